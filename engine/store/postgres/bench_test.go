package postgres_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

func BenchmarkStore(b *testing.B) {
	server, err := pgtest.Start() // it forces its writes to the disk
	pgtest.Need(b, err)
	b.Cleanup(func() { require.NoError(b, server.Stop()) })
	s := open(b, newDSN(b, server))
	b.Cleanup(func() { require.NoError(b, s.Close()) })
	storetest.RunBenchmarks(b, "PostgreSQL, durable", s)
}
