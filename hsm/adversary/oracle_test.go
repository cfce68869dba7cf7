package adversary

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm/adversary/thief"
)

// conjure unwraps what was never wrapped, until something comes out (clulow/key
// conjuring, tookan/conjuring).
func conjure(g *group) {
	random64 := tries(1<<12, 1<<16)
	for name, way := range map[string]struct {
		key  object
		mech uint
		pins []thief.Attribute
		len  []int
	}{
		"AES key wrap blobs": {g.vault, pkcs11.CKM_AES_KEY_WRAP, g.vaultPins, []int{24, 32, 40}},
		"RSA-OAEP blobs":     {g.wrapping, pkcs11.CKM_RSA_PKCS_OAEP, g.pairPins, []int{256}},
	} {
		n := random64
		if way.key == g.wrapping {
			n = tries(64, 1<<10) // a private-key operation each
		}
		for _, size := range way.len {
			for i := range n {
				blob := random(size)
				if way.key == g.wrapping {
					blob[0] = 0 // less than the modulus
				}
				g.try(fmt.Sprintf("tookan/conjure %s, %d bytes, %d", name, size, i), notOpening, func() error {
					_, code := g.unwrapping(way.key, way.mech, blob, way.pins).Once()
					return rv(code)
				})
			}
		}
	}
	// Parts of a blob are no blob: shortened keys would be searched through
	// (clulow/reduced key space, clulow/weaker key).
	blob := g.sealed.Ref
	for name, b := range map[string][]byte{
		"first 24": blob[:24], "last 24": blob[16:], "first 32": blob[:32], "last 32": blob[8:], "halves exchanged": append(bytes.Clone(blob[24:]), blob[:24]...),
		"twice": append(bytes.Clone(blob), blob...), "first 24 and zeros": append(bytes.Clone(blob[:24]), make([]byte, 16)...),
		"eight zeros more": append(bytes.Clone(blob), make([]byte, 8)...), "one byte less": blob[:39], "empty": {},
		"a block twice": append(append(bytes.Clone(blob[:16]), blob[8:16]...), blob[24:]...),
	} {
		want := notOpening
		if len(b) == 0 {
			want = refused(pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_WRAPPED_KEY_LEN_RANGE)
		}
		g.try("clulow/open "+name+" of a sealed blob", want, func() error {
			_, code := g.unwrapping(g.vault, pkcs11.CKM_AES_KEY_WRAP, b, g.vaultPins).Once()
			return rv(code)
		})
	}
	for i := range len(blob) * 8 {
		b := bytes.Clone(blob)
		b[i/8] ^= 1 << (i % 8)
		g.try(fmt.Sprintf("dks/open a sealed blob with bit %d changed", i), notOpening, func() error {
			_, code := g.unwrapping(g.vault, pkcs11.CKM_AES_KEY_WRAP, b, g.vaultPins).Once()
			return rv(code)
		})
	}
	// The thief is a customer, too: that is how he makes keys that he knows.
	g.try("S4/import a known key", hole("S4"), func() error {
		_, code := g.unwrapping(g.wrapping, pkcs11.CKM_RSA_PKCS_OAEP, oaep(g.t, g.pub, random(32)), g.pairPins).Once()
		return rv(code)
	})
	g.try("S4/seal a known key", hole("S4"), func() error {
		at := pkcs11.NewAttribute
		o := g.ownAES(nil, at(pkcs11.CKA_SENSITIVE, true), at(pkcs11.CKA_EXTRACTABLE, true), at(pkcs11.CKA_WRAP_WITH_TRUSTED, true))
		defer g.destroy(o)
		_, err := g.p.WrapKey(g.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), g.vault.handle, o)
		return err
	})
	for name, attrs := range map[string][]*pkcs11.Attribute{
		"that is not sensitive": {pkcs11.NewAttribute(pkcs11.CKA_WRAP_WITH_TRUSTED, true)},
		"that others wrap, too": {pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true)},
		"that is neither":       {},
	} {
		g.try("O4/seal an own key "+name, refused(pkcs11.CKR_KEY_NOT_WRAPPABLE), func() error {
			o := g.ownAES(nil, append(attrs, pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true))...)
			defer g.destroy(o)
			_, err := g.p.WrapKey(g.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), g.vault.handle, o)
			return err
		})
	}
}

// oracles asks the token whether chosen ciphertexts decrypt well, by every
// padding but that of RSA-OAEP, which stands that.
func oracles(g *group) {
	// T2: an OAEP pair must not tell PKCS#1 v1.5 blobs apart. One that conforms
	// is answered as one that does not, before anything is decrypted.
	conforming := textbook(g.pub, encoded(2, random(32)))
	s2e := new(big.Int).Exp(big.NewInt(7), big.NewInt(int64(g.pub.E)), g.pub.N)
	blinded := new(big.Int).Mul(new(big.Int).SetBytes(g.captured), s2e)
	for name, blob := range map[string][]byte{
		"a conforming blob": conforming, "a random blob": textbook(g.pub, random(250)), "the customer's, blinded": blinded.Mod(blinded, g.pub.N).FillBytes(make([]byte, 256)),
		"the customer's": g.captured,
	} {
		for _, m := range []uint{pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_X_509, pkcs11.CKM_RSA_9796, pkcs11.CKM_RSA_AES_KEY_WRAP} {
			g.try(fmt.Sprintf("T2, bardou/unwrap %s under the OAEP pair by 0x%X", name, m), refused(pkcs11.CKR_MECHANISM_INVALID), func() error {
				_, code := g.unwrapping(g.wrapping, m, blob, g.pairPins).Once()
				return rv(code)
			})
		}
		g.try("T2/decrypt "+name+" under the OAEP pair", refused(pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED), func() error {
			return g.p.DecryptInit(g.s, mechanism(pkcs11.CKM_RSA_PKCS), g.wrapping.handle)
		})
	}
	// Manger: whether the first byte of the encoded message is zero must not
	// show in the answer; nor what else is wrong with it.
	answers := map[string]error{}
	for name, m := range map[string][]byte{
		"first byte not zero": append([]byte{1}, random(255)...),
		"first byte zero":     append([]byte{0}, random(255)...),
		"zero":                make([]byte, 256),
		"one":                 {1},
	} {
		g.try("manger/"+name, notOpening, func() error {
			_, code := g.unwrapping(g.wrapping, pkcs11.CKM_RSA_PKCS_OAEP, textbook(g.pub, m), g.pairPins).Once()
			answers[name] = rv(code)
			return rv(code)
		})
	}
	for name, m := range map[string][]byte{
		"another label": labelled(g), "changed": append(bytes.Clone(g.captured[:255]), g.captured[255]^1),
	} {
		g.try("manger/"+name, notOpening, func() error {
			_, code := g.unwrapping(g.wrapping, pkcs11.CKM_RSA_PKCS_OAEP, m, g.pairPins).Once()
			answers[name] = rv(code)
			return rv(code)
		})
	}
	for name, err := range answers {
		if err.Error() != answers["zero"].Error() {
			g.t.Errorf("OAEP: %s is answered by %v, other faults by %v", name, err, answers["zero"])
		}
	}
	// T1: the vault must not tell well-padded blocks from others.
	for _, m := range []uint{pkcs11.CKM_AES_CBC_PAD, pkcs11.CKM_AES_CBC, pkcs11.CKM_AES_KEY_WRAP_PAD, keyWrapKWP, pkcs11.CKM_AES_ECB, pkcs11.CKM_AES_CTR} {
		for _, size := range []int{16, 32, 40, 48} {
			for iv := range 4 {
				g.try(fmt.Sprintf("T1/unwrap %d bytes under the vault by 0x%X, %d", size, m, iv), refused(pkcs11.CKR_MECHANISM_INVALID), func() error {
					params := withParameters(m)
					if m == pkcs11.CKM_AES_CBC || m == pkcs11.CKM_AES_CBC_PAD {
						params = mechanism(m, random(16))
					}
					var template []*pkcs11.Attribute
					for _, a := range g.vaultPins {
						template = append(template, &pkcs11.Attribute{Type: a.Type, Value: a.Value})
					}
					_, err := g.p.UnwrapKey(g.s, params, g.vault.handle, random(size), template)
					return err
				})
			}
		}
	}
}

// labelled is an OAEP blob with a label that nobody expects.
func labelled(g *group) []byte {
	g.t.Helper()
	out, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, g.pub, random(32), []byte("label"))
	if err != nil {
		g.t.Fatal(err)
	}
	return out
}
