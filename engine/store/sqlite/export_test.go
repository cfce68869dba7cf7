package sqlite

import (
	"database/sql/driver"
	"testing"

	"github.com/stretchr/testify/require"
)

// Pragma reads a number from the writer's connection.
func (s *Store) Pragma(t *testing.T, name string) (value int64) {
	t.Helper()
	require.NoError(t, s.write(t.Context(), func(c *conn) error {
		_, err := c.one(&query{`PRAGMA ` + name}, func(row []driver.Value) { value, _ = row[0].(int64) })
		return err
	}))
	return value
}
