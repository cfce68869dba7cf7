package postgres

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/keyferry/keyferry/engine/store"
)

// ListKeys implements store.Store. Page and total are of one snapshot. Totals
// are counted, in an index, and not kept: a row that every import had to update
// would make them wait for each other.
func (s *Store) ListKeys(ctx context.Context, filter store.KeyFilter, offset, limit int) (keys []store.Key, total int, err error) {
	where, args := conditions(filter)
	count := `SELECT count(*) FROM cmk` + where
	page := fmt.Sprintf(`SELECT %s FROM cmk%s ORDER BY created_at, key_id LIMIT $%d OFFSET $%d`,
		keyColumns, where, len(args)+1, len(args)+2)
	err = s.snapshot(ctx, func(ctx context.Context, tx pgx.Tx) error {
		if err := tx.QueryRow(ctx, count, args...).Scan(&total); err != nil {
			return err
		}
		keys = nil
		if offset >= total || limit <= 0 {
			return nil
		}
		rows, err := tx.Query(ctx, page, append(slices.Clip(args), limit, max(offset, 0))...)
		if err == nil {
			keys, err = pgx.AppendRows([]store.Key(nil), rows, collectKey)
		}
		return err
	})
	return keys, total, err
}

// conditions is a filter as SQL, with its arguments.
func conditions(filter store.KeyFilter) (where string, args []any) {
	for _, c := range []struct {
		column string
		values []string
	}{{"key_id", filter.KeyIDs}, {"state", filter.States}, {"spec", filter.Specs}} {
		if len(c.values) == 0 {
			continue
		}
		word := ` AND `
		if where == "" {
			word = ` WHERE `
		}
		args = append(args, storable(c.values))
		where += fmt.Sprintf(`%s%s = ANY ($%d)`, word, c.column, len(args))
	}
	return where, args
}

// storable are the values that a column of text can have, and so the only ones
// that may be asked for.
func storable(values []string) []string {
	return slices.DeleteFunc(slices.Clone(values), func(v string) bool {
		return !utf8.ValidString(v) || strings.ContainsRune(v, 0)
	})
}
