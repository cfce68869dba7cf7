package sqlite_test

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
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
// database that is open: the database and its write-ahead log.
func TestErased(t *testing.T) {
	path := newPath(t)
	s := open(t, path)
	const keys = 200
	secrets := make([][]byte, keys)
	for i := range keys {
		secrets[i] = make([]byte, 96)
		_, _ = rand.Read(secrets[i])
		key := benchKey(i)
		key.State, key.Material = "PendingImport", nil
		require.NoError(t, s.CreateKey(t.Context(), key))
		key.Revision, key.State, key.Material = 2, "Enabled", secrets[i]
		require.NoError(t, s.UpdateKey(t.Context(), key))
	}
	require.Equal(t, keys, inFiles(t, path, secrets), "the test can see them")

	for i := range keys {
		key := benchKey(i)
		switch i % 4 {
		case 0: // deleted with its key
			require.NoError(t, s.DeleteKey(t.Context(), key.KeyID, 2))
		case 1: // deleted alone
			key.Revision, key.State, key.Material = 3, "PendingImport", nil
			require.NoError(t, s.UpdateKey(t.Context(), key))
		case 2: // expired
			key.Revision, key.State, key.Material, key.ExpireAt = 3, "PendingImport", nil, time.Unix(1, 0)
			require.NoError(t, s.UpdateKey(t.Context(), key))
		case 3: // replaced
			key.Revision = 3
			require.NoError(t, s.UpdateKey(t.Context(), key))
		}
	}
	require.Eventually(t, func() bool { return inFiles(t, path, secrets) == 0 }, 10*time.Second, 50*time.Millisecond)
	require.NoError(t, s.Close())
	require.Zero(t, inFiles(t, path, secrets))
}
