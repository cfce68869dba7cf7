package softhsm_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

func TestNew(t *testing.T) {
	token := softhsm.New(t)
	other := softhsm.New(t)

	require.NotEqual(t, token.Label, other.Label)
	require.NotEqual(t, token.Serial, other.Serial)
	require.Equal(t, token.Conf, other.Conf, "SoftHSM2 has one configuration in a process")
	require.Equal(t, token.Conf, os.Getenv(softhsm.ConfEnv))
	require.Equal(t, token.Serial, token.Config().Pins.Serial)
	require.FileExists(t, filepath.Join(token.Files, "token.object"))

	pins := map[string]bool{}
	for file, pin := range map[string]func() ([]byte, error){
		token.SOPINFile: token.SOPIN, token.UserPINFile: token.UserPIN,
		other.SOPINFile: other.SOPIN, other.UserPINFile: other.UserPIN,
	} {
		text, err := pin()
		require.NoError(t, err)
		require.GreaterOrEqual(t, len(text), hsm.MinPINLen)
		stored, err := os.ReadFile(file)
		require.NoError(t, err)
		require.True(t, bytes.Equal(stored, text), "the file holds the PIN") // prints neither
		requireMode(t, file, 0o600)
		pins[string(text)] = true
	}
	require.Len(t, pins, 4, "no two PINs are alike")
}

func TestNewPINIsACopy(t *testing.T) {
	token := softhsm.New(t)
	first, err := token.UserPIN()
	require.NoError(t, err)
	clear(first) // as hsm does when it is done with it
	second, err := token.UserPIN()
	require.NoError(t, err)
	require.NotZero(t, second[0])
}

func TestTokenPrintsNoPIN(t *testing.T) {
	token := softhsm.New(t)
	pin, err := token.UserPIN()
	require.NoError(t, err)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		require.NotContains(t, fmt.Sprintf(verb, *token), string(pin), verb)
	}
}

func TestNewCleansUp(t *testing.T) {
	var first, second *softhsm.Token
	t.Run("two tokens at once", func(t *testing.T) {
		first = softhsm.New(t)
		t.Run("one ends", func(t *testing.T) { second = softhsm.New(t) })
		require.NoDirExists(t, second.Dir)
		require.DirExists(t, first.Files, "the other one is still in use")
	})
	require.NoDirExists(t, first.Dir)
	require.NoDirExists(t, filepath.Dir(first.Conf))

	// A directory that came back is usable, whatever the module remembers.
	again := softhsm.New(t, softhsm.WithKeys())
	require.Equal(t, first.Conf, again.Conf)
	again.Open(t)
}

func TestNewInParallel(t *testing.T) {
	for range 4 {
		t.Run("token", func(t *testing.T) {
			t.Parallel()
			token := softhsm.New(t, softhsm.WithKeys())
			require.NotEmpty(t, token.Pins.VaultAES)
			require.Equal(t, token.Serial, token.Pins.Serial)
			require.NoError(t, token.Open(t).Offers(hsm.RSA2048, hsm.OAEPSHA1))
		})
	}
}
