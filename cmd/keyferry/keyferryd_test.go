package main

import (
	"bufio"
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
	program, err := buildKeyferryd()
	ts.Check(err)
	data := ts.MkAbs("data")
	cmd := exec.Command(program, "dev", "--data", data, "--listen", "127.0.0.1:0")
	log, err := os.Create(ts.MkAbs("keyferryd.log"))
	ts.Check(err)
	cmd.Stderr = log
	stdout, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	ts.Defer(func() {
		ts.Check(cmd.Process.Signal(syscall.SIGTERM))
		ts.Check(cmd.Wait())
		ts.Check(log.Close())
	})
	ready := bufio.NewScanner(stdout)
	for ready.Scan() && !strings.HasPrefix(ready.Text(), "keyferryd listening on ") {
	}
	ts.Check(ready.Err())
	ts.Setenv(credentialsVariable, filepath.Join(data, "credentials.json"))
	ts.Setenv("KEYFERRYD", program)
}
