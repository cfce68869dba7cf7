package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/keyferry/keyferry/engine/store"
)

const (
	usageQuery = `SELECT uses, boot, mac FROM key_usage WHERE key_id = $1`
	// Locked, lest the key be deleted before the row that refers to it is there.
	putUsageQuery = `INSERT INTO key_usage (key_id, uses, boot, mac)
	SELECT cmk.key_id, CAST($2 AS BIGINT), CAST($3 AS BIGINT), CAST($4 AS BYTEA) FROM cmk WHERE cmk.key_id = $1 FOR KEY SHARE
	ON CONFLICT (key_id) DO UPDATE SET uses = excluded.uses, boot = excluded.boot, mac = excluded.mac
	WHERE key_usage.uses <= excluded.uses`
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
func (s *Store) PutUsages(ctx context.Context, usages []store.Usage) error {
	for _, u := range usages {
		if u.Uses > math.MaxInt64 || u.Boot > math.MaxInt64 {
			return fmt.Errorf("postgres: usage of key %q is out of range", u.KeyID)
		}
	}
	if len(usages) == 0 {
		return ctx.Err()
	}
	// In one order, so that two nodes do not wait for each other.
	usages = slices.Clone(usages)
	slices.SortStableFunc(usages, func(a, b store.Usage) int { return cmp.Compare(a.KeyID, b.KeyID) })
	return s.transact(ctx, func(ctx context.Context, tx pgx.Tx) error {
		var batch pgx.Batch
		for _, u := range usages {
			batch.Queue(putUsageQuery, u.KeyID, int64(u.Uses), int64(u.Boot), u.MAC)
		}
		return tx.SendBatch(ctx, &batch).Close()
	})
}
