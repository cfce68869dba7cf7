package storetest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// RunReopened tests that a store finds its rows again. Every call of database
// makes a new, empty database and returns a function that opens it, which
// RunReopened calls again after each Close.
func RunReopened(t *testing.T, database func(t *testing.T) (open func(t *testing.T) store.Store)) {
	t.Helper()
	t.Run("Reopened", func(t *testing.T) { testReopened(t, database(t)) })
	t.Run("ReopenedEmpty", func(t *testing.T) {
		open := database(t)
		for range 3 {
			s := open(t)
			requireList(t, s, nil, store.KeyFilter{}, 0, 10)
			require.NoError(t, s.Close())
		}
	})
}

func testReopened(t *testing.T, open func(t *testing.T) store.Store) {
	ctx := t.Context()
	s := open(t)
	first, second, third := create(t, s, newKey(1)), create(t, s, newKey(2)), create(t, s, newKey(3))
	second, receipt := importWith(t, s, second)
	gone := *newReceipt(third)
	require.NoError(t, s.DeleteKey(ctx, store.Deletion{KeyID: third.KeyID, Revision: 1, Receipt: &gone}))
	seqs := requireReceipts(t, []store.Receipt{receipt, gone}, pending(t, s, 10))
	tile := store.Tile{Hashes: fill(32, 1)}
	require.NoError(t, s.ExtendLog(ctx, store.LogExtension{Entries: seqs[:1], Tiles: []store.Tile{tile}, Head: []byte("head")}))
	log := logOf(t, s)
	addPairs(t, s, 1, 5)
	token := bind(t, s, newBind(1, second))
	_, err := s.CountFailure(ctx, token.ID)
	require.NoError(t, err)
	require.NoError(t, s.RetirePair(ctx, id16(2), at(9)))
	require.NoError(t, s.DeletePair(ctx, id16(3)))
	usage := store.Usage{KeyID: second.KeyID, Uses: 77, Boot: 1, MAC: fill(32, 1)}
	_, err = s.PutUsages(ctx, []store.UsageUpdate{{Usage: usage}})
	require.NoError(t, err)
	fresh, err := s.AddNonce(ctx, newNonce(1), at(0))
	require.NoError(t, err)
	require.True(t, fresh)
	boot, err := s.NextBoot(ctx)
	require.NoError(t, err)
	name, err := s.Instance(ctx)
	require.NoError(t, err)
	pairs, err := s.Pairs(ctx, time.Time{}, 0)
	require.NoError(t, err)
	counts, err := s.PairCounts(ctx, at(5))
	require.NoError(t, err)

	for range 3 {
		require.NoError(t, s.Close())
		s = open(t)
		requireList(t, s, []store.Key{first, second}, store.KeyFilter{}, 0, 10)
		requireKey(t, s, first)
		key, loaded, err := s.LoadImport(ctx, second.KeyID, token.ID)
		require.NoError(t, err)
		require.Equal(t, second, key)
		token.Failures = 1
		require.Equal(t, token, loaded)
		got, err := s.Usage(ctx, second.KeyID)
		require.NoError(t, err)
		require.Equal(t, usage, got)
		fresh, err = s.AddNonce(ctx, newNonce(1), at(1))
		require.NoError(t, err)
		require.False(t, fresh, "a nonce outlives a restart")
		require.Equal(t, log, logOf(t, s))
		requireReceipts(t, []store.Receipt{gone}, pending(t, s, 10))
		placed, err := s.LogReceipts(ctx, 0, 10)
		require.NoError(t, err)
		requireReceipts(t, []store.Receipt{receipt}, placed)
		tiles, err := s.LogTiles(ctx, []store.Tile{tile})
		require.NoError(t, err)
		require.Equal(t, []store.Tile{tile}, tiles)
		next, err := s.NextBoot(ctx)
		require.NoError(t, err)
		require.Greater(t, next, boot)
		boot = next
		sameName, err := s.Instance(ctx)
		require.NoError(t, err)
		require.Equal(t, name, sameName)
		samePairs, err := s.Pairs(ctx, time.Time{}, 0)
		require.NoError(t, err)
		require.Equal(t, pairs, samePairs)
		sameCounts, err := s.PairCounts(ctx, at(5))
		require.NoError(t, err)
		require.Equal(t, counts, sameCounts)
	}
	require.NoError(t, s.Close())
}
