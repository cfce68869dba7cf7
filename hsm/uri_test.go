package hsm_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
)

func TestParseURI(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pin")
	require.NoError(t, os.WriteFile(file, []byte("not-a-real-pin\r\n"), 0o600))
	cfg, err := hsm.ParseURI("pkcs11:token=The%20Vault;serial=0a1b?module-path=/usr/lib/x.so&pin-source=file:" + file)
	require.NoError(t, err)
	require.Equal(t, "The Vault", cfg.Label)
	require.Equal(t, "0a1b", cfg.Pins.Serial)
	require.Equal(t, "/usr/lib/x.so", cfg.Module)
	pin, err := cfg.PIN()
	require.NoError(t, err)
	require.Equal(t, "not-a-real-pin", string(pin))

	for name, uri := range map[string]string{
		"another scheme":     "https://example.com",
		"PIN in the URI":     "pkcs11:token=x?pin-value=1234",
		"unknown attribute":  "pkcs11:slot-id=3",
		"query in the path":  "pkcs11:module-path=/x",
		"twice":              "pkcs11:token=a;token=b",
		"badly escaped":      "pkcs11:token=%zz",
		"empty attribute":    "pkcs11:token=a;;serial=b",
		"path in the query":  "pkcs11:?token=x",
		"no name of a value": "pkcs11:=x",
	} {
		_, err := hsm.ParseURI(uri)
		require.Error(t, err, name)
		require.NotContains(t, err.Error(), "1234", name)
	}
}
