package engine_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/store"
)

// doubtful is a shared store whose connection is lost while counts of uses are
// stored: they were, were not, or will be a while later.
type doubtful struct {
	store.Store
	next string // "done", "lost" or "late": what becomes of the next; then ""
	late [][]store.UsageUpdate
}

func (*doubtful) Shared() bool { return true }

func (s *doubtful) PutUsages(ctx context.Context, usages []store.UsageUpdate) ([]bool, error) {
	next := s.next
	s.next = ""
	switch next {
	case "":
		return s.Store.PutUsages(ctx, usages)
	case "done":
		if _, err := s.Store.PutUsages(ctx, usages); err != nil {
			return nil, err
		}
	case "late":
		s.late = append(s.late, usages)
	}
	return nil, fmt.Errorf("%w: the connection is lost", store.ErrUnavailable)
}

// What nodes have used is in the stored count, whatever becomes of the statements
// by which they reserve uses and take them back.
func TestReservationsOfDoubtfulOutcome(t *testing.T) {
	doubt := &doubtful{}
	h := newHouse(t, withStore(func(s store.Store) store.Store {
		doubt.Store = s
		return doubt
	}), with(func(c *engine.Config) { c.CacheSize = 1 }))
	other, _ := h.enabledKey(t)
	rapid.Check(t, func(r *rapid.T) {
		doubt.next, doubt.late = "", nil
		keyID, _ := h.enabledKey(t)
		h.SetUsageLimits(1000, 8)
		total := uint64(0)
		r.Repeat(map[string]func(*rapid.T){
			"encrypt": func(r *rapid.T) {
				for range rapid.IntRange(1, 12).Draw(r, "n") {
					if _, err := h.Encrypt(t.Context(), keyID, []byte("x"), nil); err == nil {
						total++
					}
				}
			},
			"close and sweep": func(*rapid.T) { // uses that are left are taken back
				_, _ = h.Encrypt(t.Context(), other, []byte("x"), nil)
				_ = h.Sweep(t.Context())
			},
			"doubt": func(r *rapid.T) { doubt.next = rapid.SampledFrom([]string{"done", "lost", "late"}).Draw(r, "next") },
			"late": func(r *rapid.T) {
				if len(doubt.late) > 0 {
					_, err := doubt.Store.PutUsages(t.Context(), doubt.late[0])
					require.NoError(r, err)
					doubt.late = doubt.late[1:]
				}
			},
			"": func(r *rapid.T) {
				if total > 0 {
					usage, err := h.store.Usage(t.Context(), keyID)
					require.NoError(r, err)
					require.GreaterOrEqual(r, usage.Uses, total, "more uses than are counted")
				}
			},
		})
	})
	doubt.next = "" // or the house cannot be closed
}
