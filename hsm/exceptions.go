package hsm

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Exception names a rule of Keyferry's that a token cannot keep. Open and Init
// refuse such a token unless Config.Accept has the exception; it is then left
// out of every template, and nothing else is. What the token can keep is kept
// also where an exception was accepted.
//
// No exception is there for CKA_SENSITIVE and CKA_EXTRACTABLE: a token that
// ignores them gives keys away, and is refused.
type Exception string

// The exceptions.
const (
	// TrustedUnavailable: CKA_TRUSTED or CKA_WRAP_WITH_TRUSTED.
	TrustedUnavailable Exception = "trusted-unavailable"
	// UnwrapTemplateIgnored: CKA_UNWRAP_TEMPLATE.
	UnwrapTemplateIgnored Exception = "unwrap-template-ignored"
	// WrapTemplateIgnored: CKA_WRAP_TEMPLATE.
	WrapTemplateIgnored Exception = "wrap-template-ignored"
	// AllowedMechanismsIgnored: CKA_ALLOWED_MECHANISMS.
	AllowedMechanismsIgnored Exception = "allowed-mechanisms-ignored"
	// CopyableIgnored: CKA_COPYABLE.
	CopyableIgnored Exception = "copyable-ignored"
	// ModifiableIgnored: CKA_MODIFIABLE.
	ModifiableIgnored Exception = "modifiable-ignored"
	// DestroyableIgnored: CKA_DESTROYABLE.
	DestroyableIgnored Exception = "destroyable-ignored"
	// WrapsUnextractable: CKA_EXTRACTABLE=false, at C_WrapKey alone.
	WrapsUnextractable Exception = "wraps-unextractable"
	// ProvenanceUnreported: CKA_LOCAL, CKA_ALWAYS_SENSITIVE, CKA_NEVER_EXTRACTABLE.
	ProvenanceUnreported Exception = "provenance-unreported"
	// CopiesHideTwins: C_CopyObject clears CKA_COPYABLE, as PKCS#11 allows.
	CopiesHideTwins Exception = "copies-hide-twins"
)

// exceptions says of each what a token then does, what is lost with it, and
// which attributes are left out.
var exceptions = []struct {
	name   Exception
	does   string
	loses  string
	leaves []p11.Attribute
}{
	{
		TrustedUnavailable, "does not keep CKA_TRUSTED and CKA_WRAP_WITH_TRUSTED",
		"whoever has the user PIN wraps what customers have wrapped out of the token, under a key they know, while its wrapping pair lives",
		[]p11.Attribute{p11.Trusted, p11.WrapWithTrusted},
	},
	{
		UnwrapTemplateIgnored, "does not keep CKA_UNWRAP_TEMPLATE",
		"whoever has the user PIN and the database unwraps every key as they like, and reads it: the PIN holds every key",
		[]p11.Attribute{p11.UnwrapTemplate},
	},
	{
		WrapTemplateIgnored, "does not keep CKA_WRAP_TEMPLATE",
		"whoever has the user PIN seals keys under the vault that no import made, of any kind",
		[]p11.Attribute{p11.WrapTemplate},
	},
	{
		AllowedMechanismsIgnored, "does not keep CKA_ALLOWED_MECHANISMS",
		"whoever has the user PIN uses wrapping pairs and the vault by other mechanisms, and reads what they wrap by padding oracles in minutes",
		[]p11.Attribute{p11.AllowedMechanisms},
	},
	{
		CopyableIgnored, "does not keep CKA_COPYABLE",
		"whoever has the user PIN copies keys with other usages, and keeps copies of material after it was deleted",
		[]p11.Attribute{p11.Copyable},
	},
	{
		ModifiableIgnored, "does not keep CKA_MODIFIABLE",
		"whoever has the user PIN changes what keys may be used for",
		[]p11.Attribute{p11.Modifiable},
	},
	{
		DestroyableIgnored, "does not keep CKA_DESTROYABLE",
		"whoever has the user PIN destroys the vault, and with it all key material: only a backup of the token brings it back",
		[]p11.Attribute{p11.Destroyable},
	},
	{
		WrapsUnextractable, "wraps keys that have CKA_EXTRACTABLE=false",
		"whoever has the user PIN wraps every key out of the token, the vault and wrapping pairs too, under a key they know: the PIN holds every key",
		nil,
	},
	{
		ProvenanceUnreported, "does not report CKA_LOCAL, CKA_ALWAYS_SENSITIVE and CKA_NEVER_EXTRACTABLE of the keys that it generates",
		"whoever has the user PIN puts a key that they know in the place of a wrapping pair, and reads what customers wrap under it",
		[]p11.Attribute{p11.Local, p11.AlwaysSensitive, p11.NeverExtractable},
	},
	{
		CopiesHideTwins, "clears CKA_COPYABLE in copies, as PKCS#11 lets it",
		"whoever has the user PIN and writes to the database has customers wrap under a pair that has a twin of other usages: no attribute tells them apart",
		nil,
	},
}

// Exceptions are the exceptions that there are.
func Exceptions() []Exception {
	var out []Exception
	for _, e := range exceptions {
		out = append(out, e.name)
	}
	return out
}

// Does is what a token does that needs the exception, after "the token".
func (e Exception) Does() string {
	for _, x := range exceptions {
		if x.name == e {
			return x.does
		}
	}
	return ""
}

// Loses is what is lost with the exception, in one sentence without a stop.
func (e Exception) Loses() string {
	for _, x := range exceptions {
		if x.name == e {
			return x.loses
		}
	}
	return ""
}

// ExceptionError is the ErrUnsupported of a token that needs exceptions which
// were not accepted.
type ExceptionError struct {
	// Needs are those that were not accepted, in the order of Exceptions.
	Needs []Need
}

// Need is an exception that a token needs, and what showed it.
type Need struct {
	Exception Exception `json:"exception"`
	Evidence  string    `json:"evidence"`
}

func (e *ExceptionError) Error() string {
	var parts []string
	for _, n := range e.Needs {
		parts = append(parts, fmt.Sprintf("it %s (%s), so %s; accept %q if that may be", n.Exception.Does(), n.Evidence, n.Exception.Loses(), n.Exception))
	}
	return "the token cannot keep every rule: " + strings.Join(parts, "; ")
}

// Is makes it an ErrUnsupported.
func (e *ExceptionError) Is(target error) bool { return target == ErrUnsupported }

func validateAccept(accept []Exception) error {
	var errs []error
	for _, a := range accept {
		if !slices.Contains(Exceptions(), a) {
			errs = append(errs, fmt.Errorf("hsm: no exception is named %q; there are %q", a, Exceptions()))
		}
	}
	return errors.Join(errs...)
}

// rules is what is left of the templates on one token. The zero value is all
// of them.
type rules struct {
	left      []Exception
	builtCMAC bool // the token has no CKM_AES_CMAC: it is built from ECB and CBC
}

func (r rules) without(e Exception) bool { return slices.Contains(r.left, e) }

func (r rules) plus(e Exception) rules {
	if !r.without(e) {
		r.left = append(slices.Clone(r.left), e)
	}
	return r
}

// trusting is r where CKA_TRUSTED is to be had after all.
func (r rules) trusting() rules {
	r.left = slices.DeleteFunc(slices.Clone(r.left), func(x Exception) bool { return x == TrustedUnavailable })
	return r
}

// keep returns attrs, and what is nested in them, without what the token lacks.
func (r rules) keep(attrs []p11.Attr) []p11.Attr {
	var out []p11.Attr
	for _, a := range attrs {
		if r.leaves(a.Type) {
			continue
		}
		switch {
		case a.Nested() != nil:
			a = p11.Nested(a.Type, r.keep(a.Nested()))
		case a.Type == p11.AllowedMechanisms && r.builtCMAC:
			a = withoutCMAC(a)
		}
		out = append(out, a)
	}
	return out
}

func (r rules) leaves(t p11.Attribute) bool {
	for _, e := range exceptions {
		if slices.Contains(e.leaves, t) && r.without(e.name) {
			return true
		}
	}
	return false
}

// withoutCMAC puts CBC in the place of CMAC, of which it is then made.
func withoutCMAC(allowed p11.Attr) p11.Attr {
	list := allowed.Mechanisms()
	i := slices.Index(list, p11.AESCMAC)
	if i < 0 {
		return allowed
	}
	list[i] = p11.AESCBC
	slices.Sort(list)
	return p11.Mechanisms(list...)
}

// template packs what is left of a template.
func (r rules) template(attrs ...p11.Attr) *p11.Template { return p11.NewTemplate(r.keep(attrs)...) }

// readBack is the package's readBack of what is left of a template.
func (r rules) readBack(s *p11.Session, o p11.Handle, want []p11.Attr) error {
	return readBack(s, o, r.keep(want))
}
