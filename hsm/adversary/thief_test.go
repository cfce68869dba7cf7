package adversary

import (
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// TestThief attacks the module that softhsm.FindModule finds.
func TestThief(t *testing.T) {
	r := &report{shown: map[string]bool{}, unlucky: map[string]bool{}}
	s := newScene(t, r, hsm.OAEPSHA1)
	inGroup(t, s, "read values", readValues)
	inGroup(t, s, "use keys", useKeys)
	inGroup(t, s, "wrap keys", wrapKeys)
	inGroup(t, s, "unwrap blobs", unwrapBlobs)
	inGroup(t, s, "set attributes", setAttributes)
	inGroup(t, s, "copy objects", copyObjects)
	inGroup(t, s, "forge trust and origin", forgeTrust)
	inGroup(t, s, "conjure keys", conjure)
	inGroup(t, s, "ask oracles", oracles)
	inGroup(t, s, "destroy keys", destroyKeys)
	s.works(t)
	inGroup(t, s, "copy and edit files", files)
	inGroup(t, s, "race", races) // litters the token

	for _, other := range []struct {
		name     string
		alg      hsm.Algorithm
		attempts func(*group)
	}{
		{"PKCS#1 v1.5", hsm.PKCS1v15, pkcs1v15},
		{"plant look-alikes", hsm.OAEPSHA1, plant},
		{"have a second token", hsm.OAEPSHA1, secondToken},
		{"without a PIN", hsm.OAEPSHA1, outsider},
		{"with the SO PIN, too", hsm.OAEPSHA1, officer},
	} {
		inGroup(t, newScene(t, r, other.alg), other.name, other.attempts)
	}

	kind := "stock SoftHSM2"
	if r.ours {
		kind = "our build of SoftHSM2"
	}
	t.Logf("%s (%s)", s.soft.Module, kind)
	for _, line := range r.lines {
		t.Log(line)
	}
	t.Logf("%-24s %5d attempts, %5d refused", "in all", r.attempts, r.refused)

	// Each hole that is listed is there, and so the list stays true.
	for _, h := range softhsm.KnownHoles {
		switch {
		case h.Shown != "hsm/adversary":
		case r.closes(h.ID):
			require.False(t, r.shown[h.ID], "%s is closed, and was gone through", h.ID)
		default:
			require.True(t, r.shown[h.ID] || r.unlucky[h.ID], "%s is listed, and nothing goes through it", h.ID)
		}
	}
}

// moduleEnv marks a run of TestThief on a module that is not the default.
const moduleEnv = "KEYFERRY_TEST_MODULE_RUN"

// TestThiefOnEveryModule runs TestThief on the other modules that are here: a
// process holds one, and its holes may crash it.
func TestThiefOnEveryModule(t *testing.T) {
	if os.Getenv(moduleEnv) != "" {
		t.Skip("this run is for one module")
	}
	modules, err := softhsm.Modules()
	require.NoError(t, err)
	t.Logf("%s: see TestThief", modules[0])
	for _, module := range modules[1:] {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestThief$", "-test.v")
		cmd.Env = append(os.Environ(), softhsm.ModuleEnv+"="+module, moduleEnv+"=1")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s:\n%s", module, out)
		t.Logf("%s:\n%s", module, out)
	}
}
