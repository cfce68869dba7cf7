package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/enginebench"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
)

// crowdVariable names a number of CMKs, a million for instance, that
// BenchmarkCrowd compares with a thousand. It takes minutes to make them.
const crowdVariable = "KEYFERRY_CROWD"

// Of every crowd expiring CMKs have material that expires, expiringAtOnce in the
// same second.
const (
	expiring       = 200
	expiringAtOnce = 10
)

// BenchmarkCrowd fills one store with a thousand CMKs and the store of a server
// with a million, compares the same work over both, and then starts the server:
// how soon it answers, and what memory it takes with 10,000 keys open.
func BenchmarkCrowd(b *testing.B) {
	n, err := strconv.Atoi(os.Getenv(crowdVariable))
	if err != nil {
		b.Skipf("%s is no number: set it to 1000000, as make bench-crowd does", crowdVariable)
	}
	ctx := b.Context()
	dir := b.TempDir()
	startBenchServer(b, dir, fewPairs, "").stop(b)
	cfg, err := loadConfig(filepath.Join(dir, devConfigFile))
	require.NoError(b, err)
	token, err := openToken(ctx, &cfg, slog.New(slog.DiscardHandler))
	require.NoError(b, err)
	soon := time.Now().Add(time.Hour).Truncate(time.Second)
	crowd := func(n int, database string) *enginebench.Crowd {
		var db store.Store
		db, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(dir, database)})
		require.NoError(b, err)
		c := &enginebench.Crowd{
			Token: token, Store: db, N: n, Expiring: expiring,
			Expiry: func(i int) time.Time { return soon.Add(time.Duration(i/expiringAtOnce) * time.Second) },
		}
		start := time.Now()
		require.NoError(b, c.Load(ctx, func(n int) {
			if n%100_000 == 0 {
				b.Logf("%d CMKs after %s", n, time.Since(start).Truncate(time.Second))
			}
		}))
		return c
	}
	few := crowd(1000, "few.db")
	many := crowd(n, devDatabase)
	table := &enginebench.Table{Title: "A thousand CMKs and " + strconv.Itoa(n)}
	compareCrowds(ctx, b, table, few, many, soon)
	require.NoError(b, few.Store.Close())
	require.NoError(b, many.Store.Close())
	require.NoError(b, token.Close())
	require.NoError(b, table.Write(os.Stdout))

	b.Run("server", func(b *testing.B) {
		start := time.Now()
		s := reopenBenchServer(b, dir)
		(&customer{client: s.client, keyID: many.KeyID(n - 1)}).state(b)
		answered := time.Since(start)
		var requests []leanRequest
		for i := expiring; i < expiring+10_000 && i < n; i++ {
			requests = append(requests, newLeanRequest("Encrypt", map[string]string{"KeyId": many.KeyID(i), "Plaintext": plaintextOf}))
		}
		conn, err := dialLean(b, s.credentials)
		require.NoError(b, err)
		for _, r := range requests {
			require.NoError(b, conn.do(r))
		}
		for b.Loop() { // once is enough
		}
		b.ReportMetric(answered.Seconds(), "first-answer-s")
		b.ReportMetric(residentMemory(b, s.cmd.Process.Pid), "rss-MiB")
		b.ReportMetric(0, "ns/op")
		s.stop(b)
	})
}

func compareCrowds(ctx context.Context, b *testing.B, table *enginebench.Table, few, many *enginebench.Crowd, soon time.Time) {
	b.Helper()
	comparisons, end, err := enginebench.CompareCrowds(ctx, few, many, 8)
	require.NoError(b, err)
	for _, c := range comparisons {
		require.NoError(b, c.Run(ctx, 3*time.Second))
		require.NoError(b, c.Close())
		table.Rows = append(table.Rows, c.Row())
	}
	require.NoError(b, end())
	row, err := enginebench.CompareSweeps(ctx, few, many, time.Second, soon.Add(-time.Second))
	require.NoError(b, err)
	table.Rows = append(table.Rows, row)
}

var rssLine = regexp.MustCompile(`(?m)^VmRSS:\s+(\d+) kB$`)

// residentMemory of a process is in MiB.
func residentMemory(b testing.TB, pid int) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(b, err)
	found := rssLine.FindSubmatch(status)
	require.NotNil(b, found)
	kib, err := strconv.Atoi(string(found[1]))
	require.NoError(b, err)
	return float64(kib) / 1024
}
