package sqlite

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"time"

	"github.com/keyferry/keyferry/engine/store"
)

// sweepStep is how many nonces one write forgets, so that a sweep of many does
// not hold up the other writes.
const sweepStep = 500

var (
	addNonceQuery = &query{`INSERT INTO nonce (digest, expires_at) VALUES ($1, $2)
	ON CONFLICT (digest) DO UPDATE SET expires_at = excluded.expires_at WHERE nonce.expires_at <= $3`}
	deleteNoncesQuery = &query{`DELETE FROM nonce WHERE digest IN
	(SELECT digest FROM nonce WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2)`}
)

// AddNonce implements store.Store. Expiry is rounded up to the second: a nonce
// is never forgotten early.
func (s *Store) AddNonce(ctx context.Context, nonce store.Nonce, now time.Time) (fresh bool, err error) {
	digest := nonceDigest(nonce.AccessKeyID, nonce.Value)
	expires := nonce.ExpiresAt.Add(time.Second - 1).Unix()
	var changed int64
	err = s.write(ctx, func(c *conn) (err error) {
		changed, err = c.exec(addNonceQuery, digest[:16], expires, now.Unix())
		return err
	})
	return err == nil && changed == 1, err
}

// nonceDigest is a hash of both, the first with its length before it.
func nonceDigest(accessKeyID, value string) [sha256.Size]byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 128), uint32(len(accessKeyID)))
	b = append(b, accessKeyID...)
	return sha256.Sum256(append(b, value...))
}

// DeleteNonces implements store.Store.
func (s *Store) DeleteNonces(ctx context.Context, now time.Time) error {
	for {
		var deleted int64
		err := s.write(ctx, func(c *conn) (err error) {
			deleted, err = c.exec(deleteNoncesQuery, now.Unix(), int64(sweepStep))
			return err
		})
		if err != nil || deleted < sweepStep {
			return err
		}
	}
}
