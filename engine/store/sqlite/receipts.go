package sqlite

import (
	"context"
	"fmt"

	"github.com/keyferry/keyferry/engine/store"
)

// receiptColumns are the columns of table receipt in the order of
// cursor.receipt.
const receiptColumns = `seq, place, key_id, revision, request_id, is_import, entry, row_digest, mac`

var (
	// seq is SQLite's rowid: one more than the greatest there is.
	insertReceiptQuery = &query{`INSERT INTO receipt (key_id, revision, request_id, is_import, entry, row_digest, mac)
	VALUES ($1, $2, $3, $4, $5, $6, $7)`}
	logQuery             = &query{`SELECT log_id, size, head FROM receipt_log WHERE one = 1`}
	pendingReceiptsQuery = &query{`SELECT ` + receiptColumns + ` FROM receipt WHERE place IS NULL ORDER BY seq LIMIT $1`}
	logReceiptsQuery     = &query{`SELECT ` + receiptColumns + ` FROM receipt WHERE place >= $1 ORDER BY place LIMIT $2`}
	keyReceiptsQuery     = &query{`SELECT ` + receiptColumns + ` FROM receipt
	WHERE key_id = $1 ORDER BY revision DESC LIMIT $2 OFFSET $3`}
	countReceiptsQuery = &query{`SELECT count(*) FROM receipt WHERE key_id = $1`}
	importReceiptQuery = &query{`SELECT ` + receiptColumns + ` FROM receipt
	WHERE key_id = $1 AND is_import = 1 AND ($2 = '' OR request_id = $2) ORDER BY revision DESC LIMIT 1`}
	tileQuery         = &query{`SELECT hashes FROM receipt_tile WHERE level = $1 AND n = $2`}
	placeReceiptQuery = &query{`UPDATE receipt SET place = $2 WHERE seq = $1 AND place IS NULL`}
	putTileQuery      = &query{`INSERT INTO receipt_tile (level, n, hashes) VALUES ($1, $2, $3)
	ON CONFLICT (level, n) DO UPDATE SET hashes = excluded.hashes`}
	putHeadQuery = &query{`UPDATE receipt_log SET size = $1, head = $2 WHERE one = 1`}
)

// receipt reads receiptColumns.
func (c *cursor) receipt() (r store.Receipt) {
	r.Seq = c.integer()
	r.Index = -1
	if !c.null() {
		r.Index = c.integer()
	}
	r.KeyID = c.text()
	r.Revision = c.integer()
	r.RequestID = c.text()
	r.Import = c.integer() == 1
	r.Entry = c.bytes()
	r.RowDigest = c.bytes()
	r.MAC = c.bytes()
	return r
}

// addReceipt adds a pending entry, if there is one, to a transaction in which
// nothing can be refused any more.
func addReceipt(c *conn, r *store.Receipt) error {
	if r == nil {
		return nil
	}
	isImport := int64(0)
	if r.Import {
		isImport = 1
	}
	_, err := c.exec(insertReceiptQuery, r.KeyID, r.Revision, r.RequestID, isImport, r.Entry, r.RowDigest, r.MAC)
	return err
}

// Log implements store.Store.
func (s *Store) Log(ctx context.Context) (log store.Log, err error) {
	err = s.read(ctx, func(c *conn) error { log, err = readLog(c); return err })
	return log, err
}

func readLog(c *conn) (log store.Log, err error) {
	found, err := c.one(logQuery, func(row *cursor) {
		row.id(log.ID[:])
		log.Size = row.integer()
		log.Head = row.bytes()
	})
	if err == nil && !found {
		err = fmt.Errorf("sqlite: the database has lost the row of table receipt_log")
	}
	return log, err
}

// PendingReceipts implements store.Store.
func (s *Store) PendingReceipts(ctx context.Context, limit int) ([]store.Receipt, error) {
	return s.receipts(ctx, pendingReceiptsQuery, int64(max(limit, 0)))
}

// LogReceipts implements store.Store.
func (s *Store) LogReceipts(ctx context.Context, from int64, limit int) ([]store.Receipt, error) {
	return s.receipts(ctx, logReceiptsQuery, from, int64(max(limit, 0)))
}

func (s *Store) receipts(ctx context.Context, q *query, args ...any) ([]store.Receipt, error) {
	return rowsOf(ctx, s, (*cursor).receipt, q, args...)
}

// KeyReceipts implements store.Store.
func (s *Store) KeyReceipts(ctx context.Context, keyID string, offset, limit int) (list []store.Receipt, total int, err error) {
	err = s.snapshot(ctx, func(c *conn) error {
		_, err := c.one(countReceiptsQuery, func(row *cursor) { total = int(row.integer()) }, keyID)
		if err != nil {
			return err
		}
		return c.all(keyReceiptsQuery, func(row *cursor) { list = append(list, row.receipt()) },
			keyID, int64(max(limit, 0)), int64(max(offset, 0)))
	})
	return list, total, err
}

// ImportReceipt implements store.Store.
func (s *Store) ImportReceipt(ctx context.Context, keyID, requestID string) (r store.Receipt, err error) {
	err = s.read(ctx, func(c *conn) error {
		found, err := c.one(importReceiptQuery, func(row *cursor) { r = row.receipt() }, keyID, requestID)
		if err == nil && !found {
			err = fmt.Errorf("receipt of an import into key %q: %w", keyID, store.ErrNotFound)
		}
		return err
	})
	return r, err
}

// LogTiles implements store.Store.
func (s *Store) LogTiles(ctx context.Context, tiles []store.Tile) (list []store.Tile, err error) {
	err = s.snapshot(ctx, func(c *conn) error {
		for _, t := range tiles {
			_, err := c.one(tileQuery, func(row *cursor) {
				list = append(list, store.Tile{Level: t.Level, N: t.N, Hashes: row.bytes()})
			}, int64(t.Level), t.N)
			if err != nil {
				return err
			}
		}
		return nil
	})
	return list, err
}

// ExtendLog implements store.Store.
func (s *Store) ExtendLog(ctx context.Context, x store.LogExtension) error {
	return s.write(ctx, func(c *conn) error {
		log, err := readLog(c)
		if err != nil {
			return err
		}
		if log.Size != x.Size {
			return fmt.Errorf("log of %d entries, not %d: %w", log.Size, x.Size, store.ErrConflict)
		}
		for _, seq := range x.Entries { // all of them before the first is written: see write.do
			pending := false
			if _, err := c.one(pendingQuery, func(*cursor) { pending = true }, seq); err != nil {
				return err
			}
			if !pending {
				return fmt.Errorf("entry %d of the log is not pending: %w", seq, store.ErrConflict)
			}
		}
		for i, seq := range x.Entries {
			if _, err := c.exec(placeReceiptQuery, seq, x.Size+int64(i)); err != nil {
				return err
			}
		}
		for _, t := range x.Tiles {
			if _, err := c.exec(putTileQuery, int64(t.Level), t.N, t.Hashes); err != nil {
				return err
			}
		}
		_, err = c.exec(putHeadQuery, x.Size+int64(len(x.Entries)), x.Head)
		return err
	})
}

var pendingQuery = &query{`SELECT 1 FROM receipt WHERE seq = $1 AND place IS NULL`}
