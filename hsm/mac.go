package hsm

import (
	"context"
	"crypto/subtle"
	"encoding/binary"
	"fmt"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// macLen is the length of an HMAC-SHA-256 in bytes.
const macLen = 32

// MAC is HMAC-SHA-256 (FIPS 198-1), computed in the token, over the domain and
// the parts, each preceded by its length in four bytes: no two lists of parts
// give the same input, and no domain another's.
func (t *Token) MAC(ctx context.Context, domain string, parts ...[]byte) ([macLen]byte, error) {
	var sum [macLen]byte
	input := macInput(domain, parts...)
	err := t.do(ctx, "compute a MAC", func(c *connection, s *session) error {
		buf := make([]byte, macLen)
		out, err := s.Sign(p11.Plain(p11.SHA256HMAC), c.mac, input, buf)
		if err != nil {
			return c.blame(err)
		}
		if len(out) != macLen {
			return fmt.Errorf("hsm: the token's HMAC-SHA-256 has %d bytes", len(out))
		}
		copy(sum[:], out)
		return nil
	})
	if err != nil {
		return [macLen]byte{}, err
	}
	return sum, nil
}

// VerifyMAC computes the MAC again and compares in constant time. On a
// mismatch it returns ErrUntrusted.
func (t *Token) VerifyMAC(ctx context.Context, mac []byte, domain string, parts ...[]byte) error {
	want, err := t.MAC(ctx, domain, parts...)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(mac, want[:]) != 1 {
		return fmt.Errorf("%w: a MAC of %s does not match", ErrUntrusted, domain)
	}
	return nil
}

// fingerprintDomain is of the MAC whose SHA-256 names the MAC key.
const fingerprintDomain = "keyferry/fingerprint/v1"

func macInput(domain string, parts ...[]byte) []byte {
	n := 4 + len(domain)
	for _, p := range parts {
		n += 4 + len(p)
	}
	out := make([]byte, 0, n)
	out = binary.BigEndian.AppendUint32(out, uint32(len(domain)))
	out = append(out, domain...)
	for _, p := range parts {
		out = binary.BigEndian.AppendUint32(out, uint32(len(p)))
		out = append(out, p...)
	}
	return out
}

// blame is for errors of the token's own permanent keys: a handle that is no
// longer valid means that the connection is not.
func (c *connection) blame(err error) error {
	if worst(err) == p11.HandleFault {
		return fmt.Errorf("%w (a key of the token is gone: %w)", p11.DeviceRemoved, err)
	}
	return err
}

// Random returns n bytes of the token's generator.
func (t *Token) Random(ctx context.Context, n int) ([]byte, error) {
	buf := make([]byte, n)
	err := t.do(ctx, "generate random bytes", func(_ *connection, s *session) error { return s.Random(buf) })
	if err != nil {
		return nil, err
	}
	return buf, nil
}
