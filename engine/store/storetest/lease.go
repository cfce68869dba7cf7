package storetest

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

func testLease(t *testing.T, s store.Store) {
	lease := func(name, holder string, life time.Duration) bool {
		t.Helper()
		held, err := s.Lease(t.Context(), name, holder, life)
		require.NoError(t, err)
		return held
	}
	require.True(t, lease("one", "me", time.Hour))
	require.True(t, lease("one", "me", time.Hour), "renewed")
	require.False(t, lease("one", "you", time.Hour))
	require.True(t, lease("two", "you", time.Hour), "each is its own")
	require.False(t, lease("two", "me", time.Hour))

	// Given back, and run out.
	lease("one", "me", 0)
	require.True(t, lease("one", "you", 20*time.Millisecond))
	require.Eventually(t, func() bool { return lease("one", "me", time.Hour) }, 10*time.Second, 5*time.Millisecond)
	require.False(t, lease("one", "you", time.Hour))

	var holders atomic.Int32
	for _, err := range together(callers, func(i int) error {
		held, err := s.Lease(t.Context(), "three", string(rune('a'+i)), time.Hour)
		if held {
			holders.Add(1)
		}
		return err
	}) {
		require.NoError(t, err)
	}
	require.EqualValues(t, 1, holders.Load())
}
