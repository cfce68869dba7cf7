package engine

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestAttempts(t *testing.T) {
	var a attempts
	one, other := [16]byte{1}, [16]byte{2}
	require.Equal(t, 1, a.begin(one))
	require.Equal(t, 2, a.begin(one))
	require.Equal(t, 1, a.begin(other))

	first := a.withdraw(one)
	require.Equal(t, 2, a.begin(one), "a withdrawn one counts no more")
	requireWaiting(t, first)
	second := a.withdraw(one)
	requireWaiting(t, second)
	a.end(other)
	requireWaiting(t, first)
	a.end(one)
	requireWoken(t, first)
	requireWoken(t, second)
	require.Empty(t, a.running)
}

// Two that stand in each other's way must not both wait for ever.
func TestAttemptsThatAllWithdraw(t *testing.T) {
	var a attempts
	id := [16]byte{1}
	a.begin(id)
	a.begin(id)
	first := a.withdraw(id)
	requireWaiting(t, first)
	require.Nil(t, a.withdraw(id))
	requireWoken(t, first)
	require.Empty(t, a.running)
}

func requireWaiting(tb testing.TB, c <-chan struct{}) {
	tb.Helper()
	require.NotNil(tb, c)
	select {
	case <-c:
		require.FailNow(tb, "woken")
	default:
	}
}

func requireWoken(tb testing.TB, c <-chan struct{}) {
	tb.Helper()
	select {
	case <-c:
	default:
		require.FailNow(tb, "not woken")
	}
}
