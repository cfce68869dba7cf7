package engine

import (
	"context"
	"encoding/hex"
	"errors"
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

// wait waits until a pair was added, the context ends or the engine closes.
func (p *pool) wait(ctx context.Context, added <-chan struct{}) error {
	p.wake()
	select {
	case <-added:
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
	for ctx.Err() == nil {
		full, err := e.fill(ctx)
		switch {
		case err != nil && ctx.Err() == nil:
			e.log.LogAttrs(ctx, slog.LevelError, "no wrapping pair could be made",
				slog.Duration("pause", pause), slog.Any("error", err))
			rest(ctx, pause)
			pause = min(2*pause, maxPause)
		case full:
			pause = firstPause
			select {
			case <-e.pool.wanted:
			case <-ctx.Done():
			}
		}
	}
}

// fill makes one pair for the offer that has the fewest, or reports that every
// pool is full.
func (e *Engine) fill(ctx context.Context) (full bool, err error) {
	counts, err := e.store.PairCounts(ctx, e.second())
	if err != nil {
		return false, err
	}
	var emptiest WrappingOffer
	fewest := e.pool.size
	for _, offer := range e.offers {
		ready := 0
		for _, c := range counts {
			if c.Spec == string(offer.Spec) && c.Algorithm == string(offer.Algorithm) {
				ready = c.Ready
			}
		}
		if ready < fewest {
			emptiest, fewest = offer, ready
		}
	}
	if fewest == e.pool.size {
		return true, nil
	}
	return false, e.addPair(ctx, emptiest)
}

// addPair makes a pair in the token and then its row. Without the row the pair
// is destroyed again; if that fails too, the next start finds it.
func (e *Engine) addPair(ctx context.Context, offer WrappingOffer) error {
	info, err := e.token.GeneratePair(ctx, e.instance, offer.Spec, offer.Algorithm)
	if err != nil {
		return err
	}
	// The end of ctx is no reason to throw a pair away, or to leave it behind.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	err = e.store.AddPair(ctx, store.Pair{
		ID:          info.ID,
		Spec:        string(info.Spec),
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

// reconcilePairs brings token and store together at start-up, after whatever
// ended the last run: pairs of this store that have no row are destroyed, rows
// whose pair is gone are removed, and ready pairs that are no longer offered
// are retired, for the sweep to destroy.
func (e *Engine) reconcilePairs(ctx context.Context) error {
	inToken, err := e.token.Pairs(ctx, e.instance)
	if err != nil {
		return tokenError(err)
	}
	rows, err := e.store.Pairs(ctx, time.Time{}, 0)
	if err != nil {
		return storeError(err)
	}
	known := make(map[hsm.PairID]bool, len(rows))
	for i := range rows {
		known[rows[i].ID] = true
	}
	there := make(map[hsm.PairID]bool, len(inToken))
	for _, pair := range inToken {
		there[pair.ID] = true
		if known[pair.ID] {
			continue
		}
		if err := e.token.DestroyPair(ctx, pair.ID); err != nil {
			return tokenError(err)
		}
		e.log.LogAttrs(ctx, slog.LevelInfo, "destroyed a wrapping pair that a crash left behind",
			slog.String("pair", pairName(pair.ID)))
	}
	for i := range rows {
		if err := e.reconcilePair(ctx, &rows[i], there[rows[i].ID]); err != nil {
			return storeError(err)
		}
	}
	return nil
}

func (e *Engine) reconcilePair(ctx context.Context, row *store.Pair, there bool) error {
	if !there {
		e.log.LogAttrs(ctx, slog.LevelWarn, "removed the row of a wrapping pair that is not in the token",
			slog.String("pair", pairName(row.ID)))
		return e.store.DeletePair(ctx, row.ID)
	}
	offered := slices.Contains(e.offers, WrappingOffer{hsm.PairSpec(row.Spec), hsm.Algorithm(row.Algorithm)})
	if offered || !row.BoundAt.IsZero() {
		return nil
	}
	err := e.store.RetirePair(ctx, row.ID, e.second())
	if errors.Is(err, store.ErrConflict) {
		return nil // bound meanwhile, or retired already
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
