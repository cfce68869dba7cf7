package pgtest

import "syscall"

// endWithParent has the kernel end a server whose test was killed.
func endWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGQUIT }
