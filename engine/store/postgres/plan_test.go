package postgres_test

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// TestPlans has every statement whose tables grow find its rows by an index,
// with 20,000 rows in each of them: none reads a table from end to end, or
// sorts what it has read but for a page of it. Only the totals of ListKeys are
// left out: they read what they count, one way or another.
//
// Plans are generic, as those of a prepared statement become, and do not
// depend on the arguments.
func TestPlans(t *testing.T) {
	dsn := newDSN(t, sharedServer(t))
	s := open(t, dsn)
	defer func() { require.NoError(t, s.Close()) }()
	c, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { require.NoError(t, c.Close(context.Background())) }()
	const rows = 20_000
	id := `decode(lpad(to_hex(n), 32, '0'), 'hex')`
	for _, statement := range []string{
		`INSERT INTO cmk (key_id, key_version_id, revision, spec, state, description, created_at, check_value_algorithm,
			material, wrapping_algorithm, mac, due_at)
			SELECT 'key-' || n, 'version-' || n, 1, 'spec' || n % 3, 'state' || n % 5, '', n, '',
				decode(repeat('ab', 100), 'hex'), '', decode(repeat('cd', 32), 'hex'), CASE WHEN n % 10 = 0 THEN n END FROM numbers`,
		`INSERT INTO pair (id, spec, algorithm, fingerprint, created_at, bound_at, expires_at)
			SELECT ` + id + `, 'spec' || n % 3, 'algorithm', '', n, CASE WHEN n % 10 > 0 THEN n END, CASE WHEN n % 10 > 0 THEN n + 86400 END FROM numbers`,
		`INSERT INTO pair_group SELECT 'spec' || n, 'algorithm' FROM generate_series(0, 2) AS n`,
		`INSERT INTO import_token SELECT ` + id + `, 'key-' || n, ` + id + `, n, n + 86400, 0 FROM numbers`,
		`INSERT INTO key_usage SELECT 'key-' || n, n, 1, '' FROM numbers`,
		`INSERT INTO nonce SELECT ` + id + `, n, n + 900 FROM numbers`,
		`INSERT INTO receipt (place, key_id, revision, request_id, is_import, entry, row_digest, mac)
			SELECT CASE WHEN n % 100 > 0 THEN n END, 'key-' || n, 1, '', n % 2 = 0, '', '', '' FROM numbers`,
		`INSERT INTO receipt_tile SELECT 0, n, '' FROM numbers`,
		`INSERT INTO resident SELECT ` + id + `, 'key-' || n, '', n, CASE WHEN n % 100 > 0 THEN 2 ELSE 3 END FROM numbers`,
	} {
		_, err := c.Exec(t.Context(), `WITH numbers AS (SELECT * FROM generate_series(1, `+strconv.Itoa(rows)+`) AS n) `+statement)
		require.NoError(t, err, statement)
	}
	_, err = c.Exec(t.Context(), `VACUUM ANALYZE`)
	require.NoError(t, err)
	_, err = c.Exec(t.Context(), `SET plan_cache_mode = force_generic_plan`)
	require.NoError(t, err)

	sequential := regexp.MustCompile(`Seq Scan on \w+`)
	statements := s.Statements()
	for _, name := range slices.Sorted(maps.Keys(statements)) {
		t.Run(name, func(t *testing.T) {
			steps := plan(t, c, statements[name])
			require.Empty(t, sequential.FindAllString(steps, -1), "%s", steps)
			if name != "ExtendLog, tiles" { // which inserts
				require.Contains(t, steps, "Index", "%s", steps)
			}
		})
	}
	require.Contains(t, plan(t, c, `SELECT key_id FROM cmk WHERE mac = $1`), "Seq Scan on cmk", "or this test finds nothing")
}

// plan is how PostgreSQL means to run a statement, whatever its arguments.
func plan(t *testing.T, c *pgx.Conn, text string) string {
	t.Helper()
	prepared, err := c.Prepare(t.Context(), "planned", text)
	require.NoError(t, err)
	defer func() { require.NoError(t, c.Deallocate(t.Context(), "planned")) }()
	explain := `EXPLAIN EXECUTE planned`
	if n := len(prepared.ParamOIDs); n > 0 {
		explain = fmt.Sprintf(`EXPLAIN EXECUTE planned (%s)`, strings.TrimSuffix(strings.Repeat("NULL, ", n), ", "))
	}
	rows, err := c.Query(t.Context(), explain, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	steps, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	return strings.Join(steps, "\n")
}
