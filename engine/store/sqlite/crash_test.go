package sqlite_test

import (
	"context"
	"database/sql"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

// children are the programs this test binary can be.
var children = storetest.Children{
	"report": storetest.Reporter(func(path string) (store.Store, error) {
		return sqlite.Open(context.Background(), sqlite.Config{Path: path})
	}),
}

// Whatever is killed, the file is sound.
func TestKilled(t *testing.T) {
	path := newPath(t)
	storetest.RunKilled(t, path, func(t *testing.T) store.Store { return open(t, path) })
	requireSound(t, path)
}

// requireSound has SQLite check a database that is closed, and compares the
// counts kept with the rows there are.
func requireSound(t *testing.T, path string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	var answer string
	require.NoError(t, db.QueryRowContext(t.Context(), `PRAGMA integrity_check`).Scan(&answer))
	require.Equal(t, "ok", answer)
	var broken int
	require.NoError(t, db.QueryRowContext(t.Context(), `SELECT count(*) FROM pragma_foreign_key_check`).Scan(&broken))
	require.Zero(t, broken)
	require.NoError(t, db.QueryRowContext(t.Context(), `SELECT count(*) FROM (
		SELECT state, spec, count(*) FROM cmk GROUP BY state, spec
		EXCEPT SELECT state, spec, n FROM cmk_count)`).Scan(&broken))
	require.Zero(t, broken)
}
