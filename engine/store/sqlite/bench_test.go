package sqlite_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
)

// benchKeys is how many CMKs the benchmarks run over.
const benchKeys = 2000

var benchTime = time.Date(2026, 11, 23, 14, 47, 0, 0, time.UTC)

func benchKey(n int) store.Key {
	return store.Key{
		KeyID:             fmt.Sprintf("%08x-6c1f-4e0f-9c55-%012x", uint32(n)*2654435761, n),
		KeyVersionID:      fmt.Sprintf("%08x-0b7e-41a2-8d3f-%012x", uint32(n)*40503, n),
		Revision:          1,
		Spec:              "Aliyun_AES_256",
		State:             "Enabled",
		CreatedAt:         benchTime,
		KCV:               make([]byte, 3),
		MaterialID:        make([]byte, 32),
		Material:          make([]byte, 96),
		WrappingAlgorithm: "RSAES_OAEP_SHA_256",
		PairID:            make([]byte, 16),
		PairFingerprint:   make([]byte, 32),
		MAC:               make([]byte, 32),
	}
}

// benchStore has benchKeys keys, and one import token for each of them.
func benchStore(b *testing.B) (*sqlite.Store, []store.Key) {
	b.Helper()
	s, err := sqlite.Open(b.Context(), sqlite.Config{Path: b.TempDir() + "/keyferry.db"})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, s.Close()) })
	require.NoError(b, s.AddPair(b.Context(), store.Pair{ID: [16]byte{1}, Spec: "RSA_2048", Algorithm: "A", CreatedAt: benchTime}))
	keys := make([]store.Key, benchKeys)
	parallel(b, 32, benchKeys, func(_, n int) error {
		keys[n] = benchKey(n)
		return s.CreateKey(b.Context(), keys[n])
	})
	// One pair for all: the first token binds it, the others share it.
	request := func(n, bound int) store.BindRequest {
		return store.BindRequest{
			TokenID: benchID(n), KeyID: keys[n].KeyID, Spec: "RSA_2048", Algorithm: "A",
			Now: benchTime, ExpiresAt: benchTime.Add(time.Hour), ShareSince: benchTime, Bound: bound,
		}
	}
	_, err = s.BindPair(b.Context(), request(0, 1))
	require.NoError(b, err)
	parallel(b, 32, benchKeys-1, func(_, n int) error {
		_, err := s.BindPair(b.Context(), request(n+1, 0))
		return err
	})
	return s, keys
}

func benchID(n int) (id [16]byte) {
	binary.BigEndian.PutUint64(id[:], uint64(n)*0x9e3779b97f4a7c15)
	return id
}

// parallel makes calls 0 to n-1 of do, each from one of that many callers.
func parallel(b *testing.B, callers, n int, do func(caller, i int) error) {
	b.Helper()
	var next atomic.Int64
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := do(c, i); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// measured is parallel over b.N, with the processor time that a call takes of
// this process, in user mode and in the kernel.
func measured(b *testing.B, callers int, do func(caller, i int) error) {
	b.Helper()
	user, system := processorTime()
	b.ResetTimer()
	parallel(b, callers, b.N, do)
	b.StopTimer()
	user2, system2 := processorTime()
	b.ReportMetric(float64((user2-user).Microseconds())/float64(b.N), "user-µs/op")
	b.ReportMetric(float64((system2-system).Microseconds())/float64(b.N), "sys-µs/op")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "op/s")
	b.ReportMetric(0, "ns/op")
}

func processorTime() (user, system time.Duration) {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano()), time.Duration(u.Stime.Nano())
}

func BenchmarkStore(b *testing.B) {
	for _, bench := range []struct {
		name string
		run  func(b *testing.B, s *sqlite.Store, keys []store.Key, callers int)
	}{
		{"UpdateKey", benchUpdateKey},
		{"FirstImport", benchFirstImport},
		{"AddNonce", benchAddNonce},
		{"BindPair", benchBindPair},
		{"Key", func(b *testing.B, s *sqlite.Store, keys []store.Key, callers int) {
			measured(b, callers, func(_, i int) error {
				_, err := s.Key(b.Context(), keys[i%benchKeys].KeyID)
				return err
			})
		}},
		{"LoadImport", func(b *testing.B, s *sqlite.Store, keys []store.Key, callers int) {
			measured(b, callers, func(_, i int) error {
				_, _, err := s.LoadImport(b.Context(), keys[i%benchKeys].KeyID, benchID(i%benchKeys))
				return err
			})
		}},
	} {
		for _, callers := range []int{1, 8, 32} {
			b.Run(fmt.Sprintf("%s/%d", bench.name, callers), func(b *testing.B) {
				s, keys := benchStore(b)
				bench.run(b, s, keys, callers)
			})
		}
	}
}

// own spreads the keys over the callers: each has its share to itself.
func own(callers, caller, i int) int {
	share := benchKeys / callers
	return caller*share + i%share
}

func benchUpdateKey(b *testing.B, s *sqlite.Store, keys []store.Key, callers int) {
	measured(b, callers, func(caller, i int) error {
		key := &keys[own(callers, caller, i)]
		key.Revision++
		key.MAC[0]++
		return s.UpdateKey(b.Context(), store.Update{Key: *key})
	})
}

// benchFirstImport moves a key from PendingImport to Enabled, and back, which
// changes columns with an index.
func benchFirstImport(b *testing.B, s *sqlite.Store, keys []store.Key, callers int) {
	measured(b, callers, func(caller, i int) error {
		key := &keys[own(callers, caller, i)]
		key.Revision++
		if key.State == "Enabled" {
			key.State, key.ExpireAt, key.Material = "PendingImport", time.Time{}, nil
		} else {
			key.State, key.ExpireAt, key.Material = "Enabled", benchTime.Add(time.Hour), make([]byte, 96)
		}
		return s.UpdateKey(b.Context(), store.Update{Key: *key})
	})
}

func benchAddNonce(b *testing.B, s *sqlite.Store, _ []store.Key, callers int) {
	measured(b, callers, func(_, i int) error {
		fresh, err := s.AddNonce(b.Context(), store.Nonce{
			AccessKeyID: "LTAI5tExampleAccessKeyId", Value: fmt.Sprintf("%032x", i), ExpiresAt: benchTime.Add(time.Duration(i) * time.Millisecond),
		}, benchTime.Add(-time.Minute))
		if err == nil && !fresh {
			err = store.ErrExists
		}
		return err
	})
}

func benchBindPair(b *testing.B, s *sqlite.Store, keys []store.Key, callers int) {
	measured(b, callers, func(_, i int) error {
		_, err := s.BindPair(b.Context(), store.BindRequest{
			TokenID: benchID(benchKeys + i), KeyID: keys[i%benchKeys].KeyID, Spec: "RSA_2048", Algorithm: "A",
			Now: benchTime, ExpiresAt: benchTime.Add(time.Hour), ShareSince: benchTime, Bound: 1,
		})
		return err
	})
}

// BenchmarkSync is the floor under every durable write: one page appended to a
// file and forced to the disk.
func BenchmarkSync(b *testing.B) {
	f, err := os.Create(b.TempDir() + "/file")
	require.NoError(b, err)
	defer func() { require.NoError(b, f.Close()) }()
	page := make([]byte, 4096)
	_, err = f.Write(make([]byte, 4096*1000))
	require.NoError(b, err)
	measured(b, 1, func(_, i int) error {
		if _, err := f.WriteAt(page, int64(i%1000)*4096); err != nil {
			return err
		}
		return f.Sync()
	})
}
