package engine

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// sweepBatch is how many rows one read of a sweep returns.
const sweepBatch = 100

// sweepEvery sweeps until ctx ends.
func (e *Engine) sweepEvery(ctx context.Context, interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	w := &worker{name: "sweep"}
	for {
		select {
		case <-ticker.C:
			if err := e.pass(ctx, w, e.Sweep); err != nil && ctx.Err() == nil {
				e.log.LogAttrs(ctx, slog.LevelError, "the sweep could not do all its work", slog.Any("error", err))
			}
		case <-ctx.Done():
			return
		}
	}
}

// Sweep makes durable what time has done: it destroys expired material, CMKs
// past their deletion and pairs past their last token, forgets old nonces,
// writes down the counts of uses and signs the log of receipts. Of several
// Engines on one store one does it for all, save the counts. Whether something
// is expired never depends on it. What fails does not keep the rest from being
// done.
func (e *Engine) Sweep(ctx context.Context) error {
	select {
	case e.sweeping <- struct{}{}:
		defer func() { <-e.sweeping }()
	case <-ctx.Done():
		return ctx.Err()
	}
	err := e.sweep(ctx)
	e.observer.Swept(err)
	return err
}

// sweep is Sweep for one caller at a time.
func (e *Engine) sweep(ctx context.Context) error {
	now := e.second()
	e.failures.forget(now)
	e.pool.wake() // pairs may have been taken by other nodes
	own := e.usage.flush(ctx, false)
	if now.Sub(e.room.Load().At) >= watchInterval {
		own = errors.Join(own, e.watchRoom(ctx))
	}
	e.leased = 0
	for _, work := range []func(context.Context, time.Time) error{
		func(ctx context.Context, now time.Time) error {
			if now.Sub(e.reconciled) < reconcileInterval {
				return nil
			}
			return e.reconcile(ctx)
		},
		e.sweepKeys,
		e.sweepPairs,
		e.sweepResidents,
		e.store.DeleteNonces,
		e.sweepLog,
	} {
		if err := e.keepSweeping(ctx); errors.Is(err, errNotSweeping) {
			return own
		} else if err != nil {
			return errors.Join(own, err)
		}
		err := work(ctx, now)
		if errors.Is(err, errNotSweeping) {
			return own
		}
		own = errors.Join(own, err)
	}
	return own
}

// One node sweeps for all, until it has not done so for sweepLeaseLife. It asks
// again as it goes on, so that a sweep may last longer than that. Should it be
// held up in the midst of one thing, so that another node does it too, a row is
// still changed once, as they compare revisions, and an object destroyed once.
const (
	sweepLease     = "sweep"
	sweepLeaseLife = 10 * time.Second
)

// errNotSweeping: another node sweeps.
var errNotSweeping = errors.New("engine: another node sweeps")

// keepSweeping renews the lease before it ends, or returns errNotSweeping.
func (e *Engine) keepSweeping(ctx context.Context) error {
	now := e.elapsed()
	if e.leased > 0 && now-e.leased < sweepLeaseLife/2 {
		return nil
	}
	held, err := e.store.Lease(ctx, sweepLease, e.node, sweepLeaseLife)
	switch {
	case err != nil:
		return storeError(err)
	case !held:
		return errNotSweeping
	}
	e.leased = now
	return nil
}

// sweepKeys goes on until no CMK is due. One that cannot be swept, because its
// row was tampered with or is being changed just now, is left for the next
// time and must not hide those behind it.
func (e *Engine) sweepKeys(ctx context.Context, now time.Time) error {
	var failed error
	skipped := make(map[string]bool)
	spoilt := make(map[[sha256.Size]byte]bool)
	for {
		limit := sweepBatch + len(skipped)
		rows, err := e.store.DueKeys(ctx, now, limit)
		if err != nil {
			return errors.Join(failed, err)
		}
		for i := range rows {
			if skipped[rows[i].KeyID] {
				continue
			}
			domain, record := authenticated(&rows[i])
			row := digest(domain, record, rows[i].MAC)
			if err := e.keepSweeping(ctx); err != nil {
				return errors.Join(failed, err)
			}
			err := hsm.ErrUntrusted
			if !e.spoilt[row] { // which would be logged again every second
				err = e.sweepKey(ctx, &rows[i], now)
			}
			switch {
			case err == nil:
				e.observer.SweptKey()
				continue
			case errors.Is(err, Unavailable):
				return errors.Join(failed, err)
			case errors.Is(err, hsm.ErrUntrusted):
				spoilt[row] = true
			case errors.Is(err, store.ErrConflict), errors.Is(err, store.ErrNotFound):
				// Changed by someone else, for whom the next sweep is soon enough.
			default:
				failed = errors.Join(failed, err)
			}
			skipped[rows[i].KeyID] = true
		}
		if len(rows) < limit {
			e.spoilt = spoilt
			return failed
		}
	}
}

// sweepKey does to one CMK what time has done to it.
func (e *Engine) sweepKey(ctx context.Context, stored *store.Key, now time.Time) error {
	if err := e.verifyRow(ctx, stored); err != nil {
		return err
	}
	row, there := asOf(*stored, now)
	if there {
		return e.commitRow(ctx, row, store.Update{}, e.deletionEntry(stored, &row))
	}
	deletion := store.Deletion{KeyID: stored.KeyID, Revision: stored.Revision}
	if len(stored.MaterialID) > 0 { // what never had any leaves no trace
		last := *stored
		last.Revision++
		deletion.Receipt = e.enter(&last, &receipt.Entry{Kind: receipt.Deletion, Reason: receipt.KeyDeleted})
		if err := e.sealRow(ctx, &last); err != nil {
			return err
		}
		finish(deletion.Receipt, &last)
	}
	err := e.detach(ctx, func(ctx context.Context) error {
		err := e.store.DeleteKey(ctx, deletion)
		e.cache.drop(stored.KeyID, stored.KeyVersionID, changeWait)
		return err
	})
	if err != nil {
		return err
	}
	e.usage.forget(stored.KeyID)
	return nil
}

// sweepPairs destroys the pairs whose last import token has expired. A pair is
// shared only soon after it was bound, so none that is due gets a new token.
// One that cannot be destroyed must not save those behind it.
func (e *Engine) sweepPairs(ctx context.Context, now time.Time) error {
	var failed error
	skipped := make(map[[16]byte]bool)
	for {
		limit := sweepBatch + len(skipped)
		due, err := e.store.Pairs(ctx, now, limit)
		if err != nil {
			return errors.Join(failed, err)
		}
		for i := range due {
			id := due[i].ID
			if skipped[id] {
				continue
			}
			if err := e.keepSweeping(ctx); err != nil {
				return errors.Join(failed, err)
			}
			if err := e.destroyPair(ctx, id); err != nil {
				skipped[id] = true
				failed = errors.Join(failed, fmt.Errorf("wrapping pair %s: %w", pairName(id), err))
				continue
			}
			e.observer.SweptPair()
		}
		if len(due) < limit || ctx.Err() != nil {
			return failed
		}
	}
}
