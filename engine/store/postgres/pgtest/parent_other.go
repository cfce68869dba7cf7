//go:build !linux

package pgtest

import "syscall"

// endWithParent needs Linux.
func endWithParent(*syscall.SysProcAttr) {}
