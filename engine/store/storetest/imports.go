package storetest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

func testBindPair(t *testing.T, s store.Store) {
	ctx := t.Context()
	key := create(t, s, newKey(1))
	// Added in another order than made; what counts is CreatedAt.
	for _, n := range []int{3, 1, 2} {
		require.NoError(t, s.AddPair(ctx, newPair(n)))
	}
	for n := 1; n <= 3; n++ {
		req := newBind(n, key)
		pair := newPair(n)
		pair.BoundAt, pair.ExpiresAt = req.Now, req.ExpiresAt
		want := store.ImportToken{ID: req.TokenID, KeyID: key.KeyID, Pair: pair, IssuedAt: req.Now, ExpiresAt: req.ExpiresAt}
		require.Equal(t, want, bind(t, s, req), "the oldest first")
		_, token, err := s.LoadImport(ctx, key.KeyID, req.TokenID)
		require.NoError(t, err)
		require.Equal(t, want, token)
	}
	_, err := s.BindPair(ctx, newBind(4, key))
	require.ErrorIs(t, err, store.ErrNoPair)
	require.NotErrorIs(t, err, store.ErrBound)

	// Below the bound nothing is shared, even if it may be.
	req := newBind(4, key)
	req.ShareSince = at(-100)
	_, err = s.BindPair(ctx, req)
	require.ErrorIs(t, err, store.ErrNoPair)
	require.NotErrorIs(t, err, store.ErrBound)
	_, token, err := s.LoadImport(ctx, key.KeyID, req.TokenID)
	require.NoError(t, err)
	require.Zero(t, token, "a refused request leaves nothing")
}

func testBindPairBound(t *testing.T, s store.Store) {
	ctx := t.Context()
	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 9)
	request := func(n int) store.BindRequest {
		req := newBind(n, key)
		req.Bound, req.ExpiresAt = 2, at(100*n)
		return req
	}
	bind(t, s, request(1))
	bind(t, s, request(2))
	_, err := s.BindPair(ctx, request(3))
	require.ErrorIs(t, err, store.ErrNoPair)
	require.ErrorIs(t, err, store.ErrBound)

	other := request(3)
	other.Algorithm = "RSAES_OAEP_SHA_1"
	_, err = s.BindPair(ctx, other)
	require.ErrorIs(t, err, store.ErrNoPair)
	require.NotErrorIs(t, err, store.ErrBound, "each spec and algorithm has a bound of its own")

	// At 100 the first pair has expired, and one more may be bound.
	late := request(3)
	late.Now = at(100)
	require.Equal(t, id16(3), bind(t, s, late).Pair.ID)
	late.TokenID = id16(2000)
	_, err = s.BindPair(ctx, late)
	require.ErrorIs(t, err, store.ErrBound)

	none := request(4)
	none.Bound = 0
	_, err = s.BindPair(ctx, none)
	require.ErrorIs(t, err, store.ErrBound)
}

func testBindPairShares(t *testing.T, s store.Store) {
	ctx := t.Context()
	key, other := create(t, s, newKey(1)), create(t, s, newKey(2))
	addPairs(t, s, 1, 9)
	request := func(n int, key store.Key) store.BindRequest {
		req := newBind(n, key)
		req.Now, req.ExpiresAt, req.Bound, req.ShareSince = at(10*n), at(10*n+100), 2, at(10*n-30)
		return req
	}
	first := bind(t, s, request(1, key))    // bound at 10
	second := bind(t, s, request(2, other)) // bound at 20

	shared := bind(t, s, request(3, other))
	require.Equal(t, second.Pair.ID, shared.Pair.ID, "the newest is shared")
	require.Equal(t, at(20), shared.Pair.BoundAt, "it is bound since the first time")
	require.Equal(t, at(130), shared.Pair.ExpiresAt, "and as long as its last token lives")
	require.Equal(t, other.KeyID, shared.KeyID)
	require.Equal(t, at(30), shared.IssuedAt)
	_, loaded, err := s.LoadImport(ctx, other.KeyID, second.ID)
	require.NoError(t, err)
	require.Equal(t, shared.Pair, loaded.Pair)
	require.Equal(t, at(120), loaded.ExpiresAt, "the first token's own time does not change")

	// A token that ends earlier does not shorten the pair's life.
	brief := request(4, key)
	brief.ExpiresAt = at(50)
	require.Equal(t, at(130), bind(t, s, brief).Pair.ExpiresAt)

	// ShareSince itself is in; a second later is not.
	edge := request(5, key)
	edge.ShareSince = at(20)
	require.Equal(t, second.Pair.ID, bind(t, s, edge).Pair.ID)
	tooOld := request(6, key)
	tooOld.ShareSince = at(21)
	_, err = s.BindPair(ctx, tooOld)
	require.ErrorIs(t, err, store.ErrNoPair)
	require.ErrorIs(t, err, store.ErrBound)
	never := request(6, key)
	never.ShareSince = time.Time{}
	_, err = s.BindPair(ctx, never)
	require.ErrorIs(t, err, store.ErrBound)
	elsewhere := request(6, key)
	elsewhere.Bound, elsewhere.Algorithm = 0, "RSAES_OAEP_SHA_1"
	_, err = s.BindPair(ctx, elsewhere)
	require.ErrorIs(t, err, store.ErrBound, "pairs of another algorithm are not shared")

	// An expired pair neither counts nor is shared: both live pairs of now are
	// past, so a fresh one is taken.
	later := request(20, key)
	later.ShareSince = at(0)
	require.Equal(t, id16(3), bind(t, s, later).Pair.ID)
	later.TokenID, later.Bound = id16(3000), 0
	require.Equal(t, id16(3), bind(t, s, later).Pair.ID)
	require.NotEqual(t, first.Pair.ID, second.Pair.ID)

	// With nothing but expired pairs there is nothing to share.
	end := request(99, key)
	end.ShareSince, end.Bound = at(0), 0
	_, err = s.BindPair(ctx, end)
	require.ErrorIs(t, err, store.ErrBound)
}

func testBindPairRefuses(t *testing.T, s store.Store) {
	ctx := t.Context()
	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 3)
	token := bind(t, s, newBind(1, key))

	_, err := s.BindPair(ctx, newBind(1, key))
	require.ErrorIs(t, err, store.ErrExists, "one token per identifier")
	_, err = s.BindPair(ctx, newBind(2, newKey(9)))
	require.ErrorIs(t, err, store.ErrNotFound, "the key must exist")

	counts, err := s.PairCounts(ctx, at(1))
	require.NoError(t, err)
	require.Equal(t, 1, counts[0].Ready, "refused requests take no pair")
	_, loaded, err := s.LoadImport(ctx, key.KeyID, token.ID)
	require.NoError(t, err)
	require.Equal(t, token, loaded)
}

func testLoadImport(t *testing.T, s store.Store) {
	ctx := t.Context()
	key, other := create(t, s, newKey(1)), create(t, s, newKey(2))
	addPairs(t, s, 1, 3)
	mine, theirs := bind(t, s, newBind(1, key)), bind(t, s, newBind(2, other))
	require.NoError(t, s.UpdateKey(ctx, store.Update{Key: imported(key)}))

	gotKey, gotToken, err := s.LoadImport(ctx, key.KeyID, mine.ID)
	require.NoError(t, err)
	require.Equal(t, imported(key), gotKey)
	require.Equal(t, mine, gotToken)

	gotKey, gotToken, err = s.LoadImport(ctx, key.KeyID, theirs.ID)
	require.NoError(t, err)
	require.Equal(t, imported(key), gotKey)
	require.Equal(t, theirs, gotToken, "another key's token is loaded as well; the caller compares")

	gotKey, gotToken, err = s.LoadImport(ctx, key.KeyID, id16(77))
	require.NoError(t, err)
	require.Equal(t, imported(key), gotKey)
	require.Zero(t, gotToken)

	_, _, err = s.LoadImport(ctx, "nobody", mine.ID)
	require.ErrorIs(t, err, store.ErrNotFound)
}

func testCountFailure(t *testing.T, s store.Store) {
	ctx := t.Context()
	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 3)
	token, other := bind(t, s, newBind(1, key)), bind(t, s, newBind(2, key))
	for n := 1; n <= 3; n++ {
		sum, err := s.CountFailure(ctx, token.ID)
		require.NoError(t, err)
		require.Equal(t, n, sum)
	}
	_, loaded, err := s.LoadImport(ctx, key.KeyID, token.ID)
	require.NoError(t, err)
	require.Equal(t, 3, loaded.Failures)
	_, loaded, err = s.LoadImport(ctx, key.KeyID, other.ID)
	require.NoError(t, err)
	require.Zero(t, loaded.Failures)
	_, err = s.CountFailure(ctx, id16(77))
	require.ErrorIs(t, err, store.ErrNotFound)
}

// An update is made only while its import token has failures left, whatever
// else it does.
func testBudget(t *testing.T, s store.Store) {
	ctx := t.Context()
	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 3)
	token, gone := bind(t, s, newBind(1, key)), bind(t, s, newBind(2, key))
	require.NoError(t, s.DeletePair(ctx, gone.Pair.ID))
	update := store.Update{Key: imported(key), Receipt: newReceipt(key), Stale: true, Budget: &store.Budget{TokenID: token.ID, Failures: 2}}
	for range 2 {
		_, err := s.CountFailure(ctx, token.ID)
		require.NoError(t, err)
	}
	require.ErrorIs(t, s.UpdateKey(ctx, update), store.ErrSpent)
	update.Holding = &store.Holding{}
	require.ErrorIs(t, s.UpdateKey(ctx, update), store.ErrSpent)
	update.Budget = &store.Budget{TokenID: gone.ID, Failures: 2}
	require.ErrorIs(t, s.UpdateKey(ctx, update), store.ErrSpent)
	requireKey(t, s, key)
	_, total, err := s.KeyReceipts(ctx, key.KeyID, 0, 1)
	require.NoError(t, err)
	require.Zero(t, total)

	update.Budget = &store.Budget{TokenID: token.ID, Failures: 3}
	require.NoError(t, s.UpdateKey(ctx, update))
	requireKey(t, s, update.Key)
	require.ErrorIs(t, s.UpdateKey(ctx, update), store.ErrConflict)
	again := update
	again.Key, again.Holding = imported(update.Key), nil
	again.Receipt = nil
	require.NoError(t, s.UpdateKey(ctx, again))
	requireKey(t, s, again.Key)
}
