package hsm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Serial is the serial of the token, as pinned.
func (t *Token) Serial() string { return t.cfg.Pins.Serial }

// ReceiptKey returns the SubjectPublicKeyInfo, in DER, of the key that signs
// receipts: ECDSA on P-256. ErrUnsupported if none is pinned.
func (t *Token) ReceiptKey(ctx context.Context) ([]byte, error) {
	c, err := t.connection(ctx)
	if err != nil {
		return nil, err
	}
	if c.receipt == nil {
		return nil, errNoReceiptKey
	}
	return slices.Clone(c.receipt.spki), nil
}

// SignReceipt signs a SHA-256 with the receipt key and returns the signature in
// DER. ErrUnsupported if no receipt key is pinned, ErrUnavailable.
func (t *Token) SignReceipt(ctx context.Context, digest [sha256.Size]byte) ([]byte, error) {
	var signature []byte
	err := t.do(ctx, "sign a receipt", func(c *connection, s *session) error {
		if c.receipt == nil {
			return errNoReceiptKey
		}
		raw, err := s.Sign(p11.Plain(p11.ECDSA), c.receipt.handle, digest[:], make([]byte, 64))
		if err != nil {
			return c.blame(err)
		}
		signature, err = signatureDER(raw)
		return err
	})
	if err != nil {
		return nil, err
	}
	return signature, nil
}

var errNoReceiptKey = fmt.Errorf("%w: no receipt key is pinned; run init to make one", ErrUnsupported)

// signer is a receipt key of one connection.
type signer struct {
	handle p11.Handle
	spki   []byte
}

func (s *signer) fingerprint() Fingerprint { return sha256.Sum256(s.spki) }

// findReceiptKey finds the pinned receipt key. A lookalike is passed over: the
// fingerprint decides.
func (c *connection) findReceiptKey(s *p11.Session) error {
	pin := c.t.cfg.Pins.ReceiptKey
	if pin == (Fingerprint{}) {
		return nil
	}
	found, err := receiptKeys(s, c.rules)
	for _, key := range found {
		if key.fingerprint() == pin {
			c.receipt = key
			return nil
		}
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, &PinnedKeyError{"receipt key", pin})
}

// signatureDER turns r ‖ s, as PKCS#11 has ECDSA signatures, into DER.
func signatureDER(raw []byte) ([]byte, error) {
	if len(raw) != 64 {
		return nil, fmt.Errorf("hsm: the token's ECDSA signature has %d bytes", len(raw))
	}
	return asn1.Marshal(struct{ R, S asn1.RawValue }{derInteger(raw[:32]), derInteger(raw[32:])})
}

func derInteger(b []byte) asn1.RawValue {
	b = bytes.TrimLeft(b, "\x00")
	if len(b) == 0 || b[0] >= 0x80 {
		b = append([]byte{0}, b...)
	}
	return asn1.RawValue{Tag: asn1.TagInteger, Bytes: b}
}

// Values that receipts name.
var (
	classNames   = map[uint64]string{p11.ClassSecretKey: "CKO_SECRET_KEY"}
	keyTypeNames = map[uint64]string{p11.KeyAES: "CKK_AES"}
)

// describe writes attributes as words of the form NAME=VALUE, by the names of
// PKCS#11: booleans as true and false, mechanisms in hexadecimal, separated by
// commas.
func describe(attrs []p11.Attr) []string {
	words := make([]string, len(attrs))
	for i, a := range attrs {
		words[i] = attributeName(a.Type) + "=" + describeValue(a)
	}
	return words
}

func describeValue(a p11.Attr) string {
	value := a.Value()
	switch {
	case a.Type == p11.AllowedMechanisms:
		var list []string
		for ulong := range slices.Chunk(value, 8) {
			list = append(list, fmt.Sprintf("0x%X", binary.NativeEndian.Uint64(ulong)))
		}
		return strings.Join(list, ",")
	case a.Type == p11.Label:
		return string(value)
	case a.Type == p11.ID:
		return hex.EncodeToString(value)
	case len(value) == 1:
		return strconv.FormatBool(value[0] != 0)
	case len(value) == 8:
		n := binary.NativeEndian.Uint64(value)
		name, ok := classNames[n]
		if a.Type == p11.KeyType {
			name, ok = keyTypeNames[n]
		}
		if ok {
			return name
		}
		return fmt.Sprintf("0x%X", n)
	default:
		return hex.EncodeToString(value)
	}
}
