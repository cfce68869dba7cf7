package hsm

import (
	"context"

	"github.com/miekg/pkcs11"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// MeasuredForTest is the template of customers' unwraps for another client of
// PKCS#11: the bare loop of the benchmarks, and thieves.
func MeasuredForTest() []*pkcs11.Attribute { return foreign(measured()) }

// OpenedForTest is the template of opened blobs, likewise.
func OpenedForTest() []*pkcs11.Attribute { return foreign(opened(aesNumbers, false)) }

// HandleForTest is the handle of open material.
func HandleForTest(k *Key) pkcs11.ObjectHandle { return pkcs11.ObjectHandle(k.handle) }

func foreign(attrs []p11.Attr) []*pkcs11.Attribute {
	var out []*pkcs11.Attribute
	for _, a := range attrs {
		out = append(out, &pkcs11.Attribute{Type: uint(a.Type), Value: a.Value()})
	}
	return out
}

// CopyVaultForTest copies the vault key with an empty template, which
// miekg/pkcs11 cannot pass: the one copy that the token lets a user make.
func CopyVaultForTest(ctx context.Context, t *Token) error {
	return t.do(ctx, "copy the vault", func(c *connection, s *session) error {
		_, err := s.CopyObject(c.vaults[AES256].handle, p11.NewTemplate())
		return err
	})
}
