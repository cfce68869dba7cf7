package engine_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/keyferry/keyferry/engine/store"
)

// brokenStore fails one call: it did nothing, or took effect all the same.
// Calls that the engine makes of its own accord at any time are let through.
type brokenStore struct {
	store.Store

	mu     sync.Mutex
	calls  []string
	at     int // which call fails; -1: none
	took   bool
	struck bool
}

// arm has the n-th call from now on fail, or none if n is negative.
func (s *brokenStore) arm(n int, took bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls, s.at, s.took, s.struck = nil, n, took, false
}

// heal reports the calls since arm.
func (s *brokenStore) heal() (calls []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = -1
	return slices.Clone(s.calls)
}

func strike[T any](s *brokenStore, name string, do func() (T, error)) (T, error) {
	s.mu.Lock()
	hit := len(s.calls) == s.at
	s.calls = append(s.calls, name)
	took := s.took
	s.struck = s.struck || hit
	s.mu.Unlock()
	if !hit {
		return do()
	}
	if took {
		_, _ = do()
	}
	var none T
	return none, fmt.Errorf("%w: the answer of %s is lost", store.ErrUnavailable, name)
}

func strikeErr(s *brokenStore, name string, do func() error) error {
	_, err := strike(s, name, func() (struct{}, error) { return struct{}{}, do() })
	return err
}

func (s *brokenStore) CreateKey(ctx context.Context, key store.Key) error {
	return strikeErr(s, "CreateKey", func() error { return s.Store.CreateKey(ctx, key) })
}

func (s *brokenStore) Key(ctx context.Context, id string) (store.Key, error) {
	return strike(s, "Key", func() (store.Key, error) { return s.Store.Key(ctx, id) })
}

func (s *brokenStore) KeyByVersion(ctx context.Context, id string) (store.Key, error) {
	return strike(s, "KeyByVersion", func() (store.Key, error) { return s.Store.KeyByVersion(ctx, id) })
}

func (s *brokenStore) UpdateKey(ctx context.Context, update store.Update) error {
	return strikeErr(s, "UpdateKey", func() error { return s.Store.UpdateKey(ctx, update) })
}

func (s *brokenStore) DeleteKey(ctx context.Context, deletion store.Deletion) error {
	return strikeErr(s, "DeleteKey", func() error { return s.Store.DeleteKey(ctx, deletion) })
}

func (s *brokenStore) DueKeys(ctx context.Context, now time.Time, limit int) ([]store.Key, error) {
	return strike(s, "DueKeys", func() ([]store.Key, error) { return s.Store.DueKeys(ctx, now, limit) })
}

func (s *brokenStore) BindPair(ctx context.Context, req store.BindRequest) (store.ImportToken, error) {
	return strike(s, "BindPair", func() (store.ImportToken, error) { return s.Store.BindPair(ctx, req) })
}

func (s *brokenStore) LoadImport(ctx context.Context, keyID string, id [16]byte) (row store.Key, token store.ImportToken, err error) {
	row, err = strike(s, "LoadImport", func() (store.Key, error) {
		var err error
		row, token, err = s.Store.LoadImport(ctx, keyID, id)
		return row, err
	})
	return row, token, err
}

func (s *brokenStore) CountFailure(ctx context.Context, id [16]byte) (int, error) {
	return strike(s, "CountFailure", func() (int, error) { return s.Store.CountFailure(ctx, id) })
}

func (s *brokenStore) Pairs(ctx context.Context, due time.Time, limit int) ([]store.Pair, error) {
	return strike(s, "Pairs", func() ([]store.Pair, error) { return s.Store.Pairs(ctx, due, limit) })
}

func (s *brokenStore) RetirePair(ctx context.Context, id [16]byte, now time.Time) error {
	return strikeErr(s, "RetirePair", func() error { return s.Store.RetirePair(ctx, id, now) })
}

func (s *brokenStore) DeletePair(ctx context.Context, id [16]byte) error {
	return strikeErr(s, "DeletePair", func() error { return s.Store.DeletePair(ctx, id) })
}

func (s *brokenStore) NextBoot(ctx context.Context) (uint64, error) {
	return strike(s, "NextBoot", func() (uint64, error) { return s.Store.NextBoot(ctx) })
}

func (s *brokenStore) Usage(ctx context.Context, id string) (store.Usage, error) {
	return strike(s, "Usage", func() (store.Usage, error) { return s.Store.Usage(ctx, id) })
}

func (s *brokenStore) PutUsages(ctx context.Context, usages []store.UsageUpdate) ([]bool, error) {
	return strike(s, "PutUsages", func() ([]bool, error) { return s.Store.PutUsages(ctx, usages) })
}

func (s *brokenStore) DeleteNonces(ctx context.Context, now time.Time) error {
	return strikeErr(s, "DeleteNonces", func() error { return s.Store.DeleteNonces(ctx, now) })
}

func (s *brokenStore) Instance(ctx context.Context) (string, error) {
	return strike(s, "Instance", func() (string, error) { return s.Store.Instance(ctx) })
}
