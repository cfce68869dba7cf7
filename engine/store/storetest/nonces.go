package storetest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// newNonce is a nonce that expires at 900.
func newNonce(n int) store.Nonce {
	return store.Nonce{AccessKeyID: "access-key", Value: fmt.Sprintf("nonce-%06d", n), ExpiresAt: at(900)}
}

func testNonces(t *testing.T, s store.Store) {
	add := func(n store.Nonce, now time.Time) bool {
		t.Helper()
		fresh, err := s.AddNonce(t.Context(), n, now)
		require.NoError(t, err)
		return fresh
	}
	first := newNonce(1)
	require.True(t, add(first, at(0)))
	require.False(t, add(first, at(0)))
	require.False(t, add(first, at(899)))
	later := first
	later.ExpiresAt = at(1800)
	require.False(t, add(later, at(10)), "another expiry makes it no other nonce")

	// The access key is part of it, and nothing else of the split.
	other := first
	other.AccessKeyID = "another-key"
	require.True(t, add(other, at(0)))
	split := store.Nonce{AccessKeyID: "access-keyn", Value: "once-000001", ExpiresAt: at(900)}
	require.True(t, add(split, at(0)))
	empty := store.Nonce{ExpiresAt: at(900)}
	require.True(t, add(empty, at(0)))
	require.False(t, add(empty, at(0)))
	long := store.Nonce{AccessKeyID: first.AccessKeyID, Value: strings.Repeat("n", 10_000), ExpiresAt: at(900)}
	require.True(t, add(long, at(0)))
	require.False(t, add(long, at(0)))
	long.Value += "n"
	require.True(t, add(long, at(0)))

	// It is forgotten when it expires, swept or not, and not before.
	require.True(t, add(later, at(900)), "expired counts as new")
	require.False(t, add(later, at(901)), "and is remembered anew")
	require.NoError(t, s.DeleteNonces(t.Context(), at(899)))
	require.False(t, add(other, at(899)))
	require.NoError(t, s.DeleteNonces(t.Context(), at(900)))
	require.False(t, add(later, at(1799)), "a sweep spares what lives longer")
	require.True(t, add(other, at(900)))

	// Fractions of a second never shorten a nonce's life.
	fraction := newNonce(2)
	fraction.ExpiresAt = at(900).Add(900 * time.Millisecond)
	require.True(t, add(fraction, at(0)))
	require.False(t, add(fraction, at(900).Add(100*time.Millisecond)))
	require.NoError(t, s.DeleteNonces(t.Context(), at(900).Add(100*time.Millisecond)))
	require.False(t, add(fraction, at(900)))

	// A sweep of many.
	for round := range 2 {
		now := at(900 * round)
		for _, err := range together(1100, func(n int) error {
			nonce := newNonce(100 + n)
			nonce.ExpiresAt = now.Add(900 * time.Second)
			fresh, err := s.AddNonce(t.Context(), nonce, now)
			if err == nil && !fresh {
				err = fmt.Errorf("nonce %d is not fresh", n)
			}
			return err
		}) {
			require.NoError(t, err)
		}
		require.NoError(t, s.DeleteNonces(t.Context(), now.Add(900*time.Second)))
	}
}
