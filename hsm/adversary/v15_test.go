package adversary

import (
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm/adversary/thief"
)

// pkcs1v15 is a token that offers RSAES_PKCS1_V1_5, which is off by default.
func pkcs1v15(g *group) {
	ask := func(m []byte) thief.RV {
		h, code := g.unwrapping(g.wrapping, pkcs11.CKM_RSA_PKCS, textbook(g.pub, m), g.pairPins).Once()
		if code == pkcs11.CKR_OK {
			g.destroy(pkcs11.ObjectHandle(h))
		}
		return code
	}
	conforming, other := encoded(2, random(32)), encoded(3, random(32))
	if g.token.ImplicitRejection() {
		// OpenSSL 3.2 and later: all are answered alike, with some key.
		g.try("T11, bardou/tell conforming blobs from others", refused(errNotFound), func() error {
			if ask(conforming) == ask(other) {
				return errNotFound
			}
			return nil
		})
		g.report.unlucky["T11"] = true
		return
	}
	for i := range 20 {
		g.try(fmt.Sprintf("T11, bardou/tell conforming blobs from others, %d", i), hole("T11"), func() error {
			if code := ask(other); code == pkcs11.CKR_OK {
				return errNotFound
			}
			return rv(ask(conforming))
		})
	}
	// All that it gives away is that: what comes out is guarded as ever.
	for name, template := range mutations(g.pairPins) {
		g.try("T11/unwrap with "+name, pinned, func() error {
			h, code := g.unwrapping(g.wrapping, pkcs11.CKM_RSA_PKCS, g.captured, template).Once()
			if code != pkcs11.CKR_OK {
				return rv(code)
			}
			defer g.destroy(pkcs11.ObjectHandle(h))
			return g.asPinned(pkcs11.ObjectHandle(h), g.pairPins)
		})
	}
	for _, m := range []uint{pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.CKM_RSA_X_509} {
		g.try(fmt.Sprintf("T2/unwrap under the PKCS#1 v1.5 pair by 0x%X", m), refused(pkcs11.CKR_MECHANISM_INVALID), func() error {
			_, code := g.unwrapping(g.wrapping, m, g.captured, g.pairPins).Once()
			return rv(code)
		})
	}
}

// encoded is a message in EME-PKCS1-v1_5 of 256 bytes, of that block type: 2 is
// the one that conforms (RFC 8017 section 7.2.1).
func encoded(blockType byte, message []byte) []byte {
	out := random(256)
	for i := range out {
		out[i] |= 1 // not zero
	}
	out[0], out[1], out[255-len(message)] = 0, blockType, 0
	copy(out[256-len(message):], message)
	return out
}
