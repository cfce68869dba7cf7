package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// The clock is the server's alone, so that those of the nodes do not matter.
const leaseQuery = `INSERT INTO lease (name, holder, ends_at) VALUES ($1, $2, clock_timestamp() + $3 * INTERVAL '1 millisecond')
	ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, ends_at = excluded.ends_at
	WHERE lease.holder = excluded.holder OR lease.ends_at <= clock_timestamp()`

// Lease implements store.Store.
func (s *Store) Lease(ctx context.Context, name, holder string, life time.Duration) (held bool, err error) {
	err = s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		changed, err := c.Exec(ctx, leaseQuery, name, holder, life.Milliseconds())
		held = changed.RowsAffected() == 1
		return err
	})
	return err == nil && held, err
}
