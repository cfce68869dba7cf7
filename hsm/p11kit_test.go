package hsm_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// remote is a SoftHSM2 in a process of its own, which a test can kill.
type remote struct {
	soft    *softhsm.Token
	program string
	socket  string
	cmd     *exec.Cmd
}

// newRemote serves a token by p11-kit, and answers the client module for it.
func newRemote(t *testing.T, soft *softhsm.Token) (r *remote, client string) {
	t.Helper()
	program, err := exec.LookPath("p11-kit")
	clients, _ := filepath.Glob("/usr/lib/*/pkcs11/p11-kit-client.so")
	if err != nil || len(clients) == 0 {
		t.Skip("p11-kit and p11-kit-client.so are missing: install Debian's p11-kit and p11-kit-modules")
	}
	// Short: the path of a socket has 107 bytes at the most.
	dir, err := os.MkdirTemp("", "kf") //nolint:usetesting // t.TempDir names the test, too long for a socket
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	r = &remote{soft: soft, program: program, socket: filepath.Join(dir, "s")}
	t.Setenv("P11_KIT_SERVER_ADDRESS", "unix:path="+r.socket)
	r.start(t)
	t.Cleanup(r.kill)
	return r, clients[0]
}

func (r *remote) start(t *testing.T) {
	t.Helper()
	_ = os.Remove(r.socket) // a killed server leaves it
	r.cmd = exec.Command(r.program, "server", "--foreground", "--name", r.socket, "--provider", r.soft.Module, "pkcs11:token="+r.soft.Label)
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // it has a process for each connection
	require.NoError(t, r.cmd.Start())
	require.Eventually(t, func() bool { // it binds before it listens
		c, err := net.Dial("unix", r.socket)
		if err == nil {
			err = c.Close()
		}
		return err == nil
	}, waitFor, tick)
}

// kill ends the server and all it has started, without a word.
func (r *remote) kill() {
	_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
	_ = r.cmd.Wait()
}

// A token whose process is killed under load comes back by itself, with one
// login each time, and nobody gets a wrong answer meanwhile.
func TestTokenIsKilledUnderLoad(t *testing.T) {
	softhsm.Once(t)
	soft := softhsm.New(t, softhsm.WithKeys())
	ctx := context.Background()
	direct := open(t, soft.Config())
	pair, _ := newPair(t, direct, hsm.OAEPSHA1)
	want, err := direct.MAC(ctx, "test")
	require.NoError(t, err)
	require.NoError(t, direct.Close())

	r, client := newRemote(t, soft)
	cfg := soft.Config()
	// One call at a time: where one fails for want of a connection, others that
	// wait in p11-kit's client (0.24.1) for its reading are never woken.
	cfg.Module, cfg.Sessions = client, 1
	_, err = hsm.Open(ctx, cfg)
	require.ErrorContains(t, err, "probe the token: CKR_DEVICE_ERROR", "the RPC has no CKM_AES_KEY_WRAP")
	var logins atomic.Int32
	cfg.PIN = func() ([]byte, error) {
		logins.Add(1)
		return soft.UserPIN()
	}
	token, err := hsm.OpenHalfForTest(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, token.Close()) })

	var good atomic.Int64
	stop := make(chan struct{})
	end := sync.OnceFunc(func() { close(stop) })
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				call, cancel := context.WithTimeout(ctx, 5*time.Second)
				mac, err := token.MAC(call, "test")
				if err == nil && mac != want {
					t.Error("another MAC")
				}
				if err == nil {
					// Not Pair: the RPC loses its connection over nested templates.
					var list []hsm.TokenPair
					if list, err = token.Pairs(call, instance); err == nil && (len(list) != 1 || list[0].ID != pair.ID) {
						t.Errorf("%d pairs are there", len(list))
					}
				}
				cancel()
				switch {
				case err == nil:
					good.Add(1)
				case !errors.Is(err, hsm.ErrUnavailable):
					t.Error(err)
				}
			}
		})
	}
	const kills = 4
	for range kills {
		enough := good.Load() + 50
		require.Eventually(t, func() bool { return good.Load() >= enough }, waitFor, tick)
		r.kill()
		r.start(t)
	}
	enough := good.Load() + 50
	require.Eventually(t, func() bool { return good.Load() >= enough }, waitFor, tick)
	end()
	wg.Wait()
	require.GreaterOrEqual(t, int(logins.Load()), 1+kills)
	require.LessOrEqual(t, int(logins.Load()), 1+3*kills, "no storm of logins")
}
