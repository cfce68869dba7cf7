package postgres_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
)

// benchKeys is how many CMKs the benchmarks go over.
const benchKeys = 2000

var benchTime = time.Date(2026, 11, 23, 14, 47, 0, 0, time.UTC)

// bench is a database with keys, each of which has an import token.
type bench struct {
	*postgres.Store
	keys []store.Key
	turn atomic.Int64
}

func newBench(b *testing.B) *bench {
	b.Helper()
	server, err := pgtest.Start() // it forces its writes to the disk
	pgtest.Need(b, err)
	b.Cleanup(func() { require.NoError(b, server.Stop()) })
	s := &bench{Store: open(b, newDSN(b, server)), keys: make([]store.Key, benchKeys)}
	b.Cleanup(func() { require.NoError(b, s.Close()) })
	require.NoError(b, s.AddPair(b.Context(), store.Pair{ID: [16]byte{1}, Spec: "RSA_2048", Algorithm: "A", CreatedAt: benchTime}))
	for n := range s.keys {
		s.keys[n] = store.Key{
			KeyID:        fmt.Sprintf("%08x-6c1f-4e0f-9c55-%012x", uint32(n)*2654435761, n),
			KeyVersionID: fmt.Sprintf("%08x-0b7e-41a2-8d3f-%012x", uint32(n)*40503, n),
			Revision:     1, Spec: "Aliyun_AES_256", State: "Enabled", CreatedAt: benchTime,
			KCV: make([]byte, 3), MaterialID: make([]byte, 32), Material: make([]byte, 96), WrappingAlgorithm: "RSAES_OAEP_SHA_256",
			PairID: make([]byte, 16), PairFingerprint: make([]byte, 32), MAC: make([]byte, 32),
		}
	}
	s.parallel(b, 32, benchKeys, func(n int) error {
		if err := s.CreateKey(b.Context(), s.keys[n]); err != nil {
			return err
		}
		_, err := s.BindPair(b.Context(), s.request(n, 1))
		return err
	})
	return s
}

// request asks for a token of a key. The first one binds the pair, the others
// share it.
func (s *bench) request(n, bound int) store.BindRequest {
	return store.BindRequest{
		TokenID: benchID(n), KeyID: s.keys[n%benchKeys].KeyID, Spec: "RSA_2048", Algorithm: "A",
		Now: benchTime, ExpiresAt: benchTime.Add(time.Hour), ShareSince: benchTime, Bound: bound,
	}
}

func benchID(n int) (id [16]byte) {
	binary.BigEndian.PutUint64(id[:], uint64(n)*0x9e3779b97f4a7c15)
	return id
}

// parallel has callers make n calls, each with another number.
func (s *bench) parallel(b *testing.B, callers, n int, do func(i int) error) {
	b.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := do(i); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkStore measures the calls of an import's way, durably, and prints a
// table of them. The processor time is this process's; the database's own comes
// on top of it.
func BenchmarkStore(b *testing.B) {
	ctx := context.Background()
	s := newBench(b)
	revisions := make([]sync.Mutex, benchKeys)
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintln(table, "\nPostgreSQL, durable\tcallers\tcalls/s\tcpu-µs\t")
	b.Cleanup(func() { _ = table.Flush() })
	for _, bench := range []struct {
		name string
		call func(i int) error
	}{
		{"Key", func(i int) error {
			_, err := s.Key(ctx, s.keys[i%benchKeys].KeyID)
			return err
		}},
		{"LoadImport", func(i int) error {
			_, _, err := s.LoadImport(ctx, s.keys[i%benchKeys].KeyID, benchID(i%benchKeys))
			return err
		}},
		{"UpdateKey, an import", func(i int) error {
			n := i % benchKeys
			revisions[n].Lock()
			defer revisions[n].Unlock()
			key := s.keys[n]
			key.Revision++
			err := s.UpdateKey(ctx, store.Update{
				Key: key, Budget: &store.Budget{TokenID: benchID(n), Failures: 1000},
				Receipt: &store.Receipt{KeyID: key.KeyID, Revision: key.Revision, Import: true, Entry: make([]byte, 700), RowDigest: make([]byte, 32), MAC: make([]byte, 32)},
			})
			s.keys[n].Revision = key.Revision
			return err
		}},
		{"CountFailure", func(i int) error {
			_, err := s.CountFailure(ctx, benchID(i%benchKeys))
			return err
		}},
		{"BindPair, shared", func(int) error {
			_, err := s.BindPair(ctx, s.request(int(s.turn.Add(1))+benchKeys, 0))
			return err
		}},
		{"AddNonce", func(int) error {
			_, err := s.AddNonce(ctx, store.Nonce{Value: fmt.Sprint(s.turn.Add(1)), ExpiresAt: benchTime.Add(time.Hour)}, benchTime)
			return err
		}},
	} {
		for _, callers := range []int{1, 8, 32} {
			row := "" // of the last run, which is the longest
			b.Run(fmt.Sprintf("%s/%d", bench.name, callers), func(b *testing.B) {
				before := processorTime()
				b.ResetTimer()
				s.parallel(b, callers, b.N, bench.call)
				b.StopTimer()
				used := float64((processorTime() - before).Microseconds()) / float64(b.N)
				rate := float64(b.N) / b.Elapsed().Seconds()
				b.ReportMetric(rate, "calls/s")
				b.ReportMetric(used, "cpu-µs")
				b.ReportMetric(0, "ns/op")
				row = fmt.Sprintf("%s\t%d\t%.0f\t%.1f\t", bench.name, callers, rate, used)
			})
			if row != "" { // not left out by -bench
				_, _ = fmt.Fprintln(table, row)
			}
		}
	}
}

func processorTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // of one's own: never fails
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
