package sqlite

import (
	"errors"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

var countBatchesQuery = &query{`SELECT count(*) FROM nonce_batch`}

func batches(t *testing.T, s *Store) (n int64) {
	t.Helper()
	require.NoError(t, s.read(t.Context(), func(c *conn) error {
		_, err := c.one(countBatchesQuery, func(row *cursor) { n = row.integer() })
		return err
	}))
	return n
}

// TestNoncesOfOneTransaction shares a row, and are forgotten together if the
// transaction fails.
func TestNoncesOfOneTransaction(t *testing.T) {
	s := openTest(t)
	d := func(i int) digest { return nonceDigest("key", strconv.Itoa(i)) }
	fresh := make([]bool, 40)
	for _, err := range gather(t, s, 40, func(i int, _ *conn) error {
		fresh[i] = s.nonces.add(d(i%20), 900, 0)
		return nil
	}) {
		require.NoError(t, err)
	}
	for i := range 20 {
		require.NotEqual(t, fresh[i], fresh[i+20], "one of two is fresh, within a transaction as well")
	}
	require.EqualValues(t, 1, batches(t, s))

	boom := errors.New("boom")
	for range 2 { // the second time they are as new as the first
		var first, second int // how many of 20 are fresh
		require.ErrorIs(t, s.write(t.Context(), func(*conn) error {
			first, second = 0, 0
			for i := 100; i < 120; i++ {
				if s.nonces.add(d(i), 900, 0) {
					first++
				}
				if s.nonces.add(d(i), 900, 0) {
					second++
				}
			}
			return boom
		}), boom)
		require.Equal(t, []int{20, 0}, []int{first, second})
	}
	require.EqualValues(t, 1, batches(t, s))
	fresh1, err := s.AddNonce(t.Context(), store.Nonce{AccessKeyID: "key", Value: "3", ExpiresAt: time.Unix(900, 0)}, time.Unix(0, 0))
	require.NoError(t, err)
	require.False(t, fresh1, "what was committed before stays")
}

// TestNoncesSwept leaves nothing behind, in memory or on the disk.
func TestNoncesSwept(t *testing.T) {
	s := openTest(t)
	const n = 2*sweepStep + 10
	for i := range n { // one by one: a row each
		fresh, err := s.AddNonce(t.Context(), store.Nonce{Value: strconv.Itoa(i), ExpiresAt: time.Unix(int64(900+i), 0)}, time.Unix(0, 0))
		require.NoError(t, err)
		require.True(t, fresh)
	}
	require.EqualValues(t, n, batches(t, s))
	require.NoError(t, s.DeleteNonces(t.Context(), time.Unix(899, 0)))
	require.EqualValues(t, n, batches(t, s))
	require.NoError(t, s.DeleteNonces(t.Context(), time.Unix(909, 0)))
	require.EqualValues(t, n-10, batches(t, s))
	require.NoError(t, s.DeleteNonces(t.Context(), time.Unix(900+n+generation, 0)))
	require.Zero(t, batches(t, s))

	for _, err := range gather(t, s, 2, func(i int, _ *conn) error {
		for _, expires := range []int64{2000, 1000} { // the last is not the last to expire
			s.nonces.add(nonceDigest(strconv.Itoa(i), strconv.Itoa(int(expires))), expires, 0)
		}
		return nil
	}) {
		require.NoError(t, err)
	}
	require.NoError(t, s.DeleteNonces(t.Context(), time.Unix(1999, 0)))
	require.EqualValues(t, 1, batches(t, s))
	require.NoError(t, s.DeleteNonces(t.Context(), time.Unix(2000+generation, 0)))

	left := -1
	require.NoError(t, s.write(t.Context(), func(*conn) error {
		left = len(s.nonces.generations)
		return nil
	}))
	require.Zero(t, left)
}

func TestNoncesDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keyferry.db")
	s, err := Open(t.Context(), Config{Path: path})
	require.NoError(t, err)
	require.NoError(t, s.write(t.Context(), func(c *conn) error {
		_, err := c.exec(insertNoncesQuery, int64(900), make([]byte, nonceLen+1))
		return err
	}))
	require.NoError(t, s.Close())
	_, err = Open(t.Context(), Config{Path: path})
	require.ErrorContains(t, err, "nonce_batch is damaged")
	require.ErrorContains(t, err, path)
}
