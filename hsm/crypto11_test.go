package hsm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/ThalesGroup/crypto11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/softhsm"
)

// errand is what crypto11 is asked to do, in a process of its own: it
// initialises the module itself.
type errand struct {
	Module, Label, PINFile string
	Head                   receipt.Head
	Verify                 []byte // text, and
	Signature              []byte // of it, by us
}

type errandDone struct {
	SPKI   []byte
	Signed []byte // Head, by crypto11
	Agrees bool   // with Signature
}

const errandEnv = "KEYFERRY_TEST_CRYPTO11"

// TestCrypto11Errand is the other process.
func TestCrypto11Errand(t *testing.T) {
	path := os.Getenv(errandEnv)
	if path == "" {
		return // only TestCrypto11Agrees has an errand
	}
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	var e errand
	require.NoError(t, json.Unmarshal(text, &e))
	pin, err := os.ReadFile(e.PINFile)
	require.NoError(t, err)
	ctx, err := crypto11.Configure(&crypto11.Config{Path: e.Module, TokenLabel: e.Label, Pin: string(pin), MaxSessions: 2})
	require.NoError(t, err)
	signer, err := ctx.FindKeyPair(nil, []byte("keyferry receipt P-256 v1"))
	require.NoError(t, err)
	require.NotNil(t, signer)
	public, ok := signer.Public().(*ecdsa.PublicKey)
	require.True(t, ok)
	var done errandDone
	done.SPKI, err = x509.MarshalPKIXPublicKey(public)
	require.NoError(t, err)
	key, err := receipt.ParsePublicKey(done.SPKI)
	require.NoError(t, err)
	done.Signed, err = receipt.SignHead(e.Head, key, func(digest [32]byte) ([]byte, error) {
		return signer.Sign(nil, digest[:], crypto.SHA256)
	})
	require.NoError(t, err)
	digest := sha256.Sum256(e.Verify)
	done.Agrees = ecdsa.VerifyASN1(public, digest[:], e.Signature)
	require.NoError(t, ctx.Close())
	text, err = json.Marshal(done)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path+".done", text, 0o600))
}

// crypto11, a client of PKCS#11 that shares no code with this one, finds the
// receipt key by its label, verifies what it signed, and signs what our
// verifier takes.
func TestCrypto11Agrees(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	token := soft.Open(t)
	e := errand{
		Module: soft.Module, Label: soft.Label, PINFile: soft.UserPINFile, Verify: []byte("of the token"),
		Head: receipt.Head{Log: receipt.LogID{1}, Size: 7, Root: receipt.Hash{2}, Time: time.Unix(1795590000, 0).UTC(), TokenSerial: soft.Pins.Serial},
	}
	var err error
	e.Signature, err = token.SignReceipt(t.Context(), sha256.Sum256(e.Verify))
	require.NoError(t, err)
	path := t.TempDir() + "/errand"
	text, err := json.Marshal(e)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, text, 0o600))
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(exe, "-test.run=^TestCrypto11Errand$")
	cmd.Env = append(os.Environ(), errandEnv+"="+path, softhsm.ConfEnv+"="+soft.Conf)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)

	text, err = os.ReadFile(path + ".done")
	require.NoError(t, err, "%s", out)
	var done errandDone
	require.NoError(t, json.Unmarshal(text, &done))
	require.True(t, done.Agrees)
	ours, err := token.ReceiptKey(t.Context())
	require.NoError(t, err)
	require.True(t, bytes.Equal(ours, done.SPKI), "it finds the same key")
	require.Equal(t, soft.Pins.ReceiptKey.String(), fmt.Sprintf("%x", sha256.Sum256(done.SPKI)))
	pinned, err := receipt.ParsePublicKey(ours)
	require.NoError(t, err)
	head, err := receipt.OpenHead(done.Signed, pinned)
	require.NoError(t, err)
	require.Equal(t, e.Head, head)
}
