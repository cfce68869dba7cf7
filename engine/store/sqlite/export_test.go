package sqlite

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// Pragma reads a number from the writer's connection.
func (s *Store) Pragma(t *testing.T, name string) (value int64) {
	t.Helper()
	require.NoError(t, s.write(t.Context(), func(c *conn) error {
		_, err := c.one(&query{`PRAGMA ` + name}, func(row *cursor) { value = row.integer() })
		return err
	}))
	return value
}
