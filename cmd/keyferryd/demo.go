package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/byok"
)

func demoCommand() *cobra.Command {
	var module string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Walk through the life of a customer's key, against a server started for it",
		Long: `Starts "keyferryd dev" in a temporary directory and walks through the life of a
key aloud, as the customer who owns it; on a token with SM2 and SM4 then also
through that of an SM4 key. Every step is checked: the exit status is 0 only if
each did what it says.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demo(cmd.Context(), module, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&module, "module", "", "SoftHSM2's PKCS#11 library (default: where it is usually installed)")
	return cmd
}

func demo(ctx context.Context, module string, out io.Writer) (err error) {
	// No signal that can be caught ends this process before the server and the
	// directory are gone, not the second one, nor that of a closed output: that
	// is an error of the write, and ends the walk.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGPIPE, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(caught)
	if !signal.Ignored(syscall.SIGHUP) {
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, syscall.SIGHUP)
		defer stop()
	}
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	out = &watchedWriter{out, fail}

	dir, err := os.MkdirTemp("", "keyferry-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	w := &walk{out: out, keySpec: byok.AES256}
	w.title("Start a server: keyferryd dev, on a SoftHSM2 token made for it")
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	data := filepath.Join(dir, "data")
	server, err := startServer(ctx, exe, "dev", "--data", data, "--module", module)
	if err != nil {
		return fmt.Errorf("the server did not start: %w", err)
	}
	defer func() { err = errors.Join(err, server.stop()) }()
	w.say("%s", server.ready)
	var token tokenFile
	if err := readAnnounced(filepath.Join(data, devTokenFile), &token); err != nil {
		return err
	}
	w.say("Token     %s, by %s", token.TokenLabel, token.Module)
	cfg, err := loadConfig(filepath.Join(data, devConfigFile))
	if err != nil {
		return err
	}
	hasSM := !cfg.Token.Pins.VaultSM4.IsZero()
	if hasSM {
		w.say("          with SM2 and SM4")
	} else {
		w.say("          without SM2 and SM4; \"make softhsm\" builds a SoftHSM2 with them")
	}

	if w.kms, err = newClient(filepath.Join(data, devCredentials)); err != nil {
		return err
	}
	err = w.life(ctx)
	algorithm := w.algorithm
	if err == nil && hasSM {
		err = w.lifeOfSM4(ctx)
	}
	if unread := (*outputError)(nil); errors.As(context.Cause(ctx), &unread) {
		return unread
	}
	if err != nil {
		return fmt.Errorf("step %d did not do what it says: %w", w.step, err)
	}
	if module != "" {
		module = " --module " + module
	}
	_, err = fmt.Fprintf(out, farewell, module, algorithm)
	return err
}

// watchedWriter tells of the first write that fails.
type watchedWriter struct {
	io.Writer
	failed context.CancelCauseFunc
}

func (w *watchedWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	if err != nil {
		w.failed(&outputError{err})
	}
	return n, err
}

// outputError: nobody reads the output any more.
type outputError struct{ err error }

func (e *outputError) Error() string { return "the output was closed: " + e.err.Error() }
func (e *outputError) Unwrap() error { return e.err }

const farewell = `
Every step did what it says. The server of this demo is stopped and its token is
gone. To keep one running, and to use it from another terminal:

  bin/keyferryd dev --data ./keyferry-data --listen 127.0.0.1:8080%s
  bin/keyferry generate --out key.bin
  bin/keyferry import --in key.bin --algorithm %s --credentials ./keyferry-data/credentials.json

Alibaba Cloud's SDKs, command line and Terraform reach it at that address, with
the access key in credentials.json.
`
