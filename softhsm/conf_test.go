package softhsm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/softhsm"
)

func TestWriteConf(t *testing.T) {
	dir := t.TempDir()
	conf, err := softhsm.WriteConf(dir)
	require.NoError(t, err)
	require.Equal(t, filepath.Join(dir, "softhsm2.conf"), conf)

	text, err := os.ReadFile(conf)
	require.NoError(t, err)
	require.Contains(t, string(text), "directories.tokendir = "+dir+"/tokens\n")
	requireMode(t, conf, 0o600)
	requireMode(t, filepath.Join(dir, "tokens"), 0o700)

	t.Run("leaves nothing else", func(t *testing.T) {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Len(t, entries, 2)
	})
	t.Run("again, after a move, leaves the tokens alone", func(t *testing.T) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "tokens", "a-token"), nil, 0o600))
		moved := filepath.Join(t.TempDir(), "moved")
		require.NoError(t, os.Rename(dir, moved))

		conf, err := softhsm.WriteConf(moved)
		require.NoError(t, err)
		text, err := os.ReadFile(conf)
		require.NoError(t, err)
		require.Contains(t, string(text), "directories.tokendir = "+moved+"/tokens\n")
		require.NotContains(t, string(text), dir+"/tokens\n")
		require.FileExists(t, filepath.Join(moved, "tokens", "a-token"))
	})
}

func TestWriteConfRefuses(t *testing.T) {
	base := t.TempDir()
	for name, dir := range map[string]string{
		"a comment sign": "a#b",
		"an equals sign": "a=b",
		"a line break":   "a\nb",
		"a missing one":  "missing",
		"a long path":    strings.Repeat("long/", 200),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(base, dir)
			if name != "a missing one" {
				require.NoError(t, os.MkdirAll(path, 0o700))
			}
			_, err := softhsm.WriteConf(path)
			require.Error(t, err)
			require.NoFileExists(t, filepath.Join(path, "softhsm2.conf"))
		})
	}
}

func requireMode(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, mode, info.Mode().Perm(), path)
}
