package main

import (
	"bufio"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// However the demo ends, its server and its directory do not outlive it.
func TestDemoLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(t *testing.T, demo *os.Process, output *os.File){
		"closed output": func(t *testing.T, _ *os.Process, output *os.File) { require.NoError(t, output.Close()) },
		"terminated": func(t *testing.T, demo *os.Process, _ *os.File) {
			require.NoError(t, demo.Signal(syscall.SIGTERM))
			require.NoError(t, demo.Signal(syscall.SIGTERM), "and without patience")
		},
		"hung up": func(t *testing.T, demo *os.Process, _ *os.File) { require.NoError(t, demo.Signal(syscall.SIGHUP)) },
	} {
		t.Run(name, func(t *testing.T) {
			if name == "hung up" && signal.Ignored(syscall.SIGHUP) {
				t.Skip("SIGHUP is ignored here, as under nohup")
			}
			dir := t.TempDir()
			var stderr strings.Builder
			cmd := keyferryd(t, "demo")
			cmd.Env = append(os.Environ(), "TMPDIR="+dir)
			cmd.Stderr = &stderr
			output, into, err := os.Pipe()
			require.NoError(t, err)
			cmd.Stdout = into
			require.NoError(t, cmd.Start())
			require.NoError(t, into.Close())
			lines := bufio.NewScanner(output)
			address := ""
			for address == "" && lines.Scan() {
				_, address, _ = strings.Cut(lines.Text(), "listening on http://")
			}
			require.NotEmpty(t, address)
			end(t, cmd.Process, output)
			for lines.Scan() {
			}
			require.Error(t, cmd.Wait())
			require.Equal(t, 1, cmd.ProcessState.ExitCode(), "it ended in good order: %s", &stderr)
			require.NotContains(t, stderr.String(), "did not end well")
			left, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, left)
			_, err = net.Dial("tcp", address)
			require.ErrorIs(t, err, syscall.ECONNREFUSED, "the server is gone")
		})
	}
}
