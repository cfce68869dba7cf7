package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// testEndedContext calls every method with a context that has ended before.
func testEndedContext(t *testing.T, s store.Store) {
	prepare(t, s)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	expired, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	for _, m := range methods {
		require.ErrorIs(t, m.call(cancelled, s), context.Canceled, m.name)
		require.ErrorIs(t, m.call(expired, s), context.DeadlineExceeded, m.name)
	}

	requireKey(t, s, newKey(1))
	requireList(t, s, []store.Key{newKey(1)}, store.KeyFilter{}, 0, 10)
	pairs, err := s.Pairs(t.Context(), time.Time{}, 0)
	require.NoError(t, err)
	require.Len(t, pairs, 2)
	_, token, err := s.LoadImport(t.Context(), newKey(1).KeyID, id16(1001))
	require.NoError(t, err)
	require.Zero(t, token.Failures)
}

// testGivenUp cancels calls while they run. Each takes effect as a whole or
// not at all, one that succeeded has taken effect, and the store is done with
// the caller's slices when the call returns (the race detector knows).
func testGivenUp(t *testing.T, s store.Store) {
	for _, err := range together(callers, func(i int) error {
		key := newKey(i)
		if err := s.CreateKey(t.Context(), key); err != nil {
			return err
		}
		for range 20 {
			ctx, cancel := context.WithCancel(t.Context())
			go cancel()
			next := imported(key)
			next.Description = fmt.Sprint("revision ", next.Revision)
			err := s.UpdateKey(ctx, store.Update{Key: next})
			cancel()
			clear(next.Material)
			clear(next.MAC)
			if err != nil && !errors.Is(err, context.Canceled) {
				return err
			}

			// A write that comes after it settles the one given up.
			if _, err := s.NextBoot(t.Context()); err != nil {
				return err
			}
			got, getErr := s.Key(t.Context(), key.KeyID)
			if getErr != nil {
				return getErr
			}
			switch want := imported(key); {
			case got.Revision == want.Revision:
				want.Description = fmt.Sprint("revision ", want.Revision)
				if !equalKeys(got, want) {
					return fmt.Errorf("half a write: %+v", got)
				}
			case err == nil:
				return fmt.Errorf("revision %d was acknowledged and %d is stored", want.Revision, got.Revision)
			case !equalKeys(got, key):
				return fmt.Errorf("half a write: %+v", got)
			}
			key = got
		}
		return nil
	}) {
		require.NoError(t, err)
	}
}

func equalKeys(a, b store.Key) bool { return fmt.Sprintf("%+v", a) == fmt.Sprintf("%+v", b) }
