package sqlite

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/keyferry/keyferry/engine/store"
)

var (
	countsQuery   = &query{`SELECT state, spec, n FROM cmk_count WHERE n > 0 ORDER BY state, spec`}
	listQuery     = &query{`SELECT ` + keyColumns + ` FROM cmk ORDER BY created_at, key_id LIMIT $1 OFFSET $2`}
	listByIDQuery = &query{`SELECT ` + keyColumns + ` FROM cmk WHERE key_id IN (SELECT value FROM json_each($1))
	ORDER BY created_at, key_id`}
)

// group is the keys of one state and spec.
type group struct {
	state, spec string
	n           int
}

// ListKeys implements store.Store. It reads about offset+limit entries of an
// index and limit rows, however many keys there are and whatever the filter:
// totals are kept, and a filter by state and spec merges the lists of the few
// groups that match.
func (s *Store) ListKeys(ctx context.Context, filter store.KeyFilter, offset, limit int) (keys []store.Key, total int, err error) {
	offset, limit = max(offset, 0), max(limit, 0)
	err = s.snapshot(ctx, func(c *conn) (err error) {
		if len(filter.KeyIDs) > 0 {
			keys, total, err = listByID(c, filter, offset, limit)
			return err
		}
		groups, err := groupsOf(c)
		if err != nil {
			return err
		}
		all := len(groups)
		groups = slices.DeleteFunc(groups, func(g group) bool { return !matches(filter, g.state, g.spec) })
		for _, g := range groups {
			total += g.n
		}
		if offset >= total || limit == 0 {
			return nil
		}
		collect := func(row *cursor) { keys = append(keys, row.key()) }
		if len(groups) == all {
			return c.all(listQuery, collect, int64(limit), int64(offset))
		}
		return listGroups(c, groups, offset, limit, collect)
	})
	return keys, total, err
}

// matches reports whether a filter's states and specs let a key pass.
func matches(filter store.KeyFilter, state, spec string) bool {
	return (len(filter.States) == 0 || slices.Contains(filter.States, state)) &&
		(len(filter.Specs) == 0 || slices.Contains(filter.Specs, spec))
}

func groupsOf(c *conn) (groups []group, err error) {
	err = c.all(countsQuery, func(row *cursor) {
		groups = append(groups, group{row.text(), row.text(), int(row.integer())})
	})
	return groups, err
}

// listByID lists the keys named by a filter, which are few.
func listByID(c *conn, filter store.KeyFilter, offset, limit int) (keys []store.Key, total int, err error) {
	ids, err := json.Marshal(filter.KeyIDs)
	if err != nil {
		return nil, 0, fmt.Errorf("sqlite: %w", err)
	}
	err = c.all(listByIDQuery, func(row *cursor) {
		key := row.key()
		if !matches(filter, key.State, key.Spec) {
			return
		}
		if total >= offset && len(keys) < limit {
			keys = append(keys, key)
		}
		total++
	}, string(ids))
	return keys, total, err
}

// listGroups merges the lists of groups, each of which the index cmk_group has
// in order. The statement depends on how many groups there are, so it is not
// kept.
func listGroups(c *conn, groups []group, offset, limit int, scan func(*cursor)) error {
	s, err := c.statement(mergeText(len(groups)))
	if err != nil {
		return err
	}
	defer s.close()
	args := []any{int64(limit), int64(offset)}
	for _, g := range groups {
		args = append(args, g.state, g.spec)
	}
	_, err = c.run(s, -1, scan, args)
	return err
}

// mergeText is the statement that merges n groups.
func mergeText(n int) string {
	lists := make([]string, n)
	for i := range lists {
		lists[i] = fmt.Sprintf(`SELECT created_at, key_id FROM cmk WHERE state = $%d AND spec = $%d`, 2*i+3, 2*i+4)
	}
	return `SELECT ` + keyColumns + ` FROM (` + strings.Join(lists, ` UNION ALL `) + `
	ORDER BY created_at, key_id LIMIT $1 OFFSET $2) page JOIN cmk ON cmk.key_id = page.key_id
	ORDER BY page.created_at, page.key_id`
}
