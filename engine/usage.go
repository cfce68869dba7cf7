package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// AES-GCM with random 96-bit IVs must not be used more than 2^32 times under
// one key (NIST SP 800-38D section 8.3). A CMK has one material for ever, so
// its uses are counted over its whole life, however often the material is
// deleted and comes back.
//
// Counting every use durably would cost a commit each, so a process counts in
// memory and writes down now and then. What a crash loses is paid for in
// advance: a process never has more than maxUnwritten uses of one CMK that are
// not written, and each row says under which boot number it was written. Who
// loads a row charges maxUnwritten for that boot and for each one since, as
// each may have lost so many, and then no number of crashes makes the count
// too small. A boot number is drawn at the first encryption, not at the start,
// so that a process that restarts and restarts does not use up anybody's
// budget.
//
// Nodes that share a store count side by side, and a row keeps the greatest of
// their counts. All of them together have used the CMK no more often than that
// times their number: so the budget of each is divided by it. Their boots
// alternate in the row, so that what lies between two of them says nothing. Who
// loads the row of another boot therefore charges for one, and writes that down
// before it counts on from there: so no node ever starts below what it lost.
const (
	gcmBudget    = 1 << 32
	maxUnwritten = 1 << 16
	// Less where nodes charge each other whenever they take turns.
	maxUnwrittenShared = 1 << 10
)

// usageDomain labels the MAC of a usage row.
const usageDomain = "keyferry/usage/v1"

// usageBatch is how many counts one transaction stores.
const usageBatch = 256

// usage counts the AES-GCM encryptions of every CMK in use.
type usage struct {
	token *hsm.Token
	store store.Store
	log   *slog.Logger
	seen  func() // that a warning was given

	budget    uint64 // gcmBudget
	unwritten uint64 // maxUnwritten

	shared bool // with other nodes

	booting chan struct{} // held while boot is drawn
	boot    atomic.Uint64 // 0: none drawn yet

	mu       sync.Mutex
	counters map[string]*counter // of keys that are open, or not all written
}

// A counter counts the uses of one CMK.
type counter struct {
	usage *usage
	keyID string
	busy  chan struct{} // held while the row is loaded or written on a caller's time
	ready atomic.Bool   // the row was loaded

	uses    atomic.Uint64 // including those charged for earlier boots
	written atomic.Uint64 // what the store has, at least
	warning atomic.Uint64 // how many uses are worth the next warning

	holders int // of usage.mu: how many open keys count with it
}

func newUsage(token *hsm.Token, st store.Store, log *slog.Logger, seen func()) *usage {
	return &usage{
		token: token, store: st, log: log, seen: seen,
		budget:    gcmBudget,
		unwritten: maxUnwritten,
		booting:   make(chan struct{}, 1),
		counters:  make(map[string]*counter),
	}
}

// share divides the budget among as many nodes as there are at most.
func (u *usage) share(nodes int) {
	if nodes > 1 {
		u.shared, u.budget, u.unwritten = true, gcmBudget/uint64(nodes), maxUnwrittenShared
	}
}

// hold returns the one counter of a CMK. The caller lets it go.
func (u *usage) hold(keyID string) *counter {
	u.mu.Lock()
	defer u.mu.Unlock()
	c := u.counters[keyID]
	if c == nil {
		c = &counter{usage: u, keyID: keyID, busy: make(chan struct{}, 1)}
		u.counters[keyID] = c
	}
	c.holders++
	return c
}

func (u *usage) letGo(c *counter) {
	u.mu.Lock()
	defer u.mu.Unlock()
	c.holders--
	u.tidy(c)
}

// tidy forgets a counter that nobody holds and that would be the same if it
// were loaded again. The caller holds usage.mu.
func (u *usage) tidy(c *counter) {
	if c.holders == 0 && c.uses.Load() == c.written.Load() && u.counters[c.keyID] == c {
		delete(u.counters, c.keyID)
	}
}

// forget drops the counter of a CMK that was deleted.
func (u *usage) forget(keyID string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.counters, keyID)
}

// count takes one use from the budget of the CMK before it happens, or refuses
// it with LimitExceeded. In all but one of 65,536 calls it waits for nothing.
func (c *counter) count(ctx context.Context) error {
	if !c.ready.Load() {
		if err := c.load(ctx); err != nil {
			return err
		}
	}
	n := c.uses.Add(1)
	if n > c.usage.budget {
		c.uses.Add(^uint64(0))
		return &Error{
			Kind: LimitExceeded,
			Hint: "the key has encrypted as often as AES-GCM allows (NIST SP 800-38D section 8.3); it still decrypts",
		}
	}
	if n >= c.warning.Load() {
		c.warn(ctx, n)
	}
	for n > c.written.Load()+c.usage.unwritten {
		if err := c.write(ctx); err != nil {
			c.uses.Add(^uint64(0)) // it does not happen
			return err
		}
	}
	return nil
}

// load reads the row of the CMK, once. The first use ever makes the row, so
// that a later boot knows since when uses may be missing from it.
func (c *counter) load(ctx context.Context) error {
	if err := acquire(ctx, c.busy); err != nil {
		return err
	}
	defer func() { <-c.busy }()
	if c.ready.Load() {
		return nil
	}
	u := c.usage
	boot, err := u.bootNumber(ctx)
	if err != nil {
		return err
	}
	row, err := u.store.Usage(ctx, c.keyID)
	switch {
	case errors.Is(err, store.ErrNotFound):
		row = store.Usage{KeyID: c.keyID, Boot: boot}
		if err := u.put(ctx, []store.Usage{row}); err != nil {
			return err
		}
	case err != nil:
		return storeError(err)
	default:
		if err := u.verify(ctx, c.keyID, &row, boot); err != nil {
			return err
		}
		if u.shared && row.Boot != boot {
			row.Uses, row.Boot = row.Uses+u.unwritten, boot
			if err := u.put(ctx, []store.Usage{row}); err != nil {
				return err
			}
		}
	}
	uses := u.charged(&row, boot)
	c.uses.Store(uses)
	c.written.Store(uses)
	c.warning.Store(nextWarning(uses, u.budget))
	c.ready.Store(true)
	if uses >= u.budget/2 {
		c.announce(ctx, uses)
	}
	return nil
}

// charged is a row's count with what boots before this one may have lost. The
// boot number has no MAC, so someone may have made it any number.
func (u *usage) charged(row *store.Usage, boot uint64) uint64 {
	over, lost := bits.Mul64(boot-row.Boot, u.unwritten)
	uses, carry := bits.Add64(row.Uses, lost, 0)
	if over|carry != 0 {
		return math.MaxUint64
	}
	return uses
}

// write stores the count of one CMK on its caller's time.
func (c *counter) write(ctx context.Context) error {
	if err := acquire(ctx, c.busy); err != nil {
		return err
	}
	defer func() { <-c.busy }()
	if c.uses.Load() <= c.written.Load()+c.usage.unwritten/2 {
		return nil // someone else has, while this one waited
	}
	return c.usage.writeAll(ctx, []*counter{c})
}

// flush stores every count that has changed.
func (u *usage) flush(ctx context.Context) error {
	u.mu.Lock()
	var changed []*counter
	for _, c := range u.counters {
		if c.ready.Load() && c.uses.Load() != c.written.Load() {
			changed = append(changed, c)
		}
	}
	u.mu.Unlock()
	for len(changed) > 0 {
		n := min(len(changed), usageBatch)
		if err := u.writeAll(ctx, changed[:n]); err != nil {
			return err
		}
		changed = changed[n:]
	}
	return nil
}

func (u *usage) writeAll(ctx context.Context, counters []*counter) error {
	rows := make([]store.Usage, len(counters))
	for i, c := range counters {
		rows[i] = store.Usage{KeyID: c.keyID, Uses: c.uses.Load(), Boot: u.boot.Load()}
	}
	if err := u.put(ctx, rows); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, c := range counters {
		raise(&c.written, rows[i].Uses)
		u.tidy(c)
	}
	return nil
}

// raise sets v to at least n.
func raise(v *atomic.Uint64, n uint64) {
	for old := v.Load(); old < n && !v.CompareAndSwap(old, n); old = v.Load() {
	}
}

func (u *usage) put(ctx context.Context, rows []store.Usage) error {
	for i := range rows {
		mac, err := u.token.MAC(ctx, usageDomain, encodeUsage(&rows[i]))
		if err != nil {
			return tokenError(err)
		}
		rows[i].MAC = mac[:]
	}
	if err := u.store.PutUsages(ctx, rows); err != nil {
		return storeError(err)
	}
	return nil
}

func encodeUsage(row *store.Usage) []byte {
	b := appendField(nil, row.KeyID)
	b = appendUint(b, row.Uses)
	return appendUint(b, row.Boot)
}

// verify refuses a row that is not ours, or of another CMK, or from a boot
// that has not been.
func (u *usage) verify(ctx context.Context, keyID string, row *store.Usage, boot uint64) error {
	err := u.token.VerifyMAC(ctx, row.MAC, usageDomain, encodeUsage(row))
	if err == nil && (row.KeyID != keyID || row.Boot > boot && !u.shared) {
		err = fmt.Errorf("%w: a count of uses of another key or from a later boot", hsm.ErrUntrusted)
	}
	if errors.Is(err, hsm.ErrUntrusted) {
		u.log.LogAttrs(ctx, slog.LevelError, "the count of a key's uses was changed by someone else; the key is refused",
			slog.String("key_id", keyID))
	}
	if err != nil {
		return tokenError(err)
	}
	return nil
}

// bootNumber draws this process's boot number when it is first needed.
func (u *usage) bootNumber(ctx context.Context) (uint64, error) {
	if boot := u.boot.Load(); boot != 0 {
		return boot, nil
	}
	if err := acquire(ctx, u.booting); err != nil {
		return 0, err
	}
	defer func() { <-u.booting }()
	if boot := u.boot.Load(); boot != 0 {
		return boot, nil
	}
	boot, err := u.store.NextBoot(ctx)
	if err != nil {
		return 0, storeError(err)
	}
	u.boot.Store(boot)
	return boot, nil
}

// nextWarning is the next of 1/2, 3/4 and 7/8 of the budget after uses.
func nextWarning(uses, budget uint64) uint64 {
	for _, eighths := range []uint64{4, 6, 7} {
		if at := budget / 8 * eighths; at > uses {
			return at
		}
	}
	return math.MaxUint64
}

// warn says once for each threshold how much of the budget is gone.
func (c *counter) warn(ctx context.Context, uses uint64) {
	at := c.warning.Load()
	if uses >= at && c.warning.CompareAndSwap(at, nextWarning(uses, c.usage.budget)) {
		c.announce(ctx, uses)
	}
}

func (c *counter) announce(ctx context.Context, uses uint64) {
	c.usage.seen()
	c.usage.log.LogAttrs(ctx, slog.LevelWarn, "a key nears the number of encryptions that AES-GCM allows; plan its successor",
		slog.String("key_id", c.keyID), slog.Uint64("uses", uses), slog.Uint64("allowed", c.usage.budget))
}

// acquire takes a lock of one place, or gives up when ctx ends.
func acquire(ctx context.Context, lock chan struct{}) error {
	select {
	case lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return &Error{Kind: Unavailable, cause: ctx.Err()}
	}
}
