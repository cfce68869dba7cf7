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
// calls below it, over 1,000 CMKs, and prints the tables of enginebench. PROFILE.md
// says what is in the numbers.
func BenchmarkEngine(b *testing.B) {
	ctx := b.Context()
	db, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(b.TempDir(), "keyferry.db")})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, db.Close()) })
	bench, err := enginebench.New(ctx, enginebench.Config{Token: softhsm.New(b, softhsm.WithKeys()).Open(b), Store: db})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, bench.Close()) })

	var tables []*enginebench.Table
	b.Cleanup(func() {
		for _, t := range tables {
			require.NoError(b, t.Write(os.Stdout))
		}
	})
	compare := func(title, name string, callers []int, prepare func(callers int) (*enginebench.Comparison, error)) {
		table := &enginebench.Table{Title: title}
		tables = append(tables, table)
		for _, n := range callers {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				c, err := prepare(n)
				require.NoError(b, err)
				for b.Loop() {
					require.NoError(b, c.Round(b.Context()))
				}
				require.NoError(b, c.Close())
				row := c.Row()
				row.Report(b)
				table.Rows = append(table.Rows, row)
			})
		}
	}
	compare("Import, durable", "import", []int{1, 8, 32, 64}, func(n int) (*enginebench.Comparison, error) {
		return bench.Import(ctx, bench.Offers()[0], n)
	})
	compare("Onboarding of new CMKs beside imports into old ones", "onboard", []int{8, 32, 64}, func(n int) (*enginebench.Comparison, error) {
		return bench.Onboard(ctx, n)
	})
	compare("Encrypt", "encrypt", []int{1, 8, 32}, func(n int) (*enginebench.Comparison, error) { return bench.Encrypt(ctx, n) })
	compare("Decrypt", "decrypt", []int{1, 8}, func(n int) (*enginebench.Comparison, error) { return bench.Decrypt(ctx, n) })
	compare("A key that is not open", "miss", []int{1, 8}, func(n int) (*enginebench.Comparison, error) { return bench.Miss(ctx, n) })
	if err := bench.Keeps(); err != nil {
		b.Logf("custody is not compared: %v", err)
	} else {
		compare("Custody, durable imports", "custody-import", []int{1, 8}, func(n int) (*enginebench.Comparison, error) { return bench.Custody(ctx, n) })
		compare("Custody, encryption", "custody-encrypt", []int{1, 8}, func(n int) (*enginebench.Comparison, error) { return bench.CustodyUse(ctx, n) })
	}
	b.Run("parameters", func(b *testing.B) {
		table := &enginebench.Table{Title: "Parameters for import"}
		for b.Loop() {
			var err error
			table.Rows, err = bench.Parameters(ctx, 32, 8, 2*time.Second)
			require.NoError(b, err)
		}
		b.ReportMetric(table.Rows[0].Value("p99-ms"), "fresh-p99-ms")
		b.ReportMetric(table.Rows[1].Value("p99-ms"), "shared-p99-ms")
		b.ReportMetric(table.Rows[2].Value("p50-ms"), "generation-p50-ms")
		b.ReportMetric(0, "ns/op")
		tables = append(tables, table)
	})
}
