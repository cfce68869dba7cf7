package storetest

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

func testBoot(t *testing.T, s store.Store) {
	var last uint64
	for range 5 {
		boot, err := s.NextBoot(t.Context())
		require.NoError(t, err)
		require.Greater(t, boot, last)
		last = boot
	}
}

func testInstance(t *testing.T, s store.Store) {
	name, err := s.Instance(t.Context())
	require.NoError(t, err)
	require.Regexp(t, `^[0-9a-f]{16}$`, name)
	again, err := s.Instance(t.Context())
	require.NoError(t, err)
	require.Equal(t, name, again)
}

func testInstancesDiffer(t *testing.T, open func(t *testing.T) store.Store) {
	seen := map[string]bool{}
	for range 3 {
		s := open(t)
		name, err := s.Instance(t.Context())
		require.NoError(t, err)
		require.NoError(t, s.Close())
		require.False(t, seen[name], "two databases have one name")
		seen[name] = true
	}
}
