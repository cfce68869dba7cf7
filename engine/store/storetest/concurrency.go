package storetest

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// callers is how many calls the concurrent tests make at once.
const callers = 24

// requireOneWinner requires that one call succeeded and the others failed
// with want.
func requireOneWinner(t *testing.T, errs []error, want error) (winner int) {
	t.Helper()
	winner = -1
	for i, err := range errs {
		if err == nil {
			require.Negative(t, winner, "two have won")
			winner = i
			continue
		}
		require.ErrorIs(t, err, want)
	}
	require.GreaterOrEqual(t, winner, 0, "nobody has won")
	return winner
}

func testConcurrentCreate(t *testing.T, s store.Store) {
	for round := range 5 {
		keys := make([]store.Key, callers)
		errs := together(callers, func(i int) error {
			keys[i] = newKey(round)
			keys[i].KeyVersionID = fmt.Sprintf("version-%d-%d", round, i)
			return s.CreateKey(t.Context(), keys[i])
		})
		requireKey(t, s, keys[requireOneWinner(t, errs, store.ErrExists)])
	}
	_, total, err := s.ListKeys(t.Context(), store.KeyFilter{}, 0, 0)
	require.NoError(t, err)
	require.Equal(t, 5, total)
}

func testConcurrentUpdate(t *testing.T, s store.Store) {
	key := create(t, s, newKey(1))
	for range 5 {
		next := make([]store.Key, callers)
		errs := together(callers, func(i int) error {
			next[i] = imported(key)
			next[i].Description = fmt.Sprint("writer ", i)
			return s.UpdateKey(t.Context(), store.Update{Key: next[i]})
		})
		key = next[requireOneWinner(t, errs, store.ErrConflict)]
		requireKey(t, s, key)
	}
	errs := together(callers, func(int) error {
		return s.DeleteKey(t.Context(), store.Deletion{KeyID: key.KeyID, Revision: key.Revision})
	})
	requireOneWinner(t, errs, store.ErrNotFound)
}

func testConcurrentBind(t *testing.T, s store.Store) {
	key := create(t, s, newKey(1))
	addPairs(t, s, 0, callers-3)
	tokens := make([]store.ImportToken, callers)
	errs := together(callers, func(i int) (err error) {
		tokens[i], err = s.BindPair(t.Context(), newBind(i, key))
		return err
	})
	seen := map[[16]byte]bool{}
	for i, err := range errs {
		if err != nil {
			require.ErrorIs(t, err, store.ErrNoPair)
			continue
		}
		require.False(t, seen[tokens[i].Pair.ID], "one pair was taken twice")
		seen[tokens[i].Pair.ID] = true
	}
	require.Len(t, seen, callers-3, "every pair finds a taker")
}

func testConcurrentShare(t *testing.T, s store.Store) {
	const bound = 4
	key := create(t, s, newKey(1))
	addPairs(t, s, 0, callers)
	tokens := make([]store.ImportToken, callers)
	for _, err := range together(callers, func(i int) (err error) {
		req := newBind(i, key)
		req.Now, req.ExpiresAt, req.Bound, req.ShareSince = at(0), at(100), bound, at(0)
		tokens[i], err = s.BindPair(t.Context(), req)
		return err
	}) {
		require.NoError(t, err)
	}
	seen := map[[16]byte]bool{}
	for _, token := range tokens {
		seen[token.Pair.ID] = true
	}
	require.Len(t, seen, bound, "the bound is kept exactly")
	counts, err := s.PairCounts(t.Context(), at(1))
	require.NoError(t, err)
	require.Equal(t, bound, counts[0].Bound)
	require.Equal(t, callers-bound, counts[0].Ready)
}

func testConcurrentCounts(t *testing.T, s store.Store) {
	ctx := t.Context()
	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 2)
	token := bind(t, s, newBind(1, key))

	sums := make([]int, callers)
	boots := make([]uint64, callers)
	counted := make([]bool, callers)
	for _, err := range together(callers, func(i int) (err error) {
		if sums[i], err = s.CountFailure(ctx, token.ID); err != nil {
			return err
		}
		if boots[i], err = s.NextBoot(ctx); err != nil {
			return err
		}
		stored, err := s.PutUsages(ctx, []store.UsageUpdate{{Usage: store.Usage{KeyID: key.KeyID, Uses: uint64(i) + 1}}})
		counted[i] = err == nil && stored[0]
		return err
	}) {
		require.NoError(t, err)
	}
	slices.Sort(sums)
	for i, sum := range sums {
		require.Equal(t, i+1, sum, "every failure is counted once")
	}
	slices.Sort(boots)
	require.Len(t, slices.Compact(boots), callers, "no number is given twice")
	usage, err := s.Usage(ctx, key.KeyID)
	require.NoError(t, err)
	require.EqualValues(t, 1+slices.Index(counted, true), usage.Uses)
	require.NotContains(t, counted[usage.Uses:], true, "one count replaces what all have read")
}

func testConcurrentNonces(t *testing.T, s store.Store) {
	for round := range 10 {
		fresh := make([]bool, callers)
		for _, err := range together(callers, func(i int) (err error) {
			fresh[i], err = s.AddNonce(t.Context(), newNonce(round), at(0))
			return err
		}) {
			require.NoError(t, err)
		}
		n := 0
		for _, f := range fresh {
			if f {
				n++
			}
		}
		require.Equal(t, 1, n, "a nonce is fresh once")
	}
}

// testOneMoment has LoadImport read two rows that a writer changes in turns:
// read as of one moment, they are never more than one change apart.
func testOneMoment(t *testing.T, s store.Store) {
	ctx := t.Context()
	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 2)
	token := bind(t, s, newBind(1, key))

	const rounds = 80
	written := make(chan error, 1)
	go func() {
		defer close(written)
		for range rounds {
			key = imported(key)
			if err := s.UpdateKey(ctx, store.Update{Key: key}); err != nil {
				written <- err
				return
			}
			if _, err := s.CountFailure(ctx, token.ID); err != nil {
				written <- err
				return
			}
		}
	}()
	for reads, writing := 0, true; writing || reads == 0; reads++ {
		gotKey, gotToken, err := s.LoadImport(ctx, newKey(1).KeyID, token.ID)
		require.NoError(t, err)
		updates := int(gotKey.Revision) - 1
		require.GreaterOrEqual(t, updates, gotToken.Failures)
		require.LessOrEqual(t, updates, gotToken.Failures+1)
		select {
		case err := <-written:
			require.NoError(t, err)
			writing = false
		default:
		}
	}
}

// testReadsOwnWrites has every caller read what it has just written, with
// whatever connection the store takes for that.
func testReadsOwnWrites(t *testing.T, s store.Store) {
	ctx := t.Context()
	for _, err := range together(callers, func(i int) error {
		key := newKey(i)
		if err := s.CreateKey(ctx, key); err != nil {
			return err
		}
		for range 10 {
			key = imported(key)
			if err := s.UpdateKey(ctx, store.Update{Key: key}); err != nil {
				return err
			}
			got, err := s.Key(ctx, key.KeyID)
			if err != nil {
				return err
			}
			if got.Revision != key.Revision {
				return fmt.Errorf("wrote revision %d and read %d", key.Revision, got.Revision)
			}
		}
		return nil
	}) {
		require.NoError(t, err)
	}
}

// testCallersOwnSlices changes every slice as soon as a call has returned.
func testCallersOwnSlices(t *testing.T, s store.Store) {
	ctx := t.Context()
	spoil := func(k store.Key) {
		for _, b := range [][]byte{k.KCV, k.MaterialID, k.CheckValue, k.Material, k.PairID, k.PairFingerprint, k.MAC} {
			clear(b)
		}
	}
	key := newKey(1)
	require.NoError(t, s.CreateKey(ctx, key))
	clear(key.MAC)
	requireKey(t, s, newKey(1))

	key = imported(newKey(1))
	require.NoError(t, s.UpdateKey(ctx, store.Update{Key: key}))
	spoil(key)
	for range 3 {
		got, err := s.Key(ctx, key.KeyID)
		require.NoError(t, err)
		require.Equal(t, imported(newKey(1)), got)
		spoil(got)
		got, err = s.KeyByVersion(ctx, key.KeyVersionID)
		require.NoError(t, err)
		require.Equal(t, imported(newKey(1)), got)
		spoil(got)
		got, _, err = s.LoadImport(ctx, key.KeyID, id16(1))
		require.NoError(t, err)
		require.Equal(t, imported(newKey(1)), got)
		spoil(got)
		page, _, err := s.ListKeys(ctx, store.KeyFilter{}, 0, 1)
		require.NoError(t, err)
		require.Equal(t, imported(newKey(1)), page[0])
		spoil(page[0])
	}

	usages := []store.UsageUpdate{{Usage: store.Usage{KeyID: key.KeyID, Uses: 1, MAC: fill(32, 1)}}}
	_, err := s.PutUsages(ctx, usages)
	require.NoError(t, err)
	clear(usages[0].MAC)
	usage, err := s.Usage(ctx, key.KeyID)
	require.NoError(t, err)
	require.Equal(t, fill(32, 1), usage.MAC)
}

func testClosed(t *testing.T, s store.Store) {
	prepare(t, s)
	require.NoError(t, s.Close())
	require.NoError(t, s.Close(), "a second time")
	for _, m := range methods {
		if m.name == "Instance" { // may be known without asking
			continue
		}
		require.ErrorIs(t, m.call(t.Context(), s), store.ErrUnavailable, m.name)
	}
}

// testCloseUnderLoad closes the store while every method is being called.
func testCloseUnderLoad(t *testing.T, s store.Store) {
	prepare(t, s)
	running := make(chan struct{}, len(methods))
	closed := make(chan error)
	go func() {
		for range methods {
			<-running
		}
		closed <- s.Close()
	}()
	errs := together(len(methods), func(i int) error {
		if methods[i].name == "Instance" {
			running <- struct{}{}
			return nil
		}
		for n := 0; ; n++ {
			err := methods[i].call(t.Context(), s)
			if n == 0 {
				running <- struct{}{}
			}
			if errors.Is(err, store.ErrUnavailable) {
				return nil
			}
			if err != nil && !answer(err) {
				return fmt.Errorf("%s: %w", methods[i].name, err)
			}
		}
	})
	for _, err := range errs {
		require.NoError(t, err)
	}
	select {
	case err := <-closed:
		require.NoError(t, err)
	case <-time.After(time.Minute):
		t.Fatal("Close does not return")
	}
}

// answer reports whether err is an answer about rows.
func answer(err error) bool {
	return errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrExists) ||
		errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNoPair)
}
