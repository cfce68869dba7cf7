package engine

import (
	"context"
	"crypto/subtle"
	"errors"
	"time"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// importTokenDomain labels the MAC of an import token.
const importTokenDomain = "keyferry/import-token/v1"

// importTokenVersion is the first byte of an import token.
const importTokenVersion = 1

// maxImportToken is longer than any import token, in bytes.
const maxImportToken = 512

// importToken is what GetParametersForImport hands to a customer, who hands it
// back with the wrapped material. Its bytes are
//
//	version (1) ‖ record ‖ MAC (32)
//
// where the record holds token id (16), KeyId, pair id (16), pair fingerprint
// (32), algorithm, pair spec, time of issue and time of expiry in this order,
// and the MAC is made in the token over the version and the record.
//
// Whoever has the token's PIN can forge the MAC. It gains them nothing: the
// store has a row for each import token, and both must say the same.
type importToken struct {
	id          [16]byte
	keyID       string
	pair        hsm.PairID
	fingerprint hsm.Fingerprint
	algorithm   hsm.Algorithm
	spec        hsm.PairSpec // of the pair, and its custody: see kindOf
	issuedAt    time.Time
	expiresAt   time.Time
}

// macLen is the length of HMAC-SHA-256.
const macLen = 32

func (t *importToken) signed() []byte {
	b := append(make([]byte, 0, 256), importTokenVersion)
	b = appendField(b, t.id[:])
	b = appendField(b, t.keyID)
	b = appendField(b, t.pair[:])
	b = appendField(b, t.fingerprint[:])
	b = appendField(b, t.algorithm)
	b = appendField(b, t.spec)
	b = appendTime(b, t.issuedAt)
	return appendTime(b, t.expiresAt)
}

// issue encodes the token with its MAC.
func (e *Engine) issue(ctx context.Context, t *importToken) ([]byte, error) {
	signed := t.signed()
	mac, err := e.authority.sign(ctx, importTokenDomain, signed)
	if err != nil {
		return nil, tokenError(err)
	}
	return append(signed, mac...), nil
}

// parseImportToken reads what issue wrote. Its word counts for nothing until
// the MAC is verified. It reports false for bytes that no issue ever wrote.
func parseImportToken(data []byte) (t importToken, ok bool) {
	if len(data) <= 1+macLen || len(data) > maxImportToken || data[0] != importTokenVersion {
		return importToken{}, false
	}
	f := readFields(data[1 : len(data)-macLen])
	f.fixed(t.id[:])
	t.keyID = string(f.next())
	f.fixed(t.pair[:])
	f.fixed(t.fingerprint[:])
	t.algorithm = hsm.Algorithm(f.next())
	t.spec = hsm.PairSpec(f.next())
	t.issuedAt = f.time()
	t.expiresAt = f.time()
	return t, f.end()
}

// verifyImportToken checks the MAC of an import token that was parsed from
// data. A token that is not ours is InvalidImportToken.
func (e *Engine) verifyImportToken(ctx context.Context, data []byte) error {
	signed, mac := data[:len(data)-macLen], data[len(data)-macLen:]
	err := e.authority.verify(ctx, importTokenDomain, signed, mac)
	if errors.Is(err, hsm.ErrUntrusted) {
		return &Error{Kind: InvalidImportToken}
	}
	if err != nil {
		return tokenError(err)
	}
	return nil
}

// matches reports whether the store knows the token as it presents itself.
func (t *importToken) matches(row *store.ImportToken) bool {
	same := subtle.ConstantTimeCompare(t.id[:], row.ID[:]) &
		subtle.ConstantTimeCompare(t.fingerprint[:], row.Pair.Fingerprint[:]) &
		subtle.ConstantTimeCompare(t.pair[:], row.Pair.ID[:])
	return same == 1 &&
		t.keyID == row.KeyID &&
		string(t.algorithm) == row.Pair.Algorithm &&
		string(t.spec) == row.Pair.Spec &&
		t.issuedAt.Equal(row.IssuedAt) &&
		t.expiresAt.Equal(row.ExpiresAt)
}
