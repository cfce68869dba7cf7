//go:build !unix

package main

import (
	"io/fs"
	"os"
)

// lockFile locks nothing where there is no flock.
func lockFile(*os.File) error { return nil }

// isOurs is left to the permissions of the directory.
func isOurs(fs.FileInfo) bool { return true }
