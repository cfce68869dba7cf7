package main

import (
	"bytes"
	"context"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/softhsm"
)

// TestMain makes this binary the command keyferryd for scripts and for tests
// that kill it.
func TestMain(m *testing.M) {
	syscall.Umask(0o022) // "dev" refuses directories that a group can write to
	testscript.Main(m, map[string]func(){"keyferryd": main})
}

// TestScripts are the commands as a user types them, most of them wrong.
func TestScripts(t *testing.T) {
	module, err := softhsm.FindModule()
	require.NoError(t, err)
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(env *testscript.Env) error {
			env.Setenv("MODULE", module)
			env.Setenv("TMPDIR", env.WorkDir) // for what the demo makes
			return nil
		},
	})
}

// server is a keyferryd process that a test started.
type server struct {
	*serverProcess
	dir      string
	endpoint string
}

// startDevServer starts "keyferryd dev" on dir and waits until it is ready. It
// is killed at the end of the test unless it has ended by then.
func startDevServer(t testing.TB, dir string, args ...string) *server {
	t.Helper()
	return startTestServer(t, dir, append([]string{"dev", "--data", dir}, args...)...)
}

// keyferryd is the command, not yet started.
func keyferryd(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := exec.LookPath("keyferryd")
	require.NoError(t, err)
	return exec.Command(exe, args...)
}

func startTestServer(t testing.TB, dir string, args ...string) *server {
	t.Helper()
	p, err := startServer(context.Background(), keyferryd(t).Path, args...)
	require.NoError(t, err)
	s := &server{serverProcess: p, dir: dir}
	t.Cleanup(func() {
		if s.cmd.ProcessState == nil {
			s.kill(t)
		}
		if t.Failed() {
			t.Logf("the log of the server on %s:\n%s", dir, s.log)
		}
	})
	_, s.endpoint, _ = strings.Cut(p.ready, "://")
	require.NotEmpty(t, s.endpoint, p.ready)
	return s
}

// kill ends the server as a power failure would, as far as it can tell.
func (s *server) kill(t testing.TB) {
	t.Helper()
	require.NoError(t, s.cmd.Process.Kill())
	require.Error(t, s.cmd.Wait())
}

// client is one of the server of "dev".
func (s *server) client(t testing.TB) *client {
	t.Helper()
	c, err := newClient(filepath.Join(s.dir, "credentials.json"))
	require.NoError(t, err)
	return c
}

// run runs one command to its end, in this process.
func run(t testing.TB, args ...string) (status int, stderr string) {
	t.Helper()
	var errs bytes.Buffer
	status = execute(t.Context(), args, strings.NewReader(""), io.Discard, &errs)
	return status, errs.String()
}
