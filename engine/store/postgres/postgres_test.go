package postgres_test

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

// TestMain runs this binary as one of its own children if the environment
// says which, and else the tests, after which no goroutine may be left.
func TestMain(m *testing.M) {
	children.Main()
	code := m.Run()
	if err := stopShared(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// shared is the server of all tests that do not kill one.
var shared struct {
	sync.Once
	server *pgtest.Server
	err    error
}

func sharedServer(t testing.TB) *pgtest.Server {
	t.Helper()
	shared.Do(func() { shared.server, shared.err = pgtest.Start(pgtest.FastSettings...) })
	pgtest.Need(t, shared.err)
	return shared.server
}

func stopShared() error {
	if shared.server == nil {
		return nil
	}
	return shared.server.Stop()
}

// newDSN names a new database with the tables of Keyferry.
func newDSN(t testing.TB, server *pgtest.Server) string {
	t.Helper()
	name, err := server.Database(context.Background())
	require.NoError(t, err)
	t.Cleanup(func() { server.Release(name) })
	return server.DSN(name)
}

// open opens a database with the default configuration.
func open(t testing.TB, dsn string) *postgres.Store {
	t.Helper()
	s, err := postgres.Open(context.Background(), postgres.Config{DSN: dsn})
	require.NoError(t, err)
	return s
}

func TestContract(t *testing.T) {
	server := sharedServer(t)
	storetest.Run(t, func(t *testing.T) store.Store { return open(t, newDSN(t, server)) })
}

func TestReopened(t *testing.T) {
	server := sharedServer(t)
	storetest.RunReopened(t, func(t *testing.T) func(t *testing.T) store.Store {
		dsn := newDSN(t, server)
		return func(t *testing.T) store.Store { return open(t, dsn) }
	})
}
