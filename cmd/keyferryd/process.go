package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// serverProcess is a keyferryd that another one started.
type serverProcess struct {
	ctx   context.Context //nolint:containedctx // it ends the process, too
	cmd   *exec.Cmd
	ready string // its line on standard output
	log   *bytes.Buffer
}

// startServer starts exe and waits until it says that it is ready. If it ends
// instead, the error is what it said last.
func startServer(ctx context.Context, exe string, args ...string) (*serverProcess, error) {
	p := &serverProcess{ctx: ctx, cmd: exec.CommandContext(ctx, exe, args...), log: &bytes.Buffer{}}
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = shutdownTimeout + 10*time.Second
	p.cmd.Stderr = p.log
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if errors.Is(err, io.EOF) {
		err = p.cmd.Wait()
		said := strings.Split(strings.TrimSpace(p.log.String()), "\n")
		return nil, fmt.Errorf("%s (%w)", strings.TrimPrefix(said[len(said)-1], "keyferryd: "), err)
	}
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	p.ready = strings.TrimSuffix(line, "\n")
	return p, nil
}

// stop ends the server in good order.
func (p *serverProcess) stop() error {
	if p.ctx.Err() == nil { // else it has the signal, and a second one would end it at once
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
	}
	if err := p.cmd.Wait(); err != nil && !errors.Is(err, p.ctx.Err()) {
		return fmt.Errorf("the server did not end well: %w", err)
	}
	return nil
}
