package adversary

import (
	"fmt"

	"github.com/miekg/pkcs11"
)

// secretAttributes are those whose values make a key.
var secretAttributes = map[string]uint{
	"VALUE": pkcs11.CKA_VALUE, "PRIVATE_EXPONENT": pkcs11.CKA_PRIVATE_EXPONENT, "PRIME_1": pkcs11.CKA_PRIME_1, "PRIME_2": pkcs11.CKA_PRIME_2,
	"EXPONENT_1": pkcs11.CKA_EXPONENT_1, "EXPONENT_2": pkcs11.CKA_EXPONENT_2, "COEFFICIENT": pkcs11.CKA_COEFFICIENT,
}

// readValues reads what must not be read, guesses it, and digests it.
func readValues(g *group) {
	for _, o := range g.objects() {
		rsa := o == g.wrapping
		for name, a := range secretAttributes {
			want := secretKept
			if rsa == (a == pkcs11.CKA_VALUE) {
				want = refused(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) // of another kind of key
			}
			g.try("tookan/read "+name+" of "+o.name, want, func() error {
				_, err := g.bytes(o.handle, a)
				return err
			})
			g.try("tookan/read "+name+" of "+o.name+" with its label", want, func() error {
				leaked, code := g.raw.Peek(uint(g.s), o.id(), pkcs11.CKA_LABEL, a)
				if len(leaked) > 0 {
					return nil
				}
				return rv(code)
			})
		}
		// The check value is the beginning of a block under the key: more of it
		// than three bytes would be the hash key of AES-GCM.
		g.try("O/check value of "+o.name, refused(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID), func() error {
			kcv, err := g.bytes(o.handle, pkcs11.CKA_CHECK_VALUE)
			if err == nil && len(kcv) <= 3 {
				return errHarmless
			}
			return err
		})
		for _, hash := range []uint{
			pkcs11.CKM_MD5, pkcs11.CKM_SHA_1, pkcs11.CKM_SHA224, pkcs11.CKM_SHA256, pkcs11.CKM_SHA384, pkcs11.CKM_SHA512,
		} {
			want := hole("O3", pkcs11.CKR_KEY_INDIGESTIBLE)
			if o == g.wrapping || hash == pkcs11.CKM_MD5 {
				want = refused(pkcs11.CKR_KEY_INDIGESTIBLE) // no CKA_VALUE, or not on SoftHSM2's list
			}
			g.try(fmt.Sprintf("O3/digest %s by 0x%X", o.name, hash), want, func() error {
				x := g.session(g.t)
				defer func() { _ = g.p.CloseSession(x) }()
				_, code := g.raw.DigestKey(uint(x), hash, o.id())
				return rv(code)
			})
		}
	}
	for _, o := range []object{g.measured, g.opened} {
		g.try("O8/find "+o.name+" by its value", hole("O8", errNotFound), func() error {
			return g.foundBy(o, pkcs11.NewAttribute(pkcs11.CKA_VALUE, g.material))
		})
		g.try("O8/find "+o.name+" by a wrong value", refused(errNotFound), func() error {
			return g.foundBy(o, pkcs11.NewAttribute(pkcs11.CKA_VALUE, random(32)))
		})
		// Guessing byte by byte would be another matter.
		g.try("O8/find "+o.name+" by half of its value", refused(errNotFound), func() error {
			return g.foundBy(o, pkcs11.NewAttribute(pkcs11.CKA_VALUE, g.material[:16]))
		})
	}
	// The state of an operation holds the key that it is under.
	g.try("O/operation state", refused(pkcs11.CKR_FUNCTION_NOT_SUPPORTED), func() error {
		x := g.session(g.t)
		defer func() { _ = g.p.CloseSession(x) }()
		if err := g.p.SignInit(x, mechanism(pkcs11.CKM_SHA256_HMAC), g.mac.handle); err != nil {
			return err
		}
		_, err := g.p.GetOperationState(x)
		return err
	})
}

func (s *scene) foundBy(o object, a *pkcs11.Attribute) error {
	found, err := s.find(a)
	if err != nil {
		return err
	}
	for _, h := range found {
		if h == o.handle {
			return nil
		}
	}
	return errNotFound
}

func mechanism(m uint, params ...any) []*pkcs11.Mechanism {
	if len(params) == 0 {
		return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, nil)}
	}
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m, params[0])}
}
