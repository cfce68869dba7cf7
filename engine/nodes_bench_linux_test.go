package engine_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/enginebench"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// BenchmarkNodes compares one process on one core with two on two, which share
// a PostgreSQL, with all its forced writes, and a SoftHSM2. The database has the
// same cores as they have, so that the one process has no help that the two do
// not have. They take turns in short slices.
//
// The processor time is that of the processes, and the database's beside it. The
// rates are of a machine that does nothing else if busy is nearly 1; where it is
// not, ratio-when-busy is what the ratio would be if they had all of their cores.
func BenchmarkNodes(b *testing.B) {
	var cores unix.CPUSet
	require.NoError(b, unix.SchedGetaffinity(0, &cores))
	var usable []int
	for i := range 1024 {
		if cores.IsSet(i) {
			usable = append(usable, i)
		}
	}
	if len(usable) < 2 {
		b.Skip("two cores are needed")
	}
	table := &enginebench.Table{Title: "Import by one process on one core, and by two on two, on one PostgreSQL"}
	b.Cleanup(func() { require.NoError(b, table.Write(os.Stdout)) })
	for _, callers := range []int{8, 32} {
		b.Run(strconv.Itoa(callers), func(b *testing.B) {
			row := benchmarkNodes(b, usable[:2], callers)
			row.Report(b)
			table.Rows = append(table.Rows, row)
		})
	}
}

func benchmarkNodes(b *testing.B, cores []int, callers int) enginebench.Row {
	server, err := pgtest.Start()
	pgtest.Need(b, err)
	b.Cleanup(func() { require.NoError(b, server.Stop()) })
	name, err := server.Database(b.Context())
	require.NoError(b, err)
	token := softhsm.New(b, softhsm.WithKeys())
	cfg := benchNode{
		Module: token.Module, Label: token.Label, Pins: token.Pins, PINFile: token.UserPINFile,
		DSN: server.DSN(name), Callers: callers, Keys: 1000,
	}
	var nodes [2]*benchProcess
	for i := range nodes {
		nodes[i] = startBenchNode(b, cfg, cores[i])
	}
	var one, two nodesTally
	for i := 0; b.Loop(); i++ {
		one.run(b, server, cores[i%2:i%2+1], nodes[i%2])
		two.run(b, server, cores, nodes[:]...)
	}
	return enginebench.Row{Name: "import", Callers: callers, Metrics: []enginebench.Metric{
		{Name: "one/s", Value: one.perSecond()},
		{Name: "two/s", Value: two.perSecond()},
		{Name: "ratio", Value: two.perSecond() / one.perSecond()},
		{Name: "ratio-when-busy", Value: two.perSecond() / two.busy(2) / (one.perSecond() / one.busy(1))},
		{Name: "one-busy", Value: one.busy(1)},
		{Name: "two-busy", Value: two.busy(2)},
		{Name: "one-cpu-µs", Value: one.each(one.cpu)},
		{Name: "two-cpu-µs", Value: two.each(two.cpu)},
		{Name: "cpu-ratio", Value: two.each(two.cpu) / one.each(one.cpu)},
		{Name: "one-database-cpu-µs", Value: one.each(one.database)},
		{Name: "two-database-cpu-µs", Value: two.each(two.database)},
	}}
}

// nodesTally is what some processes did together.
type nodesTally struct {
	n                   int
	wall, cpu, database time.Duration
}

func (t *nodesTally) perSecond() float64 { return float64(t.n) / t.wall.Seconds() }

// each is a time of one import, in microseconds.
func (t *nodesTally) each(d time.Duration) float64 {
	return float64(d) / float64(time.Microsecond) / float64(t.n)
}

// busy is how much of so many cores they and the database had. What they had not
// they waited for, or someone else had it.
func (t *nodesTally) busy(cores int) float64 {
	return float64(t.cpu+t.database) / float64(t.wall) / float64(cores)
}

// run has processes import for a slice.
func (t *nodesTally) run(b *testing.B, server *pgtest.Server, cores []int, nodes ...*benchProcess) {
	b.Helper()
	var set unix.CPUSet
	for _, core := range cores {
		set.Set(core)
	}
	pids, err := server.Processes()
	require.NoError(b, err)
	before := processorTimes(pids)
	for _, pid := range pids {
		_ = unix.SchedSetaffinity(pid, &set) // one may have ended
	}
	for _, n := range nodes {
		_, err := io.WriteString(n.stdin, "go\n")
		require.NoError(b, err)
	}
	for i, n := range nodes {
		var done benchSlice
		require.NoError(b, n.answers.Decode(&done))
		t.n += done.N
		t.cpu += done.CPU
		if i == 0 {
			t.wall += done.Wall
		}
	}
	after := processorTimes(pids)
	for pid, used := range after {
		t.database += used - before[pid]
	}
}

// processorTimes are of the processes that are still there.
func processorTimes(pids []int) map[int]time.Duration {
	times := make(map[int]time.Duration, len(pids))
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
		first, _, _ := strings.Cut(string(text), " ")
		if ns, wrong := strconv.ParseInt(first, 10, 64); err == nil && wrong == nil {
			times[pid] = time.Duration(ns)
		}
	}
	return times
}

// benchNodeEnv has this test binary be a node of BenchmarkNodes: a benchNode in
// JSON.
const benchNodeEnv = "KEYFERRY_BENCH_NODE"

// benchNode is what a process needs to know to be a node.
type benchNode struct {
	Module, Label, PINFile, DSN string
	Pins                        hsm.Pins
	Callers, Keys               int
}

// benchSlice is what a node did when it was told to go.
type benchSlice struct {
	N         int
	Wall, CPU time.Duration
}

const benchSliceTime = 250 * time.Millisecond

type benchProcess struct {
	stdin   io.WriteCloser
	answers *json.Decoder
}

// startBenchNode starts a node on a core and waits until it has its keys.
func startBenchNode(b *testing.B, cfg benchNode, core int) *benchProcess {
	b.Helper()
	text, err := json.Marshal(cfg)
	require.NoError(b, err)
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe") // it ends in the cleanup
	cmd.Env = append(os.Environ(), benchNodeEnv+"="+string(text))
	cmd.Stderr = b.Output()
	p := &benchProcess{}
	p.stdin, err = cmd.StdinPipe()
	require.NoError(b, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(b, err)
	p.answers = json.NewDecoder(stdout)

	// A process begins on the cores of the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, mine unix.CPUSet
	require.NoError(b, unix.SchedGetaffinity(0, &before))
	mine.Set(core)
	require.NoError(b, unix.SchedSetaffinity(0, &mine))
	err = cmd.Start()
	require.NoError(b, unix.SchedSetaffinity(0, &before))
	require.NoError(b, err)
	b.Cleanup(func() {
		require.NoError(b, p.stdin.Close())
		require.NoError(b, cmd.Wait())
	})
	var ready benchSlice
	require.NoError(b, p.answers.Decode(&ready))
	return p
}

// beNode makes this process a node of BenchmarkNodes, if it was started for
// that, and does not return then.
func beNode() {
	config := os.Getenv(benchNodeEnv)
	if config == "" {
		return
	}
	if err := runBenchNode(config); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// runBenchNode is the process. It does a slice for each line that it reads.
func runBenchNode(config string) (err error) {
	ctx := context.Background()
	var cfg benchNode
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		return err
	}
	token, err := hsm.Open(ctx, hsm.Config{
		Module: cfg.Module, Label: cfg.Label, Pins: cfg.Pins,
		PIN: func() ([]byte, error) { return os.ReadFile(filepath.Clean(cfg.PINFile)) },
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	db, err := postgres.Open(ctx, postgres.Config{DSN: cfg.DSN})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	e, err := engine.New(ctx, engine.Config{Token: token, Store: db, PoolSize: 1, PairBound: 1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	imports := make([]engine.ImportInput, cfg.Keys)
	if err := errors.Join(inParallel(cfg.Callers, func(caller int) error {
		for i := caller; i < len(imports); i += cfg.Callers {
			key, err := e.CreateKey(ctx, engine.CreateKeyInput{})
			if err != nil {
				return err
			}
			params, err := e.GetParametersForImport(ctx, key.KeyID, hsm.RSA2048, hsm.OAEPSHA1)
			if err != nil {
				return err
			}
			wrapped, err := byok.Wrap(string(hsm.OAEPSHA1), params.PublicKey, randomBytes(32))
			if err != nil {
				return err
			}
			imports[i] = engine.ImportInput{KeyID: key.KeyID, EncryptedKeyMaterial: wrapped, ImportToken: params.ImportToken}
			if _, err := e.ImportKeyMaterial(ctx, imports[i]); err != nil {
				return err
			}
		}
		return nil
	})...); err != nil {
		return err
	}
	answer := json.NewEncoder(os.Stdout)
	if err := answer.Encode(benchSlice{}); err != nil {
		return err
	}
	places := make([]int, cfg.Callers)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var done benchSlice
		var mu sync.Mutex
		used, start := enginebench.ProcessorTime(), time.Now()
		err := errors.Join(inParallel(cfg.Callers, func(caller int) error {
			n := 0
			for ; time.Since(start) < benchSliceTime; n++ {
				at := (caller + places[caller]*cfg.Callers) % len(imports)
				places[caller]++
				if _, err := e.ImportKeyMaterial(ctx, imports[at]); err != nil {
					return err
				}
			}
			mu.Lock()
			defer mu.Unlock()
			done.N += n
			return nil
		})...)
		done.Wall, done.CPU = time.Since(start), enginebench.ProcessorTime()-used
		if err := errors.Join(err, answer.Encode(done)); err != nil {
			return err
		}
	}
	return nil
}
