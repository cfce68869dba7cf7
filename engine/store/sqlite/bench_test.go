package sqlite_test

import (
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

func BenchmarkStore(b *testing.B) {
	s, err := sqlite.Open(b.Context(), sqlite.Config{Path: b.TempDir() + "/keyferry.db"})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, s.Close()) })
	storetest.RunBenchmarks(b, "SQLite, durable", s)
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
	storetest.Measure(b, 1, func(i int) error {
		if _, err := f.WriteAt(page, int64(i%1000)*4096); err != nil {
			return err
		}
		return f.Sync()
	})
}
