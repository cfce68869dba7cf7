package postgres_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
)

func TestConfig(t *testing.T) {
	_, err := postgres.Open(t.Context(), postgres.Config{Connections: -1, Timeout: -1})
	for _, field := range []string{"DSN", "Connections", "Timeout"} {
		require.ErrorContains(t, err, field, "every problem is told at once")
	}
	const password = "correct-horse"
	for _, dsn := range []string{
		"postgres://keyferry:" + password + "@localhost:port/keyferry",
		"host=localhost password='" + password + " dbname=keyferry",
		"postgres://keyferry:" + password + "@localhost/keyferry?sslmode=sometimes",
		"password=" + password + " sslrootcert=/nowhere/ca.pem host=db.example sslmode=verify-full",
	} {
		_, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn})
		require.ErrorContains(t, err, "DSN")
		require.NotContains(t, err.Error(), password)
	}
	_, err = postgres.Open(t.Context(), postgres.Config{DSN: "postgres://keyferry@127.0.0.1:1/keyferry?sslmode=disable", Password: password})
	require.ErrorIs(t, err, store.ErrUnavailable)
	require.NotContains(t, err.Error(), password)
}

// TestInsecure asks for connections over networks whose other end may be
// anybody.
func TestInsecure(t *testing.T) {
	for dsn, refused := range map[string]bool{
		"postgres://db.invalid/keyferry":                                    true, // the default prefers TLS
		"postgres://db.invalid/keyferry?sslmode=disable":                    true,
		"postgres://db.invalid/keyferry?sslmode=require":                    true,
		"postgres://localhost,db.invalid/keyferry?sslmode=allow":            true,
		"postgres://192.0.2.1/keyferry?sslmode=prefer":                      true,
		"postgres://127.0.0.1:1/keyferry?sslmode=disable":                   false,
		"postgres://[::1]:1/keyferry?sslmode=disable":                       false,
		"host=/nowhere dbname=keyferry":                                     false,
		"postgres://localhost:1/keyferry?sslmode=verify-full":               false,
		"postgres://db.invalid:1/keyferry?sslmode=verify-full":              false,
		"postgres://127.0.0.1:1,localhost:1/keyferry?sslmode=verify-full":   false,
		"postgres://db.invalid:1,192.0.2.1:1/keyferry?sslmode=verify-full":  false,
		"postgres://db.invalid:1,192.0.2.1:1/keyferry?sslmode=require&a=b&": true,
	} {
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // far enough to be refused, and not to look names up
		_, err := postgres.Open(ctx, postgres.Config{DSN: dsn})
		if refused {
			require.ErrorContains(t, err, "would not prove that it is the database", dsn)
			_, err = postgres.Open(ctx, postgres.Config{DSN: dsn, AllowInsecure: true})
		}
		require.ErrorIs(t, err, context.Canceled, dsn)
	}
}

// emptyDSN names a database without tables.
func emptyDSN(t *testing.T, server *pgtest.Server) string {
	t.Helper()
	name, err := server.EmptyDatabase(t.Context())
	require.NoError(t, err)
	return server.DSN(name)
}

func TestMigrate(t *testing.T) {
	dsn := emptyDSN(t, sharedServer(t))
	_, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn})
	var schema *postgres.SchemaError
	require.ErrorAs(t, err, &schema)
	require.Zero(t, schema.Have)
	require.Zero(t, tables(t, dsn), "Open makes nothing")

	// Several nodes that are started at once.
	const nodes = 3
	errs := make(chan error)
	for range nodes {
		go func() {
			_, to, err := postgres.Migrate(context.Background(), postgres.Config{DSN: dsn})
			if err == nil && to != schema.Want {
				err = fmt.Errorf("migrated to %d", to)
			}
			errs <- err
		}()
	}
	for range nodes {
		require.NoError(t, <-errs)
	}
	from, to, err := postgres.Migrate(t.Context(), postgres.Config{DSN: dsn})
	require.NoError(t, err)
	require.Equal(t, schema.Want, from)
	require.Equal(t, schema.Want, to, "once more changes nothing")
	s := open(t, dsn)
	require.NoError(t, s.CreateKey(t.Context(), testKey(1)))
	require.NoError(t, s.Close())
}

// TestOtherSchemas opens databases that an older Keyferry and a newer one have
// left.
func TestOtherSchemas(t *testing.T) {
	server := sharedServer(t)
	dsn := emptyDSN(t, server)
	_, want, err := postgres.Migrate(t.Context(), postgres.Config{DSN: dsn})
	require.NoError(t, err)
	for _, have := range []int64{want - 1, want + 1} {
		execute(t, dsn, fmt.Sprintf(`DELETE FROM keyferry_schema WHERE version_id >= %d`, want))
		if have > want {
			execute(t, dsn, fmt.Sprintf(`INSERT INTO keyferry_schema (version_id, is_applied) VALUES (%d, true)`, have))
		}
		_, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn})
		var schema *postgres.SchemaError
		require.ErrorAs(t, err, &schema)
		require.Equal(t, postgres.SchemaError{Have: have, Want: want}, *schema)
	}
	_, _, err = postgres.Migrate(t.Context(), postgres.Config{DSN: dsn})
	require.ErrorContains(t, err, "a newer Keyferry has migrated it", "never backwards")
}

// TestBytewise makes the tables as for CockroachDB.
func TestBytewise(t *testing.T) {
	dsn := emptyDSN(t, sharedServer(t))
	postgres.MigrateBytewise(t, dsn)
	c, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { require.NoError(t, c.Close(context.Background())) }()
	var collated int
	require.NoError(t, c.QueryRow(t.Context(), `SELECT count(*) FROM information_schema.columns
		WHERE table_schema = 'public' AND collation_name IS NOT NULL`).Scan(&collated))
	require.Zero(t, collated)
	s := open(t, dsn)
	defer func() { require.NoError(t, s.Close()) }()
	require.NoError(t, s.CreateKey(t.Context(), testKey(1)))
	_, total, err := s.ListKeys(t.Context(), store.KeyFilter{Specs: []string{testKey(1).Spec}}, 0, 1)
	require.NoError(t, err)
	require.Equal(t, 1, total)
}

func TestInstancesDiffer(t *testing.T) {
	seen := map[string]bool{}
	for range 2 {
		dsn := emptyDSN(t, sharedServer(t))
		_, _, err := postgres.Migrate(t.Context(), postgres.Config{DSN: dsn})
		require.NoError(t, err)
		s := open(t, dsn)
		name, err := s.Instance(t.Context())
		require.NoError(t, err)
		require.Regexp(t, `^[0-9a-f]{16}$`, name)
		require.False(t, seen[name], "two databases have one name")
		seen[name] = true
		require.NoError(t, s.Close())
	}
}

// TestDurable has a database that acknowledges what it has not yet written, as
// far as a session may decide that.
func TestDurable(t *testing.T) {
	server := sharedServer(t)
	dsn := newDSN(t, server)
	name := databaseOf(t, dsn)
	execute(t, dsn, `ALTER DATABASE `+name+` SET synchronous_commit = off`)
	defer execute(t, dsn, `ALTER DATABASE `+name+` RESET synchronous_commit`)
	var log bytes.Buffer
	s, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	require.Equal(t, "on", s.Setting(t, "synchronous_commit"))
	require.Equal(t, "11s", s.Setting(t, "statement_timeout"))
	require.Equal(t, "11s", s.Setting(t, "idle_in_transaction_session_timeout"))
	require.Contains(t, log.String(), "fsync=off", "as the servers of tests are")
}

func databaseOf(t *testing.T, dsn string) string {
	t.Helper()
	cfg, err := pgx.ParseConfig(dsn)
	require.NoError(t, err)
	return cfg.Database
}

func execute(t *testing.T, dsn, statement string) {
	t.Helper()
	c, err := pgx.Connect(context.Background(), dsn)
	require.NoError(t, err)
	_, err = c.Exec(context.Background(), statement)
	require.NoError(t, err)
	require.NoError(t, c.Close(context.Background()))
}

func tables(t *testing.T, dsn string) (n int) {
	t.Helper()
	c, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	require.NoError(t, c.QueryRow(t.Context(), `SELECT count(*) FROM pg_tables WHERE schemaname = 'public'`).Scan(&n))
	require.NoError(t, c.Close(t.Context()))
	return n
}
