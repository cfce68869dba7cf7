package adversary

import (
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm/adversary/thief"
)

// literature are mechanisms by which keys of other tokens were taken, or that
// SoftHSM2 does not list and might answer all the same.
var literature = []uint{
	pkcs11.CKM_RSA_X_509, pkcs11.CKM_RSA_9796, pkcs11.CKM_RSA_PKCS_TPM_1_1, pkcs11.CKM_RSA_PKCS_OAEP_TPM_1_1, pkcs11.CKM_RSA_AES_KEY_WRAP,
	pkcs11.CKM_DES_ECB, pkcs11.CKM_DES_CBC, pkcs11.CKM_DES_CBC_PAD, pkcs11.CKM_DES_MAC, pkcs11.CKM_DES3_ECB, pkcs11.CKM_DES3_CBC,
	pkcs11.CKM_DES3_CBC_PAD, pkcs11.CKM_DES3_MAC, pkcs11.CKM_DES3_CMAC, pkcs11.CKM_DES_OFB64, pkcs11.CKM_DES_CFB64,
	pkcs11.CKM_AES_ECB, pkcs11.CKM_AES_CBC, pkcs11.CKM_AES_CBC_PAD, pkcs11.CKM_AES_CTR, pkcs11.CKM_AES_GCM, pkcs11.CKM_AES_CCM, pkcs11.CKM_AES_CTS,
	pkcs11.CKM_AES_OFB, pkcs11.CKM_AES_CFB1, pkcs11.CKM_AES_CFB8, pkcs11.CKM_AES_CFB64, pkcs11.CKM_AES_CFB128, pkcs11.CKM_AES_MAC,
	pkcs11.CKM_AES_MAC_GENERAL, pkcs11.CKM_AES_CMAC, pkcs11.CKM_AES_CMAC_GENERAL, pkcs11.CKM_AES_GMAC, pkcs11.CKM_AES_XCBC_MAC,
	pkcs11.CKM_AES_XCBC_MAC_96, pkcs11.CKM_AES_KEY_WRAP, pkcs11.CKM_AES_KEY_WRAP_PAD, keyWrapKWP,
	pkcs11.CKM_CONCATENATE_BASE_AND_KEY, pkcs11.CKM_CONCATENATE_BASE_AND_DATA, pkcs11.CKM_CONCATENATE_DATA_AND_BASE, pkcs11.CKM_XOR_BASE_AND_DATA,
	pkcs11.CKM_EXTRACT_KEY_FROM_KEY, pkcs11.CKM_MD2_KEY_DERIVATION, pkcs11.CKM_MD5_KEY_DERIVATION, pkcs11.CKM_SHA1_KEY_DERIVATION,
	pkcs11.CKM_SHA256_KEY_DERIVATION, pkcs11.CKM_SHA384_KEY_DERIVATION, pkcs11.CKM_SHA512_KEY_DERIVATION,
	pkcs11.CKM_DES_ECB_ENCRYPT_DATA, pkcs11.CKM_DES3_ECB_ENCRYPT_DATA, pkcs11.CKM_AES_ECB_ENCRYPT_DATA, pkcs11.CKM_AES_CBC_ENCRYPT_DATA,
	pkcs11.CKM_GENERIC_SECRET_KEY_GEN, pkcs11.CKM_SHA256_HMAC_GENERAL, pkcs11.CKM_SSL3_MASTER_KEY_DERIVE, pkcs11.CKM_TLS_MASTER_KEY_DERIVE,
	pkcs11.CKM_TLS_PRF, pkcs11.CKM_PKCS5_PBKD2, pkcs11.CKM_ECDH1_DERIVE, pkcs11.CKM_ECDH1_COFACTOR_DERIVE, pkcs11.CKM_ECMQV_DERIVE,
	pkcs11.CKM_ECDSA, pkcs11.CKM_ECDSA_SHA1, pkcs11.CKM_ECDSA_SHA256, eddsa, pkcs11.CKM_DSA, pkcs11.CKM_DH_PKCS_DERIVE,
}

// Of PKCS#11 v3.0: CKM_AES_KEY_WRAP_KWP (RFC 5649) and CKM_EDDSA.
const (
	keyWrapKWP = 0x210B
	eddsa      = 0x1057
)

// mechanisms are all those, and all that the token lists.
func (g *group) mechanisms() []uint {
	listed, err := g.p.GetMechanismList(g.slot)
	if err != nil {
		g.t.Fatal(err)
	}
	all := slices.Clone(literature)
	for _, m := range listed {
		all = append(all, m.Mechanism)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// withParameters is a mechanism with parameters as it wants them, so that it is
// not refused for those.
func withParameters(m uint) []*pkcs11.Mechanism {
	iv := make([]byte, 16)
	switch m {
	case pkcs11.CKM_AES_CBC, pkcs11.CKM_AES_CBC_PAD, pkcs11.CKM_AES_OFB, pkcs11.CKM_AES_CFB1, pkcs11.CKM_AES_CFB8, pkcs11.CKM_AES_CFB64,
		pkcs11.CKM_AES_CFB128, pkcs11.CKM_AES_CTS, softhsmSM4ECB + 1:
		return mechanism(m, iv)
	case pkcs11.CKM_DES_CBC, pkcs11.CKM_DES_CBC_PAD, pkcs11.CKM_DES3_CBC, pkcs11.CKM_DES3_CBC_PAD:
		return mechanism(m, iv[:8])
	case pkcs11.CKM_AES_CTR:
		return mechanism(m, append(thief.ULong(128), iv...))
	case pkcs11.CKM_AES_GCM, softhsmSM4GCM:
		return mechanism(m, pkcs11.NewGCMParams(iv[:12], nil, 128))
	case pkcs11.CKM_RSA_PKCS_OAEP:
		return mechanism(m, pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil))
	case pkcs11.CKM_RSA_PKCS_PSS, pkcs11.CKM_SHA1_RSA_PKCS_PSS:
		return mechanism(m, pkcs11.NewPSSParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, 20))
	case pkcs11.CKM_SHA224_RSA_PKCS_PSS:
		return mechanism(m, pkcs11.NewPSSParams(pkcs11.CKM_SHA224, pkcs11.CKG_MGF1_SHA224, 28))
	case pkcs11.CKM_SHA256_RSA_PKCS_PSS:
		return mechanism(m, pkcs11.NewPSSParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, 32))
	case pkcs11.CKM_SHA384_RSA_PKCS_PSS:
		return mechanism(m, pkcs11.NewPSSParams(pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384, 48))
	case pkcs11.CKM_SHA512_RSA_PKCS_PSS:
		return mechanism(m, pkcs11.NewPSSParams(pkcs11.CKM_SHA512, pkcs11.CKG_MGF1_SHA512, 64))
	case pkcs11.CKM_ECDH1_DERIVE:
		return mechanism(m, pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, make([]byte, 65)))
	case pkcs11.CKM_DES_ECB_ENCRYPT_DATA, pkcs11.CKM_DES3_ECB_ENCRYPT_DATA, pkcs11.CKM_AES_ECB_ENCRYPT_DATA, pkcs11.CKM_CONCATENATE_BASE_AND_DATA,
		pkcs11.CKM_CONCATENATE_DATA_AND_BASE, pkcs11.CKM_XOR_BASE_AND_DATA:
		return mechanism(m, thief.DerivationData(make([]byte, 32)))
	case pkcs11.CKM_AES_CBC_ENCRYPT_DATA:
		return mechanism(m, append(random(16), thief.DerivationData(make([]byte, 32))...))
	case pkcs11.CKM_DES_CBC_ENCRYPT_DATA, pkcs11.CKM_DES3_CBC_ENCRYPT_DATA:
		return mechanism(m, append(random(8), thief.DerivationData(make([]byte, 32))...))
	case pkcs11.CKM_EXTRACT_KEY_FROM_KEY:
		return mechanism(m, thief.ULong(0))
	}
	return mechanism(m)
}

// useKeys tries every mechanism for every use of every object. Only what the
// server itself needs goes through, and what that gives the thief is listed.
func useKeys(g *group) {
	// What else may go through: by object and use, a list of mechanisms.
	allowed := map[string][]uint{
		g.measured.name + "/encrypt":  {pkcs11.CKM_AES_ECB, pkcs11.CKM_AES_GCM},
		g.measured.name + "/sign":     {pkcs11.CKM_AES_CMAC},
		g.opened.name + "/encrypt":    {pkcs11.CKM_AES_ECB, pkcs11.CKM_AES_GCM},
		g.opened.name + "/decrypt":    {pkcs11.CKM_AES_ECB, pkcs11.CKM_AES_GCM},
		g.mac.name + "/sign":          {pkcs11.CKM_SHA256_HMAC},
		g.receipt.name + "/sign":      {pkcs11.CKM_ECDSA},
		"opened SM4 material/encrypt": {softhsmSM4ECB, softhsmSM4GCM},
		"opened SM4 material/decrypt": {softhsmSM4ECB, softhsmSM4GCM},
	}
	uses := []struct {
		name string
		call func(pkcs11.SessionHandle, []*pkcs11.Mechanism, pkcs11.ObjectHandle) error
	}{
		{"encrypt", g.p.EncryptInit},
		{"decrypt", g.p.DecryptInit},
		{"sign", g.p.SignInit},
		{"verify", g.p.VerifyInit},
		{"sign-recover", g.p.SignRecoverInit},
		{"verify-recover", g.p.VerifyRecoverInit},
		{"derive", g.derive},
	}
	x := g.session(g.t)
	for _, o := range g.objects() {
		for _, m := range g.mechanisms() {
			for _, use := range uses {
				want := noUse
				if slices.Contains(allowed[o.name+"/"+use.name], m) {
					want = hole("O5")
					if o == g.mac || o == g.receipt {
						want = hole("S4")
					}
				}
				g.try(fmt.Sprintf("use/%s with %s by 0x%X", use.name, o.name, m), want, func() error {
					err := use.call(x, withParameters(m), o.handle)
					if err == nil { // an operation is active
						_ = g.p.CloseSession(x)
						x = g.session(g.t)
					}
					return err
				})
			}
		}
	}
	g.useOwn(func(name string, m uint, o pkcs11.ObjectHandle) {
		for _, use := range uses {
			if use.name == name {
				g.try(fmt.Sprintf("%s with an unguarded key by 0x%X", name, m), control, func() error {
					defer func() { _ = g.p.CloseSession(x); x = g.session(g.t) }()
					return use.call(x, withParameters(m), o)
				})
			}
		}
	})
	_ = g.p.CloseSession(x)

	g.try("O5/decrypt what the server encrypted", hole("O5"), func() error {
		sealed, err := g.key.Encrypt(g.t.Context(), nil, []byte("a secret of the customer's"), []byte("aad"))
		if err != nil {
			return err
		}
		params := pkcs11.NewGCMParams(sealed[:12], []byte("aad"), 128)
		defer params.Free()
		if err := g.p.DecryptInit(g.s, mechanism(pkcs11.CKM_AES_GCM, params), g.opened.handle); err != nil {
			return err
		}
		_, err = g.p.Decrypt(g.s, sealed[12:])
		return err
	})
	// Keys of the thief's own lack CKA_ALLOWED_MECHANISMS, which stops this for
	// ours.
	own := g.ownAES(nil)
	for _, m := range []uint{pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_X_509, pkcs11.CKM_DSA, pkcs11.CKM_ECDSA} {
		g.try(fmt.Sprintf("D3/sign with a secret key by 0x%X", m), hole("D3", pkcs11.CKR_KEY_TYPE_INCONSISTENT), func() error {
			x := g.session(g.t)
			defer func() { _ = g.p.CloseSession(x) }()
			return g.p.SignInit(x, mechanism(m), own)
		})
	}
	g.destroy(own)
}

// useOwn names uses of the thief's own keys, which are not guarded.
func (g *group) useOwn(use func(name string, m uint, o pkcs11.ObjectHandle)) {
	aes := g.ownAES(nil)
	for _, m := range []uint{pkcs11.CKM_AES_ECB, pkcs11.CKM_AES_CBC, pkcs11.CKM_AES_CBC_PAD, pkcs11.CKM_AES_CTR, pkcs11.CKM_AES_GCM} {
		use("encrypt", m, aes)
		use("decrypt", m, aes)
	}
	use("sign", pkcs11.CKM_AES_CMAC, aes)
	use("derive", pkcs11.CKM_AES_ECB_ENCRYPT_DATA, aes)
	use("derive", pkcs11.CKM_AES_CBC_ENCRYPT_DATA, aes)
	pub, priv := g.ownRSA()
	for _, m := range []uint{pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_X_509, pkcs11.CKM_RSA_PKCS_OAEP} {
		use("decrypt", m, priv)
	}
	for _, m := range []uint{pkcs11.CKM_RSA_PKCS, pkcs11.CKM_RSA_X_509, pkcs11.CKM_SHA256_RSA_PKCS, pkcs11.CKM_SHA256_RSA_PKCS_PSS} {
		use("sign", m, priv)
	}
	for _, o := range []pkcs11.ObjectHandle{aes, pub, priv} {
		g.destroy(o)
	}
}

func (s *scene) derive(x pkcs11.SessionHandle, m []*pkcs11.Mechanism, base pkcs11.ObjectHandle) error {
	at := pkcs11.NewAttribute
	o, err := s.p.DeriveKey(x, m, base, []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), at(pkcs11.CKA_VALUE_LEN, 32),
		at(pkcs11.CKA_SENSITIVE, false), at(pkcs11.CKA_EXTRACTABLE, true),
	})
	if err == nil {
		s.destroy(o)
	}
	return err
}

// ownAES makes a session key of known value that may be used for everything.
func (g *group) ownAES(value []byte, more ...*pkcs11.Attribute) pkcs11.ObjectHandle {
	g.t.Helper()
	if value == nil {
		value = random(32)
	}
	at := pkcs11.NewAttribute
	o, err := g.p.CreateObject(g.s, append([]*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), at(pkcs11.CKA_VALUE, value),
		at(pkcs11.CKA_TOKEN, false), at(pkcs11.CKA_WRAP, true), at(pkcs11.CKA_UNWRAP, true), at(pkcs11.CKA_DERIVE, true), at(pkcs11.CKA_SIGN, true),
		at(pkcs11.CKA_ENCRYPT, true), at(pkcs11.CKA_DECRYPT, true),
	}, more...))
	if err != nil {
		g.t.Fatal(err)
	}
	return o
}
