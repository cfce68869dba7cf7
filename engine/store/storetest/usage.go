package storetest

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

func testUsage(t *testing.T, s store.Store) {
	ctx := t.Context()
	key, other := create(t, s, newKey(1)), create(t, s, newKey(2))
	_, err := s.Usage(ctx, key.KeyID)
	require.ErrorIs(t, err, store.ErrNotFound, "a key that was never used has none")
	stored, err := s.PutUsages(ctx, nil)
	require.NoError(t, err)
	require.Empty(t, stored)

	usage := func(id string, uses uint64, seed int) store.Usage {
		return store.Usage{KeyID: id, Uses: uses, Boot: uint64(seed), MAC: fill(32, seed)}
	}
	put := func(want []bool, usages ...store.UsageUpdate) {
		t.Helper()
		stored, err := s.PutUsages(ctx, usages)
		require.NoError(t, err)
		require.Equal(t, want, stored)
	}
	requireUsage := func(want store.Usage) {
		t.Helper()
		got, err := s.Usage(ctx, want.KeyID)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	put([]bool{true, false, true},
		store.UsageUpdate{Usage: usage(key.KeyID, 10, 1)},
		store.UsageUpdate{Usage: usage("nobody", 5, 2)},
		store.UsageUpdate{Usage: usage(other.KeyID, 1<<40, 3), Was: 7}) // there is none yet, so it is the first
	requireUsage(usage(key.KeyID, 10, 1))
	requireUsage(usage(other.KeyID, 1<<40, 3))
	_, err = s.Usage(ctx, "nobody")
	require.ErrorIs(t, err, store.ErrNotFound, "a key that is gone has no usage")

	put([]bool{true, false},
		store.UsageUpdate{Usage: usage(other.KeyID, 1<<40+1, 5), Was: 1 << 40},
		store.UsageUpdate{Usage: usage(key.KeyID, 11, 4), Was: 9})
	requireUsage(usage(key.KeyID, 10, 1))
	requireUsage(usage(other.KeyID, 1<<40+1, 5))

	put([]bool{true}, store.UsageUpdate{Usage: usage(key.KeyID, 10, 6), Was: 10}) // of another boot
	requireUsage(usage(key.KeyID, 10, 6))
	put([]bool{true, true},
		store.UsageUpdate{Usage: usage(key.KeyID, 12, 7), Was: 10},
		store.UsageUpdate{Usage: usage(key.KeyID, 11, 8), Was: 12}) // one after the other, and fewer too
	requireUsage(usage(key.KeyID, 11, 8))
	put([]bool{false}, store.UsageUpdate{Usage: usage(key.KeyID, 13, 9)})
	none := store.Usage{KeyID: key.KeyID, Uses: 13}
	put([]bool{true}, store.UsageUpdate{Usage: none, Was: 11})
	requireUsage(none)
	_, err = s.PutUsages(ctx, []store.UsageUpdate{{Usage: usage(key.KeyID, 1<<63, 1), Was: 13}})
	require.Error(t, err)
	requireUsage(none)
}
