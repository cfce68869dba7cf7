package adversary

import (
	"bytes"
	"fmt"

	"github.com/miekg/pkcs11"
)

// wrapKeys takes every key out under every key that the thief has, or can make
// (clulow/Trojan key, tookan/wrap and decrypt, tookan/wrap with itself).
func wrapKeys(g *group) {
	at := pkcs11.NewAttribute
	ownPublic, ownPrivate := g.ownRSA()
	ownDES3, err := g.p.CreateObject(g.s, []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_DES3), at(pkcs11.CKA_VALUE, random(24)),
		at(pkcs11.CKA_WRAP, true), at(pkcs11.CKA_ENCRYPT, true), at(pkcs11.CKA_DECRYPT, true),
	})
	if err != nil {
		g.t.Fatal(err)
	}
	ownGenerated, err := g.p.GenerateKey(g.s, mechanism(pkcs11.CKM_AES_KEY_GEN), []*pkcs11.Attribute{
		at(pkcs11.CKA_VALUE_LEN, 32), at(pkcs11.CKA_WRAP, true), at(pkcs11.CKA_DECRYPT, true), at(pkcs11.CKA_SENSITIVE, true),
		at(pkcs11.CKA_EXTRACTABLE, false),
	})
	if err != nil {
		g.t.Fatal(err)
	}
	// The customer's public key, as an object of the thief's.
	pairPublic, err := g.p.CreateObject(g.s, []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), at(pkcs11.CKA_WRAP, true), at(pkcs11.CKA_ENCRYPT, true),
		at(pkcs11.CKA_MODULUS, g.pub.N.Bytes()), at(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
	})
	if err != nil {
		g.t.Fatal(err)
	}
	own := object{"own AES key", g.ownAES(nil), pkcs11.CKO_SECRET_KEY}
	wrappers := append([]object{
		own,
		{"own generated AES key", ownGenerated, pkcs11.CKO_SECRET_KEY},
		{"own DES3 key", ownDES3, pkcs11.CKO_SECRET_KEY},
		{"own RSA public key", ownPublic, pkcs11.CKO_PUBLIC_KEY},
		{"public half of the pair", pairPublic, pkcs11.CKO_PUBLIC_KEY},
		g.receiptPublic,
	}, g.objects()...)
	mechanisms := []uint{
		pkcs11.CKM_AES_KEY_WRAP, pkcs11.CKM_AES_KEY_WRAP_PAD, keyWrapKWP, pkcs11.CKM_AES_ECB, pkcs11.CKM_AES_CBC, pkcs11.CKM_AES_CBC_PAD,
		pkcs11.CKM_AES_CTR, pkcs11.CKM_AES_GCM, pkcs11.CKM_AES_CCM, pkcs11.CKM_DES_ECB, pkcs11.CKM_DES_CBC, pkcs11.CKM_DES3_ECB, pkcs11.CKM_DES3_CBC,
		pkcs11.CKM_DES3_CBC_PAD, pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.CKM_RSA_X_509, pkcs11.CKM_RSA_AES_KEY_WRAP,
	}
	kept := refused(pkcs11.CKR_KEY_UNEXTRACTABLE, pkcs11.CKR_KEY_NOT_WRAPPABLE, pkcs11.CKR_MECHANISM_INVALID,
		pkcs11.CKR_WRAPPING_KEY_TYPE_INCONSISTENT, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED)
	for _, victim := range g.objects() {
		for _, wrapper := range wrappers {
			for _, m := range mechanisms {
				g.try(fmt.Sprintf("tookan/wrap %s under %s by 0x%X", victim.name, wrapper.name, m), g.sealing(kept, victim, wrapper, m), func() error {
					blob, err := g.p.WrapKey(g.s, withParameters(m), wrapper.handle, victim.handle)
					if err == nil && wrapper == g.vaultSM4 {
						return g.opensAsSM4(blob)
					}
					if err == nil && !bytes.Equal(blob, g.sealed.Ref) && wrapper == g.vault {
						g.t.Errorf("the vault wraps %s in another way than the server's", victim.name)
					}
					return err
				})
			}
		}
	}
	// It is the victims that keep themselves: what is not guarded is wrapped.
	unguarded := g.ownAES(nil, at(pkcs11.CKA_EXTRACTABLE, true))
	for wrapper, ms := range map[pkcs11.ObjectHandle][]uint{
		own.handle:   {pkcs11.CKM_AES_KEY_WRAP, pkcs11.CKM_AES_KEY_WRAP_PAD, pkcs11.CKM_AES_CBC},
		ownGenerated: {pkcs11.CKM_AES_KEY_WRAP},
		ownPublic:    {pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_PKCS_OAEP},
		pairPublic:   {pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_PKCS_OAEP},
	} {
		for _, m := range ms {
			g.try(fmt.Sprintf("wrap an unguarded key under key %d by 0x%X", wrapper, m), control, func() error {
				_, err := g.p.WrapKey(g.s, withParameters(m), wrapper, unguarded)
				return err
			})
		}
	}
	for _, o := range []pkcs11.ObjectHandle{ownPublic, ownPrivate, ownDES3, ownGenerated, pairPublic, own.handle, unguarded} {
		g.destroy(o)
	}
}

// sealing is the one wrapping that goes through: that of Import itself.
func (g *group) sealing(otherwise verdict, victim, wrapper object, m uint) verdict {
	if victim == g.measured && wrapper == g.vault && m == pkcs11.CKM_AES_KEY_WRAP {
		return hole("O6")
	}
	return otherwise
}

// opensAsSM4 is harmless if a blob of AES-256 material that the SM4 vault made
// does not open: one material under two ciphers is two keys of 16 bytes.
func (g *group) opensAsSM4(blob []byte) error {
	pins, err := g.raw.UnwrapTemplate(uint(g.s), g.vaultSM4.id())
	if err != nil {
		return err
	}
	_, code := g.unwrapping(g.vaultSM4, pkcs11.CKM_AES_KEY_WRAP, blob, pins).Once()
	if code == pkcs11.CKR_OK {
		return nil
	}
	return errHarmless
}

// ownRSA generates a pair of the thief's.
func (g *group) ownRSA(private ...*pkcs11.Attribute) (pub, priv pkcs11.ObjectHandle) {
	g.t.Helper()
	at := pkcs11.NewAttribute
	pub, priv, err := g.p.GenerateKeyPair(g.s, mechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN),
		[]*pkcs11.Attribute{
			at(pkcs11.CKA_TOKEN, false), at(pkcs11.CKA_MODULUS_BITS, 2048), at(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}), at(pkcs11.CKA_WRAP, true),
		},
		append([]*pkcs11.Attribute{at(pkcs11.CKA_TOKEN, false), at(pkcs11.CKA_EXTRACTABLE, true)}, private...))
	if err != nil {
		g.t.Fatal(err)
	}
	return pub, priv
}
