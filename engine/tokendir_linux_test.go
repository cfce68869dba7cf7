package engine_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// A software token whose directory vanishes, cannot be written to or is full
// makes requests unavailable at most; what was answered stays, nothing is half
// done, and all is well when the directory is.
func TestTroubleWithTheTokensDirectory(t *testing.T) {
	// A module has to be finalised to see a token again that had vanished, and is
	// not while other tokens of it are open, as they are in this process.
	const alone = "KEYFERRY_TEST_ALONE"
	if os.Getenv(alone) == "" {
		if os.Geteuid() != 0 {
			t.Skip("only root can mount a file system, to take it away and to fill it")
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), alone+"=1")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		if skipped := regexp.MustCompile(`(?m)^\s+\S+_test.go:\d+: (no resident .*|this root .*)$`).FindSubmatch(out); skipped != nil {
			t.Logf("in part: %s", skipped[1])
		}
		return
	}
	for _, custody := range []hsm.Custody{hsm.Sealed, hsm.Resident} {
		t.Run(custody.String(), func(t *testing.T) {
			on := softhsm.New(t, softhsm.WithKeys())
			mount := ownFilesystem(t, on.Files)
			cfg := on.Config()
			cfg.Patience = 50 * time.Millisecond
			token, err := hsm.Open(t.Context(), cfg)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, token.Close()) })
			if err := token.Keeps(custody, hsm.AES256); err != nil {
				t.Skipf("no resident key material on this token, but on that of \"make softhsm\": %v", err)
			}
			h := newHouse(t, withToken(token), withPairs(3), with(func(c *engine.Config) {
				c.Custody, c.PairSpecs = custody, []hsm.PairSpec{hsm.RSA2048}
			}))
			away := filepath.Join(on.Dir, "away")
			full := filepath.Join(on.Files, "of somebody else")
			for _, trouble := range []struct {
				name       string
				begin, end func() error
			}{
				{
					"cannot be written to",
					func() error { return syscall.Mount("", on.Files, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "") },
					func() error { return syscall.Mount("", on.Files, "", syscall.MS_REMOUNT, "") },
				},
				{"is full", func() error { return fill(full) }, func() error { return os.Remove(full) }},
				{
					"vanishes",
					func() error {
						if err := mount.moveTo(away); err != nil {
							return err
						}
						requireKind(t, engine.Unavailable, h.Health(t.Context()))
						return nil
					},
					func() error { return mount.moveTo(on.Files) },
				},
			} {
				t.Run(trouble.name, func(t *testing.T) { h.endure(t, trouble.begin, trouble.end) })
			}
		})
	}
}

// endure has customers work before, during and after some trouble of the token.
func (h *house) endure(t *testing.T, begin, end func() error) {
	t.Helper()
	old, fresh := newCustomer(t, h), make([]*customer, 3)
	for i := range fresh {
		fresh[i] = &customer{keyID: h.newKey(t, engine.AliyunAES256), material: randomBytes(32)}
		fresh[i].params = h.parameters(t, fresh[i].keyID)
	}
	imports := func(c *customer) error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := h.ImportKeyMaterial(ctx, input(t, c.params, c.material))
		return err
	}
	// Whatever else is answered would be taken for the customer's fault.
	bearable := func(what string, err error) {
		t.Helper()
		switch kindOf(err) {
		case "", engine.Unavailable, engine.LimitExceeded:
			t.Logf("%s: %v", what, err)
		default:
			require.NoError(t, err, what)
		}
	}
	require.NoError(t, begin())
	acknowledged := map[*customer]bool{old: true}
	for _, c := range fresh[1:] {
		err := imports(c)
		bearable("import", err)
		acknowledged[c] = err == nil
	}
	bearable("import again", imports(old))
	_, err := h.Encrypt(t.Context(), old.keyID, []byte("x"), nil)
	bearable("encrypt", err)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = h.GetParametersForImport(ctx, old.keyID, hsm.RSA2048, hsm.OAEPSHA1)
	bearable("parameters", err)
	_ = h.Sweep(ctx) // what it cannot do now it does later
	require.NoError(t, end())

	require.Eventually(t, func() bool { return h.Health(t.Context()) == nil && imports(fresh[0]) == nil }, time.Minute, 10*time.Millisecond)
	h.restart(t)
	h.requireDecrypts(t, old.blob, "secret")
	for _, c := range fresh[1:] {
		state := h.describe(t, c.keyID).State
		require.True(t, !acknowledged[c] || state == engine.Enabled, "acknowledged, and lost")
		require.NoError(t, imports(c))
		h.encrypt(t, c.keyID, "x")
	}
	if h.cfg.Custody == hsm.Resident {
		h.clock.advance(11 * time.Minute)
		h.requireHeld(t, h.enabledKeys(t))
	}
}

// filesystem is a directory that is one of its own.
type filesystem struct{ at string }

// ownFilesystem moves what is in a directory to a file system of its own, of a
// megabyte, in the same place.
func ownFilesystem(t *testing.T, dir string) *filesystem {
	t.Helper()
	elsewhere := t.TempDir()
	if err := syscall.Mount("tmpfs", elsewhere, "tmpfs", 0, "size=1m,mode=0700"); err != nil {
		t.Skipf("this root cannot mount a file system: %v", err)
	}
	m := &filesystem{elsewhere}
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(m.at, syscall.MNT_DETACH)) })
	require.NoError(t, os.CopyFS(elsewhere, os.DirFS(dir)))
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, file := range files {
		require.NoError(t, os.Remove(filepath.Join(dir, file.Name())))
	}
	require.NoError(t, m.moveTo(dir))
	return m
}

// moveTo moves the file system elsewhere. What is below stays, empty: that is
// what a mount looks like that is lost.
func (f *filesystem) moveTo(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := syscall.Mount(f.at, dir, "", syscall.MS_MOVE, ""); err != nil {
		return err
	}
	f.at = dir
	return nil
}

// fill leaves no room in the file system of a file.
func fill(path string) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	for _, n := range []int{1 << 16, 1 << 12, 1} {
		for err = nil; err == nil; {
			_, err = file.Write(make([]byte, n))
		}
	}
	_ = file.Close() // it is full
	return nil
}
