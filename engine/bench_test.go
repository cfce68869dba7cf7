package engine_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/enginebench"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/softhsm"
)

// BenchmarkEngine compares what the engine does, durably, with the bare PKCS#11
// calls below it, over 1,000 CMKs, and prints the tables of enginebench at its end.
// PROFILE.md says what is in the numbers.
func BenchmarkEngine(b *testing.B) {
	ctx := b.Context()
	db, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(b.TempDir(), "keyferry.db")})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, db.Close()) })
	bench, err := enginebench.New(ctx, enginebench.Config{Token: softhsm.New(b, softhsm.WithKeys()).Open(b), Store: db})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, bench.Close()) })

	if err := bench.Keeps(); err != nil {
		b.Logf("custody is not compared: %v", err)
	}
	var tables []*enginebench.Table
	for _, suite := range append(bench.CustodySuites(), bench.Suites()...) {
		b.Run(suite.Name, func(b *testing.B) {
			table := &enginebench.Table{Title: suite.Title}
			err := suite.Each(ctx, []int{1, 8, 32, 64}, func(callers int, c *enginebench.Comparison) error {
				b.Run(fmt.Sprintf("%s/%d", c.Name(), callers), func(b *testing.B) {
					for b.Loop() {
						require.NoError(b, c.Round(ctx))
					}
					row := c.Row()
					row.Report(b)
					table.Rows = append(table.Rows, row)
				})
				return nil
			})
			require.NoError(b, err)
			tables = append(tables, table)
		})
	}
	b.Run("parameters", func(b *testing.B) {
		var table *enginebench.Table
		for b.Loop() {
			table, err = bench.Parameters(ctx, 32, 8, 2*time.Second)
			require.NoError(b, err)
		}
		table.Rows[0].Report(b)
		tables = append(tables, table)
	})
	for _, t := range tables {
		require.NoError(b, t.Write(os.Stdout))
	}
}
