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
	require.NoError(t, s.PutUsages(ctx, nil))

	usage := func(id string, uses uint64, seed int) store.Usage {
		return store.Usage{KeyID: id, Uses: uses, Boot: uint64(seed), MAC: fill(32, seed)}
	}
	requireUsage := func(want store.Usage) {
		t.Helper()
		got, err := s.Usage(ctx, want.KeyID)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	require.NoError(t, s.PutUsages(ctx, []store.Usage{usage(key.KeyID, 10, 1), usage("nobody", 5, 2), usage(other.KeyID, 1<<40, 3)}))
	requireUsage(usage(key.KeyID, 10, 1))
	requireUsage(usage(other.KeyID, 1<<40, 3))
	_, err = s.Usage(ctx, "nobody")
	require.ErrorIs(t, err, store.ErrNotFound, "a key that is gone has no usage")

	require.NoError(t, s.PutUsages(ctx, []store.Usage{usage(key.KeyID, 9, 4), usage(other.KeyID, 1<<40+1, 5)}))
	requireUsage(usage(key.KeyID, 10, 1))
	requireUsage(usage(other.KeyID, 1<<40+1, 5))

	require.NoError(t, s.PutUsages(ctx, []store.Usage{usage(key.KeyID, 10, 6)}))
	requireUsage(usage(key.KeyID, 10, 6)) // equal counts: the newer boot wins
	require.NoError(t, s.PutUsages(ctx, []store.Usage{usage(key.KeyID, 12, 7), usage(key.KeyID, 11, 8)}))
	requireUsage(usage(key.KeyID, 12, 7))
	none := store.Usage{KeyID: key.KeyID, Uses: 13}
	require.NoError(t, s.PutUsages(ctx, []store.Usage{none}))
	requireUsage(none)
}
