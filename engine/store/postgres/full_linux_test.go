package postgres_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
)

// newDisk is a disk of so many megabytes, and grow makes it larger.
func newDisk(t *testing.T, megabytes int) (dir string, grow func(megabytes int)) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a small disk")
	}
	// Below /tmp, where another user gets to it.
	dir, err := os.MkdirTemp("", "keyferry-disk-") //nolint:usetesting // see above
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	size := func(megabytes int) string { return fmt.Sprintf("size=%dm,mode=0755", megabytes) }
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, size(megabytes)); errors.Is(err, syscall.EPERM) {
		t.Skip("root may not mount here: a container without CAP_SYS_ADMIN?")
	} else {
		require.NoError(t, err)
	}
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
	return dir, func(megabytes int) {
		require.NoError(t, syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT, size(megabytes)))
	}
}

// large is a key whose row nothing compresses.
func large(n int) store.Key {
	key := testKey(n)
	key.Material = make([]byte, 256<<10)
	rand.Read(key.Material)
	return key
}

// fillUp creates keys until there is no room for the next.
func fillUp(t *testing.T, s *postgres.Store) (created []store.Key) {
	t.Helper()
	for n := 0; ; n++ {
		key := large(n)
		err := s.CreateKey(t.Context(), key)
		if err != nil {
			require.ErrorIs(t, err, store.ErrUnavailable)
			return created
		}
		created = append(created, key)
	}
}

// requireCreated requires that a store has what was acknowledged.
func requireCreated(t *testing.T, s *postgres.Store, created []store.Key) {
	t.Helper()
	for _, want := range created {
		got, err := s.Key(t.Context(), want.KeyID)
		require.NoError(t, err, "it was acknowledged")
		require.Equal(t, want, got)
	}
	_, total, err := s.ListKeys(t.Context(), store.KeyFilter{}, 0, 0)
	require.NoError(t, err)
	require.Equal(t, len(created), total)
}

// TestFull fills the disk of the tables. What was acknowledged is there, what was
// not has changed nothing, deleting goes on, and with more room everything does.
func TestFull(t *testing.T) {
	server := sharedServer(t)
	dir, grow := newDisk(t, 24)
	require.NoError(t, server.Own(dir))
	require.NoError(t, server.Exec(t.Context(), "postgres", `CREATE TABLESPACE test_full LOCATION '`+dir+`'`))
	name, err := server.Database(t.Context())
	require.NoError(t, err)
	require.NoError(t, server.Exec(t.Context(), "postgres", `ALTER DATABASE `+name+` SET TABLESPACE test_full`))
	defer func() {
		require.NoError(t, server.Exec(t.Context(), "postgres", `DROP DATABASE `+name))
		require.NoError(t, server.Exec(t.Context(), "postgres", `DROP TABLESPACE test_full`))
	}()
	s := open(t, server.DSN(name))
	defer func() { require.NoError(t, s.Close()) }()
	created := fillUp(t, s)
	require.Greater(t, len(created), 10)
	requireCreated(t, s, created)
	require.NoError(t, s.DeleteKey(t.Context(), store.Deletion{KeyID: created[0].KeyID, Revision: 1}))
	requireCreated(t, s, created[1:])

	grow(64)
	again := large(1000)
	require.NoError(t, s.CreateKey(t.Context(), again))
	requireCreated(t, s, append(created[1:], again))
}

// TestLogFull fills the disk of the server as a whole, with its write-ahead log:
// it panics, and may not even start again until there is more room.
func TestLogFull(t *testing.T) {
	dir, grow := newDisk(t, 110)
	server, err := pgtest.StartIn(dir, "max_wal_size=32MB", "min_wal_size=32MB")
	pgtest.Need(t, err)
	defer func() { require.NoError(t, server.Stop()) }()
	s := open(t, newDSN(t, server))
	defer func() { require.NoError(t, s.Close()) }()
	created := fillUp(t, s)
	require.Greater(t, len(created), 10)

	grow(300)
	_ = server.Kill() // it may have ended by itself
	require.NoError(t, server.Restart())
	requireCreated(t, s, created)
	again := large(1000)
	require.NoError(t, s.CreateKey(t.Context(), again))
	requireCreated(t, s, append(created, again))
}
