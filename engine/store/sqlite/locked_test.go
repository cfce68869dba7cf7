package sqlite_test

import (
	"context"
	"database/sql"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

// lock takes SQLite's write lock on a database that a Store has open, as a
// backup program would, until the function it returns is called.
func lock(t *testing.T, path string) (release func()) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	c, err := db.Conn(t.Context())
	require.NoError(t, err)
	_, err = c.ExecContext(t.Context(), `BEGIN IMMEDIATE`)
	require.NoError(t, err)
	return func() {
		_, err := c.ExecContext(t.Context(), `ROLLBACK`)
		require.NoError(t, err)
		require.NoError(t, c.Close())
		require.NoError(t, db.Close())
	}
}

func TestLocked(t *testing.T) {
	path := newPath(t)
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path, BusyTimeout: 30 * time.Millisecond})
	require.NoError(t, err)
	key := storetest.BenchKey(1)
	require.NoError(t, s.CreateKey(t.Context(), key))

	release := lock(t, path)
	began := time.Now()
	next := key
	next.Revision = 2
	err = s.UpdateKey(t.Context(), store.Update{Key: next})
	require.ErrorIs(t, err, store.ErrUnavailable)
	require.ErrorContains(t, err, "locked")
	require.GreaterOrEqual(t, time.Since(began), 30*time.Millisecond, "it is given a chance")
	errs := make(chan error)
	for i := range 20 {
		go func() { errs <- s.CreateKey(t.Context(), storetest.BenchKey(100+i)) }()
	}
	for range 20 {
		require.ErrorIs(t, <-errs, store.ErrUnavailable)
	}
	got, err := s.Key(t.Context(), key.KeyID)
	require.NoError(t, err, "reads go on")
	require.Equal(t, key, got)
	release()

	require.NoError(t, s.UpdateKey(t.Context(), store.Update{Key: next}), "and so does everything, afterwards")
	_, total, err := s.ListKeys(t.Context(), store.KeyFilter{}, 0, 0)
	require.NoError(t, err)
	require.Equal(t, 1, total, "what was refused was not done")
	require.NoError(t, s.Close())
	requireSound(t, path)
}

// TestWaitGivenUp ends a context while its write waits for the lock. The call
// returns at once, and the write is never made: the caller may reuse the row.
func TestWaitGivenUp(t *testing.T) {
	path := newPath(t)
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path, BusyTimeout: time.Hour})
	require.NoError(t, err)
	key := storetest.BenchKey(1)
	require.NoError(t, s.CreateKey(t.Context(), key))

	release := lock(t, path)
	ctx, cancel := context.WithCancel(t.Context())
	next := storetest.BenchKey(1)
	next.Revision = 2
	failed := make(chan error)
	go func() { failed <- s.UpdateKey(ctx, store.Update{Key: next}) }()
	patient := make(chan error)
	go func() { patient <- s.CreateKey(t.Context(), storetest.BenchKey(2)) }()
	cancel()
	require.ErrorIs(t, <-failed, context.Canceled)
	clear(next.Material)
	release()

	require.NoError(t, <-patient, "who waits is served")
	got, err := s.Key(t.Context(), key.KeyID)
	require.NoError(t, err)
	require.Equal(t, key, got)
	require.NoError(t, s.Close())
}
