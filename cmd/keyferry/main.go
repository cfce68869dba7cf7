// Command keyferry is for who holds a key: it makes, identifies and wraps key
// material and imports it into a KMS that speaks the Alibaba Cloud KMS API,
// Alibaba Cloud itself or keyferryd. It needs no HSM and no C library.
//
// Key material is read from a file or a pipe, never from an argument, where
// other users of the machine would see it, and is wiped after use. It leaves
// the process only wrapped.
//
// The exit status is 0, or 1 after a failure, or 2 if the command line is at
// fault, or 10 plus the number of items of a manifest that failed, 110 at most. A failure is told on standard error: what failed, and what to do.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], &streams{in: os.Stdin, out: os.Stdout, err: os.Stderr}))
}

// streams are the standard ones, and how to write to them.
type streams struct {
	in   *os.File
	out  *os.File
	err  io.Writer
	json bool
}

const (
	exitFailure = 1
	exitUsage   = 2
	// With --manifest: this, and as many more as items failed, at most.
	exitItems    = 10
	maxExitItems = 100
)

func run(ctx context.Context, args []string, std *streams) int {
	root := newRoot(std)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(std.err, "keyferry: %s\n", printable(err.Error()))
	var hinted *hintedError
	if errors.As(err, &hinted) {
		fmt.Fprintf(std.err, "hint: %s\n", printable(hinted.hint))
	}
	var items *itemsFailed
	if errors.As(err, &items) {
		return items.status()
	}
	var failed *failure
	if errors.As(err, &failed) {
		return exitFailure
	}
	if hinted == nil {
		fmt.Fprintf(std.err, "hint: see %s --help\n", cmd.CommandPath())
	}
	return exitUsage
}

func newRoot(std *streams) *cobra.Command {
	root := &cobra.Command{
		Use:   "keyferry",
		Short: "Bring your own key to a KMS",
		Long: `Make, identify and wrap key material, and import it into a KMS.

Key material comes from a file or a pipe, never from an argument:

  keyferry generate --out key.bin
  keyferry import --in key.bin --credentials credentials.json --algorithm RSAES_OAEP_SHA_1`,
		Args:          noArguments,
		RunE:          func(*cobra.Command, []string) error { return errors.New("a command is missing") },
		SilenceErrors: true, // run tells them
		SilenceUsage:  true,
	}
	root.PersistentFlags().BoolVar(&std.json, "json", false, "write one JSON object instead of text")
	root.SetIn(std.in)
	root.SetOut(std.out)
	root.SetErr(std.err)
	root.AddCommand(
		newGenerate(std), newKCV(std), newMaterialID(std), newWrap(std), newImport(std), newStatus(std),
		newReceipt(std),
	)
	return root
}

// noArguments refuses arguments without repeating them: one of them may be a
// key that somebody typed.
func noArguments(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case !cmd.HasParent():
		return withHint(errors.New("no such command"), "see keyferry --help")
	default:
		return withHint(fmt.Errorf("%s takes no arguments", cmd.CommandPath()),
			"key material is read from a file (--in FILE) or a pipe; see %s --help", cmd.CommandPath())
	}
}

// failing makes a function the action of a command. What it returns is a
// failure unless it is a usageError; what cobra finds wrong before it runs is
// the command line's fault.
func failing(action func(ctx context.Context) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		err := action(cmd.Context())
		var usage *usageError
		if err == nil || errors.As(err, &usage) {
			return err
		}
		return &failure{err}
	}
}
