//go:build unix

package main

import (
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
		j, err := openJournal(name, os.O_CREATE, "https://kms.example/", "a")
		if err == nil {
			require.NoError(t, j.close())
		}
		return err
	}
	name := filepath.Join(dir, "results")
	first, err := openJournal(name, os.O_CREATE, "https://kms.example/", "a")
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
