package engine

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// pool keeps ready wrapping pairs of every offer, made ahead of time by one
// goroutine: a pair takes the token a fifth of a second and more, which no
// request should wait for. The pairs themselves are in the token and in the
// store; a pool only knows who waits and who generates.
type pool struct {
	size    int // ready pairs per offer
	wanted  chan struct{}
	stopped <-chan struct{}

	mu    sync.Mutex
	fresh chan struct{} // closed when a pair is added, and then replaced
}

func newPool(size int, stopped <-chan struct{}) *pool {
	return &pool{
		size:    size,
		wanted:  make(chan struct{}, 1),
		stopped: stopped,
		fresh:   make(chan struct{}),
	}
}

// wake tells the generator that a pair was taken.
func (p *pool) wake() {
	select {
	case p.wanted <- struct{}{}:
	default:
	}
}

// added returns a channel that is closed when the next pair is ready.
func (p *pool) added() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fresh
}

// announce wakes everybody who waits for a pair.
func (p *pool) announce() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.fresh)
	p.fresh = make(chan struct{})
}

// pollPairs is how often those who wait for a pair look whether another node
// has added one.
const pollPairs = 100 * time.Millisecond

// wait waits until a pair was added, or may have been by another node, the
// context ends or the engine closes.
func (p *pool) wait(ctx context.Context, added <-chan struct{}) error {
	p.wake()
	elsewhere := time.NewTimer(pollPairs)
	defer elsewhere.Stop()
	select {
	case <-added:
		return nil
	case <-elsewhere.C:
		return nil
	case <-ctx.Done():
		return &Error{Kind: Unavailable, Hint: "wrapping pairs are being generated", cause: ctx.Err()}
	case <-p.stopped:
		return &Error{Kind: Unavailable, cause: errClosed}
	}
}

// Pauses of the generator after a failure.
const (
	firstPause = time.Second
	maxPause   = time.Minute
)

// generate fills the pools until ctx ends. A failure is logged and tried again
// after a pause that doubles.
func (e *Engine) generate(ctx context.Context) {
	pause := firstPause
	w := &worker{name: "wrapping pairs"}
	for ctx.Err() == nil {
		idle := false
		err := e.pass(ctx, w, func(ctx context.Context) (err error) {
			idle, err = e.fill(ctx)
			return err
		})
		switch {
		case err != nil && ctx.Err() == nil:
			e.log.LogAttrs(ctx, slog.LevelError, "no wrapping pair could be made",
				slog.Duration("pause", pause), slog.Any("error", err))
			rest(ctx, pause)
			pause = min(2*pause, maxPause)
		case idle:
			pause = firstPause
			select {
			case <-e.pool.wanted:
			case <-ctx.Done():
			}
		}
	}
}

// One node generates for all, until it has not asked for so long: a pair takes
// a second at most, and much longer on a slow token.
const (
	generatorLease     = "generator"
	generatorLeaseLife = 5 * time.Second
)

// fill makes one pair for an offer that lacks one, of those with the fewest
// first, or reports that there is nothing to do: every pool is full, or another
// node fills them. An offer that the token cannot
// serve does not keep the others from being served: the error is only returned
// if no pair could be made at all.
func (e *Engine) fill(ctx context.Context) (idle bool, err error) {
	counts, err := e.store.PairCounts(ctx, e.second())
	if err != nil {
		return false, err
	}
	ready := make(map[WrappingOffer]int, len(counts))
	for _, c := range counts {
		ready[WrappingOffer{hsm.PairSpec(c.Spec), hsm.Algorithm(c.Algorithm)}] = c.Ready
	}
	lacking := slices.DeleteFunc(e.pooled(), func(o WrappingOffer) bool { return ready[o] >= e.pool.size })
	slices.SortStableFunc(lacking, func(a, b WrappingOffer) int { return cmp.Compare(ready[a], ready[b]) })
	if len(lacking) == 0 {
		return true, nil
	}
	if held, err := e.store.Lease(ctx, generatorLease, e.node, generatorLeaseLife); err != nil || !held {
		return true, err
	}
	var failed error
	for _, offer := range lacking {
		err := e.addPair(ctx, offer)
		if err == nil {
			return false, nil
		}
		failed = errors.Join(failed, fmt.Errorf("%s for %s: %w", offer.Spec, offer.Algorithm, err))
	}
	return false, failed
}

// addPair makes a pair in the token and then its row. Without the row the pair
// is destroyed again; if that fails too, the next start finds it.
func (e *Engine) addPair(ctx context.Context, offer WrappingOffer) error {
	// Close lets a pair that is nearly made have its row.
	making, stop := e.graced(ctx)
	defer stop()
	generate := e.token.GeneratePair
	spec, custody := ofKind(offer.Spec)
	if custody == hsm.Resident {
		generate = e.token.GenerateResidentPair
	}
	info, err := generate(making, e.instance, e.second(), spec, offer.Algorithm)
	if err != nil {
		return err
	}
	// The end of ctx is no reason to throw a pair away, or to leave it behind.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	err = e.store.AddPair(ctx, store.Pair{
		ID:          info.ID,
		Spec:        string(offer.Spec),
		Algorithm:   string(info.Algorithm),
		Fingerprint: info.Fingerprint,
		CreatedAt:   e.second(),
	})
	if err != nil {
		return errors.Join(err, e.destroyPair(ctx, info.ID))
	}
	e.pool.announce()
	return nil
}

// destroyPair destroys a pair in the token and then removes its row: after a
// crash in between the row is still there to say what remains to be done.
func (e *Engine) destroyPair(ctx context.Context, id [16]byte) error {
	if err := e.token.DestroyPair(ctx, id); err != nil {
		return err
	}
	return e.store.DeletePair(ctx, id)
}

// Ages of wrapping pairs.
const (
	// youngPair: a pair without a row that is no older may be about to get
	// one, from a node that is making it at this moment.
	youngPair = 10 * time.Minute
	// hiddenPair: a pair whose row is no older may be in the token, made by
	// another node since this one looked, or not yet visible to it.
	hiddenPair = 10 * time.Second
	// maxReady is how long a pair waits for its first import token.
	maxReady = 7 * 24 * time.Hour
	// maxPair is the age at which a pair is destroyed whatever its row says:
	// rows of pairs have no MAC, and what was wrapped under a pair is safe
	// from the PIN only once that is gone.
	maxPair = maxReady + ImportTokenLife + shareWindow + time.Hour
)

// reconcileInterval is how often the pairs of token and store are compared.
const reconcileInterval = time.Hour

// reconcile brings token and store together, at the start and now and then.
func (e *Engine) reconcile(ctx context.Context) error {
	if err := e.reconcilePairs(ctx); err != nil {
		return err
	}
	if err := e.reconcileResidents(ctx); err != nil {
		return err
	}
	e.reconciled = e.second()
	return nil
}

// reconcilePairs brings token and store together, at the start, after whatever
// ended the last run, and now and then: pairs of this store that have no row,
// and those that are too old by the token's own word, are destroyed; rows whose
// pair is gone are removed; ready pairs that are no longer offered, or have
// waited too long, are retired, for the sweep to destroy. A pair that cannot be
// destroyed is logged and left: someone may have planted it for the purpose.
func (e *Engine) reconcilePairs(ctx context.Context) error {
	inToken, err := e.token.Pairs(ctx, e.instance)
	if err != nil {
		return tokenError(err)
	}
	rows, err := e.store.Pairs(ctx, time.Time{}, 0)
	if err != nil {
		return storeError(err)
	}
	now := e.second()
	known := make(map[hsm.PairID]bool, len(rows))
	for i := range rows {
		known[rows[i].ID] = true
	}
	there := make(map[hsm.PairID]bool, len(inToken))
	for _, pair := range inToken {
		there[pair.ID] = true
		age := now.Sub(pair.CreatedAt)
		if known[pair.ID] && age < maxPair || !known[pair.ID] && age < youngPair {
			continue
		}
		if err := e.destroyPair(ctx, pair.ID); err != nil {
			e.log.LogAttrs(ctx, slog.LevelError, "a wrapping pair that nobody may use any more cannot be destroyed; look at it in the token",
				slog.String("pair", pairName(pair.ID)), slog.Any("error", err))
			continue
		}
		there[pair.ID] = false
		e.log.LogAttrs(ctx, slog.LevelInfo, "destroyed a wrapping pair that had no row, or was too old",
			slog.String("pair", pairName(pair.ID)), slog.Duration("age", age))
	}
	for i := range rows {
		if err := e.reconcilePair(ctx, &rows[i], there[rows[i].ID], now); err != nil {
			return storeError(err)
		}
	}
	return nil
}

func (e *Engine) reconcilePair(ctx context.Context, row *store.Pair, there bool, now time.Time) error {
	if !there {
		if now.Sub(row.CreatedAt) < hiddenPair {
			return nil
		}
		e.log.LogAttrs(ctx, slog.LevelWarn, "removed the row of a wrapping pair that is not in the token",
			slog.String("pair", pairName(row.ID)))
		return e.store.DeletePair(ctx, row.ID)
	}
	offered := e.makesPairs(WrappingOffer{hsm.PairSpec(row.Spec), hsm.Algorithm(row.Algorithm)})
	if offered && now.Sub(row.CreatedAt) < maxReady || !row.BoundAt.IsZero() {
		return nil
	}
	err := e.store.RetirePair(ctx, row.ID, now)
	if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNotFound) {
		return nil // bound or gone meanwhile, or retired already
	}
	return err
}

func pairName(id [16]byte) string { return hex.EncodeToString(id[:]) }

// rest waits, at most until ctx ends.
func rest(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
