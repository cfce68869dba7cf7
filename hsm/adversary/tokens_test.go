package adversary

import (
	"context"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/adversary/thief"
)

// thiefsPIN is every PIN that the thief sets.
const thiefsPIN = "some PIN of the thief's own"

// secondToken makes a token of the thief's own in the free slot, for which
// nobody's credentials are needed. He is its SO and its user (S2).
func secondToken(g *group) {
	at := pkcs11.NewAttribute
	slot := g.initToken("thief's " + g.soft.Label[:16])
	x, err := g.p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		g.t.Fatal(err)
	}
	if err := g.p.Login(x, pkcs11.CKU_SO, thiefsPIN); err != nil {
		g.t.Fatal(err)
	}
	if err := g.p.InitPIN(x, thiefsPIN); err != nil {
		g.t.Fatal(err)
	}
	trusted, err := g.p.CreateObject(x, []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), at(pkcs11.CKA_PRIVATE, false),
		at(pkcs11.CKA_TOKEN, true), at(pkcs11.CKA_VALUE, random(32)), at(pkcs11.CKA_WRAP, true), at(pkcs11.CKA_UNWRAP, true), at(pkcs11.CKA_TRUSTED, true),
	})
	if err != nil {
		g.t.Fatal(err)
	}
	elsewhere := refused(pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID, pkcs11.CKR_KEY_UNEXTRACTABLE)
	for _, o := range g.objects() {
		want := elsewhere
		if o == g.measured { // extractable: it was to be sealed next
			want = hole("T15", pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID)
		}
		g.try("T15/wrap "+o.name+" under a trusted key of another token", want, func() error {
			blob, err := g.p.WrapKey(g.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), trusted, o.handle)
			if err != nil {
				return err
			}
			k, err := g.p.UnwrapKey(g.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), trusted, blob, readable())
			if err == nil && !g.stolen(k) {
				g.t.Error("what was wrapped out is not the customer's material")
			}
			return err
		})
	}
	gone := refused(pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID,
		pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_ATTRIBUTE_SENSITIVE, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ACTION_PROHIBITED,
		pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_MECHANISM_INVALID)
	g.useElsewhere(x, "SO", gone)
	if err := g.p.Logout(x); err != nil {
		g.t.Fatal(err)
	}
	if err := g.p.Login(x, pkcs11.CKU_USER, thiefsPIN); err != nil {
		g.t.Fatal(err)
	}
	g.useElsewhere(x, "user", gone)
	if err := g.p.CloseSession(x); err != nil {
		g.t.Fatal(err)
	}

	if err := g.token.Close(); err != nil {
		g.t.Fatal(err)
	}
	g.try("S2/another serial", byServer(hsm.ErrUntrusted), func() error {
		cfg := g.soft.Config()
		cfg.Pins.Serial = fmt.Sprintf("%016x", new(big.Int).SetBytes(random(8)))
		token, err := hsm.Open(context.Background(), cfg)
		if err == nil {
			_ = token.Close()
		}
		return err
	})
	g.initToken(g.soft.Label)
	g.try("S2/second token of our label", byServer(hsm.ErrUntrusted), g.taken)
}

// useElsewhere uses our objects in a session of another token, where the thief
// is whom he likes.
func (g *group) useElsewhere(x pkcs11.SessionHandle, who string, gone verdict) {
	for _, o := range g.objects() {
		for name, do := range map[string]func() error{
			"read": func() error {
				_, err := g.p.GetAttributeValue(x, o.handle, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
				return err
			},
			"set": func() error {
				return g.p.SetAttributeValue(x, o.handle, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TRUSTED, true)})
			},
			"copy": func() error {
				h, code := g.raw.Copy(uint(x), o.id(), []thief.Attribute{})
				if code == pkcs11.CKR_OK && (o == g.vault || o == g.vaultSM4) {
					// Its value is encrypted under our token's key, not under his.
					u := g.unwrapping(object{handle: pkcs11.ObjectHandle(h)}, pkcs11.CKM_AES_KEY_WRAP, g.sealed.Ref, g.vaultPins)
					u.Session = uint(x)
					_, code := u.Once()
					if code != pkcs11.CKR_OK {
						return errHarmless
					}
					return nil
				}
				return rv(code)
			},
			"open the sealed blob with": func() error {
				u := g.unwrapping(o, pkcs11.CKM_AES_KEY_WRAP, g.sealed.Ref, g.vaultPins)
				u.Session = uint(x)
				_, code := u.Once()
				return rv(code)
			},
		} {
			g.try(fmt.Sprintf("T15/%s %s as the %s of another token", name, o.name, who), gone, do)
		}
	}
}

// readable is a template for a key that anybody may read.
func readable() []*pkcs11.Attribute {
	at := pkcs11.NewAttribute
	return []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), at(pkcs11.CKA_SENSITIVE, false),
		at(pkcs11.CKA_EXTRACTABLE, true),
	}
}

// initToken makes a token in the free slot and returns where it then is.
func (g *group) initToken(label string) (slot uint) {
	g.t.Helper()
	each := func(f func(slot uint, info pkcs11.TokenInfo)) {
		slots, err := g.p.GetSlotList(true)
		if err != nil {
			g.t.Fatal(err)
		}
		for _, slot := range slots {
			info, err := g.p.GetTokenInfo(slot)
			if err != nil {
				g.t.Fatal(err)
			}
			f(slot, info)
		}
	}
	each(func(s uint, info pkcs11.TokenInfo) {
		if info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			if err := g.p.InitToken(s, thiefsPIN, label); err != nil {
				g.t.Fatal(err)
			}
		}
	})
	each(func(s uint, info pkcs11.TokenInfo) {
		if info.Label == label {
			slot = s
		}
	})
	return slot
}
