package storetest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

func testPairs(t *testing.T, s store.Store) {
	ctx := t.Context()
	pairs, err := s.Pairs(ctx, time.Time{}, 0)
	require.NoError(t, err)
	require.Empty(t, pairs)

	first := newPair(1)
	require.NoError(t, s.AddPair(ctx, first))
	require.ErrorIs(t, s.AddPair(ctx, first), store.ErrExists)
	bound := newPair(2)
	bound.BoundAt, bound.ExpiresAt = at(1), at(2)
	require.NoError(t, s.AddPair(ctx, bound))

	pairs, err = s.Pairs(ctx, time.Time{}, 0)
	require.NoError(t, err)
	require.ElementsMatch(t, []store.Pair{first, newPair(2)}, pairs, "what is added is ready, whatever it says")
	pairs, err = s.Pairs(ctx, at(1<<20), 10)
	require.NoError(t, err)
	require.Empty(t, pairs, "a ready pair is never due")

	// Due: bound ones whose last token has expired, the earliest first.
	key := create(t, s, newKey(1))
	late, early := newBind(1, key), newBind(2, key)
	late.ExpiresAt, early.ExpiresAt = at(200), at(100)
	lateToken, earlyToken := bind(t, s, late), bind(t, s, early)
	for _, tt := range []struct {
		due, limit int
		want       []store.Pair
	}{
		{99, 10, nil},
		{100, 10, []store.Pair{earlyToken.Pair}},
		{200, 10, []store.Pair{earlyToken.Pair, lateToken.Pair}},
		{200, 1, []store.Pair{earlyToken.Pair}},
		{200, 0, nil},
	} {
		pairs, err = s.Pairs(ctx, at(tt.due), tt.limit)
		require.NoError(t, err)
		require.Equal(t, tt.want, pairs, "due at %d, %d at most", tt.due, tt.limit)
	}
	pairs, err = s.Pairs(ctx, time.Time{}, 1)
	require.NoError(t, err)
	require.Len(t, pairs, 2, "without due, limit says nothing")
}

func testRetirePair(t *testing.T, s store.Store) {
	ctx := t.Context()
	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 4)
	bound := bind(t, s, newBind(1, key))
	require.Equal(t, id16(1), bound.Pair.ID)

	require.ErrorIs(t, s.RetirePair(ctx, id16(9), at(50)), store.ErrNotFound)
	require.ErrorIs(t, s.RetirePair(ctx, id16(1), at(50)), store.ErrConflict)
	_, token, err := s.LoadImport(ctx, key.KeyID, bound.ID)
	require.NoError(t, err)
	require.Equal(t, bound, token, "a bound pair stays as it is")

	require.NoError(t, s.RetirePair(ctx, id16(2), at(50)))
	require.NoError(t, s.RetirePair(ctx, id16(2), at(60)), "it is retired already")
	due, err := s.Pairs(ctx, at(50), 10)
	require.NoError(t, err)
	require.Len(t, due, 1)
	require.Equal(t, id16(2), due[0].ID)
	require.True(t, due[0].BoundAt.IsZero())

	require.Equal(t, id16(3), bind(t, s, newBind(2, key)).Pair.ID, "the retired one is older, and passed over")
	_, err = s.BindPair(ctx, newBind(3, key))
	require.ErrorIs(t, err, store.ErrNoPair)

	// Nor is it shared, even by a request from before it was retired.
	req := newBind(4, key)
	req.Now, req.Bound, req.ShareSince = at(10), 0, at(-100)
	require.Equal(t, id16(3), bind(t, s, req).Pair.ID)
	counts, err := s.PairCounts(ctx, at(10))
	require.NoError(t, err)
	require.Equal(t, []store.PairCount{{Spec: "RSA_2048", Algorithm: "RSAES_OAEP_SHA_256", Bound: 2, LastBoundAt: at(2)}}, counts)
}

func testDeletePair(t *testing.T, s store.Store) {
	ctx := t.Context()
	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 3)
	first, second := bind(t, s, newBind(1, key)), bind(t, s, newBind(2, key))

	require.NoError(t, s.DeletePair(ctx, first.Pair.ID))
	require.NoError(t, s.DeletePair(ctx, first.Pair.ID), "gone already")
	require.NoError(t, s.DeletePair(ctx, id16(99)), "never there")
	_, token, err := s.LoadImport(ctx, key.KeyID, first.ID)
	require.NoError(t, err)
	require.Zero(t, token, "its import tokens go with it")
	_, err = s.CountFailure(ctx, first.ID)
	require.ErrorIs(t, err, store.ErrNotFound)
	_, token, err = s.LoadImport(ctx, key.KeyID, second.ID)
	require.NoError(t, err)
	require.Equal(t, second, token)
	pairs, err := s.Pairs(ctx, time.Time{}, 0)
	require.NoError(t, err)
	require.Equal(t, []store.Pair{second.Pair}, pairs)
	requireKey(t, s, key)
}

func testPairCounts(t *testing.T, s store.Store) {
	ctx := t.Context()
	counts, err := s.PairCounts(ctx, at(0))
	require.NoError(t, err)
	require.Empty(t, counts)

	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 6)
	for n := 6; n < 8; n++ {
		p := newPair(n)
		p.Spec, p.Algorithm = "RSA_4096", "RSAES_OAEP_SHA_1"
		require.NoError(t, s.AddPair(ctx, p))
	}
	for n := 1; n <= 3; n++ {
		req := newBind(n, key)
		req.ExpiresAt = at(100 * n)
		bind(t, s, req)
	}
	for _, tt := range []struct{ now, bound int }{{50, 3}, {99, 3}, {100, 2}, {250, 1}, {300, 0}} {
		counts, err = s.PairCounts(ctx, at(tt.now))
		require.NoError(t, err)
		require.ElementsMatch(t, []store.PairCount{
			{Spec: "RSA_2048", Algorithm: "RSAES_OAEP_SHA_256", Ready: 2, Bound: tt.bound, LastBoundAt: at(3)},
			{Spec: "RSA_4096", Algorithm: "RSAES_OAEP_SHA_1", Ready: 2},
		}, counts, "at %d", tt.now)
	}
}
