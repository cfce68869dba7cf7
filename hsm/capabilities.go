package hsm

import (
	"fmt"
	"slices"
)

// Verdict is what a probe of a token found out about one statement.
type Verdict string

// The verdicts.
const (
	Proven  Verdict = "proven"  // shown by a known answer, or by what the token refused
	Absent  Verdict = "absent"  // the token says that it has no such thing
	Ignored Verdict = "ignored" // the token takes it, and does not act on it or does not report it
	Wrong   Verdict = "wrong"   // the token answers, and not what is right
	Off     Verdict = "off"     // switched off in the configuration, and not tried
	Unknown Verdict = "unknown" // cannot be probed, or what it needs is not there
)

// Finding is one statement about a token, and what became of it.
type Finding struct {
	ID        string  `json:"id"`        // never changes its meaning; see the constants
	Statement string  `json:"statement"` // what is true if the verdict is Proven
	Verdict   Verdict `json:"verdict"`
	Evidence  string  `json:"evidence,omitempty"` // what the token answered
}

// Identifiers of findings. Those of wrapping algorithms are
// "wrapping/RSAES_OAEP_SHA_1/RSA_2048" and so on.
const (
	FindKeyWrap         = "aes-key-wrap"
	FindKeyWrapKWP      = "aes-key-wrap-kwp"
	FindECB             = "aes-ecb"
	FindCBC             = "aes-cbc"
	FindCTR             = "aes-ctr"
	FindCMAC            = "aes-cmac"
	FindBuiltCMAC       = "aes-cmac-built"
	FindGCM             = "aes-gcm"
	FindHMAC            = "hmac-sha-256"
	FindECDSA           = "ecdsa-p-256"
	FindRandom          = "random"
	FindSM4             = "sm4"
	FindSM2             = "sm2"
	FindSensitive       = "sensitive"
	FindExtractable     = "extractable"
	FindUnextractable   = "unextractable-not-wrapped"
	FindCopyable        = "copyable"
	FindModifiable      = "modifiable"
	FindDestroyable     = "destroyable"
	FindAllowed         = "allowed-mechanisms"
	FindUnwrapTemplate  = "unwrap-template"
	FindTemplateMerged  = "unwrap-template-merged"
	FindWrapTemplate    = "wrap-template"
	FindWrapTrusted     = "wrap-with-trusted"
	FindTrusted         = "trusted"
	FindCopiesCopyable  = "copies-stay-copyable"
	FindProvenance      = "provenance"
	FindLengths         = "lengths-told-apart"
	FindLengthsRefused  = "lengths-refused-at-unwrap"
	FindValueLen        = "value-len"
	FindCheckValue      = "check-value"
	FindResident        = "resident"
	FindDigestKey       = "digest-key-refused"
	FindByValue         = "find-by-value-refused"
	FindImplicit        = "implicit-rejection"
	FindSessions        = "sessions"
	findWrappingPattern = "wrapping/%s/%s"
)

var statements = map[string]string{
	FindKeyWrap:        "CKM_AES_KEY_WRAP (RFC 3394) wraps and unwraps",
	FindKeyWrapKWP:     "CKM_AES_KEY_WRAP_KWP (RFC 5649) wraps and unwraps",
	FindECB:            "CKM_AES_ECB encrypts",
	FindCBC:            "CKM_AES_CBC encrypts",
	FindCTR:            "CKM_AES_CTR encrypts",
	FindCMAC:           "CKM_AES_CMAC authenticates",
	FindBuiltCMAC:      "AES-CMAC can be built from CKM_AES_ECB and CKM_AES_CBC",
	FindGCM:            "CKM_AES_GCM encrypts under a given IV, decrypts and checks the tag",
	FindHMAC:           "CKM_SHA256_HMAC authenticates",
	FindECDSA:          "CKM_ECDSA signs with generated P-256 keys",
	FindRandom:         "C_GenerateRandom answers, and differently each time",
	FindSM4:            "SM4 encrypts, by ECB and GCM",
	FindSM2:            "SM2 pairs unwrap (SM2PKE)",
	FindSensitive:      "CKA_SENSITIVE of an unwrapped key is kept",
	FindExtractable:    "CKA_EXTRACTABLE=false of an unwrapped key is kept",
	FindUnextractable:  "C_WrapKey refuses keys with CKA_EXTRACTABLE=false",
	FindCopyable:       "CKA_COPYABLE=false of an unwrapped key is kept",
	FindModifiable:     "CKA_MODIFIABLE=false of an unwrapped key is kept",
	FindDestroyable:    "CKA_DESTROYABLE=false is kept",
	FindAllowed:        "CKA_ALLOWED_MECHANISMS is kept",
	FindUnwrapTemplate: "CKA_UNWRAP_TEMPLATE binds whoever unwraps",
	FindTemplateMerged: "CKA_UNWRAP_TEMPLATE fills in what a template leaves out",
	FindWrapTemplate:   "CKA_WRAP_TEMPLATE binds whoever wraps",
	FindWrapTrusted:    "CKA_WRAP_WITH_TRUSTED is kept",
	FindTrusted:        "CKA_TRUSTED is not for the user to set",
	FindCopiesCopyable: "a copy is as copyable as its original, which tells a pair with a twin",
	FindProvenance:     "CKA_LOCAL, CKA_ALWAYS_SENSITIVE and CKA_NEVER_EXTRACTABLE tell generated keys",
	FindLengths:        "keys of 16, 24, 31, 32 and 33 bytes are told apart in the token",
	FindLengthsRefused: "lengths that no AES key has are refused at unwrap",
	FindValueLen:       "CKA_VALUE_LEN of an unwrapped key is right",
	FindCheckValue:     "CKA_CHECK_VALUE of an unwrapped key is right",
	FindResident:       "material can be resident: the token tells the length of keys that are not extractable",
	FindDigestKey:      "C_DigestKey refuses sensitive keys",
	FindByValue:        "C_FindObjects does not find sensitive keys by their value",
	FindImplicit:       "a tampered RSAES_PKCS1_V1_5 blob unwraps to a random key",
	FindSessions:       "the token has sessions enough for those configured",
}

// Capabilities are what a token proved by known answers, on session objects
// alone. What it advertises counts for nothing: SoftHSM2 2.6.1 lists OAEP and
// does SHA-1 only. No token is known by its name.
type Capabilities struct {
	Findings []Finding
	// Needs are the exceptions without which the token cannot be used.
	Needs []Need

	refusal           error               // why the token cannot be used at all
	wrapping          map[Algorithm]error // nil: proven; else why not
	maxModulus        int                 // bits
	implicitRejection bool
	gcm               error
	resident          error // nil: material can be resident; else why not
	rules             rules // as if all that is needed were accepted
	sm                sm
}

// Finding returns a finding by its identifier; its verdict is Unknown where
// there is none.
func (c *Capabilities) Finding(id string) Finding {
	if i := slices.IndexFunc(c.Findings, func(f Finding) bool { return f.ID == id }); i >= 0 {
		return c.Findings[i]
	}
	return Finding{ID: id, Statement: statements[id], Verdict: Unknown}
}

// Refusal says why the token cannot be used, whatever is accepted; nil if it
// can.
func (c *Capabilities) Refusal() error { return c.refusal }

// Offers reports whether the token proved that it unwraps under pairs of that
// spec by that algorithm. The error is ErrUnsupported and names what is
// missing.
func (c *Capabilities) Offers(spec PairSpec, alg Algorithm) error {
	why, known := c.wrapping[alg]
	switch {
	case (spec == ECSM2) != (alg == SM2PKE):
		return fmt.Errorf("%w: wrapping algorithm %q with pairs of spec %q", ErrUnsupported, alg, spec)
	case alg == SM2PKE:
		return c.sm.sm2
	case spec.Bits() == 0:
		return fmt.Errorf("%w: wrapping pairs of spec %q", ErrUnsupported, spec)
	case !known:
		return fmt.Errorf("%w: wrapping algorithm %q", ErrUnsupported, alg)
	case why != nil:
		return why
	case spec.Bits() > c.maxModulus:
		return fmt.Errorf("%w: RSA keys of more than %d bits", ErrUnsupported, c.maxModulus)
	}
	return nil
}

// Usable reports whether the token encrypts and decrypts with material of that
// spec, once it has the vault for it.
func (c *Capabilities) Usable(spec MaterialSpec) error {
	switch spec {
	case AES256:
		return c.gcm
	case SM4:
		return c.sm.sm4
	}
	return fmt.Errorf("%w: material spec %q", ErrUnsupported, spec)
}

// accepted returns the rules under which the token is used with these
// exceptions accepted. The error is ErrUnsupported.
func (c *Capabilities) accepted(accept []Exception) (rules, error) {
	if c.refusal != nil {
		return rules{}, c.refusal
	}
	var missing []Need
	r := rules{builtCMAC: c.rules.builtCMAC}
	for _, n := range c.Needs {
		if !slices.Contains(accept, n.Exception) {
			missing = append(missing, n)
		}
		r = r.plus(n.Exception)
	}
	if len(missing) > 0 {
		return rules{}, &ExceptionError{Needs: missing}
	}
	if slices.Contains(accept, TrustedUnavailable) {
		// No probe without the SO's PIN shows that the SO cannot set it: the
		// operator's word counts, until the vault is found to be trusted.
		r = r.plus(TrustedUnavailable)
	}
	return r, nil
}

// Superfluous are the exceptions that are accepted and that the token does
// not need.
func (c *Capabilities) Superfluous(accept []Exception) []Exception {
	var out []Exception
	for _, a := range accept {
		if !c.needs(a) {
			out = append(out, a)
		}
	}
	return out
}

// needs reports whether the token cannot be used without an exception.
func (c *Capabilities) needs(e Exception) bool {
	return slices.ContainsFunc(c.Needs, func(n Need) bool { return n.Exception == e })
}
