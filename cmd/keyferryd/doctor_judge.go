package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// guarantees are what holds on a token that keeps every rule, with the
// exceptions that end it.
var guarantees = []struct {
	statement string
	ends      []hsm.Exception
}{
	{"the database alone opens nothing", nil},
	{
		"whoever has the user PIN and the database, and reaches the token through PKCS#11, gets no key that was sealed",
		[]hsm.Exception{hsm.UnwrapTemplateIgnored, hsm.AllowedMechanismsIgnored, hsm.WrapsUnextractable},
	},
	{
		"whoever has the user PIN reads nothing that customers have wrapped, also while its wrapping pair lives",
		[]hsm.Exception{
			hsm.UnwrapTemplateIgnored, hsm.AllowedMechanismsIgnored, hsm.TrustedUnavailable, hsm.WrapsUnextractable,
			hsm.CopyableIgnored, hsm.ModifiableIgnored, hsm.ProvenanceUnreported, hsm.CopiesHideTwins,
		},
	},
	{
		"only keys that were generated in the token, and have no twin of other usages, are given to customers to wrap under",
		[]hsm.Exception{hsm.ProvenanceUnreported, hsm.CopiesHideTwins, hsm.CopyableIgnored},
	},
	{
		"whoever has the user PIN gives no key another use than it has",
		[]hsm.Exception{hsm.CopyableIgnored, hsm.ModifiableIgnored, hsm.AllowedMechanismsIgnored, hsm.UnwrapTemplateIgnored},
	},
	{
		"only what was imported is sealed under the vault",
		[]hsm.Exception{hsm.WrapTemplateIgnored, hsm.TrustedUnavailable},
	},
	{
		"whoever has the user PIN does not destroy the vault, the MAC key and the receipt key",
		[]hsm.Exception{hsm.DestroyableIgnored},
	},
}

// judge says what follows for whom.
func (d *diagnosis) judge(x *hsm.Examination, cfg *config) {
	lost := func(e hsm.Exception) bool {
		return slices.ContainsFunc(d.Exceptions, func(x exception) bool { return x.Name == e })
	}
	const v15 = "token.allow_pkcs1_v15 offers a padding oracle to whoever has the PIN"
	for i, g := range guarantees {
		out := guarantee{Statement: g.statement, Holds: true}
		for _, e := range g.ends {
			if lost(e) {
				out.Because = append(out.Because, "the token "+e.Does())
			}
		}
		if i == 2 && cfg.Token.AllowPKCS1v15 && x.Capabilities.Offers(hsm.RSA2048, hsm.PKCS1v15) == nil {
			out.Because = append(out.Because, v15)
		}
		if err := x.Capabilities.Refusal(); err != nil && g.ends != nil {
			out.Because = append(out.Because, "the token cannot be used: see the problems")
		}
		out.Holds = len(out.Because) == 0
		d.Guarantees = append(d.Guarantees, out)
	}
	if x.Capabilities.Finding(hsm.FindImplicit).Verdict == hsm.Proven {
		d.warn("a tampered RSAES_PKCS1_V1_5 blob unwraps to a random key, about one in 250 of them of the right length",
			"have customers compare the check value or the material id of what they imported")
	}
	var gaping []string
	for _, h := range softhsm.KnownHoles {
		if h.Closed == "" {
			d.Limits = append(d.Limits, h.Limit)
			continue
		}
		state := stateOf(h.ID, x)
		d.Holes = append(d.Holes, hole{ID: h.ID, Limit: h.Limit, State: state})
		if state == "listed" && h.ID[0] == 'T' {
			gaping = append(gaping, h.ID)
		}
	}
	if len(gaping) > 0 {
		d.warn(fmt.Sprintf("whoever has the user PIN and loads the module of this SoftHSM2 has every key (holes %s)", strings.Join(gaping, ", ")),
			"use an HSM; or, for tests, the SoftHSM2 of \"make softhsm\"")
	}
}

// probed are the findings that show a hole.
var probed = map[string]string{"O3": hsm.FindDigestKey, "O8": hsm.FindByValue}

// stateOf is the state of a hole. What a library says of itself counts where
// nothing can be tried: one that lies has the PIN, and needs no hole. But it must
// agree with what was tried.
func stateOf(id string, x *hsm.Examination) string {
	verdict := func(finding string) hsm.Verdict { return x.Capabilities.Finding(finding).Verdict }
	if finding, ok := probed[id]; ok {
		switch verdict(finding) {
		case hsm.Proven:
			return "closed"
		case hsm.Ignored:
			return "open"
		}
		return "unknown"
	}
	all := func(want hsm.Verdict) bool {
		for _, finding := range probed {
			if verdict(finding) != want {
				return false
			}
		}
		return true
	}
	switch lib := x.Token.Library; {
	case lib.Manufacturer != softhsm.Manufacturer:
	case lib.Description == softhsm.OurDescription && all(hsm.Proven):
		return "patched"
	case lib.Description == softhsm.StockDescription && lib.Version == softhsm.StockVersion && all(hsm.Ignored):
		return "listed"
	}
	return "unknown"
}
