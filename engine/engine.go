// Package engine keeps customer master keys (CMKs) whose material their owners
// bring: it hands out parameters for an import, imports wrapped material into
// a PKCS#11 token, lets it expire, deletes it, and encrypts and decrypts under
// it, in the token.
//
// Start with New. An Engine needs a token that hsm.Open opened and a
// store.Store; both stay the caller's to close, after the Engine.
//
// What it guarantees:
//
//   - Key material is in the clear nowhere but in the token.
//   - An import that was answered is durable. One that was refused has changed
//     nothing: a CMK is never Enabled by it. One that ended Unavailable may
//     have taken effect, as a whole or not at all.
//   - A CMK has one material for its whole life, even across deletion and
//     expiry; what identifies it is measured in the token.
//   - Material stops working in the second in which it expires, and when
//     DeleteKeyMaterial, DisableKey or ScheduleKeyDeletion returns, on this
//     Engine; within a second on every other one of the same store, even one
//     that cannot reach the store any more.
//   - No row that someone else wrote or moved is used: each carries a MAC that
//     only the token can make. An old row brought back whole is not noticed.
//   - Every import and every loss of material leaves an entry in a log that the
//     token signs, committed in the same transaction; see package receipt.
//
// Every method takes a context, which bounds waiting for the store, for a
// session and for wrapping pairs. A call that has entered the PKCS#11 library
// is not interrupted. Every request that fails answers an *Error; see Kind.
package engine

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// Config says what an Engine works with. Token and Store are required. A Store
// that is not Shared is for one Engine: of two on it each would count for itself
// what is to be bounded over both.
type Config struct {
	Token  *hsm.Token
	Store  store.Store
	Logger *slog.Logger     // nil: discards
	Now    func() time.Time // nil: time.Now

	Observer Observer // nil: none

	PoolSize  int            // ready wrapping pairs per spec and algorithm; 0: 8
	PairBound int            // outstanding ones before they are shared; 0: 64
	PairSpecs []hsm.PairSpec // offered if the token has them; nil: DefaultPairSpecs

	// Custody is that of CMKs which do not ask for one; 0: hsm.Sealed. Material
	// of CMKs that ask for another is kept in that, if the token can, unless
	// OnlyCustody.
	Custody     hsm.Custody
	OnlyCustody bool
	// ResidentLimit is how many objects of resident material the token may
	// hold. From 80 percent on a warning is logged, and at the limit the
	// material of no further CMK is imported. 0: DefaultResidentLimit.
	ResidentLimit int

	CacheSize int // open keys; 0: 10,000

	// A refused import is answered at FailureFloor after its start or at a
	// multiple of it, whatever the token took to refuse it. 0: 100 ms.
	FailureFloor time.Duration
	// FailureBudget is how many imports may be refused by one import token
	// before that is invalid for ever. 0: 100.
	FailureBudget int

	SweepInterval time.Duration // 0: one second
	ManualSweep   bool          // only Sweep sweeps, for tests

	bounds bounds // zero: defaultBounds
}

// DefaultPairSpecs are Config.PairSpecs where those are nil.
func DefaultPairSpecs() []hsm.PairSpec { return []hsm.PairSpec{hsm.RSA2048, hsm.ECSM2} }

// DefaultResidentLimit is Config.ResidentLimit where that is 0: what a small
// HSM holds beside its other objects.
const DefaultResidentLimit = 2000

// Validate returns everything that is wrong with a Config.
func (c *Config) Validate() error {
	var errs []error
	if c.Token == nil {
		errs = append(errs, errors.New("engine: Config.Token is required"))
	}
	if c.Store == nil {
		errs = append(errs, errors.New("engine: Config.Store is required"))
	}
	for _, field := range []struct {
		name  string
		value int64
	}{
		{"PoolSize", int64(c.PoolSize)},
		{"PairBound", int64(c.PairBound)},
		{"ResidentLimit", int64(c.ResidentLimit)},
		{"CacheSize", int64(c.CacheSize)},
		{"FailureFloor", int64(c.FailureFloor)},
		{"FailureBudget", int64(c.FailureBudget)},
		{"SweepInterval", int64(c.SweepInterval)},
	} {
		if field.value < 0 {
			errs = append(errs, fmt.Errorf("engine: Config.%s is negative", field.name))
		}
	}
	return errors.Join(errs...)
}

// Engine keeps CMKs. All methods are safe for concurrent use.
type Engine struct {
	token     *hsm.Token
	store     store.Store
	log       *slog.Logger
	now       func() time.Time
	observer  Observer
	instance  string
	specs     []hsm.PairSpec
	offers    []WrappingOffer
	pairBound int

	custodies     []hsm.Custody // that CMKs can have, that of new ones first
	residentLimit int
	residents     residents
	room          atomic.Pointer[Room] // as it was last looked at; never nil after New
	bothPools     atomic.Bool          // pairs for the other custodies were asked for

	failureFloor  time.Duration
	failureBudget int
	attempts      attempts
	failures      failures

	bounds    bounds
	authority *authority

	// The log of receipts.
	logID      receipt.LogID
	receiptKey *receipt.PublicKey         // nil: the token has none, and no head is signed
	extending  chan struct{}              // held while the log is extended, and for strangers
	strangers  map[[sha256.Size]byte]bool // pending entries that are not ours
	headAt     time.Time                  // when the sweep last signed a head; the sweep's own
	entered    atomic.Int64               // entries of this Engine since then
	headAfter  int64                      // so many of them do not wait; logBatch
	headMu     sync.Mutex
	lastHead   receipt.Head // the longest that was seen; guarded by headMu

	cache    *cache
	usage    *usage
	pool     *pool
	sweeping chan struct{} // held while sweeping

	// Of sweeping: when the lease was renewed, by elapsed, when the pairs of
	// token and store were reconciled, and which rows the last sweep found spoilt.
	leased     time.Duration
	reconciled time.Time
	spoilt     map[[sha256.Size]byte]bool

	started time.Time
	node    string          // names this Engine among all of its store
	life    context.Context // ends with Close
	end     context.CancelFunc

	mu      sync.Mutex
	closed  bool
	working sync.WaitGroup // goroutines, none of which starts after closed
}

// errClosed is the cause of an Unavailable after Close.
var errClosed = errors.New("engine: closed")

// errBusy is the cause of an Unavailable of Close itself.
var errBusy = errors.New("engine: calls to the token or the store have not returned; they were left behind")

// closeTimeout bounds Close, and what is cleaned up after a context has ended.
const closeTimeout = 10 * time.Second

// New starts an Engine: it clears away what a crash left in the token and
// begins to fill the pools of wrapping pairs and to sweep. ctx is for the start
// only; a token that does not answer is given up after minutes without it.
func New(ctx context.Context, cfg Config) (*Engine, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.bounds == (bounds{}) {
		cfg.bounds = defaultBounds
	}
	ctx, cancel := context.WithTimeout(ctx, cfg.bounds.pass)
	defer cancel()
	instance, err := cfg.Store.Instance(ctx)
	if err != nil {
		return nil, storeError(err)
	}
	log, err := cfg.Store.Log(ctx)
	if err != nil {
		return nil, storeError(err)
	}
	e := &Engine{
		token:         cfg.Token,
		store:         cfg.Store,
		log:           cfg.Logger,
		now:           cfg.Now,
		observer:      cfg.Observer,
		bounds:        cfg.bounds,
		instance:      instance,
		specs:         cfg.PairSpecs,
		pairBound:     orDefault(cfg.PairBound, 64),
		failureFloor:  orDefault(cfg.FailureFloor, 100*time.Millisecond),
		failureBudget: orDefault(cfg.FailureBudget, 100),
		sweeping:      make(chan struct{}, 1),
		logID:         log.ID,
		extending:     make(chan struct{}, 1),
		strangers:     make(map[[sha256.Size]byte]bool),
		started:       time.Now(),
		node:          rand.Text(),
		residentLimit: orDefault(cfg.ResidentLimit, DefaultResidentLimit),
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if e.now == nil {
		e.now = time.Now
	}
	if e.observer == nil {
		e.observer = unobserved{}
	}
	if e.specs == nil {
		e.specs = DefaultPairSpecs()
	}
	e.offers = offersOf(e.token, e.specs)
	e.headAt, e.headAfter = e.second(), logBatch
	if err := e.findReceiptKey(ctx); err != nil {
		return nil, err
	}
	if e.custodies, err = custodies(e.token, cmp.Or(cfg.Custody, hsm.Sealed), cfg.OnlyCustody); err != nil {
		return nil, err
	}
	if err := e.reconcile(ctx); err != nil {
		return nil, err
	}
	if err := e.watchRoom(ctx); err != nil {
		return nil, err
	}
	e.life, e.end = context.WithCancel(context.Background())
	e.usage = newUsage(e.token, e.store, e.log, e.observer.Warned)
	e.authority = newAuthority(e.token, orDefault(cfg.CacheSize, 10000))
	e.cache = newCache(orDefault(cfg.CacheSize, 10000), e.openRow, e.discardKey, e.observer.Used)
	// One key whose use hangs must not hold up the news of others.
	e.store.Watch(func(keyID, versionID string) { e.cache.drop(keyID, versionID, 0) })
	e.pool = newPool(orDefault(cfg.PoolSize, 8), e.life.Done())
	e.spawn(func() { e.generate(e.life) })
	if !cfg.ManualSweep {
		e.spawn(func() { e.sweepEvery(e.life, orDefault(cfg.SweepInterval, time.Second)) })
	}
	return e, nil
}

func orDefault[T int | time.Duration](value, otherwise T) T {
	if value == 0 {
		return otherwise
	}
	return value
}

// Close ends everything the Engine does of its own accord, closes the open keys,
// signs the log of receipts and writes down the counts of uses. Requests under way fail or finish.
//
// It returns within 10 seconds. What does not end in that time, because a call
// to the token does not return, is left behind, and is Unavailable; a count that
// was not written is made up for at the next start.
func (e *Engine) Close() error {
	e.mu.Lock()
	already := e.closed
	e.closed = true
	e.mu.Unlock()
	if already {
		return nil
	}
	e.store.Watch(nil)
	e.end()
	ctx, cancel := context.WithTimeout(context.Background(), e.bounds.close)
	defer cancel()
	// Some of the time is kept for the log and the counts, which other sessions
	// of the token may still serve.
	waiting, stop := context.WithTimeout(ctx, e.bounds.close*4/5)
	defer stop()
	var busy error
	idle := finished(waiting, e.working.Wait)
	if !finished(waiting, e.cache.close) || !idle {
		busy = &Error{Kind: Unavailable, cause: errBusy}
	}
	if e.receiptKey != nil {
		// What is not signed now is at the next start.
		if err := e.extendLog(ctx); err != nil {
			e.log.LogAttrs(ctx, slog.LevelWarn, "the log of receipts could not be signed at the end", slog.Any("error", err))
		}
	}
	// Another node may do at once what this one did for all. If it cannot be
	// told, the leases run out by themselves.
	for _, lease := range []string{generatorLease, sweepLease} {
		_, _ = e.store.Lease(ctx, lease, e.node, 0)
	}
	return errors.Join(busy, e.usage.flush(ctx, true))
}

// findReceiptKey asks the token for the key that signs the log of receipts. A
// server without one, because it is not pinned, goes on and logs its imports,
// for a head that is signed later.
func (e *Engine) findReceiptKey(ctx context.Context) error {
	spki, err := e.token.ReceiptKey(ctx)
	if errors.Is(err, hsm.ErrUnsupported) {
		e.log.LogAttrs(ctx, slog.LevelWarn, "no receipts are signed", slog.Any("error", err))
		return nil
	}
	if err != nil {
		return tokenError(err)
	}
	if e.receiptKey, err = receipt.ParsePublicKey(spki); err != nil {
		return &Error{Kind: Internal, cause: err}
	}
	return nil
}

// Health returns nil if store and token answer.
func (e *Engine) Health(ctx context.Context) error {
	// A read that no store answers from memory.
	if _, err := e.store.PairCounts(ctx, e.second()); err != nil {
		return storeError(err)
	}
	// By a key: a token whose objects are gone may still answer without them.
	if _, err := e.token.MAC(ctx, healthDomain); err != nil {
		return tokenError(err)
	}
	return nil
}

// healthDomain is the domain of a MAC that nothing is compared with.
const healthDomain = "keyferry/health/v1"

// Advice says what a person has to see to, in whole sentences, of which there
// is a small number. They name no CMK and no secret. It asks nothing of token
// and store.
func (e *Engine) Advice() []string {
	var out []string
	switch refused := e.token.Stats().Refused; {
	case errors.Is(refused, hsm.ErrPIN):
		out = append(out, "The token refused the user PIN. It is not tried again, so that the token does not lock: put the PIN right, then restart the server.")
	case refused != nil:
		out = append(out, "The token that came back is not the one that was there. It is not used: bring that back, then restart the server.")
	}
	if r := e.room.Load(); r.Low() {
		out = append(out, "The token is nearly full of key material.")
	}
	return out
}

// second is the present time as rows have it: UTC, whole seconds.
func (e *Engine) second() time.Time { return e.now().UTC().Truncate(time.Second) }

// spawn runs work in a goroutine that Close waits for, or reports false after
// Close.
func (e *Engine) spawn(work func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.working.Go(work)
	return true
}

// detach does work that must come to its end once begun, such as a commit and
// what has to follow it, and bounds only the waiting by the caller's context.
// A commit given up half-way might otherwise take effect later, with nobody
// there to close what it made stale. Errors are those of work, of ctx, and
// errClosed.
func (e *Engine) detach(ctx context.Context, work func(context.Context) error) error {
	done := make(chan error, 1)
	if !e.spawn(func() { done <- work(e.life) }) {
		return errClosed
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
