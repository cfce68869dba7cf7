package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
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
	// The v1 SDK sends even loopback through a proxy.
	for _, name := range []string{"HTTP_PROXY", "http_proxy"} {
		if err := os.Unsetenv(name); err != nil {
			panic(err)
		}
	}
	testscript.Main(suite{m}, map[string]func(){"keyferryd": main, lootCommand: loot, aftermathCommand: aftermath})
}

// suite is all tests, and the server that some of them share.
type suite struct{ *testing.M }

func (s suite) Run() int {
	status := s.M.Run()
	if err := stopPostgres(); err != nil {
		fmt.Fprintln(os.Stderr, "the shared PostgreSQL:", err)
		return 1
	}
	if err := shared.stop(status != 0); err != nil {
		fmt.Fprintln(os.Stderr, "the shared server:", err)
		return 1
	}
	return status
}

// shared is a server of "dev" for all tests that need no more of one than keys
// of their own: the start of one takes a core for a second.
var shared sharedDev

type sharedDev struct {
	once   sync.Once
	server *server
	err    error
}

func sharedServer(t testing.TB) *server {
	t.Helper()
	shared.once.Do(func() {
		var dir string
		if dir, shared.err = os.MkdirTemp("", "keyferryd-test-"); shared.err == nil { //nolint:usetesting // it outlives this test
			shared.server, shared.err = newServer(keyferryd(t).Path, dir, "dev", "--data", dir)
		}
	})
	require.NoError(t, shared.err)
	return shared.server
}

func (d *sharedDev) stop(failed bool) error {
	if d.server == nil {
		return nil
	}
	err := errors.Join(d.server.stop(), os.RemoveAll(d.server.dir))
	if failed || err != nil {
		fmt.Fprintf(os.Stderr, "the log of the shared server:\n%s", d.server.log)
	}
	return err
}

// TestScripts are the commands as a user types them, most of them wrong.
func TestScripts(t *testing.T) {
	module, err := softhsm.FindModule()
	require.NoError(t, err)
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Condition: func(cond string) (bool, error) {
			if cond != "sm" {
				return false, fmt.Errorf("unknown condition %s", cond)
			}
			cfg, err := loadConfig(filepath.Join(sharedServer(t).dir, devConfigFile))
			return !cfg.Token.Pins.VaultSM4.IsZero(), err
		},
		Setup: func(env *testscript.Env) error {
			env.Setenv("MODULE", module)
			env.Setenv(softhsm.ModuleEnv, module) // whichever this test found
			env.Setenv("TMPDIR", env.WorkDir)     // for what the demo makes
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
	s, err := newServer(keyferryd(t).Path, dir, args...)
	require.NoError(t, err)
	t.Cleanup(func() {
		if s.cmd.ProcessState == nil {
			s.kill(t)
		}
		if t.Failed() {
			t.Logf("the log of the server on %s:\n%s", dir, s.log)
		}
	})
	return s
}

func newServer(exe, dir string, args ...string) (*server, error) {
	p, err := startServer(context.Background(), exe, args...)
	if err != nil {
		return nil, err
	}
	_, endpoint, _ := strings.Cut(p.ready, "://")
	return &server{serverProcess: p, dir: dir, endpoint: endpoint}, nil
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
	c, err := newClient(filepath.Join(s.dir, devCredentials))
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
