package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
)

func demoCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Walk through the life of a customer's key, against a server started for it",
		Long: `Starts "keyferryd dev" in a temporary directory and walks through the life of a
key aloud, as the customer who owns it. Every step is checked: the exit status
is 0 only if each did what it says.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demo(cmd.Context(), cmd.OutOrStdout())
		},
	}
}

func demo(ctx context.Context, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "keyferry-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	w := &walk{out: out}
	w.title("Start a server: keyferryd dev, on a SoftHSM2 token made for it")
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	server, err := startServer(ctx, exe, "dev", "--data", filepath.Join(dir, "data"))
	if err != nil {
		return fmt.Errorf("the server did not start: %w", err)
	}
	defer func() { err = errors.Join(err, server.stop()) }()
	w.say("%s", server.ready)
	var token tokenFile
	if err := readAnnounced(filepath.Join(dir, "data", devTokenFile), &token); err != nil {
		return err
	}
	w.say("Token     %s, by %s", token.TokenLabel, token.Module)

	if w.kms, err = newClient(filepath.Join(dir, "data", devCredentials)); err != nil {
		return err
	}
	if err := w.life(ctx); err != nil {
		return fmt.Errorf("step %d did not do what it says: %w", w.step, err)
	}
	_, err = fmt.Fprintf(out, farewell, w.algorithm)
	return err
}

const farewell = `
Every step did what it says. The server of this demo is stopped and its token is
gone. To keep one running, and to use it from another terminal:

  bin/keyferryd dev --data ./keyferry-data --listen 127.0.0.1:8080
  bin/keyferry generate --out key.bin
  bin/keyferry import --in key.bin --algorithm %s --credentials ./keyferry-data/credentials.json

Alibaba Cloud's SDKs, command line and Terraform reach it at that address, with
the access key in credentials.json.
`
