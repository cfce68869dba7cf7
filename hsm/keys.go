package hsm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"fmt"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// publicConstant is wrapped by a vault and authenticated by a MAC key to tell
// which they are: 32 bytes, public by intent.
var publicConstant = []byte("Keyferry fingerprint constant v1")

// findKeys finds the pinned vault and MAC key, and refuses a token that
// carries anything else with CKA_TRUSTED: one trusted key of known value opens
// every blob.
func (c *connection) findKeys(s *p11.Session) error {
	pins := c.t.cfg.Pins
	vaults, err := findVaults(s)
	if err != nil {
		return err
	}
	for _, v := range vaults {
		// Several objects of one fingerprint are copies of one key.
		if v.fingerprint != pins.VaultAES {
			return fmt.Errorf("%w: the token has a vault key %s that is not the pinned one", ErrUntrusted, v.fingerprint)
		}
		c.vault, c.reseal, c.canary = v.handle, v.reseal, v.wrapped
	}
	if c.vault == 0 {
		return fmt.Errorf("%w: the token has no vault key %s; run init, or correct the pin", ErrUnavailable, pins.VaultAES)
	}
	macs, err := findMACKeys(s)
	if err != nil {
		return err
	}
	for _, m := range macs {
		if m.fingerprint == pins.MACKey {
			c.mac = m.handle
		}
	}
	if c.mac == 0 {
		return fmt.Errorf("%w: the token has no MAC key %s; run init, or correct the pin", ErrUnavailable, pins.MACKey)
	}
	return nil
}

// foundKey is a key of ours as found on a token.
type foundKey struct {
	handle      p11.Handle
	fingerprint Fingerprint
	wrapped     []byte // vault: the wrapped public constant
	reseal      bool   // vault: what it pins of EXTRACTABLE
}

// findVaults reads back every object with CKA_TRUSTED and returns the vault
// keys. ErrUntrusted if one is anything else.
func findVaults(s *p11.Session) ([]foundKey, error) {
	handles, err := s.FindObjects(p11.NewTemplate(p11.Bool(p11.Trusted, true)))
	if err != nil {
		return nil, err
	}
	var out []foundKey
	for _, h := range handles {
		v := foundKey{handle: h}
		strict := readBack(s, h, join(vaultKey(false), provenance()))
		if strict != nil {
			v.reseal = true
			if readBack(s, h, join(vaultKey(true), provenance())) != nil {
				label, _ := s.Attributes(h, p11.Label)
				return nil, fmt.Errorf("object %q has CKA_TRUSTED and is no vault key of ours; the token must be dedicated: %w",
					label[p11.Label], strict)
			}
		}
		if v.wrapped, err = wrapConstant(s, h); err != nil {
			return nil, err
		}
		v.fingerprint = sha256.Sum256(v.wrapped)
		out = append(out, v)
	}
	return out, nil
}

// wrapConstant wraps the public constant under a vault key; RFC 3394 is
// deterministic, so the result names the key.
func wrapConstant(s *p11.Session, vault p11.Handle) ([]byte, error) {
	known, err := s.CreateObject(p11.NewTemplate(knownKey(publicConstant)...))
	if err != nil {
		return nil, err
	}
	blob, err := s.Wrap(p11.Plain(p11.AESKeyWrap), vault, known, make([]byte, blobRoom))
	if err != nil {
		return nil, err
	}
	return blob, s.DestroyObject(known)
}

// findMACKeys returns the objects that look like our MAC key and read back as
// one. Lookalikes are passed over: the fingerprint decides.
func findMACKeys(s *p11.Session) ([]foundKey, error) {
	handles, err := s.FindObjects(p11.NewTemplate(
		p11.ULong(p11.Class, p11.ClassSecretKey),
		p11.Bool(p11.OnToken, true),
		p11.Bytes(p11.Label, []byte(labelMAC)),
	))
	if err != nil {
		return nil, err
	}
	var out []foundKey
	for _, h := range handles {
		if readBack(s, h, join(macKey(), provenance())) != nil {
			continue
		}
		sum, err := s.Sign(p11.Plain(p11.SHA256HMAC), h, macInput("keyferry/fingerprint/v1", publicConstant), make([]byte, macLen))
		if err != nil {
			return nil, err
		}
		out = append(out, foundKey{handle: h, fingerprint: sha256.Sum256(sum)})
	}
	return out, nil
}

// findReceiptKeys returns the receipt keys, by the public half whose private
// half reads back as ours and signs for it.
func findReceiptKeys(s *p11.Session) ([]foundKey, error) {
	handles, err := s.FindObjects(p11.NewTemplate(
		p11.ULong(p11.Class, p11.ClassPrivateKey),
		p11.Bool(p11.OnToken, true),
		p11.Bytes(p11.Label, []byte(labelReceipt)),
	))
	if err != nil {
		return nil, err
	}
	var out []foundKey
	for _, h := range handles {
		values, err := s.Attributes(h, p11.ID)
		if err != nil {
			return nil, err
		}
		id := values[p11.ID]
		_, private := receiptKey(id)
		if readBack(s, h, join(private, provenance())) != nil {
			continue
		}
		spki, err := receiptSPKI(s, h, id)
		if err != nil {
			return nil, err
		}
		out = append(out, foundKey{handle: h, fingerprint: sha256.Sum256(spki)})
	}
	return out, nil
}

// receiptSPKI finds the public half that verifies what the private half signs:
// an object's word for being the other half proves nothing.
func receiptSPKI(s *p11.Session, private p11.Handle, id []byte) ([]byte, error) {
	digest := sha256.Sum256(publicConstant)
	sig, err := s.Sign(p11.Plain(p11.ECDSA), private, digest[:], make([]byte, 64))
	if err != nil {
		return nil, err
	}
	handles, err := s.FindObjects(p11.NewTemplate(p11.ULong(p11.Class, p11.ClassPublicKey), p11.Bytes(p11.ID, id)))
	if err != nil {
		return nil, err
	}
	for _, h := range handles {
		values, err := s.Attributes(h, p11.ECPoint)
		if err != nil {
			return nil, err
		}
		pub, err := parseECPoint(values[p11.ECPoint])
		if err == nil && verifyRaw(pub, digest[:], sig) {
			return x509.MarshalPKIXPublicKey(pub)
		}
	}
	return nil, fmt.Errorf("%w: no public half on the token verifies what the receipt key signs", ErrUntrusted)
}

// parseECPoint parses CKA_EC_POINT: an uncompressed point in a DER OCTET
// STRING (PKCS#11 v2.40), or bare as some tokens have it.
func parseECPoint(der []byte) (*ecdsa.PublicKey, error) {
	point := der
	var inner []byte
	if rest, err := asn1.Unmarshal(der, &inner); err == nil && len(rest) == 0 {
		point = inner
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
}

// verifyRaw verifies r ‖ s, as PKCS#11 has ECDSA signatures.
func verifyRaw(pub *ecdsa.PublicKey, digest, sig []byte) bool {
	if len(sig) != 64 {
		return false
	}
	der, err := asn1.Marshal(struct{ R, S asn1.RawValue }{derInteger(sig[:32]), derInteger(sig[32:])})
	return err == nil && ecdsa.VerifyASN1(pub, digest, der)
}

func derInteger(b []byte) asn1.RawValue {
	b = bytes.TrimLeft(b, "\x00")
	if len(b) == 0 || b[0] >= 0x80 {
		b = append([]byte{0}, b...)
	}
	return asn1.RawValue{Tag: asn1.TagInteger, Bytes: b}
}
