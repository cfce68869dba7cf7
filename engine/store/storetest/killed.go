package storetest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// The environment of a child process: which of Children it is, and its database.
const (
	childEnv    = "KEYFERRY_TEST_CHILD"
	databaseEnv = "KEYFERRY_TEST_DATABASE"
)

// Children are the programs that a test binary can be besides, by name. Each is
// told which database it works on: a path, or a connection string.
type Children map[string]func(database string) error

// Main makes this process a child if the environment says so, and does not return
// then. TestMain calls it first.
func (c Children) Main() {
	name := os.Getenv(childEnv)
	if name == "" {
		return
	}
	if err := c[name](os.Getenv(databaseEnv)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Child is this test binary as the child of that name.
func Child(t *testing.T, name, database string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+name, databaseEnv+"="+database)
	cmd.Stderr = t.Output()
	return cmd
}

// Reporter is the child that RunKilled kills. It must be called "report".
func Reporter(open func(database string) (store.Store, error)) func(database string) error {
	return func(database string) error {
		s, err := open(database)
		if err != nil {
			return err
		}
		return Report(context.Background(), s, os.Stdout)
	}
}

// RunKilled kills a process that writes, at a random moment, again and again on
// one database. Nothing that was acknowledged may be missing. Slow tests kill
// twenty.
func RunKilled(t *testing.T, database string, open func(t *testing.T) store.Store) {
	t.Helper()
	kills := 4
	if os.Getenv("KEYFERRY_SLOW") != "" {
		kills = 20
	}
	rng := rand.New(rand.NewPCG(rand.Uint64(), 0))
	var reports []byte
	check := func(report []byte) {
		s := open(t)
		CheckReport(t, s, report)
		require.NoError(t, s.Close())
	}
	for range kills {
		cmd := Child(t, "report", database)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		var report bytes.Buffer
		// The moment is a number of bytes: a dozen or so per write.
		_, err = io.CopyN(&report, out, 1+rng.Int64N(3000))
		require.NoError(t, err, "the child has ended by itself")
		require.NoError(t, cmd.Process.Kill())
		_, err = io.Copy(&report, out)
		require.NoError(t, err)
		require.ErrorContains(t, cmd.Wait(), "killed")
		whole := wholeLines(report.Bytes())
		check(whole)
		reports = append(reports, whole...)
	}
	check(reports)
}

// wholeLines is a report without its last line, if that has no end.
func wholeLines(report []byte) []byte { return report[:bytes.LastIndexByte(report, '\n')+1] }
