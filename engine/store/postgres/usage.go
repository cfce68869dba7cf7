package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/keyferry/keyferry/engine/store"
)

const (
	usageQuery = `SELECT uses, boot, mac FROM key_usage WHERE key_id = $1`
	// Locked, lest the key be deleted before the row that refers to it is there.
	putUsageQuery = `INSERT INTO key_usage (key_id, uses, boot, mac)
	SELECT cmk.key_id, CAST($2 AS BIGINT), CAST($3 AS BIGINT), CAST($4 AS BYTEA) FROM cmk WHERE cmk.key_id = $1 FOR KEY SHARE
	ON CONFLICT (key_id) DO UPDATE SET uses = excluded.uses, boot = excluded.boot, mac = excluded.mac
	WHERE key_usage.uses = $5`
)

// Usage implements store.Store.
func (s *Store) Usage(ctx context.Context, keyID string) (usage store.Usage, err error) {
	err = s.read(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		usage = store.Usage{KeyID: keyID}
		err := c.QueryRow(ctx, usageQuery, keyID).Scan(&usage.Uses, &usage.Boot, &usage.MAC)
		if errors.Is(err, pgx.ErrNoRows) {
			err = fmt.Errorf("usage of key %q: %w", keyID, store.ErrNotFound)
		}
		return err
	})
	if err != nil {
		return store.Usage{}, err
	}
	return usage, nil
}

// PutUsages implements store.Store. SQL has no unsigned integers, and counts
// end at 2^32 anyway: one that does not fit into 63 bits is refused.
func (s *Store) PutUsages(ctx context.Context, usages []store.UsageUpdate) (stored []bool, err error) {
	for _, u := range usages {
		if u.Uses > math.MaxInt64 || u.Boot > math.MaxInt64 || u.Was > math.MaxInt64 {
			return nil, fmt.Errorf("postgres: usage of key %q is out of range", u.KeyID)
		}
	}
	values := func(u *store.UsageUpdate) []any {
		return []any{u.KeyID, int64(u.Uses), int64(u.Boot), u.MAC, int64(u.Was)}
	}
	stored = make([]bool, len(usages))
	switch len(usages) {
	case 0:
		err = ctx.Err()
	case 1:
		err = s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
			changed, err := c.Exec(ctx, putUsageQuery, values(&usages[0])...)
			stored[0] = changed.RowsAffected() == 1
			return err
		})
	default:
		// In one order, so that two nodes do not wait for each other.
		order := make([]int, len(usages))
		for i := range order {
			order[i] = i
		}
		slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(usages[a].KeyID, usages[b].KeyID) })
		err = s.transact(ctx, func(ctx context.Context, tx pgx.Tx) error {
			var batch pgx.Batch
			for _, i := range order {
				batch.Queue(putUsageQuery, values(&usages[i])...).Exec(func(changed pgconn.CommandTag) error {
					stored[i] = changed.RowsAffected() == 1
					return nil
				})
			}
			return tx.SendBatch(ctx, &batch).Close()
		})
	}
	if err != nil {
		return nil, err
	}
	return stored, nil
}
