package main

import (
	"encoding/json"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// The contract of "dev", which scripts of users rely on.
func TestDevContract(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "not", "there", "yet")
	s := startDevServer(t, dir, "--listen", "127.0.0.1:0")

	// The line that says it is ready, with the port that was picked.
	require.Regexp(t, `^keyferryd listening on http://127\.0\.0\.1:[1-9]\d*$`, s.ready)

	var fields map[string]string
	readJSON(t, filepath.Join(dir, devCredentials), &fields)
	require.Len(t, fields, 4)
	require.Equal(t, s.endpoint, fields["endpoint"])
	for _, name := range []string{"region", "access_key_id", "access_key_secret"} {
		require.NotEmpty(t, fields[name], name)
	}
	var token map[string]string
	readJSON(t, filepath.Join(dir, devTokenFile), &token)
	require.Len(t, token, 4)
	for _, name := range []string{"module", "softhsm2_conf", "user_pin_file"} {
		require.True(t, filepath.IsAbs(token[name]), name)
		require.FileExists(t, token[name], name)
	}
	require.NotEmpty(t, token["token_label"])

	// Nobody else reads anything of it, and the PINs cannot be guessed.
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		require.NoError(t, err)
		info, err := entry.Info()
		require.NoError(t, err)
		require.Zero(t, info.Mode().Perm()&0o077, "%s has mode %04o", path, info.Mode().Perm())
		return nil
	}))
	pins := map[string]bool{}
	for _, name := range []string{devSOPIN, devUserPIN, devSecret} {
		pin, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(strings.TrimSpace(string(pin))), hsm.MinPINLen, name)
		pins[string(pin)] = true
	}
	require.Len(t, pins, 3)

	// On the same directory it comes back with everything, on another port.
	c := newCustomer(t, s.client(t))
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", c.params(wrapped(t, byok.OAEPSHA1, c.publicKey, c.material)), nil))
	var sealed struct{ CiphertextBlob string }
	require.NoError(t, c.call(t.Context(), "Encrypt", map[string]string{"KeyId": c.keyID, "Plaintext": "YQ=="}, &sealed))
	require.NoError(t, s.stop())
	require.NotContains(t, s.log.String(), "ERROR")

	moved := filepath.Join(t.TempDir(), "moved")
	require.NoError(t, os.Rename(dir, moved))
	again := startDevServer(t, moved)
	c.client = again.client(t)
	require.Equal(t, "Enabled", c.state(t).KeyState)
	var opened struct{ Plaintext string }
	require.NoError(t, c.call(t.Context(), "Decrypt", map[string]string{"CiphertextBlob": sealed.CiphertextBlob}, &opened))
	require.Equal(t, "YQ==", opened.Plaintext)
	var came map[string]string
	readJSON(t, filepath.Join(moved, devCredentials), &came)
	require.Equal(t, again.endpoint, came["endpoint"])
	require.Equal(t, fields["access_key_id"], came["access_key_id"])
	require.Equal(t, fields["access_key_secret"], came["access_key_secret"])

	// The parameters of an import are still good, too: the pair is in the token.
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", c.params(wrapped(t, byok.OAEPSHA1, c.publicKey, c.material)), nil))

	// One server at a time; and it ends well on either signal.
	status, stderr := run(t, "dev", "--data", moved)
	require.Equal(t, 1, status)
	require.Regexp(t, `^keyferryd: .* is in use by another keyferryd: .*\n$`, stderr)
	require.NoError(t, again.cmd.Process.Signal(os.Interrupt))
	require.NoError(t, again.cmd.Wait())

	// A database that is gone is not replaced by an empty one.
	require.NoError(t, os.Rename(filepath.Join(moved, devDatabase), filepath.Join(moved, "elsewhere.db")))
	status, stderr = run(t, "dev", "--data", moved)
	require.Equal(t, 1, status)
	require.Regexp(t, `^keyferryd: the database .*/keyferry\.db is gone, and every key with it: restore it, or start over with another --data\n$`, stderr)
	require.NoFileExists(t, filepath.Join(moved, devDatabase))
}

// What others can write, the configuration with the name of a library above
// all, is not read.
func TestDevReadsNothingOfOthers(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "keyferryd.yaml", "so-pin", "tokens", "tokens/a/token.object"} {
		t.Run("writable "+name, func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, os.MkdirAll(filepath.Join(dir, "tokens", "a"), 0o700))
			for _, file := range []string{"keyferryd.yaml", "so-pin", "tokens/a/token.object"} {
				require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte("{"), 0o600))
			}
			path := filepath.Join(dir, name)
			info, err := os.Stat(path)
			require.NoError(t, err)
			for _, bit := range []fs.FileMode{0o020, 0o002} {
				require.NoError(t, os.Chmod(path, info.Mode().Perm()&^0o022|bit))
				link := filepath.Join(t.TempDir(), "link")
				require.NoError(t, os.Symlink(dir, link))
				for _, data := range []string{dir, link} {
					status, stderr := run(t, "dev", "--data", data)
					require.Equal(t, 1, status)
					require.Regexp(t, `^keyferryd: /.* can be written by others \(mode 0\d+\): chmod go-w it, if you know all that is in it\n$`, stderr)
				}
			}
		})
	}
	own := t.TempDir()
	require.NoError(t, onlyOf(os.Geteuid(), own))
	require.ErrorContains(t, onlyOf(os.Geteuid()+1, own), own+" belongs to another user: choose a --data of your own")
}

func readJSON(t *testing.T, path string, into any) {
	t.Helper()
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, into))
}

// Whoever can connect can read where to: the files are there before the port
// answers, also a connection that says nothing.
func TestBoundPortAnswersOnlyAfterListen(t *testing.T) {
	port, err := bind("127.0.0.1:0")
	require.NoError(t, err)
	defer port.close()
	address := port.addr.String()
	require.NotContains(t, address, ":0")

	_, err = net.Dial("tcp", address)
	require.Error(t, err)
	_, err = net.Listen("tcp", address)
	require.Error(t, err, "and yet it is taken")

	listener, err := port.listen()
	require.NoError(t, err)
	defer func() { require.NoError(t, listener.Close()) }()
	conn, err := net.Dial("tcp", address)
	require.NoError(t, err)
	require.NoError(t, conn.Close())

	_, err = bind(address)
	require.ErrorContains(t, err, "the port is in use: stop the program that uses it or choose another port")
}

// Two programs can take one port before either listens; one of them does.
func TestListenWhenAnotherWasQuicker(t *testing.T) {
	address := freePort(t)
	quick, err := bind(address)
	require.NoError(t, err)
	slow, err := bind(address)
	require.NoError(t, err)
	listener, err := quick.listen()
	require.NoError(t, err)
	defer func() { require.NoError(t, listener.Close()) }()
	_, err = slow.listen()
	require.ErrorContains(t, err, "cannot listen on "+address+": the port is in use")
}

func TestBind(t *testing.T) {
	for _, address := range []string{":0", "0.0.0.0:0", "127.0.0.1:0", "localhost:0"} {
		t.Run(address, func(t *testing.T) {
			port, err := bind(address)
			require.NoError(t, err)
			listener, err := port.listen()
			require.NoError(t, err)
			endpoint := endpointOf(address, port.addr.Port)
			require.Regexp(t, `^(127\.0\.0\.1|localhost):[1-9]\d*$`, endpoint)
			conn, err := net.Dial("tcp", endpoint)
			require.NoError(t, err)
			require.NoError(t, conn.Close())
			require.NoError(t, listener.Close())
			port.close() // again, and after listen: nothing of another owner is closed
		})
	}
	for _, address := range []string{"127.0.0.1", "127.0.0.1:99999", "192.0.2.1:0", "no such host.invalid:1"} {
		t.Run(address, func(t *testing.T) {
			_, err := bind(address)
			require.ErrorContains(t, err, "cannot listen on "+address)
		})
	}
}
