package sqlite

import (
	"context"
	"fmt"
	"math"

	"github.com/keyferry/keyferry/engine/store"
)

var (
	usageQuery    = &query{`SELECT uses, boot, mac FROM key_usage WHERE key_id = $1`}
	putUsageQuery = &query{`INSERT INTO key_usage (key_id, uses, boot, mac)
	SELECT key_id, $2, $3, $4 FROM cmk WHERE key_id = $1
	ON CONFLICT (key_id) DO UPDATE SET uses = excluded.uses, boot = excluded.boot, mac = excluded.mac
	WHERE key_usage.uses = $5`}
)

// Usage implements store.Store.
func (s *Store) Usage(ctx context.Context, keyID string) (usage store.Usage, err error) {
	err = s.read(ctx, func(c *conn) error {
		found, err := c.one(usageQuery, func(row *cursor) {
			usage = store.Usage{KeyID: keyID, Uses: uint64(row.integer()), Boot: uint64(row.integer()), MAC: row.bytes()}
		}, keyID)
		if err == nil && !found {
			err = fmt.Errorf("usage of key %q: %w", keyID, store.ErrNotFound)
		}
		return err
	})
	return usage, err
}

// PutUsages implements store.Store. SQL has no unsigned integers, and counts
// end at 2^32 anyway: one that does not fit into 63 bits is refused.
func (s *Store) PutUsages(ctx context.Context, usages []store.UsageUpdate) (stored []bool, err error) {
	for _, u := range usages {
		if u.Uses > math.MaxInt64 || u.Boot > math.MaxInt64 || u.Was > math.MaxInt64 {
			return nil, fmt.Errorf("sqlite: usage of key %q is out of range", u.KeyID)
		}
	}
	if len(usages) == 0 {
		return nil, ctx.Err()
	}
	err = s.write(ctx, func(c *conn) error {
		stored = make([]bool, len(usages))
		for i, u := range usages {
			changed, err := c.exec(putUsageQuery, u.KeyID, int64(u.Uses), int64(u.Boot), u.MAC, int64(u.Was))
			if err != nil {
				return err
			}
			stored[i] = changed == 1
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return stored, nil
}
