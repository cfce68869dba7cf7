// Command keyferryd serves the Alibaba Cloud KMS API on a PKCS#11 token, so
// that customers can bring keys of their own.
//
//	keyferryd init         make the keys a token needs, and pin them in the configuration
//	keyferryd migrate      bring the database to the schema of this program
//	keyferryd serve        serve as the configuration says
//	keyferryd dev          serve on a SoftHSM2 token of its own, with nothing set up
//	keyferryd demo         walk through the life of a customer's key
//	keyferryd doctor       say what the token can do, and what to change
//	keyferryd bench        measure the token, and what serving costs beyond it
//	keyferryd health       ask a running server whether it is well
//	keyferryd receipt-key  print the public key that receipts are verified with
//
// A command that fails writes one line to standard error, saying what is wrong
// and what to do, and exits with status 1; doctor exits with 2 where it found a
// problem, and init with 3 where a key waits to be marked by the vendor's tool.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// The exit statuses of commands that have failed in ways of their own.
const (
	statusProblem = 2 // doctor found a problem
	statusMark    = 3 // init stopped for a key to be marked
)

// statusError is an error with an exit status of its own.
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

func main() {
	// The first signal ends the command in good order, a second one at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(execute(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// execute runs one command and returns its exit status.
func execute(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use:           "keyferryd",
		Short:         "Let customers bring their own keys into a PKCS#11 token",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(initCommand(), migrateCommand(), serveCommand(), devCommand(), demoCommand(), doctorCommand(), benchCommand(), healthCommand(), receiptKeyCommand())
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		// One line, also where several things are wrong.
		_, _ = fmt.Fprintln(stderr, "keyferryd: "+strings.ReplaceAll(err.Error(), "\n", "; "))
		var own *statusError
		if errors.As(err, &own) {
			return own.status
		}
		return 1
	}
	return 0
}
