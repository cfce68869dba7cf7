package adversary

import (
	"bytes"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm/adversary/thief"
)

// races has arguments and objects change while the token looks at them. None of
// these is to be closed by attributes.
func races(g *group) {
	customers := g.unwrapping(g.wrapping, pkcs11.CKM_RSA_PKCS_OAEP, g.captured, g.pairPins)
	sealed := g.unwrapping(g.vault, pkcs11.CKM_AES_KEY_WRAP, g.sealed.Ref, g.vaultPins)
	g.try("T9/result written over the template, customer's blob", hole("T9", errNotRead), func() error { return g.read(customers.Aliased()) })
	// Here false is all that can be written, and EXTRACTABLE is pinned to it.
	g.try("T9/result written over the template, sealed blob", refused(errNotRead), func() error { return g.read(sealed.Aliased()) })
	if !racing() {
		for _, id := range []string{"T9", "T12", "T13", "T14", "T16"} {
			g.report.unlucky[id] = true
		}
		g.t.Log(`not raced: "make test-races" does, for what is raced in memory may crash SoftHSM2, and this process with it`)
		return
	}
	x := g.session(g.t)
	defer func() { _ = g.p.CloseSession(x) }()
	n, cheap := tries(500, 20_000), tries(5_000, 20_000) // an RSA operation each, and none
	g.race("T9/template changed, customer's blob", "T9", func() thief.Loot { return customers.RaceTemplate(n) })
	g.race("T9/template changed, sealed blob", "T9", func() thief.Loot { return sealed.RaceTemplate(cheap) })

	bulky := customers
	bulky.Template = slowly(customers.Template)
	g.race("T14/object changed in the making, customer's blob", "T14", func() thief.Loot { return bulky.RaceObject(uint(x), tries(200, 4_000)) })
	bulky = sealed
	bulky.Template = slowly(sealed.Template)
	g.try("T14/object changed in the making, sealed blob", refused(errNotRead), func() error {
		return g.read(bulky.RaceObject(uint(x), tries(50, 500)))
	})

	other := customers
	other.Blob = textbook(g.pub, encoded(2, g.material))
	g.try("T13/mechanism changed, PKCS#1 v1.5 under the OAEP pair", race("T13"), func() error {
		loot := other.RaceMechanism(pkcs11.CKM_RSA_PKCS, cheap)
		g.t.Logf("T13: %d calls, %d answered", loot.Tries, loot.Accepted)
		if loot.Accepted == 0 {
			return errLost
		}
		return nil
	})

	// What the token makes here and the thief has no handle of goes with a
	// session of its own.
	for name, u := range map[string]thief.Unwrapping{"customer's blob": customers, "sealed blob": sealed} {
		most := n
		if u.Key == sealed.Key {
			most = cheap
		}
		y := g.session(g.t)
		own := g.ownAES(nil, pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true))
		u.Session = uint(y)
		g.race("T16/result changed, "+name, "T16", func() thief.Loot { return u.RaceResult(uint(own), most) })
		_ = g.p.CloseSession(y)
		g.destroy(own)
	}

	// Last, for every try leaves a copy of the vault that nobody can destroy. The
	// vault has no secret but the value that its guards keep.
	g.race("T12/vault copied while it is copied", "T12", func() thief.Loot { return sealed.RaceCopy(uint(x), tries(100, 2_000)) })
}

// read is nil if the loot is the customer's material.
func (g *group) read(loot thief.Loot) error {
	g.t.Helper()
	if loot.Value == nil {
		return errNotRead
	}
	if !bytes.Equal(loot.Value, g.material) {
		g.t.Error("what was read is not the customer's material")
	}
	return nil
}

func (g *group) race(name, id string, run func() thief.Loot) {
	g.t.Helper()
	g.try(name, race(id), func() error {
		loot := run()
		g.t.Logf("%s: %d calls, %d answered, %v", name, loot.Tries, loot.Accepted, loot.Value != nil)
		// A race in which nothing was answered at all proves nothing.
		if loot.Accepted == 0 && !g.report.closes(id) {
			g.t.Errorf("%s: no call was answered", name)
		}
		if g.read(loot) != nil {
			return errLost
		}
		return nil
	})
}

// slowly is a template with bulky attributes before SENSITIVE, which nobody
// pins and which take the token their time.
func slowly(template []thief.Attribute) []thief.Attribute {
	var first, last []thief.Attribute
	for range 2 {
		first = append(first, thief.Attribute{Type: pkcs11.CKA_ID, Value: make([]byte, 1<<16)})
	}
	for _, a := range template {
		if a.Type == pkcs11.CKA_SENSITIVE {
			first = append(first, a)
		} else {
			last = append(last, a)
		}
	}
	return append(first, last...)
}
