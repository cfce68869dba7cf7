package main

import (
	"context"
	"errors"
	"time"

	"github.com/keyferry/keyferry/engine/store"
)

// measuredStore takes the time of what requests ask of a store, and of what
// they have written; everything else goes through.
type measuredStore struct {
	store.Store
	metrics *metrics
}

// took is called with the start of a call and its error. What a store answers
// as it should is no failure.
func (m *measuredStore) took(call string, start time.Time, err error) {
	m.metrics.store.WithLabelValues(call).Observe(time.Since(start).Seconds())
	for _, answer := range []error{nil, store.ErrNotFound, store.ErrExists, store.ErrConflict, store.ErrNoPair, store.ErrBound, context.Canceled} {
		if errors.Is(err, answer) {
			return
		}
	}
	m.metrics.failures.WithLabelValues(call).Inc()
}

func (m *measuredStore) CreateKey(ctx context.Context, key store.Key) (err error) {
	defer func(start time.Time) { m.took("CreateKey", start, err) }(time.Now())
	return m.Store.CreateKey(ctx, key)
}

func (m *measuredStore) Key(ctx context.Context, keyID string) (_ store.Key, err error) {
	defer func(start time.Time) { m.took("Key", start, err) }(time.Now())
	return m.Store.Key(ctx, keyID)
}

func (m *measuredStore) KeyByVersion(ctx context.Context, versionID string) (_ store.Key, err error) {
	defer func(start time.Time) { m.took("KeyByVersion", start, err) }(time.Now())
	return m.Store.KeyByVersion(ctx, versionID)
}

func (m *measuredStore) UpdateKey(ctx context.Context, update store.Update) (err error) {
	defer func(start time.Time) { m.took("UpdateKey", start, err) }(time.Now())
	return m.Store.UpdateKey(ctx, update)
}

func (m *measuredStore) ListKeys(ctx context.Context, filter store.KeyFilter, offset, limit int) (_ []store.Key, _ int, err error) {
	defer func(start time.Time) { m.took("ListKeys", start, err) }(time.Now())
	return m.Store.ListKeys(ctx, filter, offset, limit)
}

func (m *measuredStore) BindPair(ctx context.Context, req store.BindRequest) (_ store.ImportToken, err error) {
	defer func(start time.Time) { m.took("BindPair", start, err) }(time.Now())
	return m.Store.BindPair(ctx, req)
}

func (m *measuredStore) LoadImport(ctx context.Context, keyID string, tokenID [16]byte) (_ store.Key, _ store.ImportToken, err error) {
	defer func(start time.Time) { m.took("LoadImport", start, err) }(time.Now())
	return m.Store.LoadImport(ctx, keyID, tokenID)
}

func (m *measuredStore) CountFailure(ctx context.Context, tokenID [16]byte) (_ int, err error) {
	defer func(start time.Time) { m.took("CountFailure", start, err) }(time.Now())
	return m.Store.CountFailure(ctx, tokenID)
}

func (m *measuredStore) AddNonce(ctx context.Context, nonce store.Nonce, now time.Time) (_ bool, err error) {
	defer func(start time.Time) { m.took("AddNonce", start, err) }(time.Now())
	return m.Store.AddNonce(ctx, nonce, now)
}

func (m *measuredStore) PutUsages(ctx context.Context, usages []store.UsageUpdate) (stored []bool, err error) {
	defer func(start time.Time) { m.took("PutUsages", start, err) }(time.Now())
	return m.Store.PutUsages(ctx, usages)
}
