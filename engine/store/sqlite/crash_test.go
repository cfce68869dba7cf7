package sqlite_test

import (
	"bytes"
	"context"
	"database/sql"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

// The environment of a child process: which of children it is, and the path of
// its database.
const (
	childEnv = "KEYFERRY_TEST_SQLITE_CHILD"
	pathEnv  = "KEYFERRY_TEST_SQLITE_PATH"
)

// children are the programs this test binary can be.
var children = map[string]func(path string) error{
	"report": reportChild,
}

// child is this test binary as the child of that name.
func child(t *testing.T, name, path string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+name, pathEnv+"="+path)
	cmd.Stderr = t.Output()
	return cmd
}

func reportChild(path string) error {
	s, err := sqlite.Open(context.Background(), sqlite.Config{Path: path})
	if err != nil {
		return err
	}
	return storetest.Report(context.Background(), s, os.Stdout)
}

// TestKilled kills a process that writes, at a random moment, again and again
// on one database. Nothing that was acknowledged may be missing, and the file
// must be sound.
func TestKilled(t *testing.T) {
	path := newPath(t)
	rng := rand.New(rand.NewPCG(rand.Uint64(), 0))
	var reports []byte
	for range 20 {
		cmd := child(t, "report", path)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		var report bytes.Buffer
		// The moment is a number of bytes: a dozen or so per write.
		_, err = io.CopyN(&report, out, 1+rng.Int64N(6000))
		require.NoError(t, err, "the child has ended by itself")
		require.NoError(t, cmd.Process.Kill())
		_, err = io.Copy(&report, out)
		require.NoError(t, err)
		require.ErrorContains(t, cmd.Wait(), "killed")

		s := open(t, path)
		storetest.CheckReport(t, s, report.Bytes())
		reports = append(reports, report.Bytes()[:bytes.LastIndexByte(report.Bytes(), '\n')+1]...)
		require.NoError(t, s.Close())
	}
	s := open(t, path)
	storetest.CheckReport(t, s, reports)
	require.NoError(t, s.Close())
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
