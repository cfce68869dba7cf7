package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"
)

// buildDir is removed after the tests.
var buildDir string

// buildKeyferryd builds the server once, if a test needs it. It is a program of its own here because it needs C and this one must
// not.
var buildKeyferryd = sync.OnceValues(func() (string, error) {
	program := filepath.Join(buildDir, "keyferryd")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", program, "../keyferryd")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	build.Stderr = os.Stderr
	return program, build.Run()
})

// keyferryd starts a real server, which makes a SoftHSM2 token of its own and
// writes the same credentials.json as the fake.
func keyferryd(ts *testscript.TestScript, _ bool, _ []string) {
	data := ts.MkAbs("data")
	d, err := startDaemon(data, "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { ts.Check(d.stop()) })
	ts.Setenv(credentialsVariable, filepath.Join(data, "credentials.json"))
	ts.Setenv("KEYFERRYD", d.cmd.Path)
}

// daemon is a keyferryd dev.
type daemon struct {
	cmd *exec.Cmd
	log *os.File
}

// startDaemon starts a server on a directory and waits until it listens.
func startDaemon(data, listen string) (*daemon, error) {
	program, err := buildKeyferryd()
	if err != nil {
		return nil, err
	}
	d := &daemon{cmd: exec.Command(program, "dev", "--data", data, "--listen", listen)}
	if d.log, err = os.OpenFile(data+".log", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return nil, err
	}
	d.cmd.Stderr = d.log
	stdout, err := d.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	ready := bufio.NewScanner(stdout)
	for ready.Scan() && !strings.HasPrefix(ready.Text(), "keyferryd listening on ") {
	}
	return d, ready.Err()
}

// stop ends the server in good order.
func (d *daemon) stop() error {
	return errors.Join(d.cmd.Process.Signal(syscall.SIGTERM), d.cmd.Wait(), d.log.Close())
}
