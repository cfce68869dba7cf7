package contract

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
)

// The soft token of opencryptoki gives away what it unwraps as sensitive: it is
// refused, whatever is accepted, and nothing is left on it. In a process of its
// own: C_Initialize of its module crashes where SoftHSM2 was opened before.
func TestOpencryptokiIsRefused(t *testing.T) {
	const alone = "KEYFERRY_OPENCRYPTOKI_ALONE"
	if os.Getenv(alone) == "" {
		inChild(t, alone+"=1")
		return
	}
	module := slotDaemon(t)
	const label, pin = "keyferry-test", "11111112"
	initOpencryptoki(t, module, label, pin)
	cfg := hsm.Config{
		Module: module, Label: label, PIN: func() ([]byte, error) { return []byte(pin), nil }, Accept: hsm.Exceptions(),
	}
	x, err := hsm.Examine(ctx, cfg, false)
	require.NoError(t, err)
	caps := x.Capabilities
	for id, want := range map[string]hsm.Verdict{
		hsm.FindSensitive: hsm.Ignored, hsm.FindExtractable: hsm.Ignored, hsm.FindKeyWrap: hsm.Absent, hsm.FindGCM: hsm.Absent,
		hsm.FindCMAC: hsm.Absent, hsm.FindBuiltCMAC: hsm.Proven, hsm.FindHMAC: hsm.Proven, hsm.FindECB: hsm.Proven,
	} {
		require.Equal(t, want, caps.Finding(id).Verdict, "%s: %s", id, caps.Finding(id).Evidence)
	}
	require.Contains(t, caps.Finding(hsm.FindSensitive).Evidence, "CKA_VALUE: CKR_OK")
	require.ErrorIs(t, x.Rules, hsm.ErrUnsupported)
	require.ErrorContains(t, x.Rules, "the token does not keep CKA_SENSITIVE of an unwrapped key")
	require.ErrorContains(t, x.Rules, "the key was destroyed")
	require.Equal(t, hsm.ObjectCounts{}, x.Objects)

	cfg.Pins = hsm.Pins{Serial: x.Token.Serial, VaultAES: hsm.Fingerprint{1}, MACKey: hsm.Fingerprint{1}}
	_, err = hsm.Open(ctx, cfg)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, "the token does not keep CKA_SENSITIVE of an unwrapped key")
	// Its PINs have eight characters at the most.
	_, err = hsm.Init(ctx, hsm.InitConfig{Module: module, Label: label, UserPIN: cfg.PIN, Accept: hsm.Exceptions()})
	require.ErrorIs(t, err, hsm.ErrPIN)
}

// slotDaemon starts the daemon of opencryptoki on a soft token of this test,
// and returns the module. Its files have fixed places that belong to root.
func slotDaemon(t *testing.T) (module string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("opencryptoki's pkcsslotd is started by root only, and this is not root")
	}
	found, err := filepath.Glob("/usr/lib/*-linux-gnu*/libopencryptoki.so.0")
	require.NoError(t, err)
	daemon, err := exec.LookPath("/usr/sbin/pkcsslotd")
	if err != nil || len(found) == 0 {
		t.Fatal("the package opencryptoki is not installed: run \"make deps\"")
	}
	const home, marker = "/var/lib/opencryptoki/swtok", "/var/lib/opencryptoki/swtok/keyferry-test"
	if pid, running := slotDaemonPID(); running {
		t.Skipf("a pkcsslotd is running here (process %d), whose tokens are not this test's: stop it", pid)
	}
	if _, err := os.Stat(marker); errors.Is(err, os.ErrNotExist) {
		if _, err := os.Stat(filepath.Join(home, "NVTOK.DAT")); err == nil {
			t.Skipf("%s holds a token that is not this test's", home)
		}
	}
	require.NoError(t, os.MkdirAll(home, 0o770))
	require.NoError(t, os.WriteFile(marker, nil, 0o600))
	wipeSoftToken(t, home)
	t.Cleanup(func() {
		wipeSoftToken(t, home)
		require.NoError(t, os.Remove(marker))
	})
	out, err := exec.CommandContext(t.Context(), daemon).CombinedOutput() // it goes on in the background
	require.NoError(t, err, "%s", out)
	t.Cleanup(func() {
		pid, running := slotDaemonPID()
		require.True(t, running, "the daemon has ended by itself")
		require.NoError(t, syscall.Kill(pid, syscall.SIGTERM))
		require.Eventually(t, func() bool { _, running := slotDaemonPID(); return !running }, 30*time.Second, 10*time.Millisecond)
	})
	require.Eventually(t, func() bool { _, running := slotDaemonPID(); return running }, 30*time.Second, 10*time.Millisecond)
	return found[0]
}

// slotDaemonPID reads the daemon's PID file, and looks whether that process is
// one.
func slotDaemonPID() (pid int, running bool) {
	for _, file := range []string{"/run/pkcsslotd.pid", "/run/opencryptoki/pkcsslotd.pid"} {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
			continue
		}
		name, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
		if err == nil && strings.TrimSpace(string(name)) == "pkcsslotd" {
			return pid, true
		}
	}
	return 0, false
}

// wipeSoftToken takes the soft token back to where it never was initialised.
func wipeSoftToken(t *testing.T, home string) {
	t.Helper()
	for _, pattern := range []string{home + "/NVTOK.DAT", home + "/MK_*", home + "/TOK_OBJ/*", "/dev/shm/var.lib.opencryptoki.*"} {
		found, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, file := range found {
			require.NoError(t, os.Remove(file))
		}
	}
}

// initOpencryptoki sets the PINs, each twice, as that token wants it.
func initOpencryptoki(t *testing.T, module, label, pin string) {
	t.Helper()
	p := pkcs11.New(module)
	require.NotNil(t, p)
	defer p.Destroy()
	require.NoError(t, p.Initialize())
	defer func() { require.NoError(t, p.Finalize()) }()
	slots, err := p.GetSlotList(true)
	require.NoError(t, err)
	require.Len(t, slots, 1, "the soft token and no other")
	const factory, officer, first = "87654321", "76543210", "00000001"
	require.NoError(t, p.InitToken(slots[0], factory, label))
	s, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	require.NoError(t, err)
	require.NoError(t, p.Login(s, pkcs11.CKU_SO, factory))
	require.NoError(t, p.SetPIN(s, factory, officer))
	require.NoError(t, p.InitPIN(s, first))
	require.NoError(t, p.Logout(s))
	require.NoError(t, p.Login(s, pkcs11.CKU_USER, first))
	require.NoError(t, p.SetPIN(s, first, pin))
	require.NoError(t, p.Logout(s))
	require.NoError(t, p.CloseSession(s))
}
