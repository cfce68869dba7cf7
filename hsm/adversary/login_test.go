package adversary

import (
	"context"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm"
)

// outsider has the module and no PIN.
func outsider(g *group) {
	at := pkcs11.NewAttribute
	all := g.all()
	if err := g.token.Close(); err != nil {
		g.t.Fatal(err)
	}
	if err := g.p.CloseAllSessions(g.slot); err != nil { // and so nobody is logged in
		g.t.Fatal(err)
	}
	g.s = g.session(g.t)
	g.try("T3/find anything", refused(errNotFound), func() error {
		found, err := g.find()
		if err == nil && len(found) == 0 {
			return errNotFound
		}
		return err
	})
	// Handles are small numbers, and the thief may have seen ours.
	gone := refused(pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_UNWRAPPING_KEY_HANDLE_INVALID,
		pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID, pkcs11.CKR_USER_NOT_LOGGED_IN,
		pkcs11.CKR_GENERAL_ERROR) // SoftHSM2's word for the last, to C_GetAttributeValue
	for _, o := range all {
		for name, do := range map[string]func() error{
			"read": func() error { _, err := g.bytes(o.handle, pkcs11.CKA_LABEL); return err },
			"copy": func() error {
				_, err := g.p.CopyObject(g.s, o.handle, []*pkcs11.Attribute{at(pkcs11.CKA_TOKEN, false)})
				return err
			},
			"destroy": func() error { return g.p.DestroyObject(g.s, o.handle) },
			"sign":    func() error { return g.p.SignInit(g.s, mechanism(pkcs11.CKM_SHA256_HMAC), o.handle) },
			"decrypt": func() error { return g.p.DecryptInit(g.s, mechanism(pkcs11.CKM_AES_ECB), o.handle) },
			"set": func() error {
				return g.p.SetAttributeValue(g.s, o.handle, []*pkcs11.Attribute{at(pkcs11.CKA_LABEL, "x")})
			},
			"unwrap": func() error {
				_, code := g.unwrapping(o, pkcs11.CKM_AES_KEY_WRAP, g.sealed.Ref, g.vaultPins).Once()
				return rv(code)
			},
			"wrap": func() error {
				_, err := g.p.WrapKey(g.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), o.handle, o.handle)
				return err
			},
		} {
			g.try("T3/"+name+" "+o.name+" without a PIN", gone, do)
		}
	}
	for handle := range pkcs11.ObjectHandle(200) {
		g.try(fmt.Sprintf("T3/read object %d without a PIN", handle), gone, func() error {
			_, err := g.bytes(handle, pkcs11.CKA_CLASS)
			return err
		})
	}
	data := func(private bool) []*pkcs11.Attribute {
		return []*pkcs11.Attribute{
			at(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), at(pkcs11.CKA_TOKEN, true), at(pkcs11.CKA_PRIVATE, private), at(pkcs11.CKA_VALUE, random(1<<16)),
		}
	}
	g.try("D4/store a private object", refused(pkcs11.CKR_USER_NOT_LOGGED_IN), func() error { return g.create(data(true)) })
	g.try("D4/store a public object", hole("D4"), func() error { return g.create(data(false)) })
	g.try("S5/store a trusted object", refused(pkcs11.CKR_ATTRIBUTE_READ_ONLY), func() error {
		return g.create([]*pkcs11.Attribute{
			at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), at(pkcs11.CKA_TOKEN, true), at(pkcs11.CKA_PRIVATE, false),
			at(pkcs11.CKA_VALUE, random(32)), at(pkcs11.CKA_TRUSTED, true),
		})
	})
	g.try("D1/set the user PIN", refused(pkcs11.CKR_PIN_INCORRECT), func() error {
		return g.p.SetPIN(g.s, "a guess of the thief's", thiefsPIN)
	})
	guessPINs(g)
}

// guessPINs tries PINs until one is right: no token of SoftHSM2 is ever locked.
func guessPINs(g *group) {
	const wrong = 50
	for name, who := range map[string]struct {
		user uint
		pin  func() ([]byte, error)
	}{"user": {pkcs11.CKU_USER, g.soft.UserPIN}, "SO": {pkcs11.CKU_SO, g.soft.SOPIN}} {
		for i := range wrong {
			g.try(fmt.Sprintf("T17/guess the %s PIN, %d", name, i), refused(pkcs11.CKR_PIN_INCORRECT), func() error {
				return g.p.Login(g.s, who.user, fmt.Sprintf("%s, no. %d", thiefsPIN, i))
			})
		}
		g.try("T17/the right "+name+" PIN after so many wrong ones", hole("T17", pkcs11.CKR_PIN_LOCKED), func() error {
			pin, err := who.pin()
			if err != nil {
				return err
			}
			if err := g.p.Login(g.s, who.user, string(pin)); err != nil {
				return err
			}
			return g.p.Logout(g.s)
		})
	}
}

// officer has the SO PIN as well (T6). The vault pins EXTRACTABLE=false for
// that (R6): nothing of the database is read with both PINs.
func officer(g *group) {
	at := pkcs11.NewAttribute
	if err := g.token.Close(); err != nil {
		g.t.Fatal(err)
	}
	if err := g.p.CloseAllSessions(g.slot); err != nil {
		g.t.Fatal(err)
	}
	g.s = g.session(g.t)
	publicAES := []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), at(pkcs11.CKA_TOKEN, true), at(pkcs11.CKA_PRIVATE, false),
		at(pkcs11.CKA_WRAP, true), at(pkcs11.CKA_DECRYPT, true), at(pkcs11.CKA_UNWRAP, true), at(pkcs11.CKA_VALUE, random(32)),
	}
	g.login(g.t, pkcs11.CKU_USER, g.soft.UserPIN)
	usersKey, err := g.p.CreateObject(g.s, publicAES)
	if err != nil {
		g.t.Fatal(err)
	}
	keys := []object{
		g.only(g.t, g.vault.name, at(pkcs11.CKA_TRUSTED, true), at(pkcs11.CKA_LABEL, "keyferry vault AES-256 v1")),
		g.only(g.t, g.mac.name, at(pkcs11.CKA_LABEL, "keyferry mac HMAC-SHA-256 v1")),
		g.only(g.t, g.receipt.name, at(pkcs11.CKA_LABEL, "keyferry receipt P-256 v1"), at(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)),
		g.only(g.t, g.wrapping.name, at(pkcs11.CKA_ID, g.pair.ID[:])),
	}
	if err := g.p.Logout(g.s); err != nil {
		g.t.Fatal(err)
	}

	g.login(g.t, pkcs11.CKU_SO, g.soft.SOPIN)
	g.try("T6/find private objects as the SO", refused(errNotFound), func() error {
		found, err := g.find(at(pkcs11.CKA_PRIVATE, true))
		if err == nil && len(found) == 0 {
			return errNotFound
		}
		return err
	})
	for _, o := range keys {
		kept := refused(pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_USER_NOT_LOGGED_IN)
		g.try("T6/destroy "+o.name+" as the SO", kept, func() error { return g.p.DestroyObject(g.s, o.handle) })
		g.try("T6/set attributes of "+o.name+" as the SO", kept, func() error {
			return g.p.SetAttributeValue(g.s, o.handle, []*pkcs11.Attribute{at(pkcs11.CKA_TRUSTED, true)})
		})
		g.try("T6/copy "+o.name+" as the SO", kept, func() error {
			_, err := g.p.CopyObject(g.s, o.handle, []*pkcs11.Attribute{at(pkcs11.CKA_TOKEN, false)})
			return err
		})
	}
	g.try("T6/mark a known key as trusted", hole("T6", pkcs11.CKR_ATTRIBUTE_READ_ONLY), func() error {
		return g.create(append(publicAES[:len(publicAES):len(publicAES)], at(pkcs11.CKA_TRUSTED, true)))
	})
	g.try("T6/mark the user's key as trusted", refused(pkcs11.CKR_ATTRIBUTE_READ_ONLY), func() error {
		return g.p.SetAttributeValue(g.s, usersKey, []*pkcs11.Attribute{at(pkcs11.CKA_TRUSTED, true)})
	})
	g.try("T6/set the user PIN as the SO", hole("T6"), func() error {
		return g.p.InitPIN(g.s, thiefsPIN)
	})
	if err := g.p.Logout(g.s); err != nil {
		g.t.Fatal(err)
	}

	g.login(g.t, pkcs11.CKU_USER, func() ([]byte, error) { return []byte(thiefsPIN), nil })
	trusted := g.only(g.t, "the thief's trusted key", at(pkcs11.CKA_TRUSTED, true), at(pkcs11.CKA_PRIVATE, false))
	vault := g.only(g.t, g.vault.name, at(pkcs11.CKA_TRUSTED, true), at(pkcs11.CKA_PRIVATE, true), at(pkcs11.CKA_LABEL, "keyferry vault AES-256 v1"))
	pair := g.only(g.t, g.wrapping.name, at(pkcs11.CKA_ID, g.pair.ID[:]))
	take := func(victim pkcs11.ObjectHandle) error {
		blob, err := g.p.WrapKey(g.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), trusted.handle, victim)
		if err != nil {
			return err
		}
		o, err := g.p.UnwrapKey(g.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), trusted.handle, blob, readable())
		if err == nil && !g.stolen(o) {
			g.t.Error("what was wrapped out is not the customer's material")
		}
		return err
	}
	h, code := g.unwrapping(pair, pkcs11.CKM_RSA_PKCS_OAEP, g.captured, g.pairPins).Once()
	if code != pkcs11.CKR_OK {
		g.t.Fatal(rv(code))
	}
	g.try("T6/read what the customer wrapped", hole("T6"), func() error { return take(pkcs11.ObjectHandle(h)) })
	h, code = g.unwrapping(vault, pkcs11.CKM_AES_KEY_WRAP, g.sealed.Ref, g.vaultPins).Once()
	if code != pkcs11.CKR_OK {
		g.t.Fatal(rv(code))
	}
	for name, o := range map[string]pkcs11.ObjectHandle{
		"what the database keeps": pkcs11.ObjectHandle(h), "the vault": vault.handle, "the pair": pair.handle,
		"the MAC key": g.only(g.t, "", at(pkcs11.CKA_LABEL, "keyferry mac HMAC-SHA-256 v1")).handle,
	} {
		g.try("R6/read "+name+" with both PINs", refused(pkcs11.CKR_KEY_UNEXTRACTABLE), func() error { return take(o) })
	}
	cfg := g.soft.Config()
	cfg.PIN = func() ([]byte, error) { return []byte(thiefsPIN), nil }
	g.try("S5/have the server work beside a trusted key", byServer(hsm.ErrUntrusted), func() error {
		token, err := hsm.Open(context.Background(), cfg)
		if err == nil {
			_ = token.Close()
		}
		return err
	})
	g.try("D1/change the user PIN as the user", hole("D1"), func() error { return g.p.SetPIN(g.s, thiefsPIN, thiefsPIN+"2") })
}
