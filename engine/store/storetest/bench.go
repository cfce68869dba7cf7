package storetest

import (
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
)

// benchKeys is how many CMKs the benchmarks go over.
const benchKeys = 2000

// BenchKey is a CMK with material as long as it usually is, and names in no
// order, as they are.
func BenchKey(n int) store.Key {
	return store.Key{
		KeyID:             fmt.Sprintf("%08x-6c1f-4e0f-9c55-%012x", uint32(n)*2654435761, n),
		KeyVersionID:      fmt.Sprintf("%08x-0b7e-41a2-8d3f-%012x", uint32(n)*40503, n),
		Revision:          1,
		Spec:              "Aliyun_AES_256",
		State:             "Enabled",
		CreatedAt:         base,
		KCV:               make([]byte, 3),
		MaterialID:        make([]byte, 32),
		Material:          make([]byte, 96),
		WrappingAlgorithm: "RSAES_OAEP_SHA_256",
		PairID:            make([]byte, 16),
		PairFingerprint:   make([]byte, 32),
		MAC:               make([]byte, 32),
	}
}

// bench is a store with keys, each of which has an import token.
type bench struct {
	store.Store
	keys  []store.Key
	locks []sync.Mutex // of keys
	turn  atomic.Int64 // of what must differ from run to run
}

// newBench gives a new, empty store its keys.
func newBench(b *testing.B, s store.Store) *bench {
	b.Helper()
	x := &bench{Store: s, keys: make([]store.Key, benchKeys), locks: make([]sync.Mutex, benchKeys)}
	ctx := b.Context()
	require.NoError(b, s.AddPair(ctx, store.Pair{ID: [16]byte{1}, Spec: "RSA_2048", Algorithm: "A", CreatedAt: base}))
	parallel(b, 32, benchKeys, func(n int) error {
		x.keys[n] = BenchKey(n)
		if err := s.CreateKey(ctx, x.keys[n]); err != nil {
			return err
		}
		_, err := s.BindPair(ctx, x.request(n))
		return err
	})
	return x
}

// request asks for a token of a key. The first one binds the pair, the others
// share it.
func (x *bench) request(n int) store.BindRequest {
	return store.BindRequest{
		TokenID: benchID(n), KeyID: x.keys[n%benchKeys].KeyID, Spec: "RSA_2048", Algorithm: "A",
		Now: base, ExpiresAt: base.Add(time.Hour), ShareSince: base, Bound: 1,
	}
}

func benchID(n int) (id [16]byte) {
	binary.BigEndian.PutUint64(id[:], uint64(n)*0x9e3779b97f4a7c15)
	return id
}

// update has change make the next revision of a key.
func (x *bench) update(b *testing.B, n int, change func(*store.Update)) error {
	x.locks[n].Lock()
	defer x.locks[n].Unlock()
	update := store.Update{Key: x.keys[n]}
	update.Key.Revision++
	change(&update)
	err := x.UpdateKey(b.Context(), update)
	if err == nil {
		x.keys[n] = update.Key
	}
	return err
}

// RunBenchmarks measures the calls of an import's way on a new, empty store, and
// prints a table of them under a title. The processor time is this process's; that
// of a database's own processes comes on top of it.
func RunBenchmarks(b *testing.B, title string, s store.Store) {
	b.Helper()
	x := newBench(b, s)
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintf(table, "\n%s\tcallers\tcalls/s\tuser-µs\tsys-µs\t\n", title)
	b.Cleanup(func() { _ = table.Flush() })
	for _, bench := range []struct {
		name string
		call func(b *testing.B, n int) error // n: of the key
	}{
		{"Key", func(b *testing.B, n int) error {
			_, err := s.Key(b.Context(), x.keys[n].KeyID)
			return err
		}},
		{"LoadImport", func(b *testing.B, n int) error {
			_, _, err := s.LoadImport(b.Context(), x.keys[n].KeyID, benchID(n))
			return err
		}},
		{"UpdateKey", func(b *testing.B, n int) error { // which changes no column with an index
			return x.update(b, n, func(*store.Update) {})
		}},
		{"UpdateKey, an import", func(b *testing.B, n int) error {
			return x.update(b, n, func(u *store.Update) {
				u.Budget = &store.Budget{TokenID: benchID(n), Failures: 1 << 30}
				u.Receipt = &store.Receipt{
					KeyID: u.Key.KeyID, Revision: u.Key.Revision, Import: true,
					Entry: make([]byte, 700), RowDigest: make([]byte, 32), MAC: make([]byte, 32),
				}
			})
		}},
		{"UpdateKey, of the state", func(b *testing.B, n int) error { // and back, which changes columns with an index
			return x.update(b, n, func(u *store.Update) {
				if u.Key.State == "Enabled" {
					u.Key.State, u.Key.ExpireAt, u.Key.Material = "PendingImport", time.Time{}, nil
				} else {
					u.Key.State, u.Key.ExpireAt, u.Key.Material = "Enabled", base.Add(time.Hour), make([]byte, 96)
				}
			})
		}},
		{"CountFailure", func(b *testing.B, n int) error {
			_, err := s.CountFailure(b.Context(), benchID(n))
			return err
		}},
		{"BindPair, shared", func(b *testing.B, _ int) error {
			_, err := s.BindPair(b.Context(), x.request(benchKeys+int(x.turn.Add(1))))
			return err
		}},
		{"AddNonce", func(b *testing.B, _ int) error {
			turn := x.turn.Add(1)
			fresh, err := s.AddNonce(b.Context(), store.Nonce{
				AccessKeyID: "LTAI5tExampleAccessKeyId", Value: fmt.Sprintf("%032x", turn), ExpiresAt: base.Add(time.Duration(turn) * time.Millisecond),
			}, base.Add(-time.Minute))
			if err == nil && !fresh {
				err = store.ErrExists
			}
			return err
		}},
	} {
		for _, callers := range []int{1, 8, 32} {
			row := "" // of the last run, which is the longest
			b.Run(fmt.Sprintf("%s/%d", bench.name, callers), func(b *testing.B) {
				rate, user, system := Measure(b, callers, func(i int) error { return bench.call(b, i%benchKeys) })
				row = fmt.Sprintf("%s\t%d\t%.0f\t%.1f\t%.1f\t", bench.name, callers, rate, user, system)
			})
			if row != "" { // not left out by -bench
				_, _ = fmt.Fprintln(table, row)
			}
		}
	}
}

// Measure has callers make b.N calls, each with another number, and reports how
// many there were in a second, and the processor time in microseconds that each
// took of this process, in user mode and in the kernel.
func Measure(b *testing.B, callers int, do func(i int) error) (rate, user, system float64) {
	b.Helper()
	userBefore, systemBefore := processorTime()
	b.ResetTimer()
	parallel(b, callers, b.N, do)
	b.StopTimer()
	userAfter, systemAfter := processorTime()
	rate = float64(b.N) / b.Elapsed().Seconds()
	user = float64((userAfter - userBefore).Microseconds()) / float64(b.N)
	system = float64((systemAfter - systemBefore).Microseconds()) / float64(b.N)
	b.ReportMetric(rate, "calls/s")
	b.ReportMetric(user, "user-µs")
	b.ReportMetric(system, "sys-µs")
	b.ReportMetric(0, "ns/op")
	return rate, user, system
}

// parallel has callers make n calls, each with another number.
func parallel(b *testing.B, callers, n int, do func(i int) error) {
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

func processorTime() (user, system time.Duration) {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // of one's own: never fails
	return time.Duration(u.Utime.Nano()), time.Duration(u.Stime.Nano())
}
