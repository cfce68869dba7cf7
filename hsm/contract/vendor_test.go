package contract

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// Where the vendor's own tool marks keys as trusted, Init stops for it, as
// often as it is run, and goes on when the mark is there. The tool of these
// tests works below PKCS#11, as vendors' do: it edits the token's files.
func TestVendorMarksTheVault(t *testing.T) {
	soft := softhsm.New(t)
	cfg := hsm.InitConfig{Module: soft.Module, Label: soft.Label, UserPIN: soft.UserPIN, VendorTrust: true}
	mark := func(fresh bool) *hsm.MarkError {
		pins, err := hsm.Init(ctx, cfg)
		require.Zero(t, pins)
		require.ErrorIs(t, err, hsm.ErrMark)
		var stop *hsm.MarkError
		require.ErrorAs(t, err, &stop)
		require.NotEmpty(t, stop.Objects)
		for _, o := range stop.Objects {
			require.Equal(t, fresh, o.New)
			require.Len(t, o.ID, 16)
			require.ErrorContains(t, err, hex.EncodeToString(o.ID))
		}
		return stop
	}
	first := mark(true)
	again := mark(false)
	require.Len(t, again.Objects, len(first.Objects))
	for i := range first.Objects {
		require.Equal(t, first.Objects[i].ID, again.Objects[i].ID, "it waits, and no other was made")
	}
	// Nothing works before.
	open := soft.Config()
	open.Pins.VaultAES, open.Pins.MACKey = hsm.Fingerprint{1}, hsm.Fingerprint{1}
	_, err := hsm.Open(ctx, open)
	require.ErrorIs(t, err, hsm.ErrUnavailable)

	require.Equal(t, len(first.Objects), setTrusted(t, soft))
	pins, err := hsm.Init(ctx, cfg)
	require.NoError(t, err)
	require.NotZero(t, pins.VaultAES)
	soft.Pins = pins
	token := soft.Open(t)
	_, err = token.MAC(ctx, "domain")
	require.NoError(t, err)
	// And no run makes another.
	cfg.Pins = pins
	same, err := hsm.Init(ctx, cfg)
	require.NoError(t, token.Close())
	if err != nil {
		require.ErrorIs(t, err, hsm.ErrUnavailable) // the token was open in this process
		same, err = hsm.Init(ctx, cfg)
	}
	require.NoError(t, err)
	require.Equal(t, pins, same)
}

// A second key that waits is a thief's, or a mistake: nobody is asked to mark
// either.
func TestVendorMarksNoStranger(t *testing.T) {
	soft := softhsm.New(t)
	cfg := hsm.InitConfig{Module: soft.Module, Label: soft.Label, UserPIN: soft.UserPIN, VendorTrust: true}
	_, err := hsm.Init(ctx, cfg)
	require.ErrorIs(t, err, hsm.ErrMark)
	// The file of the first is put aside while another is made.
	files, err := filepath.Glob(filepath.Join(soft.Files, "????????-*.object"))
	require.NoError(t, err)
	for _, file := range files {
		require.NoError(t, os.Rename(file, file+".aside"))
	}
	_, err = hsm.Init(ctx, cfg)
	require.ErrorIs(t, err, hsm.ErrMark)
	for _, file := range files {
		require.NoError(t, os.Rename(file+".aside", file))
	}
	_, err = hsm.Init(ctx, cfg)
	require.ErrorIs(t, err, hsm.ErrUntrusted)
	require.ErrorContains(t, err, "destroy those that no run of init named to you")

	cfg.Accept = []hsm.Exception{hsm.TrustedUnavailable}
	_, err = hsm.Init(ctx, cfg)
	require.ErrorContains(t, err, "one or the other")
}

// setTrusted sets CKA_TRUSTED in the files of the token's keys, which are the
// vault and no others. An attribute there is its type and its kind in eight
// bytes each, and its value.
func setTrusted(t *testing.T, soft *softhsm.Token) (marked int) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(soft.Files, "*.object"))
	require.NoError(t, err)
	no := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, 0x86), 1)
	for _, file := range files {
		content, err := os.ReadFile(file)
		require.NoError(t, err)
		if i := bytes.Index(content, no); i >= 0 {
			content[i+len(no)] = 0xff
			require.NoError(t, os.WriteFile(file, content, 0o600))
			marked++
		}
	}
	return marked
}
