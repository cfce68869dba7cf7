package contract

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
)

// nss makes a database of NSS, as an operator does.
func nss(t *testing.T) *candidate {
	t.Helper()
	module := installed(t, "libnss3", "usr/lib/*-linux-gnu*/libsoftokn3.so", "usr/lib/*-linux-gnu*/nss/libsoftokn3.so", "usr/lib64/libsoftokn3.so")
	certutil := installed(t, "libnss3-tools", "usr/bin/certutil")
	dir := t.TempDir()
	pin := filepath.Join(dir, "pin")
	require.NoError(t, os.WriteFile(pin, []byte("a PIN of these tests, long enough"), 0o600))
	cmd := exec.Command(certutil, "-N", "-d", "sql:"+dir, "-f", pin)
	cmd.Env = append(os.Environ(), "LD_LIBRARY_PATH="+filepath.Dir(module))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return &candidate{
		Config: hsm.Config{
			Module: module, InitArgs: "configDir=sql:" + dir, Label: "NSS Certificate DB",
			PIN: func() ([]byte, error) { return os.ReadFile(pin) },
		},
		needs: []hsm.Exception{
			hsm.TrustedUnavailable, hsm.UnwrapTemplateIgnored, hsm.WrapTemplateIgnored, hsm.AllowedMechanismsIgnored,
			hsm.CopyableIgnored, hsm.DestroyableIgnored, hsm.WrapsUnextractable, hsm.ProvenanceUnreported,
		},
		findings: map[string]hsm.Verdict{
			hsm.FindKeyWrap: hsm.Proven, hsm.FindKeyWrapKWP: hsm.Proven, hsm.FindGCM: hsm.Proven, hsm.FindCMAC: hsm.Proven,
			hsm.FindSensitive: hsm.Proven, hsm.FindExtractable: hsm.Proven, hsm.FindUnwrapTemplate: hsm.Ignored,
			hsm.FindLengths: hsm.Proven, hsm.FindLengthsRefused: hsm.Proven, hsm.FindValueLen: hsm.Proven,
			hsm.FindCheckValue: hsm.Absent, hsm.FindSM4: hsm.Absent, hsm.FindSM2: hsm.Absent,
		},
		offers: []hsm.Algorithm{hsm.OAEPSHA1, hsm.OAEPSHA256},
		slow:   true,
		usable: map[hsm.MaterialSpec]bool{hsm.AES256: true},
	}
}

// installed finds a file of a Debian package, where it was installed or where
// "make deps" unpacked it.
func installed(t *testing.T, pkg string, patterns ...string) string {
	t.Helper()
	for _, root := range []string{"/", "../../build/deps/"} {
		for _, pattern := range patterns {
			found, err := filepath.Glob(root + pattern)
			require.NoError(t, err)
			if len(found) > 0 {
				path, err := filepath.Abs(found[0])
				require.NoError(t, err)
				return path
			}
		}
	}
	require.FailNowf(t, "missing", "the package %s is not installed: run \"make deps\"", pkg)
	return ""
}

func TestNSS(t *testing.T) {
	c := nss(t)
	if libraries := filepath.Dir(c.Module); strings.Contains(libraries, "/build/deps/") && os.Getenv("LD_LIBRARY_PATH") == "" {
		inChild(t, "LD_LIBRARY_PATH="+libraries) // it looks for others of its package
		return
	}
	run(t, c)
}
