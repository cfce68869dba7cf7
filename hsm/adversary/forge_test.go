package adversary

import (
	"bytes"
	"crypto/aes"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm/adversary/thief"
)

// forgeTrust makes keys that claim CKA_TRUSTED, or an origin that they do not
// have (S5, tookan/attributes of key creation).
func forgeTrust(g *group) {
	at := pkcs11.NewAttribute
	trusted := at(pkcs11.CKA_TRUSTED, true)
	want := refused(pkcs11.CKR_ATTRIBUTE_READ_ONLY)
	value := random(32)
	own := g.ownAES(nil)
	wrapped, err := g.p.WrapKey(g.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), own, g.ownAES(value, at(pkcs11.CKA_EXTRACTABLE, true)))
	if err != nil {
		g.t.Fatal(err)
	}
	secret := []*pkcs11.Attribute{at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES)}
	data := make([]byte, 32)
	for name, do := range map[string]func(...*pkcs11.Attribute) (pkcs11.ObjectHandle, error){
		"created": func(more ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
			return g.p.CreateObject(g.s, append(append(secret[:2:2], at(pkcs11.CKA_VALUE, value)), more...))
		},
		"generated": func(more ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
			return g.p.GenerateKey(g.s, mechanism(pkcs11.CKM_AES_KEY_GEN), append([]*pkcs11.Attribute{at(pkcs11.CKA_VALUE_LEN, 32)}, more...))
		},
		"unwrapped": func(more ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
			return g.p.UnwrapKey(g.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), own, wrapped, append(secret[:2:2], more...))
		},
		"copied": func(more ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
			return g.p.CopyObject(g.s, own, append([]*pkcs11.Attribute{at(pkcs11.CKA_TOKEN, false)}, more...))
		},
		"derived": func(more ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
			return g.p.DeriveKey(g.s, mechanism(pkcs11.CKM_AES_ECB_ENCRYPT_DATA, thief.DerivationData(data)), own,
				append(append(secret[:2:2], at(pkcs11.CKA_VALUE_LEN, 32)), more...))
		},
		"set": func(more ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
			return own, g.p.SetAttributeValue(g.s, own, append([]*pkcs11.Attribute{at(pkcs11.CKA_LABEL, "x")}, more...))
		},
	} {
		attempt := func(how string, want verdict, more ...*pkcs11.Attribute) {
			g.try("S5/"+name+", "+how, want, func() error {
				_, err := do(more...)
				return err
			})
		}
		if name != "set" {
			attempt("as anybody may", control, at(pkcs11.CKA_LABEL, "control"))
		}
		attempt("trusted", want, trusted)
		attempt("trusted and public", refused(pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_TEMPLATE_INCONSISTENT), at(pkcs11.CKA_PRIVATE, false), trusted)
		attempt("trusted and on the token", want, at(pkcs11.CKA_TOKEN, true), trusted)
		attempt("as if made here", want, at(pkcs11.CKA_LOCAL, true))
		attempt("as if always sensitive", want, at(pkcs11.CKA_ALWAYS_SENSITIVE, true))
		attempt("as if never extractable", want, at(pkcs11.CKA_NEVER_EXTRACTABLE, true))
	}
	_, ownPrivate := g.ownRSA()
	g.try("S5/trusted public key", want, func() error {
		_, err := g.p.CreateObject(g.s, []*pkcs11.Attribute{
			at(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), at(pkcs11.CKA_MODULUS, g.pub.N.Bytes()),
			at(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}), at(pkcs11.CKA_WRAP, true), trusted,
		})
		return err
	})
	g.try("S5/trusted private key", refused(pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID), func() error {
		return g.p.SetAttributeValue(g.s, ownPrivate, []*pkcs11.Attribute{trusted})
	})
	g.try("S5/measured material trusted", frozen, func() error {
		return g.p.SetAttributeValue(g.s, g.measured.handle, []*pkcs11.Attribute{trusted})
	})

	// A known key that claims to have been sensitive and unextractable always:
	// derived from one that is, by what can be computed of it. LOCAL tells.
	base, err := g.p.GenerateKey(g.s, mechanism(pkcs11.CKM_AES_KEY_GEN), []*pkcs11.Attribute{
		at(pkcs11.CKA_VALUE_LEN, 32), at(pkcs11.CKA_SENSITIVE, true), at(pkcs11.CKA_EXTRACTABLE, false), at(pkcs11.CKA_DERIVE, true), at(pkcs11.CKA_ENCRYPT, true),
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.try("T8/known key with all of the provenance", refused(errProvenance), func() error {
		o, err := g.p.DeriveKey(g.s, mechanism(pkcs11.CKM_AES_ECB_ENCRYPT_DATA, thief.DerivationData(data)), base,
			append(secret[:2:2], at(pkcs11.CKA_VALUE_LEN, 32), at(pkcs11.CKA_SENSITIVE, true), at(pkcs11.CKA_EXTRACTABLE, false), at(pkcs11.CKA_ENCRYPT, true)))
		if err != nil {
			return err
		}
		if err := g.p.EncryptInit(g.s, mechanism(pkcs11.CKM_AES_ECB), base); err != nil {
			return err
		}
		known, err := g.p.Encrypt(g.s, data)
		if err != nil {
			return err
		}
		g.mustBeKnown(o, known)
		return g.provenance(o)
	})
	g.try("T8/known key by C_CreateObject", refused(errProvenance), func() error {
		return g.provenance(g.ownAES(nil, at(pkcs11.CKA_SENSITIVE, true)))
	})
	g.try("T8/copy of a generated key", refused(errProvenance), func() error {
		// All of the provenance is right, so it must not be enough: COPYABLE is
		// what tells that there may be twins.
		o, err := g.p.CopyObject(g.s, base, []*pkcs11.Attribute{at(pkcs11.CKA_DERIVE, false)})
		if err != nil {
			return err
		}
		copyable, err := g.bytes(o, pkcs11.CKA_COPYABLE)
		if err == nil && copyable[0] != 0 {
			return errProvenance
		}
		return err
	})
	// R8 rests on this. A token that lets a copy give up being copyable would
	// make twins of a pair that no attribute tells from ours.
	for name, template := range map[string][]*pkcs11.Attribute{
		"by copying": {at(pkcs11.CKA_COPYABLE, false)},
		"by setting": {at(pkcs11.CKA_COPYABLE, false), at(pkcs11.CKA_MODIFIABLE, false)},
	} {
		g.try("T8/hide that there are twins, "+name, refused(pkcs11.CKR_ATTRIBUTE_READ_ONLY), func() error {
			if name == "by copying" {
				_, err := g.p.CopyObject(g.s, base, template)
				return err
			}
			return g.p.SetAttributeValue(g.s, base, template)
		})
	}
}

// provenance is nil if the token attests that a key was made in it and never
// was outside.
func (g *group) provenance(o pkcs11.ObjectHandle) error {
	for _, a := range []uint{pkcs11.CKA_LOCAL, pkcs11.CKA_ALWAYS_SENSITIVE, pkcs11.CKA_NEVER_EXTRACTABLE} {
		v, err := g.bytes(o, a)
		if err != nil {
			return err
		}
		if v[0] == 0 {
			return errProvenance
		}
	}
	return nil
}

// mustBeKnown checks that a key has the value that the thief computed.
func (g *group) mustBeKnown(o pkcs11.ObjectHandle, value []byte) {
	g.t.Helper()
	if err := g.p.EncryptInit(g.s, mechanism(pkcs11.CKM_AES_ECB), o); err != nil {
		g.t.Fatal(err)
	}
	got, err := g.p.Encrypt(g.s, make([]byte, 16))
	if err != nil {
		g.t.Fatal(err)
	}
	block, err := aes.NewCipher(value)
	if err != nil {
		g.t.Fatal(err)
	}
	want := make([]byte, 16)
	block.Encrypt(want, want)
	if !bytes.Equal(got, want) {
		g.t.Fatal("the thief does not know the key")
	}
}
