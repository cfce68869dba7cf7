package contract

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// TestSoftHSM runs the contract on every SoftHSM2 of this machine: the
// distribution's, and ours where "make softhsm" has built it.
func TestSoftHSM(t *testing.T) {
	if os.Getenv(softhsm.ModuleEnv) != "" {
		run(t, softHSM(t))
		return
	}
	modules, err := softhsm.Modules()
	require.NoError(t, err)
	run(t, softHSM(t))
	for _, module := range modules[1:] {
		t.Run(module, func(t *testing.T) { inChild(t, softhsm.ModuleEnv+"="+module) })
	}
}

func softHSM(t *testing.T) *candidate {
	t.Helper()
	soft := softhsm.New(t)
	c := &candidate{
		Config: soft.Config(), soPIN: soft.SOPIN,
		findings: map[string]hsm.Verdict{
			hsm.FindKeyWrap: hsm.Proven, hsm.FindGCM: hsm.Proven, hsm.FindCMAC: hsm.Proven, hsm.FindBuiltCMAC: hsm.Proven,
			hsm.FindSensitive: hsm.Proven, hsm.FindExtractable: hsm.Proven, hsm.FindUnextractable: hsm.Proven,
			hsm.FindUnwrapTemplate: hsm.Proven, hsm.FindTemplateMerged: hsm.Absent, hsm.FindWrapTemplate: hsm.Proven,
			hsm.FindWrapTrusted: hsm.Proven, hsm.FindTrusted: hsm.Proven, hsm.FindAllowed: hsm.Proven, hsm.FindCopyable: hsm.Proven,
			hsm.FindModifiable: hsm.Proven, hsm.FindDestroyable: hsm.Proven, hsm.FindCopiesCopyable: hsm.Proven,
			hsm.FindLengths: hsm.Proven, hsm.FindImplicit: hsm.Unknown,
		},
		offers: []hsm.Algorithm{hsm.OAEPSHA1},
		usable: map[hsm.MaterialSpec]bool{hsm.AES256: true},
	}
	x, err := hsm.Examine(ctx, c.Config, false)
	require.NoError(t, err)
	// What tells stock SoftHSM2 from ours goes together: it is either of them.
	stock := map[string]hsm.Verdict{
		hsm.FindSM4: hsm.Absent, hsm.FindSM2: hsm.Absent, hsm.FindValueLen: hsm.Wrong, hsm.FindCheckValue: hsm.Absent,
		hsm.FindLengthsRefused: hsm.Ignored, hsm.FindDigestKey: hsm.Ignored, hsm.FindByValue: hsm.Ignored,
	}
	ours := x.Capabilities.Usable(hsm.SM4) == nil
	for id, verdict := range stock {
		if ours {
			verdict = hsm.Proven
		}
		c.findings[id] = verdict
	}
	if ours {
		c.offers = append(c.offers, hsm.OAEPSHA256)
		c.usable[hsm.SM4] = true
	}
	return c
}

// inChild runs the test in a process of its own, with other modules loaded or
// other libraries found.
func inChild(t *testing.T, env string) {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	name := t.Name()
	for i := range name { // of the test, without its subtests
		if name[i] == '/' {
			name = name[:i]
			break
		}
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run", "^"+name+"$", "-test.v")
	cmd.Env = append(os.Environ(), env)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	if strings.Contains(string(out), "--- SKIP: "+name) {
		t.Skipf("%s", out)
	}
	require.Contains(t, string(out), "--- PASS: "+name)
}
