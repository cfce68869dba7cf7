package postgres_test

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

// The environment of a child process: which of children it is, and its
// database.
const (
	childEnv = "KEYFERRY_TEST_POSTGRES_CHILD"
	dsnEnv   = "KEYFERRY_TEST_POSTGRES_DSN"
)

// children are the programs this test binary can be.
var children = map[string]func(dsn string) error{
	"report": reportChild,
}

// child is this test binary as the child of that name.
func child(t *testing.T, name, dsn string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+name, dsnEnv+"="+dsn)
	cmd.Stderr = t.Output()
	return cmd
}

func reportChild(dsn string) error {
	s, err := postgres.Open(context.Background(), postgres.Config{DSN: dsn})
	if err != nil {
		return err
	}
	return storetest.Report(context.Background(), s, os.Stdout)
}

// TestKilled kills a process that writes, at a random moment, again and again
// on one database. Nothing that was acknowledged may be missing.
func TestKilled(t *testing.T) {
	dsn := newDSN(t, sharedServer(t))
	rng := rand.New(rand.NewPCG(rand.Uint64(), 0))
	s := open(t, dsn)
	var reports []byte
	for range 3 {
		cmd := child(t, "report", dsn)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		var report bytes.Buffer
		// The moment is a number of bytes: a dozen or so per write.
		_, err = io.CopyN(&report, out, 1+rng.Int64N(2000))
		require.NoError(t, err, "the child has ended by itself")
		require.NoError(t, cmd.Process.Kill())
		_, err = io.Copy(&report, out)
		require.NoError(t, err)
		require.ErrorContains(t, cmd.Wait(), "killed")
		reports = append(reports, settled(t, s, report.Bytes())...)
	}
	storetest.CheckReport(t, s, reports)
	require.NoError(t, s.Close())
}

// settled checks a report of a process that is gone, and returns its whole
// lines.
func settled(t *testing.T, s store.Store, report []byte) []byte {
	t.Helper()
	report = report[:bytes.LastIndexByte(report, '\n')+1]
	storetest.CheckReport(t, s, report)
	return report
}

// TestServerKilled kills the server, with all of its processes, while a client
// writes, and starts it again. What was acknowledged is there; the Store, which
// stays open all the while, goes on by itself.
func TestServerKilled(t *testing.T) {
	server, err := pgtest.Start() // it forces its writes to the disk
	pgtest.Need(t, err)
	defer func() { require.NoError(t, server.Stop()) }()
	s := open(t, newDSN(t, server))
	defer func() { require.NoError(t, s.Close()) }()
	rng := rand.New(rand.NewPCG(rand.Uint64(), 0))
	for range 3 {
		report := &cutOff{at: 200 + rng.IntN(1000), reached: make(chan struct{})}
		failed := make(chan error, 1)
		go func() { failed <- storetest.Report(t.Context(), s, report) }()
		select {
		case <-report.reached:
		case err := <-failed:
			t.Fatal("the server was not even killed yet: ", err)
		}
		require.NoError(t, server.Kill())
		require.ErrorIs(t, <-failed, store.ErrUnavailable)
		_, err := s.Key(t.Context(), "any")
		require.ErrorIs(t, err, store.ErrUnavailable)
		require.NoError(t, server.Restart())
		settled(t, s, report.bytes())
	}
}

// cutOff collects what is written and says when it is so many bytes.
type cutOff struct {
	at      int
	reached chan struct{}

	mu   sync.Mutex
	text bytes.Buffer
}

func (c *cutOff) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.text.Len()
	c.text.Write(p)
	if before < c.at && c.text.Len() >= c.at {
		close(c.reached)
	}
	return len(p), nil
}

func (c *cutOff) bytes() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return bytes.Clone(c.text.Bytes())
}
