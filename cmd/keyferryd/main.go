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
// and what to do, and exits with status 1, or 2 if the command line is at fault;
// doctor exits with 2 where it found a problem, too, and init with 3 where a key
// waits to be marked by the vendor's tool.
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
	statusUsage   = 2 // the command line is at fault
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

		SuggestionsMinimumDistance: 1,
	}
	root.AddCommand(initCommand(), migrateCommand(), serveCommand(), devCommand(), demoCommand(), doctorCommand(), benchCommand(), healthCommand(), receiptKeyCommand())
	ran := false // until then all that fails is the command line
	for _, cmd := range root.Commands() {
		run := cmd.RunE
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			ran = true
			return run(cmd, args)
		}
	}
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	said := "keyferryd: " + oneLine(err.Error())
	if !ran {
		_, _ = fmt.Fprintf(stderr, "%s; see %s --help\n", said, cmd.CommandPath())
		return statusUsage
	}
	_, _ = fmt.Fprintln(stderr, said)
	var own *statusError
	if errors.As(err, &own) {
		return own.status
	}
	return 1
}

// oneLine has the lines of a text, where several things are wrong, in one.
func oneLine(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || out.Len() == 0:
		case strings.HasSuffix(out.String(), "?"): // "Did you mean this?"
			out.WriteString(" ")
		default:
			out.WriteString("; ")
		}
		out.WriteString(line)
	}
	return out.String()
}
