package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/enginebench"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/hsm"
)

func benchCommand() *cobra.Command {
	var b bench
	cmd := &cobra.Command{
		Use:   "bench --config FILE",
		Short: "Measure what the token can do, and what serving costs beyond it",
		Long: `Measures imports, by each wrapping algorithm that the token offers, encryptions,
decryptions, the opening of keys and parameters for import, durably, on the token
of the configuration. Beside each it runs, in turn and in the same run, the bare
calls of PKCS#11 in a loop (bare), and where an operation takes more calls than
the first of them, all of those (calls). It is for people who choose an HSM.

In the tables, ratio is ours to bare, and extra-cpu the processor time that an
operation of ours takes of this machine beyond that of the bare calls. On a token
that computes in hardware, that is what the server adds; on a software token the
processor time holds the token's own.

It can run beside a server, whose keys it never touches: it makes CMKs of its own
in a throw-away SQLite database, also where the configuration has a PostgreSQL, and
signs no receipts. The database is in a new directory beside that of the
configuration, for its disk is measured, too; --dir puts it elsewhere.

Where custody is resident it compares that with sealed custody, too.

On the token it makes session objects, and a few wrapping pairs, and a fifth of
the keys if custody is resident, which it destroys at its end. If it is killed
they stay, labelled "keyferry pair" or "keyferry material" and
` + enginebench.Instance + `, until it is run again ten minutes later, and so
does the directory, which holds no key that anybody uses. Run one at a time.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return b.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&b.config, "config", "", "the configuration file")
	flags.DurationVar(&b.duration, "duration", 30*time.Second, "how long to measure, beside preparations")
	flags.IntVar(&b.keys, "keys", 1000, "how many CMKs to make; the token holds as many open at a time")
	flags.IntSliceVar(&b.callers, "callers", []int{1, 8, 32}, "how many callers there are at a time")
	flags.StringVar(&b.dir, "dir", "", "where to put the throw-away database")
	flags.BoolVar(&b.json, "json", false, "write one JSON object instead of tables")
	requireFlag(cmd, "config")
	return cmd
}

// bench is one run of the command.
type bench struct {
	config   string
	duration time.Duration
	keys     int
	callers  []int
	dir      string
	json     bool
}

// measurement is what bench found. Its JSON is for programs: fields and metrics are
// added, and never change their meaning.
type measurement struct {
	Module     string               `json:"module"`
	Label      string               `json:"label"`
	Serial     string               `json:"serial"`
	Processors int                  `json:"processors"`
	System     string               `json:"system"`
	Keys       int                  `json:"keys"`
	Store      string               `json:"store"` // the directory of the database, which is gone
	Began      time.Time            `json:"began"`
	Tables     []*enginebench.Table `json:"tables"`
}

func (b *bench) run(ctx context.Context, out, log io.Writer) (err error) {
	if err := b.validate(); err != nil {
		return err
	}
	cfg, err := loadConfig(b.config)
	if err != nil {
		return err
	}
	if err := errors.Join(cfg.validateToken(), cfg.Store.validate()); err != nil {
		return fmt.Errorf("%s: %w", b.config, err)
	}
	// Heads of a log that is thrown away are not to be signed by the key that
	// customers trust.
	cfg.Token.Pins.ReceiptKey = fingerprint{}
	dir := b.dir
	if dir == "" && cfg.Store.SQLite != "" {
		dir = filepath.Dir(cfg.Store.SQLite)
	}
	if dir, err = os.MkdirTemp(dir, "keyferry-bench-"); err != nil {
		return fmt.Errorf("there is nowhere to put the database: %w: name a directory with --dir", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	_, _ = fmt.Fprintf(log, "Measuring for %v, after some seconds of preparation. Killed, this leaves %s, and pairs on the token for the next run.\n", b.duration, dir)

	m := measurement{
		Module: cfg.Token.Module, Label: cfg.Token.Label, Serial: cfg.Token.Pins.Serial, Processors: runtime.GOMAXPROCS(0),
		System: runtime.GOOS + "/" + runtime.GOARCH, Keys: b.keys, Store: dir, Began: time.Now().UTC().Truncate(time.Second),
	}
	if m.Tables, err = b.measure(ctx, &cfg, dir, slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelError}))); err != nil {
		return err
	}
	if b.json {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(m)
	}
	return m.write(out)
}

func (b *bench) validate() error {
	const fewest, most = 100, 100_000
	switch {
	case b.duration <= 0:
		return errors.New("--duration is not positive")
	case b.keys < fewest || b.keys > most:
		return fmt.Errorf("--keys has to be from %d to %d", fewest, most)
	case len(b.callers) == 0, slices.Min(b.callers) < 1, slices.Max(b.callers) > b.keys:
		return errors.New("--callers are numbers from 1 to that of --keys")
	}
	return nil
}

func (b *bench) measure(ctx context.Context, cfg *config, dir string, log *slog.Logger) (tables []*enginebench.Table, err error) {
	token, err := openToken(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	db, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(dir, "keyferry.db")})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	e, err := enginebench.New(ctx, enginebench.Config{Token: token, Store: db, Keys: b.keys, Logger: log, PairSpecs: cfg.Pairs.Specs})
	if err != nil {
		return nil, benchAdvice(err)
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	suites := e.Suites()
	if cfg.custody() == hsm.Resident {
		if err := e.Keeps(); err != nil {
			return nil, custodyAdvice(err, cfg)
		}
		suites = append(e.CustodySuites(), suites...)
	}
	rows := 1 // of Parameters
	for _, s := range suites {
		rows += s.Rows(b.callers)
	}
	fresh := max(1, min(8, int(b.duration/(5*time.Second)))) // they take the token a while to generate
	tables, err = e.Tables(ctx, enginebench.Plan{Suites: suites, Callers: b.callers, Each: b.duration / time.Duration(rows), Fresh: fresh})
	return tables, benchAdvice(err)
}

// benchAdvice adds what to do about a token with few sessions.
func benchAdvice(err error) error {
	if errors.Is(err, hsm.ErrUnavailable) {
		return fmt.Errorf("%w: if the token grants no more sessions, lower token.sessions or --callers", err)
	}
	return err
}

// write writes the tables for people.
func (m *measurement) write(w io.Writer) error {
	_, err := fmt.Fprintf(w, "Token %q, serial %s, by %s\n%d CMKs, %d processors, %s, a SQLite database in %s\n",
		m.Label, cmp.Or(m.Serial, "unknown"), m.Module, m.Keys, m.Processors, m.System, filepath.Dir(m.Store))
	for _, t := range m.Tables {
		err = errors.Join(err, t.Write(w))
	}
	return err
}
