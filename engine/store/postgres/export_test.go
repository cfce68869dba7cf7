package postgres

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// Setting reads a setting of a session.
func (s *Store) Setting(t *testing.T, name string) (value string) {
	t.Helper()
	require.NoError(t, s.read(t.Context(), func(ctx context.Context, c *pgxpool.Conn) error {
		return c.QueryRow(ctx, `SELECT current_setting($1)`, name).Scan(&value)
	}))
	return value
}
