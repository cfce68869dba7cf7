//go:build unix

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// Whoever writes the results decides into which keys material goes: another user
// cannot, by making the file first in a directory that is everybody's.
func TestResultsOfSomeoneElse(t *testing.T) {
	dir := t.TempDir()
	open := func(name string) error {
		j, err := openJournal(name, os.O_CREATE, target{endpoint: "https://kms.example/", accessKeyID: "a"})
		if err == nil {
			require.NoError(t, j.close())
		}
		return err
	}
	name := filepath.Join(dir, "results")
	first, err := openJournal(name, os.O_CREATE, target{endpoint: "https://kms.example/", accessKeyID: "a"})
	require.NoError(t, err)
	require.ErrorContains(t, open(name), "in use by another import")
	require.NoError(t, first.close())
	require.NoError(t, open(name))
	require.NoError(t, os.Chmod(name, 0o666))
	require.ErrorContains(t, open(name), "everybody may write")
	if os.Geteuid() == 0 {
		require.NoError(t, os.Chmod(name, 0o600))
		require.NoError(t, os.Chown(name, 65534, 65534))
		require.ErrorContains(t, open(name), "another user's")
	}

	fifo := filepath.Join(dir, "fifo")
	require.NoError(t, syscall.Mkfifo(fifo, 0o600))
	require.ErrorContains(t, open(fifo), "no regular file")
	require.ErrorContains(t, open(os.DevNull), "no regular file")
}

// A link that leads nowhere, which another user left where the results are to
// be, has nothing made where it leads.
func TestResultsAreNotMadeThroughALink(t *testing.T) {
	s := newSite(t, nil)
	s.write(t, "key.bin", bytes.Repeat([]byte{1, 200}, 16))
	manifest := s.write(t, "keys.jsonl", []byte(`{"name":"new","material_file":"key.bin"}`))
	elsewhere := filepath.Join(s.dir, "elsewhere")
	require.NoError(t, os.Symlink(elsewhere, manifest+".results"))
	status, _, stderr := s.keyferry(t, "import", "--manifest", manifest)
	require.Equal(t, exitFailure, status)
	require.Contains(t, stderr, "file exists")
	require.NoFileExists(t, elsewhere)
}
