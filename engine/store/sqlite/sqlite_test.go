package sqlite_test

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

// TestMain runs this binary as one of its own children if the environment
// says which, and else the tests, after which no goroutine may be left.
func TestMain(m *testing.M) {
	children.Main()
	goleak.VerifyTestMain(m)
}

// open opens the database at path with the default configuration.
func open(t *testing.T, path string) *sqlite.Store {
	t.Helper()
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
	require.NoError(t, err)
	return s
}

// newPath names a database that does not exist yet.
func newPath(t *testing.T) string { return filepath.Join(t.TempDir(), "keyferry.db") }

func TestContract(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return open(t, newPath(t)) })
}

func TestReopened(t *testing.T) {
	storetest.RunReopened(t, func(t *testing.T) func(t *testing.T) store.Store {
		path := newPath(t)
		return func(t *testing.T) store.Store { return open(t, path) }
	})
}
