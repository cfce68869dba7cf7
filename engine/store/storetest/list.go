package storetest

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// longText is a description of the greatest length the engine allows, in
// characters of four bytes.
var longText = strings.Repeat("\U0001f511", 8192)

// expectList is ListKeys as its comment says, over keys in any order.
func expectList(keys []store.Key, f store.KeyFilter, offset, limit int) (page []store.Key, total int) {
	in := func(list []string, v string) bool { return len(list) == 0 || slices.Contains(list, v) }
	keys = slices.DeleteFunc(slices.Clone(keys), func(k store.Key) bool {
		return !in(f.KeyIDs, k.KeyID) || !in(f.States, k.State) || !in(f.Specs, k.Spec)
	})
	slices.SortFunc(keys, func(a, b store.Key) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.KeyID, b.KeyID))
	})
	from := min(offset, len(keys))
	return keys[from:min(from+limit, len(keys))], len(keys)
}

func requireList(t *testing.T, s store.Store, keys []store.Key, f store.KeyFilter, offset, limit int) {
	t.Helper()
	page, total, err := s.ListKeys(t.Context(), f, offset, limit)
	require.NoError(t, err)
	wantPage, wantTotal := expectList(keys, f, offset, limit)
	require.Equal(t, wantTotal, total, "%+v", f)
	require.Equal(t, ids(wantPage), ids(page), "%+v from %d, %d at most", f, offset, limit)
	for i := range page {
		require.Equal(t, wantPage[i], page[i])
	}
}

func testListKeys(t *testing.T, s store.Store) {
	requireList(t, s, nil, store.KeyFilter{}, 0, 10)
	requireList(t, s, nil, store.KeyFilter{States: []string{"Enabled"}}, 0, 10)

	states := []string{"Enabled", "Disabled", "PendingDeletion", "PendingImport"}
	specs := []string{"Aliyun_AES_256", "Aliyun_SM4"}
	rng := rand.New(rand.NewPCG(1, 2))
	var keys []store.Key
	for _, n := range rng.Perm(40) {
		k := newKey(n)
		k.State = states[rng.IntN(3)] // none is PendingImport
		k.Spec = specs[rng.IntN(2)]
		k.CreatedAt = at(n / 4) // four of the same second
		keys = append(keys, create(t, s, k))
	}

	filters := []store.KeyFilter{{}}
	for _, st := range [][]string{nil, states[:1], states[1:3], states, states[3:], {"Nowhere"}, {"Enabled", "Enabled"}} {
		for _, sp := range [][]string{nil, specs[:1], specs, {"Nothing"}, {"Aliyun_SM4", "Nothing"}} {
			for _, id := range [][]string{nil, {keys[0].KeyID}, ids(keys[:9]), {"nobody", keys[3].KeyID, keys[3].KeyID}, {"nobody"}} {
				filters = append(filters, store.KeyFilter{KeyIDs: id, States: st, Specs: sp})
			}
		}
	}
	pages := [][2]int{{0, 100}, {0, 1}, {0, 7}, {5, 7}, {38, 7}, {40, 7}, {1000, 7}, {0, 0}, {3, 0}}
	for i, f := range filters {
		requireList(t, s, keys, f, 0, 100)
		p := pages[i%len(pages)]
		requireList(t, s, keys, f, p[0], p[1])
	}
	for _, p := range pages {
		requireList(t, s, keys, store.KeyFilter{}, p[0], p[1])
		requireList(t, s, keys, store.KeyFilter{States: states[1:3]}, p[0], p[1])
	}
}

func testListKeysFollowsChanges(t *testing.T, s store.Store) {
	ctx := t.Context()
	states := []string{"Enabled", "Disabled", "PendingImport"}
	specs := []string{"Aliyun_AES_256", "Aliyun_SM4"}
	rng := rand.New(rand.NewPCG(3, 4))
	var keys []store.Key
	for n := range 40 {
		switch op := rng.IntN(4); {
		case op == 0 && len(keys) > 0:
			i := rng.IntN(len(keys))
			require.NoError(t, s.DeleteKey(ctx, store.Deletion{KeyID: keys[i].KeyID, Revision: keys[i].Revision}))
			keys = slices.Delete(keys, i, i+1)
		case op == 1 && len(keys) > 0:
			i := rng.IntN(len(keys))
			k := keys[i]
			k.Revision++
			k.State, k.Spec = states[rng.IntN(3)], specs[rng.IntN(2)]
			stale := k
			stale.Revision += 5
			require.ErrorIs(t, s.UpdateKey(ctx, store.Update{Key: stale}), store.ErrConflict)
			require.NoError(t, s.UpdateKey(ctx, store.Update{Key: k}))
			keys[i] = k
		default:
			k := newKey(n)
			k.State, k.Spec = states[rng.IntN(3)], specs[rng.IntN(2)]
			keys = append(keys, create(t, s, k))
			require.ErrorIs(t, s.CreateKey(ctx, k), store.ErrExists)
		}
		requireList(t, s, keys, store.KeyFilter{}, 0, 200)
		requireList(t, s, keys, store.KeyFilter{States: states[:1]}, 0, 200)
		requireList(t, s, keys, store.KeyFilter{States: states[1:], Specs: specs[1:]}, 1, 5)
	}
}

// testListOneMoment lists while another caller creates and deletes: the page
// and the total are of one moment.
func testListOneMoment(t *testing.T, s store.Store) {
	ctx := t.Context()
	written := make(chan error, 1)
	go func() {
		defer close(written)
		for n := range 120 {
			err := s.CreateKey(ctx, newKey(n))
			if err == nil && n%3 == 0 {
				err = s.DeleteKey(ctx, store.Deletion{KeyID: newKey(n / 2).KeyID, Revision: 1})
			}
			if err != nil && !answer(err) {
				written <- err
				return
			}
		}
	}()
	for writing := true; writing; {
		for _, f := range []store.KeyFilter{{}, {States: []string{"PendingImport"}}} {
			keys, total, err := s.ListKeys(ctx, f, 0, 1000)
			require.NoError(t, err)
			require.Len(t, keys, total)
		}
		select {
		case err := <-written:
			require.NoError(t, err)
			writing = false
		default:
		}
	}
}
