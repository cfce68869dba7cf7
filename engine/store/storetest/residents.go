package storetest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// newResident is the entry of an object for key, made at the moment at(n).
func newResident(n int, key store.Key) store.Resident {
	return store.Resident{ID: id16(5000 + n), KeyID: key.KeyID, Node: "node", Since: at(n), State: store.ResidentExpected}
}

// requireResidents requires that there are exactly these entries.
func requireResidents(t *testing.T, s store.Store, want ...store.Resident) {
	t.Helper()
	got, err := s.Residents(t.Context(), time.Time{}, 0)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func testResidents(t *testing.T, s store.Store) {
	ctx := t.Context()
	requireResidents(t, s)
	key := create(t, s, newKey(1))
	first, second := newResident(1, key), newResident(2, key)
	second.State = store.ResidentKept
	require.NoError(t, s.AddResident(ctx, first, 2))
	require.ErrorIs(t, s.AddResident(ctx, first, 2), store.ErrExists)
	require.NoError(t, s.AddResident(ctx, second, 2))
	second.State = store.ResidentExpected
	requireResidents(t, s, first, second)
	require.ErrorIs(t, s.AddResident(ctx, newResident(3, key), 2), store.ErrLimit)
	third := newResident(3, key)
	require.NoError(t, s.AddResident(ctx, third, 0))

	require.ErrorIs(t, s.CondemnResident(ctx, id16(1)), store.ErrNotFound)
	require.NoError(t, s.CondemnResident(ctx, third.ID))
	require.NoError(t, s.CondemnResident(ctx, third.ID), "it is so already")
	third.State = store.ResidentCondemned
	for _, tt := range []struct {
		due, limit int
		want       []store.Resident
	}{
		{0, 10, []store.Resident{third}},
		{1, 10, []store.Resident{first, third}},
		{9, 10, []store.Resident{first, second, third}},
		{9, 2, []store.Resident{first, second}},
		{9, 0, nil},
	} {
		got, err := s.Residents(ctx, at(tt.due), tt.limit)
		require.NoError(t, err)
		require.Equal(t, tt.want, got, "due at %d, %d at most", tt.due, tt.limit)
	}
	require.NoError(t, s.RemoveResidents(ctx, nil))
	require.NoError(t, s.RemoveResidents(ctx, [][16]byte{first.ID, third.ID, id16(1)}))
	requireResidents(t, s, second)
	require.NoError(t, s.RemoveResidents(ctx, [][16]byte{first.ID}), "gone already")
}

func testHoldResidents(t *testing.T, s store.Store) {
	ctx := t.Context()
	key, other := create(t, s, newKey(1)), create(t, s, newKey(2))
	first, second, others := newResident(1, key), newResident(2, key), newResident(3, other)
	for _, r := range []store.Resident{first, second, others} {
		require.NoError(t, s.AddResident(ctx, r, 0))
	}
	update := func(holding *store.Holding) error {
		next := imported(key)
		err := s.UpdateKey(ctx, store.Update{Key: next, Holding: holding})
		if err == nil {
			key = next
		}
		requireKey(t, s, key)
		return err
	}

	require.NoError(t, update(nil))
	requireResidents(t, s, first, second, others)
	require.NoError(t, update(&store.Holding{ID: first.ID[:]}))
	first.State = store.ResidentKept
	requireResidents(t, s, first, second, others)
	require.ErrorIs(t, s.CondemnResident(ctx, first.ID), store.ErrConflict)
	require.NoError(t, s.RemoveResidents(ctx, [][16]byte{first.ID}), "a kept one stays")
	requireResidents(t, s, first, second, others)
	require.NoError(t, update(&store.Holding{ID: first.ID[:]}), "it is kept already")

	// Nothing is written for an object that nobody expects, or another CMK's.
	require.NoError(t, s.CondemnResident(ctx, second.ID))
	second.State = store.ResidentCondemned
	for _, id := range [][16]byte{second.ID, others.ID, id16(1)} {
		err := update(&store.Holding{ID: id[:]})
		require.ErrorIs(t, err, store.ErrCondemned)
		require.ErrorIs(t, err, store.ErrConflict)
		requireResidents(t, s, first, second, others)
	}
	stale := imported(key)
	stale.Revision++
	require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: stale, Holding: &store.Holding{}}), store.ErrConflict)
	requireResidents(t, s, first, second, others)

	// Another object in the place of the first, then none.
	next := newResident(4, key)
	require.NoError(t, s.AddResident(ctx, next, 0))
	require.NoError(t, update(&store.Holding{ID: next.ID[:]}))
	first.State, next.State = store.ResidentCondemned, store.ResidentKept
	requireResidents(t, s, first, second, others, next)
	require.NoError(t, update(&store.Holding{}))
	next.State = store.ResidentCondemned
	requireResidents(t, s, first, second, others, next)

	// Entries outlive their CMK.
	require.NoError(t, s.DeleteKey(ctx, store.Deletion{KeyID: other.KeyID, Revision: other.Revision}))
	others.State = store.ResidentCondemned
	requireResidents(t, s, first, second, others, next)
}
