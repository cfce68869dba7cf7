package adversary

import (
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm/adversary/thief"
)

// changes are attributes that would give a key another use, or another look.
func changes() map[string]thief.Attribute {
	out := map[string]thief.Attribute{}
	for a, name := range attributeNames {
		switch a {
		case pkcs11.CKA_CLASS:
			out["CLASS"] = thief.Attribute{Type: a, Value: thief.ULong(pkcs11.CKO_DATA)}
		case pkcs11.CKA_KEY_TYPE:
			out["KEY_TYPE"] = thief.Attribute{Type: a, Value: thief.ULong(pkcs11.CKK_GENERIC_SECRET)}
		case pkcs11.CKA_ALLOWED_MECHANISMS:
			out["ALLOWED_MECHANISMS to others"] = thief.Attribute{Type: a, Value: thief.ULong(pkcs11.CKM_AES_ECB, pkcs11.CKM_RSA_PKCS)}
			out["ALLOWED_MECHANISMS to none"] = thief.Attribute{Type: a}
		case pkcs11.CKA_VALUE, pkcs11.CKA_MODULUS, pkcs11.CKA_PRIVATE_EXPONENT, pkcs11.CKA_LABEL, pkcs11.CKA_ID, pkcs11.CKA_CHECK_VALUE:
			out[name] = thief.Attribute{Type: a, Value: random(32)}
		case pkcs11.CKA_VALUE_LEN, pkcs11.CKA_KEY_GEN_MECHANISM, pkcs11.CKA_CERTIFICATE_TYPE:
			out[name] = thief.Attribute{Type: a, Value: thief.ULong(16)}
		case pkcs11.CKA_UNWRAP_TEMPLATE, pkcs11.CKA_WRAP_TEMPLATE, pkcs11.CKA_START_DATE, pkcs11.CKA_END_DATE:
			out[name+" to nothing"] = thief.Attribute{Type: a}
		default:
			out[name+" to true"] = thief.Attribute{Type: a, Value: thief.Bool(true)}
			out[name+" to false"] = thief.Attribute{Type: a, Value: thief.Bool(false)}
		}
	}
	return out
}

// setAttributes changes keys where they are (tookan/sensitive and extractable
// are one way, tookan/conflicting attributes).
func setAttributes(g *group) {
	for _, o := range g.all() {
		for name, a := range changes() {
			g.try("tookan/set "+name+" of "+o.name, frozen, func() error {
				return g.p.SetAttributeValue(g.s, o.handle, []*pkcs11.Attribute{{Type: a.Type, Value: a.Value}})
			})
		}
	}
}

// copyObjects changes keys by copying them.
func copyObjects(g *group) {
	copyable, err := g.bytes(g.vault.handle, pkcs11.CKA_COPYABLE)
	if err != nil {
		g.t.Fatal(err)
	}
	for _, o := range g.all() {
		want := frozen
		vault := o == g.vault || o == g.vaultSM4
		if vault && copyable[0] != 0 { // as the user had to copy it to the token
			want = refused(pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_TEMPLATE_INCONSISTENT)
		}
		attempt := func(name string, want verdict, template []thief.Attribute) {
			g.try("tookan/copy "+o.name+" with "+name, want, func() error {
				_, code := g.raw.Copy(uint(g.s), o.id(), template)
				return rv(code)
			})
		}
		for name, a := range changes() {
			attempt(name, want, []thief.Attribute{a})
			attempt(name+" on the token", want, []thief.Attribute{{Type: pkcs11.CKA_TOKEN, Value: thief.Bool(true)}, a})
			attempt(name+" in the session", want, []thief.Attribute{{Type: pkcs11.CKA_TOKEN, Value: thief.Bool(false)}, a})
		}
		attempt("NULL", refused(pkcs11.CKR_ARGUMENTS_BAD), nil)
		if !vault || copyable[0] == 0 {
			attempt("nothing", frozen, []thief.Attribute{})
		}
	}
	if copyable[0] == 0 {
		g.t.Log("vaults of this token cannot be copied: hole D2 is closed")
		g.report.shown["D2"] = true
		return
	}
	// What can be had is the same key again, as guarded as the first.
	h, code := g.raw.Copy(uint(g.s), g.vault.id(), []thief.Attribute{})
	twin := object{"twin of the vault", pkcs11.ObjectHandle(h), pkcs11.CKO_SECRET_KEY}
	g.try("D2/copy the vault with nothing changed", hole("D2"), func() error { return rv(code) })
	for name, a := range changes() {
		g.try("D2/set "+name+" of the twin", frozen, func() error {
			return g.p.SetAttributeValue(g.s, twin.handle, []*pkcs11.Attribute{{Type: a.Type, Value: a.Value}})
		})
	}
	for _, m := range []uint{pkcs11.CKM_AES_ECB, pkcs11.CKM_AES_CBC, pkcs11.CKM_AES_GCM} {
		g.try(fmt.Sprintf("D2/decrypt with the twin by 0x%X", m), noUse, func() error {
			return g.p.DecryptInit(g.s, withParameters(m), twin.handle)
		})
	}
	for name, template := range mutations(g.vaultPins) {
		g.try("D2/open under the twin with "+name, pinned, func() error {
			h, code := g.unwrapping(twin, pkcs11.CKM_AES_KEY_WRAP, g.sealed.Ref, template).Once()
			if code != pkcs11.CKR_OK {
				return rv(code)
			}
			defer g.destroy(pkcs11.ObjectHandle(h))
			return g.asPinned(pkcs11.ObjectHandle(h), g.vaultPins)
		})
	}
	g.try("D2/destroy the twin", frozen, func() error { return g.p.DestroyObject(g.s, twin.handle) })
}

// all are the objects and the public half that is kept.
func (s *scene) all() []object { return append(s.objects(), s.receiptPublic) }

// destroyKeys destroys what must outlive a thief, and what cannot.
func destroyKeys(g *group) {
	keys := []object{g.vault, g.mac, g.receipt, g.receiptPublic}
	if g.report.ours {
		keys = append(keys, g.vaultSM4)
	}
	for _, o := range keys {
		g.try("D1/destroy "+o.name, frozen, func() error { return g.p.DestroyObject(g.s, o.handle) })
	}
	g.try("D1/initialise the token anew without the SO PIN", refused(pkcs11.CKR_SESSION_EXISTS, pkcs11.CKR_PIN_INCORRECT), func() error {
		return g.p.InitToken(g.slot, thiefsPIN, g.soft.Label)
	})
	g.try("D1/initialise the user PIN as the user", refused(pkcs11.CKR_USER_NOT_LOGGED_IN), func() error {
		return g.p.InitPIN(g.s, thiefsPIN)
	})
}
