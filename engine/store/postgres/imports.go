package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/keyferry/keyferry/engine/store"
)

const (
	bindCheckQuery = `SELECT EXISTS (SELECT 1 FROM cmk WHERE key_id = $1),
	EXISTS (SELECT 1 FROM import_token WHERE id = $2)`
	lockGroupQuery = `SELECT 1 FROM pair_group WHERE spec = $1 AND algorithm = $2 FOR UPDATE`
	// The bound is small; counting stops there. Those that have not expired are
	// the last ones that were bound.
	boundPairsQuery = `SELECT count(*) FROM (SELECT 1 FROM pair
	WHERE spec = $1 AND algorithm = $2 AND bound_at IS NOT NULL AND expires_at > $3 ORDER BY bound_at DESC LIMIT $4) AS bound`
	// One that is being retired at this moment is passed over.
	readyPairQuery = `SELECT ` + pairColumns + ` FROM pair
	WHERE spec = $1 AND algorithm = $2 AND expires_at IS NULL ORDER BY created_at, id LIMIT 1 FOR UPDATE SKIP LOCKED`
	sharedPairQuery = `SELECT ` + pairColumns + ` FROM pair
	WHERE spec = $1 AND algorithm = $2 AND bound_at >= $3 AND expires_at > $4 ORDER BY bound_at DESC LIMIT 1`
	bindPairQuery = `UPDATE pair SET bound_at = $2, expires_at = $3 WHERE id = $1`
	// Most tokens of a second find the pair's time set by the first of them, so
	// that they need not wait for each other.
	extendPairQuery  = `UPDATE pair SET expires_at = $2 WHERE id = $1 AND expires_at < $2`
	insertTokenQuery = `INSERT INTO import_token (id, key_id, pair_id, issued_at, expires_at, failures)
	VALUES ($1, $2, $3, $4, $5, 0)`
	loadImportQuery = `SELECT ` + keyColumns + `, import_token.id, import_token.key_id, import_token.issued_at,
	import_token.expires_at, import_token.failures, ` + pairColumns + `
	FROM cmk LEFT JOIN import_token ON import_token.id = $2 LEFT JOIN pair ON pair.id = import_token.pair_id
	WHERE cmk.key_id = $1`
	countFailureQuery = `UPDATE import_token SET failures = failures + 1 WHERE id = $1 RETURNING failures`
)

// BindPair implements store.Store. Whoever takes a fresh pair holds the lock of
// its group while it counts those that are outstanding; whoever shares one
// needs no lock, as the count of outstanding pairs stays the same.
func (s *Store) BindPair(ctx context.Context, req store.BindRequest) (store.ImportToken, error) {
	token := store.ImportToken{
		ID:        req.TokenID,
		KeyID:     req.KeyID,
		IssuedAt:  whole(req.Now),
		ExpiresAt: whole(req.ExpiresAt),
	}
	err := s.transact(ctx, func(ctx context.Context, tx pgx.Tx) (err error) {
		var key, taken bool
		if err := tx.QueryRow(ctx, bindCheckQuery, req.KeyID, req.TokenID[:]).Scan(&key, &taken); err != nil {
			return err
		}
		switch {
		case !key:
			return fmt.Errorf("key %q: %w", req.KeyID, store.ErrNotFound)
		case taken:
			return fmt.Errorf("import token %x: %w", req.TokenID, store.ErrExists)
		}
		if token.Pair, err = choosePair(ctx, tx, &req); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, insertTokenQuery, token.ID[:], token.KeyID, token.Pair.ID[:], seconds(token.IssuedAt), seconds(token.ExpiresAt))
		if sqlState(err) == foreignKeyViolation { // the key or the pair was deleted at this moment
			return fmt.Errorf("key %q, or its wrapping pair: %w", req.KeyID, store.ErrNotFound)
		}
		return err
	})
	if err != nil {
		return store.ImportToken{}, err
	}
	return token, nil
}

// choosePair writes the pair for a new token and returns it.
func choosePair(ctx context.Context, tx pgx.Tx, req *store.BindRequest) (store.Pair, error) {
	full, err := outstanding(ctx, tx, req)
	if err == nil && !full {
		if _, err = tx.Exec(ctx, lockGroupQuery, req.Spec, req.Algorithm); err == nil {
			full, err = outstanding(ctx, tx, req)
		}
	}
	switch {
	case err != nil:
		return store.Pair{}, err
	case full:
		return sharePair(ctx, tx, req)
	}
	var pair store.Pair
	err = tx.QueryRow(ctx, readyPairQuery, req.Spec, req.Algorithm).Scan(pairTargets(&pair)...)
	if errors.Is(err, pgx.ErrNoRows) {
		return pair, store.ErrNoPair
	}
	if err != nil {
		return pair, err
	}
	pair.BoundAt, pair.ExpiresAt = whole(req.Now), whole(req.ExpiresAt)
	_, err = tx.Exec(ctx, bindPairQuery, pair.ID[:], seconds(pair.BoundAt), seconds(pair.ExpiresAt))
	return pair, err
}

// outstanding reports whether as many pairs are bound as may be.
func outstanding(ctx context.Context, tx pgx.Tx, req *store.BindRequest) (full bool, err error) {
	var bound int
	err = tx.QueryRow(ctx, boundPairsQuery, req.Spec, req.Algorithm, req.Now.Unix(), max(req.Bound, 0)).Scan(&bound)
	return bound >= req.Bound, err
}

func sharePair(ctx context.Context, tx pgx.Tx, req *store.BindRequest) (pair store.Pair, err error) {
	none := fmt.Errorf("%w: %w", store.ErrNoPair, store.ErrBound)
	if req.ShareSince.IsZero() {
		return pair, none
	}
	err = tx.QueryRow(ctx, sharedPairQuery, req.Spec, req.Algorithm, req.ShareSince.Unix(), req.Now.Unix()).Scan(pairTargets(&pair)...)
	if errors.Is(err, pgx.ErrNoRows) {
		return pair, none
	}
	if at := whole(req.ExpiresAt); err == nil && at.After(pair.ExpiresAt) {
		pair.ExpiresAt = at
		_, err = tx.Exec(ctx, extendPairQuery, pair.ID[:], seconds(at))
	}
	return pair, err
}

// LoadImport implements store.Store.
func (s *Store) LoadImport(ctx context.Context, keyID string, tokenID [16]byte) (key store.Key, token store.ImportToken, err error) {
	err = s.read(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		key, token = store.Key{}, store.ImportToken{}
		var failures pgtype.Int8
		var owner, spec, algorithm pgtype.Text
		p := &token.Pair
		targets := append(keyTargets(&key), identifier(token.ID[:]), &owner, (*instant)(&token.IssuedAt), (*instant)(&token.ExpiresAt), &failures,
			identifier(p.ID[:]), &spec, &algorithm, identifier(p.Fingerprint[:]), (*instant)(&p.CreatedAt), (*instant)(&p.BoundAt), (*instant)(&p.ExpiresAt))
		err := c.QueryRow(ctx, loadImportQuery, keyID, tokenID[:]).Scan(targets...)
		if errors.Is(err, pgx.ErrNoRows) {
			err = fmt.Errorf("key %q: %w", keyID, store.ErrNotFound)
		}
		token.KeyID, token.Failures = owner.String, int(failures.Int64)
		p.Spec, p.Algorithm = spec.String, algorithm.String
		return err
	})
	return key, token, err
}

// CountFailure implements store.Store.
func (s *Store) CountFailure(ctx context.Context, tokenID [16]byte) (int, error) {
	var failures int
	err := s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		err := c.QueryRow(ctx, countFailureQuery, tokenID[:]).Scan(&failures)
		if errors.Is(err, pgx.ErrNoRows) {
			err = fmt.Errorf("import token %x: %w", tokenID, store.ErrNotFound)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return failures, nil
}
