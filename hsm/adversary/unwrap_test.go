package adversary

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm/adversary/thief"
)

// names of the attributes that a template pins.
var attributeNames = map[uint]string{
	pkcs11.CKA_CLASS: "CLASS", pkcs11.CKA_KEY_TYPE: "KEY_TYPE", pkcs11.CKA_TOKEN: "TOKEN", pkcs11.CKA_PRIVATE: "PRIVATE",
	pkcs11.CKA_SENSITIVE: "SENSITIVE", pkcs11.CKA_EXTRACTABLE: "EXTRACTABLE", pkcs11.CKA_WRAP_WITH_TRUSTED: "WRAP_WITH_TRUSTED",
	pkcs11.CKA_ENCRYPT: "ENCRYPT", pkcs11.CKA_DECRYPT: "DECRYPT", pkcs11.CKA_SIGN: "SIGN", pkcs11.CKA_VERIFY: "VERIFY", pkcs11.CKA_WRAP: "WRAP",
	pkcs11.CKA_UNWRAP: "UNWRAP", pkcs11.CKA_DERIVE: "DERIVE", pkcs11.CKA_COPYABLE: "COPYABLE", pkcs11.CKA_MODIFIABLE: "MODIFIABLE",
	pkcs11.CKA_ALLOWED_MECHANISMS: "ALLOWED_MECHANISMS", pkcs11.CKA_DESTROYABLE: "DESTROYABLE", pkcs11.CKA_TRUSTED: "TRUSTED",
	pkcs11.CKA_LOCAL: "LOCAL", pkcs11.CKA_ALWAYS_SENSITIVE: "ALWAYS_SENSITIVE", pkcs11.CKA_NEVER_EXTRACTABLE: "NEVER_EXTRACTABLE",
	pkcs11.CKA_VALUE: "VALUE", pkcs11.CKA_VALUE_LEN: "VALUE_LEN", pkcs11.CKA_CHECK_VALUE: "CHECK_VALUE", pkcs11.CKA_LABEL: "LABEL", pkcs11.CKA_ID: "ID",
	pkcs11.CKA_START_DATE: "START_DATE", pkcs11.CKA_END_DATE: "END_DATE", pkcs11.CKA_KEY_GEN_MECHANISM: "KEY_GEN_MECHANISM",
	pkcs11.CKA_WRAP_TEMPLATE: "WRAP_TEMPLATE", pkcs11.CKA_UNWRAP_TEMPLATE: "UNWRAP_TEMPLATE", pkcs11.CKA_SIGN_RECOVER: "SIGN_RECOVER",
	pkcs11.CKA_ALWAYS_AUTHENTICATE: "ALWAYS_AUTHENTICATE", pkcs11.CKA_MODULUS: "MODULUS", pkcs11.CKA_PRIVATE_EXPONENT: "PRIVATE_EXPONENT",
	pkcs11.CKA_CERTIFICATE_TYPE: "CERTIFICATE_TYPE",
}

// keyTypes are those that material must not come out as.
var keyTypes = []uint{
	pkcs11.CKK_RSA, pkcs11.CKK_DSA, pkcs11.CKK_DH, pkcs11.CKK_EC, pkcs11.CKK_GENERIC_SECRET, pkcs11.CKK_RC2, pkcs11.CKK_RC4, pkcs11.CKK_DES,
	pkcs11.CKK_DES2, pkcs11.CKK_DES3, pkcs11.CKK_CAST128, pkcs11.CKK_IDEA, pkcs11.CKK_BLOWFISH, pkcs11.CKK_TWOFISH, pkcs11.CKK_MD5_HMAC,
	pkcs11.CKK_SHA_1_HMAC, pkcs11.CKK_SHA256_HMAC, pkcs11.CKK_SHA512_HMAC, pkcs11.CKK_GOST28147, pkcs11.CKK_CAMELLIA, softhsmSM4, 0x80000002, 0x80000015,
}

var classes = []uint{
	pkcs11.CKO_DATA, pkcs11.CKO_CERTIFICATE, pkcs11.CKO_PUBLIC_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_HW_FEATURE, pkcs11.CKO_DOMAIN_PARAMETERS,
	pkcs11.CKO_MECHANISM, pkcs11.CKO_OTP_KEY, pkcs11.CKO_VENDOR_DEFINED,
}

// unwrapBlobs unwraps the customer's blob and opens the database's with every
// template but the right one (clulow/Trojan template, dks/conflicting attributes
// of two imports, tookan/unwrap and decrypt).
func unwrapBlobs(g *group) {
	for _, way := range []struct {
		name   string
		pins   []thief.Attribute
		unwrap func([]thief.Attribute) (uint, thief.RV)
	}{
		{"customer's blob", g.pairPins, g.unwrapCaptured},
		{"sealed blob", g.vaultPins, g.unwrapSealed},
	} {
		attempt := func(name string, template []thief.Attribute) {
			g.try("tookan/unwrap "+way.name+" with "+name, pinned, func() error {
				h, code := way.unwrap(template)
				if code != pkcs11.CKR_OK {
					return rv(code)
				}
				defer g.destroy(pkcs11.ObjectHandle(h))
				return g.asPinned(pkcs11.ObjectHandle(h), way.pins)
			})
		}
		for name, template := range mutations(way.pins) {
			attempt(name, template)
		}
		g.try("unwrap "+way.name+" with the right template", control, func() error {
			h, code := way.unwrap(way.pins)
			g.destroy(pkcs11.ObjectHandle(h))
			return rv(code)
		})
	}
	g.confuse()
}

// asPinned is errHarmless if the object has every attribute that was pinned.
func (g *group) asPinned(h pkcs11.ObjectHandle, pins []thief.Attribute) error {
	for _, pin := range pins {
		got, err := g.bytes(h, pin.Type)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, pin.Value) {
			g.t.Logf("%s is %x, not %x", attributeNames[pin.Type], got, pin.Value)
			return nil
		}
	}
	return errHarmless
}

// mutations are templates that differ from the pinned one, by what differs.
func mutations(pins []thief.Attribute) map[string][]thief.Attribute {
	out := map[string][]thief.Attribute{
		"nothing": {},
	}
	with := func(i int, value []byte) []thief.Attribute {
		t := slices.Clone(pins)
		t[i].Value = value
		return t
	}
	before := func(a thief.Attribute) []thief.Attribute { return append([]thief.Attribute{a}, pins...) }
	after := func(a thief.Attribute) []thief.Attribute { return append(slices.Clone(pins), a) }
	everywhere := func(name string, i int, value []byte) {
		a := thief.Attribute{Type: pins[i].Type, Value: value}
		out[name] = with(i, value)
		out[name+" before"] = before(a)
		out[name+" after"] = after(a)
		out[name+" before SENSITIVE"] = slices.Insert(slices.Clone(pins), 4, a)
	}
	for i, pin := range pins {
		name := attributeNames[pin.Type]
		out["no "+name] = slices.Delete(slices.Clone(pins), i, i+1)
		out[name+" twice before"] = before(pin)
		out[name+" twice after"] = after(pin)
		switch pin.Type {
		case pkcs11.CKA_CLASS:
			for _, c := range classes {
				everywhere(fmt.Sprintf("CLASS 0x%X", c), i, thief.ULong(c))
			}
		case pkcs11.CKA_KEY_TYPE:
			for _, k := range keyTypes {
				everywhere(fmt.Sprintf("KEY_TYPE 0x%X", k), i, thief.ULong(k))
			}
		case pkcs11.CKA_ALLOWED_MECHANISMS:
			everywhere("no mechanism", i, nil)
			everywhere("one mechanism", i, pin.Value[:8])
			everywhere("one mechanism more", i, append(slices.Clone(pin.Value), thief.ULong(pkcs11.CKM_AES_CBC)...))
			everywhere("mechanisms in another order", i, append(slices.Clone(pin.Value[8:]), pin.Value[:8]...))
			everywhere("other mechanisms", i, thief.ULong(pkcs11.CKM_AES_CBC, pkcs11.CKM_AES_KEY_WRAP, pkcs11.CKM_AES_CBC_ENCRYPT_DATA)[:len(pin.Value)])
		}
		if len(pin.Value) == 1 {
			everywhere(name+" flipped", i, thief.Bool(pin.Value[0] == 0))
			for _, odd := range []byte{2, 0x80, 0xff} {
				out[fmt.Sprintf("%s 0x%02X", name, odd)] = with(i, []byte{odd})
			}
			for _, n := range []int{0, 2, 8} {
				for _, b := range []byte{0, 1} {
					out[fmt.Sprintf("%s of %d bytes 0x%02X", name, n, b)] = with(i, bytes.Repeat([]byte{b}, n))
				}
			}
		} else {
			out[name+" shortened"] = with(i, pin.Value[:len(pin.Value)/2])
			out[name+" lengthened"] = with(i, append(slices.Clone(pin.Value), pin.Value...))
		}
	}
	for _, extra := range []thief.Attribute{
		{Type: pkcs11.CKA_VALUE, Value: random(32)},
		{Type: pkcs11.CKA_VALUE_LEN, Value: thief.ULong(16)},
		{Type: pkcs11.CKA_CHECK_VALUE, Value: random(3)},
		{Type: pkcs11.CKA_TRUSTED, Value: thief.Bool(true)},
		{Type: pkcs11.CKA_LOCAL, Value: thief.Bool(true)},
		{Type: pkcs11.CKA_ALWAYS_SENSITIVE, Value: thief.Bool(true)},
		{Type: pkcs11.CKA_NEVER_EXTRACTABLE, Value: thief.Bool(true)},
		{Type: pkcs11.CKA_KEY_GEN_MECHANISM, Value: thief.ULong(pkcs11.CKM_AES_KEY_GEN)},
		{Type: pkcs11.CKA_SIGN_RECOVER, Value: thief.Bool(true)},
		{Type: pkcs11.CKA_ALWAYS_AUTHENTICATE, Value: thief.Bool(false)},
		{Type: pkcs11.CKA_MODULUS, Value: random(256)},
		{Type: pkcs11.CKA_PRIVATE_EXPONENT, Value: random(256)},
		{Type: pkcs11.CKA_CERTIFICATE_TYPE, Value: thief.ULong(0)},
		{Type: pkcs11.CKA_UNWRAP_TEMPLATE},
		{Type: pkcs11.CKA_WRAP_TEMPLATE},
		{Type: pkcs11.CKA_DESTROYABLE, Value: thief.Bool(false)},
		{Type: pkcs11.CKA_ID, Value: random(16)},
		{Type: pkcs11.CKA_LABEL, Value: []byte("keyferry vault AES-256 v1")},
		{Type: pkcs11.CKA_START_DATE},
		{Type: pkcs11.CKA_END_DATE},
		{Type: pkcs11.CKA_VENDOR_DEFINED + 1, Value: []byte{1}},
	} {
		name, ok := attributeNames[extra.Type]
		if !ok {
			name = fmt.Sprintf("0x%X", extra.Type)
		}
		out[name+" before"] = before(extra)
		out[name+" after"] = after(extra)
	}
	long := slices.Clone(pins)
	for range 40 {
		long = append(long, thief.Attribute{Type: pkcs11.CKA_ID, Value: []byte{1}})
	}
	out["57 attributes"] = long
	return out
}

// confuse unwraps by every mechanism but the one that is allowed, and every
// blob under every key but its own.
func (g *group) confuse() {
	want := refused(pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED,
		pkcs11.CKR_WRAPPED_KEY_LEN_RANGE)
	at := func(pins []thief.Attribute) (out []*pkcs11.Attribute) {
		for _, a := range pins {
			out = append(out, &pkcs11.Attribute{Type: a.Type, Value: a.Value})
		}
		return out
	}
	keys := map[string]object{}
	for _, o := range g.objects() {
		keys[o.name] = o
	}
	for name, key := range keys {
		for _, m := range g.mechanisms() {
			pins := g.pairPins
			if key == g.vault {
				pins = g.vaultPins
			}
			for blobName, blob := range map[string][]byte{"customer's": g.captured, "sealed": g.sealed.Ref, "one block": random(16), "two blocks": random(32)} {
				want := want
				if (key == g.wrapping && m == pkcs11.CKM_RSA_PKCS_OAEP) || (key == g.vault && m == pkcs11.CKM_AES_KEY_WRAP) || key == g.vaultSM4 || key == g.wrappingSM2 {
					want.refusals = append(slices.Clone(want.refusals), slices.Concat(notOpening.refusals, pinned.refusals)...)
				}
				if (key == g.wrapping && m == pkcs11.CKM_RSA_PKCS_OAEP && blobName == "customer's") ||
					(key == g.vault && m == pkcs11.CKM_AES_KEY_WRAP && blobName == "sealed") {
					continue // the right way
				}
				g.try(fmt.Sprintf("clulow/unwrap %s blob under %s by 0x%X", blobName, name, m), want, func() error {
					o, err := g.p.UnwrapKey(g.s, withParameters(m), key.handle, blob, at(pins))
					if err == nil {
						g.destroy(o)
					}
					return err
				})
			}
		}
	}
	own := object{"own AES key", g.ownAES(nil), pkcs11.CKO_SECRET_KEY}
	g.try("clulow/unwrap sealed blob under an own key", notOpening, func() error {
		_, code := g.unwrapping(own, pkcs11.CKM_AES_KEY_WRAP, g.sealed.Ref, g.vaultPins).Once()
		return rv(code)
	})
	g.destroy(own.handle)
	for i, code := range g.unwrapping(g.wrapping, pkcs11.CKM_RSA_PKCS_OAEP, g.captured, g.pairPins).WithNULL() {
		g.try(fmt.Sprintf("null/unwrap with NULL for pointer %d", i), refused(pkcs11.CKR_ARGUMENTS_BAD), func() error { return rv(code) })
	}
}
