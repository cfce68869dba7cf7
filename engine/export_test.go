package engine

import (
	"context"
	"time"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// Forgery is an import token of whoever has the token's PIN, and so its MAC.
type Forgery struct {
	ID        [16]byte
	KeyID     string
	Pair      hsm.PairID
	Print     hsm.Fingerprint
	Algorithm hsm.Algorithm
	Spec      hsm.PairSpec
	Issued    time.Time
	Expires   time.Time
}

// Forge changes what an import token says and gives it a good MAC.
func (e *Engine) Forge(ctx context.Context, token []byte, change func(*Forgery)) ([]byte, error) {
	t, ok := parseImportToken(token)
	if !ok {
		panic("not an import token")
	}
	f := Forgery{t.id, t.keyID, t.pair, t.fingerprint, t.algorithm, t.spec, t.issuedAt, t.expiresAt}
	change(&f)
	return e.issue(ctx, &importToken{f.ID, f.KeyID, f.Pair, f.Print, f.Algorithm, f.Spec, f.Issued, f.Expires})
}

// SealRow gives a row a good MAC.
func (e *Engine) SealRow(ctx context.Context, row *store.Key) error { return e.sealRow(ctx, row) }

// SetUsageLimits replaces 2^32 uses of a key and 2^16 unwritten ones, or 2^12
// reserved ones.
func (e *Engine) SetUsageLimits(budget, ahead uint64) {
	e.usage.budget, e.usage.ahead, e.usage.lost = budget, ahead, ahead
}

// SetHeadAfter replaces how many entries of the log of receipts do not wait for
// a head.
func (e *Engine) SetHeadAfter(n int64) { e.headAfter = n }

// OpenKeys is how many keys the cache holds open.
func (e *Engine) OpenKeys() int {
	e.cache.mu.Lock()
	defer e.cache.mu.Unlock()
	return e.cache.recent.Len()
}

// SetBounds replaces the bounds of what the Engine does of its own accord.
func (c *Config) SetBounds(pass, notice, grace, end time.Duration) {
	c.bounds = bounds{pass: pass, notice: notice, grace: grace, close: end}
}
