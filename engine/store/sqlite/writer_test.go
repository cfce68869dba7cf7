package sqlite

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

func openTest(t *testing.T) *Store {
	t.Helper()
	s, err := Open(t.Context(), Config{Path: filepath.Join(t.TempDir(), "keyferry.db")})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// hold keeps the writer busy until release is called, and returns when it is.
func hold(t *testing.T, s *Store) (release func()) {
	t.Helper()
	busy, done := make(chan struct{}), make(chan struct{})
	failed := make(chan error)
	go func() {
		failed <- s.write(context.Background(), func(*conn) error {
			close(busy)
			<-done
			return nil
		})
	}()
	<-busy
	return func() {
		close(done)
		require.NoError(t, <-failed)
	}
}

// gather has n writes wait in the queue while the writer is busy, lets them
// go, and returns their errors.
func gather(t *testing.T, s *Store, n int, do func(i int, c *conn) error) []error {
	t.Helper()
	release := hold(t, s)
	type result struct {
		i   int
		err error
	}
	results := make(chan result)
	for i := range n {
		go func() { results <- result{i, s.write(context.Background(), func(c *conn) error { return do(i, c) })} }()
	}
	for queued := 0; queued < n; {
		s.mu.Lock()
		queued = len(s.waiting)
		s.mu.Unlock()
	}
	release()
	errs := make([]error, n)
	for range n {
		r := <-results
		errs[r.i] = r.err
	}
	return errs
}

var (
	putQuery = &query{`INSERT INTO key_usage (key_id, uses, boot) VALUES ($1, 1, 1)`}
	cmkQuery = &query{`INSERT INTO cmk (key_id, key_version_id, revision, spec, state, description, check_value_algorithm, wrapping_algorithm)
	VALUES ($1, $1, 1, 'spec', 'state', '', '', '')`}
)

func total(t *testing.T, s *Store) int {
	t.Helper()
	_, n, err := s.ListKeys(t.Context(), store.KeyFilter{}, 0, 0)
	require.NoError(t, err)
	return n
}

func TestWritesShareTransaction(t *testing.T) {
	s := openTest(t)
	const n = 100
	seen := make([]int, n) // by the other connections, when the write is executed
	for _, err := range gather(t, s, n, func(i int, c *conn) error {
		seen[i] = total(t, s)
		_, err := c.exec(cmkQuery, fmt.Sprint(i))
		return err
	}) {
		require.NoError(t, err)
	}
	require.Equal(t, make([]int, n), seen, "nothing is committed before all of it is")
	require.Equal(t, n, total(t, s))
}

func TestLongQueue(t *testing.T) {
	s := openTest(t)
	const n = maxBatch + 100
	for _, err := range gather(t, s, n, func(i int, c *conn) error {
		_, err := c.exec(cmkQuery, fmt.Sprint(i))
		return err
	}) {
		require.NoError(t, err)
	}
	require.Equal(t, n, total(t, s))
}

// TestRefusedAmongOthers has some writes of a transaction get an answer that
// is an error.
func TestRefusedAmongOthers(t *testing.T) {
	s := openTest(t)
	for i, err := range gather(t, s, 60, func(i int, c *conn) error {
		if _, err := c.exec(cmkQuery, fmt.Sprint(i/2)); err != nil {
			return err // one of each two
		}
		return nil
	}) {
		if err != nil {
			require.ErrorIs(t, err, store.ErrExists, i)
		}
	}
	require.Equal(t, 30, total(t, s))
}

// TestFailureAmongOthers has a write fail in the middle of a transaction after
// it has written something.
func TestFailureAmongOthers(t *testing.T) {
	s := openTest(t)
	boom := errors.New("boom")
	runs := make([]int, 30)
	for i, err := range gather(t, s, 30, func(i int, c *conn) error {
		runs[i]++
		if _, err := c.exec(cmkQuery, fmt.Sprint(i)); err != nil {
			return err
		}
		switch i {
		case 7:
			return boom
		case 8: // a constraint that is no answer
			_, err := c.exec(putQuery, "nobody")
			return err
		}
		return nil
	}) {
		switch i {
		case 7:
			require.ErrorIs(t, err, boom)
		case 8:
			require.ErrorContains(t, err, "FOREIGN KEY")
			require.NotErrorIs(t, err, store.ErrExists)
		default:
			require.NoError(t, err, "the others do not suffer")
		}
		require.LessOrEqual(t, runs[i], 2)
	}
	require.Equal(t, 28, total(t, s), "a write that fails leaves nothing")
}

// TestCommitFails has the last write of a transaction end it behind the
// writer's back.
func TestCommitFails(t *testing.T) {
	s := openTest(t)
	const n = 30
	runs := 0
	for _, err := range gather(t, s, n, func(i int, c *conn) error {
		_, err := c.exec(cmkQuery, fmt.Sprint(i))
		if runs++; runs == n {
			_, err = c.exec(rollbackQuery)
		}
		return err
	}) {
		require.ErrorIs(t, err, store.ErrUnavailable, "all of them")
	}
	require.Equal(t, n, runs, "none is tried again")
	require.Zero(t, total(t, s))
	require.NoError(t, s.CreateKey(t.Context(), store.Key{KeyID: "after", KeyVersionID: "after", Revision: 1}))
	_, err := s.Key(t.Context(), "after")
	require.NoError(t, err)
}

// TestAbandoned gives up writes that wait in the queue. They must never run.
func TestAbandoned(t *testing.T) {
	s := openTest(t)
	release := hold(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	for range 10 {
		go func() {
			failed <- s.write(ctx, func(*conn) error { panic("an abandoned write was made") })
		}()
	}
	for queued := 0; queued < 10; {
		s.mu.Lock()
		queued = len(s.waiting)
		s.mu.Unlock()
	}
	cancel()
	for range 10 {
		require.ErrorIs(t, <-failed, context.Canceled)
	}
	release()
	require.NoError(t, s.write(t.Context(), func(*conn) error { return nil }))
}

// TestReadersBusy bounds the wait for a connection by the context.
func TestReadersBusy(t *testing.T) {
	s := openTest(t)
	held := make([]*conn, 0, cap(s.idle))
	for range cap(s.idle) {
		held = append(held, <-s.idle)
	}
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, err := s.Key(ctx, "nobody")
		failed <- err
	}()
	cancel()
	require.ErrorIs(t, <-failed, context.Canceled)
	for _, c := range held {
		s.idle <- c
	}
	_, err := s.Key(t.Context(), "nobody")
	require.ErrorIs(t, err, store.ErrNotFound)
}
