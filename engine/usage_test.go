package engine_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/store"
)

// encrypts tries to encrypt n times and returns how often it could.
func (h *house) encrypts(tb require.TestingT, keyID string, n int) (done int) {
	for range n {
		_, err := h.Encrypt(context.Background(), keyID, []byte("x"), nil)
		if err != nil {
			require.ErrorIs(tb, err, engine.LimitExceeded)
			return done
		}
		done++
	}
	return done
}

// A CMK encrypts so many times in its life and no more, wherever its material
// was meanwhile, and decrypts after that.
func TestBudgetOfAKey(t *testing.T) {
	const budget = 1000
	log, logger := newLog()
	h := newHouse(t, with(func(c *engine.Config) { c.Logger = logger }))
	h.SetUsageLimits(budget, 10)
	keyID, material := h.enabledKey(t)
	blob := h.encrypt(t, keyID, "secret")
	require.Equal(t, 498, h.encrypts(t, keyID, 498))
	require.NotContains(t, log.String(), "SP 800-38D")
	require.NotContains(t, log.String(), `"uses":500`)
	require.Equal(t, 1, h.encrypts(t, keyID, 1))
	require.Contains(t, log.String(), `"uses":500`, "half of the budget")

	require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID))
	h.importInto(t, keyID, material)
	require.Equal(t, 500, h.encrypts(t, keyID, 501))
	require.Equal(t, 3, strings.Count(log.String(), `"allowed":1000`), "at 1/2, 3/4 and 7/8")

	_, _, err := h.GenerateDataKey(t.Context(), engine.DataKeyInput{KeyID: keyID})
	require.Contains(t, requireKind(t, engine.LimitExceeded, err).Hint, "SP 800-38D")
	h.requireDecrypts(t, blob, "secret")

	other, _ := h.enabledKey(t)
	require.Equal(t, 1, h.encrypts(t, other, 1), "another CMK has its own budget")

	h.reopen(t)
	h.SetUsageLimits(budget, 10)
	require.Zero(t, h.encrypts(t, keyID, 1))
	h.requireDecrypts(t, blob, "secret")
}

// amnesiac is a store that forgets counts of uses while it is told to: what a
// process had in memory when it was killed.
type amnesiac struct {
	store.Store
	shared, forget bool
}

func (s *amnesiac) Shared() bool { return s.shared }

func (s *amnesiac) PutUsages(ctx context.Context, usages []store.UsageUpdate) ([]bool, error) {
	if s.forget {
		return slices.Repeat([]bool{true}, len(usages)), nil
	}
	return s.Store.PutUsages(ctx, usages)
}

// However often processes start, crash or end as they should, a CMK never
// encrypts more often than its budget allows, and what is charged for crashes
// is bounded.
func TestBudgetSurvivesCrashes(t *testing.T) {
	t.Run("alone", func(t *testing.T) { testBudgetSurvivesCrashes(t, false) })
	t.Run("with other nodes", func(t *testing.T) { testBudgetSurvivesCrashes(t, true) })
}

func testBudgetSurvivesCrashes(t *testing.T, shared bool) {
	const budget, unwritten = 100, 16
	memory := &amnesiac{shared: shared}
	h := newHouse(t, withStore(func(s store.Store) store.Store {
		memory.Store = s
		return memory
	}))
	rapid.Check(t, func(r *rapid.T) {
		keyID, _ := h.enabledKey(t)
		h.SetUsageLimits(budget, unwritten)
		total, boots := 0, 1
		r.Repeat(map[string]func(*rapid.T){
			"encrypt": func(r *rapid.T) {
				n := rapid.IntRange(1, 40).Draw(r, "n")
				done := h.encrypts(r, keyID, n)
				total += done
				require.LessOrEqual(r, total, budget)
				if done < n {
					require.GreaterOrEqual(r, total+boots*unwritten, budget, "refused too soon")
				}
			},
			"sweep": func(r *rapid.T) { require.NoError(r, h.Sweep(t.Context())) },
			"restart": func(*rapid.T) {
				h.restart(t)
				h.SetUsageLimits(budget, unwritten)
				boots++
			},
			"crash": func(r *rapid.T) {
				memory.forget = true
				require.NoError(r, h.Engine.Close())
				memory.forget = false
				h.start(t)
				h.SetUsageLimits(budget, unwritten)
				boots++
			},
			"": func(r *rapid.T) {
				usage, err := h.store.Usage(t.Context(), keyID)
				if shared && total > 0 {
					require.NoError(r, err)
					require.GreaterOrEqual(r, usage.Uses, uint64(total), "more uses than are counted")
				}
			},
		})
		total += h.encrypts(t, keyID, budget+1)
		require.LessOrEqual(t, total, budget)
		require.GreaterOrEqual(t, total+boots*unwritten, budget)
	})
}

// Many at once do not use more than the budget, nor more than may be unwritten
// without writing.
func TestBudgetUnderConcurrency(t *testing.T) {
	const budget = 500
	h := newHouse(t)
	h.SetUsageLimits(budget, 7)
	keyID, _ := h.enabledKey(t)
	done := make([]int, 16)
	inParallel(len(done), func(i int) error {
		done[i] = h.encrypts(t, keyID, 100)
		return nil
	})
	total := 0
	for _, n := range done {
		total += n
	}
	require.Equal(t, budget, total)
	usage, err := h.store.Usage(t.Context(), keyID)
	require.NoError(t, err)
	require.GreaterOrEqual(t, usage.Uses, uint64(budget-7))
}

// Counts are kept while keys come and go in a cache that is too small.
func TestBudgetOutlivesTheCache(t *testing.T) {
	h := newHouse(t, with(func(c *engine.Config) { c.CacheSize = 1 }))
	h.SetUsageLimits(20, 10)
	one, _ := h.enabledKey(t)
	two, _ := h.enabledKey(t)
	for i := range 20 {
		require.Equal(t, 1, h.encrypts(t, one, 1))
		require.Equal(t, 1, h.encrypts(t, two, 1))
		if i%3 == 0 {
			require.NoError(t, h.Sweep(t.Context()))
		}
	}
	require.Zero(t, h.encrypts(t, one, 1))
	require.Zero(t, h.encrypts(t, two, 1))
}

// A count that was edited, or taken from another CMK, stops encryption.
func TestEditedCountIsRefused(t *testing.T) {
	h := newHouse(t)
	mine, _ := h.enabledKey(t)
	victims, _ := h.enabledKey(t)
	blob := h.encrypt(t, victims, "secret")
	require.Equal(t, 5, h.encrypts(t, victims, 5))
	h.encrypt(t, mine, "x")
	h.shut(t)
	h.open(t)
	for name, edit := range map[string]string{
		"uses": "UPDATE key_usage SET uses = uses - 1 WHERE key_id = ?",
		"boot": "UPDATE key_usage SET boot = boot + 1 WHERE key_id = ?",
		"mac":  "UPDATE key_usage SET mac = NULL WHERE key_id = ?",
	} {
		t.Run(name, func(t *testing.T) {
			before, err := h.store.Usage(t.Context(), victims)
			require.NoError(t, err)
			h.exec(t, edit, victims)
			_, err = h.Encrypt(t.Context(), victims, []byte("x"), nil)
			requireKind(t, engine.Internal, err)
			h.requireDecrypts(t, blob, "secret")
			h.exec(t, "UPDATE key_usage SET uses = ?, boot = ?, mac = ? WHERE key_id = ?",
				int64(before.Uses), int64(before.Boot), before.MAC, victims)
		})
	}
	h.exec(t, "DELETE FROM key_usage WHERE key_id = ?", victims)
	h.exec(t, "UPDATE key_usage SET key_id = ?", victims)
	_, err := h.Encrypt(t.Context(), victims, []byte("x"), nil)
	requireKind(t, engine.Internal, err)
}
