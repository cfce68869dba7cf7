package sqlite_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"database/sql"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

// inFiles counts the secrets of which either half occurs in the database file
// or one beside it.
func inFiles(t *testing.T, path string, secrets [][]byte) int {
	t.Helper()
	files, err := filepath.Glob(path + "*")
	require.NoError(t, err)
	found := map[int]bool{}
	for _, file := range files {
		content, err := os.ReadFile(file)
		require.NoError(t, err)
		for i, secret := range secrets {
			half := len(secret) / 2
			if bytes.Contains(content, secret[:half]) || bytes.Contains(content, secret[half:]) {
				found[i] = true
			}
		}
	}
	return len(found)
}

// TestErased looks for the bytes of deleted material in the files of a
// database that is open: the database itself and its write-ahead log.
func TestErased(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		erase func(t *testing.T, s *sqlite.Store, key store.Key) error
	}{
		{"with its key", func(t *testing.T, s *sqlite.Store, key store.Key) error {
			t.Helper()
			return s.DeleteKey(t.Context(), store.Deletion{KeyID: key.KeyID, Revision: key.Revision})
		}},
		{"alone", func(t *testing.T, s *sqlite.Store, key store.Key) error {
			t.Helper()
			key.Revision, key.State, key.Material = 3, "PendingImport", nil
			return s.UpdateKey(t.Context(), store.Update{Key: key})
		}},
		{"without a change of state", func(t *testing.T, s *sqlite.Store, key store.Key) error {
			t.Helper()
			key.Revision, key.Material = 3, nil
			return s.UpdateKey(t.Context(), store.Update{Key: key})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // most of it is waiting
			path := newPath(t)
			s := open(t, path)
			const keys = 60
			secrets := make([][]byte, keys)
			imported := make([]store.Key, keys)
			for i := range keys {
				secrets[i] = make([]byte, 96)
				_, _ = rand.Read(secrets[i])
				key := storetest.BenchKey(i)
				key.State, key.Material = "PendingImport", nil
				require.NoError(t, s.CreateKey(t.Context(), key))
				key.Revision, key.State, key.Material = 2, "Enabled", secrets[i]
				require.NoError(t, s.UpdateKey(t.Context(), store.Update{Key: key}))
				imported[i] = key
			}
			require.Equal(t, keys, inFiles(t, path, secrets), "the test can see them")
			for _, key := range imported {
				require.NoError(t, tt.erase(t, s, key))
			}
			require.Eventually(t, func() bool { return inFiles(t, path, secrets) == 0 }, 10*time.Second, 50*time.Millisecond)
			require.NoError(t, s.Close())
			require.Zero(t, inFiles(t, path, secrets))
		})
	}
}

// TestErasedLater has a read hold the log in use when it should be emptied.
func TestErasedLater(t *testing.T) {
	t.Parallel()
	path := newPath(t)
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path, BusyTimeout: time.Hour})
	require.NoError(t, err)
	key := storetest.BenchKey(1)
	key.Material = make([]byte, 96)
	_, _ = rand.Read(key.Material)
	require.NoError(t, s.CreateKey(t.Context(), key))

	db, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	reader, err := db.Conn(t.Context())
	require.NoError(t, err)
	_, err = reader.ExecContext(t.Context(), `BEGIN; SELECT * FROM cmk`)
	require.NoError(t, err)
	require.NoError(t, s.DeleteKey(t.Context(), store.Deletion{KeyID: key.KeyID, Revision: 1}))
	// Writes do not wait for the reader, before or after the log should be empty.
	patience, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for began := time.Now(); time.Since(began) < 1200*time.Millisecond; {
		_, err := s.NextBoot(patience)
		require.NoError(t, err)
	}
	require.Equal(t, 1, inFiles(t, path, [][]byte{key.Material}))
	_, err = reader.ExecContext(t.Context(), `ROLLBACK`)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return inFiles(t, path, [][]byte{key.Material}) == 0 }, 10*time.Second, 50*time.Millisecond)
	require.NoError(t, reader.Close())
	require.NoError(t, db.Close())
	require.NoError(t, s.Close())
}
