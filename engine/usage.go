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
// memory, and what is stored is never less than what was used, once what a
// crash may have cost is added.
//
// A process that has the store to itself writes its counts down now and then.
// It never has more than maxUnwritten uses of one CMK that are not written, and
// each row says under which boot number it was written. Who loads a row charges
// maxUnwritten for that boot and for each one since, as each may have lost so
// many. A boot number is drawn at the first encryption, not at the start, so
// that a process that restarts and restarts does not use up anybody's budget.
//
// Nodes that share a store write first and use then: each adds maxReserved to
// the count before it uses a CMK so often, and takes back what is left of them
// when it no longer has the CMK open. A row is replaced only by who knows what
// it says, so that no addition is lost. So there is one count, of all nodes,
// that nothing that crashes makes too small; it costs at most maxReserved uses.
// Such a row has no boot number.
const (
	gcmBudget    = 1 << 32
	maxUnwritten = 1 << 16
	maxReserved  = 1 << 12
)

// usageDomain labels the MAC of a usage row.
const usageDomain = "keyferry/usage/v1"

// usageBatch is how many counts one transaction stores.
const usageBatch = 256

// usage counts the AES-GCM encryptions of every CMK in use.
type usage struct {
	token  *hsm.Token
	store  store.Store
	log    *slog.Logger
	seen   func() // that a warning was given
	shared bool   // the store, with other nodes

	budget uint64 // gcmBudget
	ahead  uint64 // maxUnwritten, or maxReserved
	lost   uint64 // maxUnwritten: what a boot may have lost that had the store to itself

	booting chan struct{} // held while boot is drawn
	boot    atomic.Uint64 // 0: none drawn yet

	mu       sync.Mutex
	counters map[string]*counter // of keys that are open, or have something to write
}

// A counter counts the uses of one CMK.
type counter struct {
	usage *usage
	keyID string
	busy  chan struct{} // held while the row is read or written

	mu      sync.Mutex
	loaded  bool
	uses    uint64 // of all nodes, as far as this one knows
	left    uint64 // uses before the row must be written again
	stored  uint64 // what the row says
	written uint64 // what the row stands for, with the charges for crashes
	warning uint64 // how many uses are worth the next warning

	holders int // of usage.mu: how many open keys count with it
}

func newUsage(token *hsm.Token, st store.Store, log *slog.Logger, seen func()) *usage {
	u := &usage{
		token: token, store: st, log: log, seen: seen, shared: st.Shared(),
		budget:   gcmBudget,
		ahead:    maxUnwritten,
		lost:     maxUnwritten,
		booting:  make(chan struct{}, 1),
		counters: make(map[string]*counter),
	}
	if u.shared {
		u.ahead = maxReserved
	}
	return u
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

// tidy forgets a counter that nobody holds and that has nothing to write. The
// caller holds usage.mu.
func (u *usage) tidy(c *counter) {
	if c.holders == 0 && !c.unsettled() && u.counters[c.keyID] == c {
		delete(u.counters, c.keyID)
	}
}

// unsettled reports whether the row does not say what it should if this process
// uses the CMK no more.
func (c *counter) unsettled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.usage.shared {
		return c.left > 0
	}
	return c.loaded && c.uses != c.written
}

// forget drops the counter of a CMK that was deleted.
func (u *usage) forget(keyID string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.counters, keyID)
}

// count takes one use from the budget of the CMK before it happens, or refuses
// it with LimitExceeded. Most calls wait for nothing.
func (c *counter) count(ctx context.Context) error {
	for {
		n, warn, ok := c.take()
		if warn {
			c.announce(ctx, n)
		}
		if ok {
			return nil
		}
		if err := c.refill(ctx); err != nil {
			return err
		}
	}
}

// take takes a use that needs no writing, if there is one, and says whether the
// count is worth a warning.
func (c *counter) take() (uses uint64, warn, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left == 0 {
		return 0, false, false
	}
	c.left--
	c.uses++
	if c.uses >= c.warning {
		c.warning = nextWarning(c.uses, c.usage.budget)
		warn = true
	}
	return c.uses, warn, true
}

// refill makes uses possible, or returns LimitExceeded.
func (c *counter) refill(ctx context.Context) error {
	if err := acquire(ctx, c.busy); err != nil {
		return err
	}
	defer func() { <-c.busy }()
	c.mu.Lock()
	left, loaded, uses := c.left, c.loaded, c.uses
	c.mu.Unlock()
	switch {
	case left > 0: // of someone else, while this one waited
		return nil
	case c.usage.shared:
		return c.reserve(ctx)
	case !loaded:
		return c.load(ctx)
	case uses >= c.usage.budget:
		return errUsedUp()
	}
	return c.usage.writeAll(ctx, []*counter{c})
}

func errUsedUp() error {
	return &Error{
		Kind: LimitExceeded,
		Hint: "the key has encrypted as often as AES-GCM allows (NIST SP 800-38D section 8.3); it still decrypts",
	}
}

// errUsesContended: others replaced the row between each reading and writing.
func errUsesContended() error {
	return &Error{Kind: Unavailable, Hint: "the key's uses are being counted by others all the time"}
}

// reserve adds uses to the count of all nodes, for this one.
func (c *counter) reserve(ctx context.Context) error {
	u := c.usage
	for range maxConflicts {
		row, uses, err := c.current(ctx)
		if err != nil {
			return err
		}
		if uses >= u.budget {
			c.open(ctx, uses, 0, row.Uses)
			return errUsedUp()
		}
		n := min(u.ahead, u.budget-uses)
		stored, err := u.put(ctx, []store.UsageUpdate{{Usage: store.Usage{KeyID: c.keyID, Uses: uses + n}, Was: row.Uses}})
		if err != nil {
			return err
		}
		if stored[0] {
			c.open(ctx, uses, n, uses+n)
			return nil
		}
	}
	return errUsesContended()
}

// load reads the row of the CMK. One that is not of this kind of counting yet
// is written, so that a later boot knows since when uses may be missing from it.
func (c *counter) load(ctx context.Context) error {
	u := c.usage
	boot, err := u.bootNumber(ctx)
	if err != nil {
		return err
	}
	row, uses, err := c.current(ctx)
	if err != nil {
		return err
	}
	if row.Boot == 0 { // or there is none
		stored, err := u.put(ctx, []store.UsageUpdate{{Usage: store.Usage{KeyID: c.keyID, Uses: uses, Boot: boot}, Was: row.Uses}})
		if err != nil {
			return err
		}
		if !stored[0] { // the CMK was deleted at this moment
			return &Error{Kind: KeyNotFound}
		}
	}
	c.open(ctx, uses, min(u.ahead, u.budget-min(uses, u.budget)), row.Uses)
	if uses >= u.budget {
		return errUsedUp()
	}
	return nil
}

// open says what is known of the CMK's uses, and how many may follow.
func (c *counter) open(ctx context.Context, uses, left, stored uint64) {
	c.mu.Lock()
	first := !c.loaded
	c.loaded = true
	c.uses, c.left, c.stored, c.written = uses, left, stored, uses
	if first {
		c.warning = nextWarning(uses, c.usage.budget)
	}
	c.mu.Unlock()
	if first && uses >= c.usage.budget/2 {
		c.announce(ctx, uses)
	}
}

// current returns the row of the CMK, and how many uses it stands for.
func (c *counter) current(ctx context.Context) (row store.Usage, uses uint64, err error) {
	if row, _, err = c.usage.read(ctx, c.keyID); err == nil {
		uses, err = c.usage.charged(ctx, &row)
	}
	return row, uses, err
}

// read returns the row of a CMK, which is ours, or that of one that was never
// used.
func (u *usage) read(ctx context.Context, keyID string) (row store.Usage, found bool, err error) {
	row, err = u.store.Usage(ctx, keyID)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return store.Usage{KeyID: keyID}, false, nil
	case err != nil:
		return row, false, storeError(err)
	}
	err = u.verify(ctx, keyID, &row)
	return row, true, err
}

// charged is a row's count with what boots before this one may have lost. A row
// without a boot number has lost nothing.
func (u *usage) charged(ctx context.Context, row *store.Usage) (uint64, error) {
	if row.Boot == 0 {
		return row.Uses, nil
	}
	boot, err := u.bootNumber(ctx)
	if err != nil {
		return 0, err
	}
	if row.Boot > boot {
		u.log.LogAttrs(ctx, slog.LevelError, "the count of a key's uses is of a boot that has not been; the key is refused",
			slog.String("key_id", row.KeyID))
		return 0, tokenError(fmt.Errorf("%w: a count of uses from a later boot", hsm.ErrUntrusted))
	}
	// Whoever can write to the database may have set the boot numbers back.
	over, lost := bits.Mul64(boot-row.Boot, u.lost)
	uses, carry := bits.Add64(row.Uses, lost, 0)
	if over|carry != 0 {
		return math.MaxUint64, nil
	}
	return uses, nil
}

// flush stores every count that has changed, and with all set takes back every
// use that was reserved, of open keys too.
func (u *usage) flush(ctx context.Context, all bool) error {
	u.mu.Lock()
	var changed []*counter
	for _, c := range u.counters {
		if (!u.shared || all || c.holders == 0) && c.unsettled() {
			changed = append(changed, c)
		}
	}
	u.mu.Unlock()
	for len(changed) > 0 {
		n := min(len(changed), usageBatch)
		var batch []*counter
		for _, c := range changed[:n] {
			select {
			case c.busy <- struct{}{}:
				batch = append(batch, c)
			default: // whoever has it writes it, or the next flush does
			}
		}
		err := u.writeAll(ctx, batch)
		for _, c := range batch {
			<-c.busy
		}
		if err != nil {
			return err
		}
		changed = changed[n:]
	}
	return nil
}

// writeAll stores the counts of counters that the caller keeps busy. In a store
// that is shared it takes back what they have reserved.
func (u *usage) writeAll(ctx context.Context, counters []*counter) error {
	for range maxConflicts {
		updates := make([]store.UsageUpdate, len(counters))
		for i, c := range counters {
			updates[i] = c.settle()
		}
		if len(updates) == 0 {
			return nil
		}
		stored, err := u.put(ctx, updates)
		if err != nil {
			return err // what was to be taken back is lost: perhaps it was
		}
		var behind []*counter
		for i, c := range counters {
			if stored[i] {
				c.settled(updates[i].Uses)
			} else if again, err := c.reread(ctx, &updates[i]); err != nil {
				return err
			} else if again {
				behind = append(behind, c)
			}
		}
		u.mu.Lock()
		for _, c := range counters {
			u.tidy(c)
		}
		u.mu.Unlock()
		if counters = behind; len(counters) == 0 {
			return nil
		}
	}
	return errUsesContended()
}

// settle says what the row should say now. Of what was reserved nothing is left
// from here on.
func (c *counter) settle() store.UsageUpdate {
	c.mu.Lock()
	defer c.mu.Unlock()
	update := store.UsageUpdate{Usage: store.Usage{KeyID: c.keyID, Uses: c.uses, Boot: c.usage.boot.Load()}, Was: c.stored}
	if c.usage.shared {
		update.Uses, update.Boot = c.stored-min(c.left, c.stored), 0
		c.left = 0
	}
	return update
}

// settled takes note of what the row says.
func (c *counter) settled(uses uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stored = uses
	if !c.usage.shared {
		c.written = uses
		c.left = min(uses+c.usage.ahead, c.usage.budget) - c.uses
	}
}

// reread finds out what the row says that was not replaced, and whether to try
// again.
func (c *counter) reread(ctx context.Context, refused *store.UsageUpdate) (again bool, err error) {
	row, found, err := c.usage.read(ctx, c.keyID)
	if err != nil {
		return false, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stored = row.Uses
	switch {
	case c.usage.shared:
		if found {
			c.left = refused.Was - refused.Uses
		}
	case !found: // nor is the CMK
		c.loaded, c.left = false, 0
	default:
		c.uses = max(c.uses, row.Uses)
	}
	return found, nil
}

// put has the store replace rows, and reports which of them it did.
func (u *usage) put(ctx context.Context, rows []store.UsageUpdate) ([]bool, error) {
	for i := range rows {
		mac, err := u.token.MAC(ctx, usageDomain, encodeUsage(&rows[i].Usage))
		if err != nil {
			return nil, tokenError(err)
		}
		rows[i].MAC = mac[:]
	}
	stored, err := u.store.PutUsages(ctx, rows)
	if err != nil {
		return nil, storeError(err)
	}
	return stored, nil
}

func encodeUsage(row *store.Usage) []byte {
	b := appendField(nil, row.KeyID)
	b = appendUint(b, row.Uses)
	return appendUint(b, row.Boot)
}

// verify refuses a row that is not ours, or of another CMK.
func (u *usage) verify(ctx context.Context, keyID string, row *store.Usage) error {
	err := u.token.VerifyMAC(ctx, row.MAC, usageDomain, encodeUsage(row))
	if err == nil && row.KeyID != keyID {
		err = fmt.Errorf("%w: a count of uses of another key", hsm.ErrUntrusted)
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

// announce says how much of the budget is gone.
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
