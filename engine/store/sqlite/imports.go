package sqlite

import (
	"context"
	"fmt"
	"time"

	"github.com/keyferry/keyferry/engine/store"
)

// tokenColumns are the columns of table import_token in the order of
// cursor.token, with those of its pair.
const tokenColumns = `import_token.id, import_token.key_id, import_token.issued_at, import_token.expires_at, import_token.failures,
	` + pairColumns

var (
	bindCheckQuery = &query{`SELECT EXISTS (SELECT 1 FROM cmk WHERE key_id = $1),
	EXISTS (SELECT 1 FROM import_token WHERE id = $2)`}
	// The bound is small; counting stops there.
	boundPairsQuery = &query{`SELECT count(*) FROM (SELECT 1 FROM pair
	WHERE spec = $1 AND algorithm = $2 AND bound_at IS NOT NULL AND expires_at > $3 LIMIT $4) AS bound`}
	readyPairQuery = &query{`SELECT ` + pairColumns + ` FROM pair
	WHERE spec = $1 AND algorithm = $2 AND expires_at IS NULL ORDER BY created_at, id LIMIT 1`}
	sharedPairQuery = &query{`SELECT ` + pairColumns + ` FROM pair
	WHERE spec = $1 AND algorithm = $2 AND bound_at >= $3 AND expires_at > $4 ORDER BY bound_at DESC LIMIT 1`}
	bindPairQuery    = &query{`UPDATE pair SET bound_at = $2, expires_at = $3 WHERE id = $1`}
	insertTokenQuery = &query{`INSERT INTO import_token (id, key_id, pair_id, issued_at, expires_at, failures)
	VALUES ($1, $2, $3, $4, $5, 0)`}
	loadImportQuery = &query{`SELECT ` + keyColumns + `, ` + tokenColumns + `
	FROM cmk LEFT JOIN import_token ON import_token.id = $2 LEFT JOIN pair ON pair.id = import_token.pair_id
	WHERE cmk.key_id = $1`}
	failuresQuery     = &query{`SELECT failures FROM import_token WHERE id = $1`}
	countFailureQuery = &query{`UPDATE import_token SET failures = failures + 1 WHERE id = $1 RETURNING failures`}
)

// token reads tokenColumns.
func (c *cursor) token() (t store.ImportToken) {
	c.id(t.ID[:])
	t.KeyID = c.text()
	t.IssuedAt = c.time()
	t.ExpiresAt = c.time()
	t.Failures = int(c.integer())
	t.Pair = c.pair()
	return t
}

// BindPair implements store.Store.
func (s *Store) BindPair(ctx context.Context, req store.BindRequest) (store.ImportToken, error) {
	var token store.ImportToken
	err := s.write(ctx, func(c *conn) (err error) {
		token, err = bindPair(c, req)
		return err
	})
	if err != nil {
		return store.ImportToken{}, err
	}
	return token, nil
}

// bindPair checks everything before it writes, as write.do must.
func bindPair(c *conn, req store.BindRequest) (token store.ImportToken, err error) {
	var key, taken bool
	_, err = c.one(bindCheckQuery, func(row *cursor) {
		key, taken = row.integer() == 1, row.integer() == 1
	}, req.KeyID, req.TokenID[:])
	switch {
	case err != nil:
		return token, err
	case !key:
		return token, fmt.Errorf("key %q: %w", req.KeyID, store.ErrNotFound)
	case taken:
		return token, fmt.Errorf("import token %x: %w", req.TokenID, store.ErrExists)
	}

	pair, changed, err := choosePair(c, req)
	if err != nil {
		return token, err
	}
	token = store.ImportToken{
		ID:        req.TokenID,
		KeyID:     req.KeyID,
		Pair:      pair,
		IssuedAt:  whole(req.Now),
		ExpiresAt: whole(req.ExpiresAt),
	}
	if changed {
		if _, err := c.exec(bindPairQuery, pair.ID[:], seconds(pair.BoundAt), seconds(pair.ExpiresAt)); err != nil {
			return token, err
		}
	}
	_, err = c.exec(insertTokenQuery, token.ID[:], token.KeyID, pair.ID[:], seconds(token.IssuedAt), seconds(token.ExpiresAt))
	return token, err
}

// choosePair returns the pair for a new token as it is to be stored, and whether
// that differs from how it is stored.
func choosePair(c *conn, req store.BindRequest) (pair store.Pair, changed bool, err error) {
	var bound int64
	_, err = c.one(boundPairsQuery, func(row *cursor) { bound = row.integer() },
		req.Spec, req.Algorithm, req.Now.Unix(), int64(max(req.Bound, 0)))
	if err != nil {
		return pair, false, err
	}
	scan := func(row *cursor) { pair = row.pair() }

	if bound < int64(req.Bound) {
		found, err := c.one(readyPairQuery, scan, req.Spec, req.Algorithm)
		if err == nil && !found {
			err = store.ErrNoPair
		}
		pair.BoundAt, pair.ExpiresAt = whole(req.Now), whole(req.ExpiresAt)
		return pair, true, err
	}

	found := false
	if !req.ShareSince.IsZero() {
		if found, err = c.one(sharedPairQuery, scan, req.Spec, req.Algorithm, req.ShareSince.Unix(), req.Now.Unix()); err != nil {
			return pair, false, err
		}
	}
	if !found {
		return pair, false, fmt.Errorf("%w: %w", store.ErrNoPair, store.ErrBound)
	}
	if at := whole(req.ExpiresAt); at.After(pair.ExpiresAt) {
		pair.ExpiresAt, changed = at, true
	}
	return pair, changed, nil
}

// whole is t as it would be read back.
func whole(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return time.Unix(t.Unix(), 0).UTC()
}

// LoadImport implements store.Store.
func (s *Store) LoadImport(ctx context.Context, keyID string, tokenID [16]byte) (key store.Key, token store.ImportToken, err error) {
	err = s.read(ctx, func(c *conn) error {
		found, err := c.one(loadImportQuery, func(row *cursor) {
			key, token = row.key(), row.token()
		}, keyID, tokenID[:])
		if err == nil && !found {
			err = fmt.Errorf("key %q: %w", keyID, store.ErrNotFound)
		}
		return err
	})
	return key, token, err
}

// checkBudget makes sure that an import token is not used up.
func checkBudget(c *conn, b *store.Budget) error {
	if b == nil {
		return nil
	}
	failures := int64(0)
	found, err := c.one(failuresQuery, func(row *cursor) { failures = row.integer() }, b.TokenID[:])
	if err == nil && (!found || failures >= int64(b.Failures)) {
		err = fmt.Errorf("import token %x: %w", b.TokenID, store.ErrSpent)
	}
	return err
}

// CountFailure implements store.Store.
func (s *Store) CountFailure(ctx context.Context, tokenID [16]byte) (int, error) {
	var failures int64
	err := s.write(ctx, func(c *conn) error {
		found, err := c.one(countFailureQuery, func(row *cursor) { failures = row.integer() }, tokenID[:])
		if err == nil && !found {
			err = fmt.Errorf("import token %x: %w", tokenID, store.ErrNotFound)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return int(failures), nil
}
