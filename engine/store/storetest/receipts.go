package storetest

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// newReceipt is the entry of an import that made key what it is.
func newReceipt(key store.Key) *store.Receipt {
	n := int(key.Revision)
	return &store.Receipt{
		KeyID: key.KeyID, Revision: key.Revision, RequestID: fmt.Sprintf("request-%d", n), Import: true,
		Entry: fmt.Appendf(nil, "entry %s %d, ключ\n", key.KeyID, n), RowDigest: fill(32, n), MAC: fill(32, n+1),
	}
}

// importWith makes the next revision of a key, with a receipt, and returns both.
func importWith(t *testing.T, s store.Store, key store.Key) (store.Key, store.Receipt) {
	t.Helper()
	key = imported(key)
	key.Receipt = fill(32, int(key.Revision)+9)
	receipt := newReceipt(key)
	require.NoError(t, s.UpdateKey(t.Context(), store.Update{Key: key, Receipt: receipt}))
	return key, *receipt
}

// requireReceipts compares entries but for what the store gives them, and
// returns what it gave.
func requireReceipts(t *testing.T, want, got []store.Receipt) (seqs []int64) {
	t.Helper()
	require.Len(t, got, len(want))
	for i, r := range got {
		seqs = append(seqs, r.Seq)
		r.Seq, r.Index = want[i].Seq, want[i].Index
		require.Equal(t, want[i], r, "number %d", i)
	}
	return seqs
}

func pending(t *testing.T, s store.Store, limit int) []store.Receipt {
	t.Helper()
	list, err := s.PendingReceipts(t.Context(), limit)
	require.NoError(t, err)
	for _, r := range list {
		require.EqualValues(t, -1, r.Index)
	}
	return list
}

func logOf(t *testing.T, s store.Store) store.Log {
	t.Helper()
	log, err := s.Log(t.Context())
	require.NoError(t, err)
	return log
}

// An entry is committed with what it is of, or not at all.
func testReceipts(t *testing.T, s store.Store) {
	ctx := t.Context()
	a, b := create(t, s, newKey(1)), create(t, s, newKey(2))
	require.Empty(t, pending(t, s, 10))
	a, first := importWith(t, s, a)
	b, second := importWith(t, s, b)
	requireKey(t, s, a)
	stale := a
	require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: stale, Receipt: newReceipt(stale)}), store.ErrConflict)
	require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: imported(newKey(3)), Receipt: newReceipt(stale)}), store.ErrNotFound)
	require.ErrorIs(t, s.DeleteKey(ctx, store.Deletion{KeyID: a.KeyID, Revision: 9, Receipt: newReceipt(a)}), store.ErrConflict)
	seqs := requireReceipts(t, []store.Receipt{first, second}, pending(t, s, 10))
	require.Less(t, seqs[0], seqs[1])
	requireReceipts(t, []store.Receipt{first}, pending(t, s, 1))
	require.Empty(t, pending(t, s, 0))

	a, third := importWith(t, s, a)
	gone := *newReceipt(imported(a))
	gone.Import, gone.RequestID = false, ""
	require.NoError(t, s.DeleteKey(ctx, store.Deletion{KeyID: a.KeyID, Revision: a.Revision, Receipt: &gone}))
	require.NoError(t, s.DeleteKey(ctx, store.Deletion{KeyID: b.KeyID, Revision: b.Revision}))
	requireReceipts(t, []store.Receipt{first, second, third, gone}, pending(t, s, 10))

	// Entries stay when their keys are gone.
	list, total, err := s.KeyReceipts(ctx, a.KeyID, 0, 10)
	require.NoError(t, err)
	require.Equal(t, 3, total)
	requireReceipts(t, []store.Receipt{gone, third, first}, list)
	list, total, err = s.KeyReceipts(ctx, a.KeyID, 1, 1)
	require.NoError(t, err)
	require.Equal(t, 3, total)
	requireReceipts(t, []store.Receipt{third}, list)
	list, total, err = s.KeyReceipts(ctx, "nobody", 0, 10)
	require.NoError(t, err)
	require.Zero(t, total)
	require.Empty(t, list)

	for request, want := range map[string]store.Receipt{"": third, third.RequestID: third, first.RequestID: first} {
		got, err := s.ImportReceipt(ctx, a.KeyID, request)
		require.NoError(t, err)
		requireReceipts(t, []store.Receipt{want}, []store.Receipt{got})
	}
	for _, name := range [][2]string{{a.KeyID, "another request"}, {"nobody", ""}, {b.KeyID, third.RequestID}} {
		_, err = s.ImportReceipt(ctx, name[0], name[1])
		require.ErrorIs(t, err, store.ErrNotFound)
	}
}

// The log grows by what it is given, from the size it has, and by nothing else.
func testExtendLog(t *testing.T, s store.Store) {
	ctx := t.Context()
	empty := logOf(t, s)
	require.NotZero(t, empty.ID)
	require.Equal(t, store.Log{ID: empty.ID}, empty)
	key := create(t, s, newKey(1))
	var want []store.Receipt
	for range 4 {
		var r store.Receipt
		key, r = importWith(t, s, key)
		want = append(want, r)
	}
	seqs := requireReceipts(t, want, pending(t, s, 10))
	tile := store.Tile{Level: 0, N: 0, Hashes: fill(64, 1)}
	other := store.Tile{Level: 1, N: 1 << 40, Hashes: fill(32, 2)}
	first := store.LogExtension{Entries: seqs[:2], Tiles: []store.Tile{tile, other}, Head: []byte("head of 2")}

	for name, x := range map[string]store.LogExtension{
		"of another size":      {Size: 1, Entries: seqs[:2], Head: []byte("x"), Tiles: []store.Tile{tile}},
		"with an unknown":      {Entries: []int64{seqs[0], seqs[3] + 1000}, Head: []byte("x"), Tiles: []store.Tile{tile}},
		"of another, negative": {Size: -1, Entries: seqs[:1], Head: []byte("x")},
	} {
		require.ErrorIs(t, s.ExtendLog(ctx, x), store.ErrConflict, name)
		require.Equal(t, empty, logOf(t, s), name)
	}
	got, err := s.LogTiles(ctx, []store.Tile{tile})
	require.NoError(t, err)
	require.Empty(t, got, "nothing of what was refused is there")
	requireReceipts(t, want, pending(t, s, 10))

	require.NoError(t, s.ExtendLog(ctx, first))
	require.ErrorIs(t, s.ExtendLog(ctx, first), store.ErrConflict)
	require.Equal(t, store.Log{ID: empty.ID, Size: 2, Head: first.Head}, logOf(t, s))
	requireReceipts(t, want[2:], pending(t, s, 10))
	got, err = s.LogTiles(ctx, []store.Tile{{Level: 1, N: 1 << 40}, {Level: 0, N: 0}, {Level: 7, N: 7}})
	require.NoError(t, err)
	require.ElementsMatch(t, []store.Tile{tile, other}, got)

	// One that has a place does not get another.
	again := store.LogExtension{Size: 2, Entries: []int64{seqs[2], seqs[0]}, Head: []byte("x")}
	require.ErrorIs(t, s.ExtendLog(ctx, again), store.ErrConflict)
	require.Equal(t, store.Log{ID: empty.ID, Size: 2, Head: first.Head}, logOf(t, s))

	tile.Hashes = fill(96, 3)
	second := store.LogExtension{Size: 2, Entries: []int64{seqs[3]}, Tiles: []store.Tile{tile}, Head: []byte("head of 3")}
	require.NoError(t, s.ExtendLog(ctx, second))
	got, err = s.LogTiles(ctx, []store.Tile{tile, tile})
	require.NoError(t, err)
	require.Contains(t, got, tile)
	requireReceipts(t, want[2:3], pending(t, s, 10))

	places := func(from int64, limit int) []store.Receipt {
		list, err := s.LogReceipts(ctx, from, limit)
		require.NoError(t, err)
		for i, r := range list {
			require.Equal(t, from+int64(i), r.Index)
		}
		return list
	}
	requireReceipts(t, []store.Receipt{want[0], want[1], want[3]}, places(0, 10))
	requireReceipts(t, []store.Receipt{want[1]}, places(1, 1))
	require.Empty(t, places(3, 10))
	require.Empty(t, places(0, 0))
	r, err := s.ImportReceipt(ctx, key.KeyID, "")
	require.NoError(t, err)
	require.EqualValues(t, 2, r.Index)
}

// Of two that extend the log at once, one does.
func testConcurrentExtend(t *testing.T, s store.Store) {
	const callers, imports = 4, 3
	keys := make([]store.Key, callers)
	for i := range keys {
		keys[i] = create(t, s, newKey(i))
	}
	errs := together(callers, func(i int) error {
		for range imports {
			keys[i] = imported(keys[i])
			if err := s.UpdateKey(t.Context(), store.Update{Key: keys[i], Receipt: newReceipt(keys[i])}); err != nil {
				return err
			}
		}
		return nil
	})
	for _, err := range errs {
		require.NoError(t, err)
	}
	list := pending(t, s, 100)
	require.Len(t, list, callers*imports)
	last := map[string]int64{}
	for _, r := range list {
		require.Greater(t, r.Revision, last[r.KeyID], "those of one key are in order")
		last[r.KeyID] = r.Revision
	}
	errs = together(callers, func(i int) error {
		return s.ExtendLog(t.Context(), store.LogExtension{Entries: []int64{list[i].Seq}, Head: []byte{byte(i)}})
	})
	won := 0
	for i, err := range errs {
		if err == nil {
			won++
			require.Equal(t, []byte{byte(i)}, logOf(t, s).Head)
			continue
		}
		require.ErrorIs(t, err, store.ErrConflict)
	}
	require.Equal(t, 1, won)
	require.EqualValues(t, 1, logOf(t, s).Size)
	require.Len(t, pending(t, s, 100), callers*imports-1)
}
