package storetest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

func testCreateKey(t *testing.T, s store.Store) {
	ctx := t.Context()
	_, err := s.Key(ctx, newKey(1).KeyID)
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = s.KeyByVersion(ctx, newKey(1).KeyVersionID)
	require.ErrorIs(t, err, store.ErrNotFound)

	key := create(t, s, newKey(1))
	other := create(t, s, newKey(2))
	requireKey(t, s, key)
	requireKey(t, s, other)
	got, err := s.KeyByVersion(ctx, key.KeyVersionID)
	require.NoError(t, err)
	require.Equal(t, key, got)
	_, err = s.KeyByVersion(ctx, key.KeyID)
	require.ErrorIs(t, err, store.ErrNotFound, "a key id is no version id")

	sameID, sameVersion := newKey(3), newKey(3)
	sameID.KeyID = key.KeyID
	sameVersion.KeyVersionID = key.KeyVersionID
	require.ErrorIs(t, s.CreateKey(ctx, key), store.ErrExists)
	require.ErrorIs(t, s.CreateKey(ctx, sameID), store.ErrExists)
	require.ErrorIs(t, s.CreateKey(ctx, sameVersion), store.ErrExists)
	requireKey(t, s, key)
	_, err = s.Key(ctx, newKey(3).KeyID)
	require.ErrorIs(t, err, store.ErrNotFound)
	_, total, err := s.ListKeys(ctx, store.KeyFilter{}, 0, 10)
	require.NoError(t, err)
	require.Equal(t, 2, total)

	old := newKey(4)
	old.Revision = 2
	require.Error(t, s.CreateKey(ctx, old), "revisions begin at 1")
}

func testKeyValues(t *testing.T, s store.Store) {
	zone := time.FixedZone("elsewhere", 8*3600)
	full := imported(newKey(1))
	full.Revision = 1
	empty := newKey(2)
	empty.Description, empty.MAC = "", nil
	hollow := newKey(3)
	hollow.KCV, hollow.MaterialID, hollow.CheckValue = []byte{}, []byte{}, []byte{}
	hollow.Material, hollow.PairID, hollow.PairFingerprint, hollow.MAC = []byte{}, []byte{}, []byte{}, []byte{}
	odd := newKey(4)
	odd.Description = "'; DROP TABLE cmk; -- $1 ? :a \n\t\"\\ %s"
	large := newKey(5)
	large.Description, large.Material = longText, fill(100_000, 5)
	early := newKey(6)
	early.CreatedAt = time.Date(1969, 7, 20, 20, 17, 40, 0, time.UTC)
	late := newKey(7)
	late.DeleteAt = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

	for name, key := range map[string]store.Key{
		"every field": full, "zero times and nil": empty, "empty, not nil": hollow, "SQL in text": odd,
		"large": large, "before 1970": early, "year 9999": late,
	} {
		t.Run(name, func(t *testing.T) { requireKey(t, s, create(t, s, key)) })
	}

	t.Run("whole seconds, UTC", func(t *testing.T) {
		key := newKey(8)
		key.CreatedAt = at(8).Add(999_999_999).In(zone)
		key.ExpireAt = at(9).Add(1).In(zone)
		key.DeleteAt = at(10).In(zone)
		create(t, s, key)
		key.CreatedAt, key.ExpireAt, key.DeleteAt = at(8), at(9), at(10)
		requireKey(t, s, key)
	})
}

func testUpdateKey(t *testing.T, s store.Store) {
	ctx := t.Context()
	first := create(t, s, newKey(1))
	other := create(t, s, newKey(2))

	require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: first}), store.ErrConflict, "the revision must grow")
	second := imported(first)
	require.NoError(t, s.UpdateKey(ctx, store.Update{Key: second}))
	requireKey(t, s, second)
	requireKey(t, s, other)

	require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: second}), store.ErrConflict)
	ahead := imported(imported(second))
	require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: ahead}), store.ErrConflict)
	require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: imported(newKey(3))}), store.ErrNotFound)
	taken := imported(second)
	taken.KeyVersionID = other.KeyVersionID
	require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: taken}), store.ErrExists)
	requireKey(t, s, second)

	// Everything but the key id may change, and go back to nothing.
	third := newKey(1)
	third.Revision = 3
	third.KeyVersionID = "another version"
	third.Spec = "Aliyun_SM4"
	third.Description = "changed"
	third.CreatedAt = at(77)
	require.NoError(t, s.UpdateKey(ctx, store.Update{Key: third}))
	requireKey(t, s, third)
	_, err := s.KeyByVersion(ctx, second.KeyVersionID)
	require.ErrorIs(t, err, store.ErrNotFound)
	got, err := s.KeyByVersion(ctx, third.KeyVersionID)
	require.NoError(t, err)
	require.Equal(t, third, got)

	// The same but for the material: what a re-import changes.
	for range 3 {
		next := imported(third)
		next.State, next.DeleteAt, next.ExpireAt = third.State, third.DeleteAt, third.ExpireAt
		require.NoError(t, s.UpdateKey(ctx, store.Update{Key: next}))
		requireKey(t, s, next)
		third = next
	}
}

func testDeleteKey(t *testing.T, s store.Store) {
	ctx := t.Context()
	key, other := create(t, s, newKey(1)), create(t, s, newKey(2))
	addPairs(t, s, 1, 3)
	mine, theirs := bind(t, s, newBind(1, key)), bind(t, s, newBind(2, other))
	_, err := s.PutUsages(ctx, []store.UsageUpdate{{Usage: store.Usage{KeyID: key.KeyID, Uses: 7}}, {Usage: store.Usage{KeyID: other.KeyID, Uses: 8}}})
	require.NoError(t, err)
	updated := imported(key)
	require.NoError(t, s.UpdateKey(ctx, store.Update{Key: updated}))

	require.ErrorIs(t, s.DeleteKey(ctx, store.Deletion{KeyID: key.KeyID, Revision: 1}), store.ErrConflict)
	require.ErrorIs(t, s.DeleteKey(ctx, store.Deletion{KeyID: key.KeyID, Revision: 3}), store.ErrConflict)
	require.ErrorIs(t, s.DeleteKey(ctx, store.Deletion{KeyID: "nobody", Revision: 1}), store.ErrNotFound)
	requireKey(t, s, updated)

	require.NoError(t, s.DeleteKey(ctx, store.Deletion{KeyID: key.KeyID, Revision: 2}))
	require.ErrorIs(t, s.DeleteKey(ctx, store.Deletion{KeyID: key.KeyID, Revision: 2}), store.ErrNotFound)
	_, err = s.Key(ctx, key.KeyID)
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = s.Usage(ctx, key.KeyID)
	require.ErrorIs(t, err, store.ErrNotFound)
	_, err = s.CountFailure(ctx, mine.ID)
	require.ErrorIs(t, err, store.ErrNotFound, "its import tokens go with it")
	require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: imported(updated)}), store.ErrNotFound)

	requireKey(t, s, other)
	usage, err := s.Usage(ctx, other.KeyID)
	require.NoError(t, err)
	require.EqualValues(t, 8, usage.Uses)
	_, token, err := s.LoadImport(ctx, other.KeyID, theirs.ID)
	require.NoError(t, err)
	require.Equal(t, theirs, token)
	pairs, err := s.Pairs(ctx, time.Time{}, 0)
	require.NoError(t, err)
	require.Len(t, pairs, 2, "pairs stay until they are due: their keys are in the token")

	create(t, s, key)
	_, err = s.Usage(ctx, key.KeyID)
	require.ErrorIs(t, err, store.ErrNotFound, "a new key of the same id inherits nothing")
}

func testDueKeys(t *testing.T, s store.Store) {
	ctx := t.Context()
	// Due at 10, 20, 30 and 40, in an order that is neither that of creation
	// nor of the identifiers; the others never, or later.
	expires := func(n, second int) store.Key {
		k := newKey(n)
		k.Material, k.ExpireAt = fill(120, n), at(second)
		return k
	}
	deleted := func(n, second int) store.Key {
		k := newKey(n)
		k.DeleteAt = at(second)
		return k
	}
	both := expires(4, 20)
	both.DeleteAt = at(500)
	both2 := expires(5, 500)
	both2.DeleteAt = at(40)
	gone := newKey(6) // its material is gone: the expiry is history
	gone.ExpireAt = at(5)
	forever := newKey(7)
	forever.Material = fill(120, 7)
	for _, k := range []store.Key{expires(1, 30), deleted(2, 10), newKey(3), both, both2, gone, forever, expires(8, 1000), deleted(9, 1000)} {
		create(t, s, k)
	}

	for _, tt := range []struct {
		now, limit int
		want       []int
	}{
		{9, 10, nil},
		{10, 10, []int{2}},
		{20, 10, []int{2, 4}},
		{40, 10, []int{2, 4, 1, 5}},
		{40, 3, []int{2, 4, 1}},
		{40, 1, []int{2}},
		{40, 0, nil},
	} {
		keys, err := s.DueKeys(ctx, at(tt.now), tt.limit)
		require.NoError(t, err)
		want := []string{}
		for _, n := range tt.want {
			want = append(want, newKey(n).KeyID)
		}
		require.Equal(t, want, ids(keys), "at %d, %d at most", tt.now, tt.limit)
	}

	keys, err := s.DueKeys(ctx, at(10), 1)
	require.NoError(t, err)
	require.Equal(t, []store.Key{deleted(2, 10)}, keys)

	// What was done about a key shows at once.
	expired := expires(1, 30)
	expired.Revision, expired.Material = 2, nil
	require.NoError(t, s.UpdateKey(ctx, store.Update{Key: expired}))
	cancelled := newKey(2)
	cancelled.Revision = 2
	require.NoError(t, s.UpdateKey(ctx, store.Update{Key: cancelled}))
	require.NoError(t, s.DeleteKey(ctx, store.Deletion{KeyID: both.KeyID, Revision: 1}))
	keys, err = s.DueKeys(ctx, at(40), 10)
	require.NoError(t, err)
	require.Equal(t, []string{both2.KeyID}, ids(keys))
}
