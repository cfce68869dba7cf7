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

// receiptColumns are the columns of table receipt in the order of scanReceipt.
const receiptColumns = `seq, place, key_id, revision, request_id, is_import, entry, row_digest, mac`

const (
	logQuery             = `SELECT log_id, size, head FROM receipt_log WHERE one = 1`
	lockLogQuery         = `SELECT size FROM receipt_log WHERE one = 1 FOR UPDATE`
	pendingReceiptsQuery = `SELECT ` + receiptColumns + ` FROM receipt WHERE place IS NULL ORDER BY seq LIMIT $1`
	logReceiptsQuery     = `SELECT ` + receiptColumns + ` FROM receipt WHERE place >= $1 ORDER BY place LIMIT $2`
	keyReceiptsQuery     = `SELECT ` + receiptColumns + ` FROM receipt
	WHERE key_id = $1 ORDER BY revision DESC LIMIT $2 OFFSET $3`
	countReceiptsQuery = `SELECT count(*) FROM receipt WHERE key_id = $1`
	importReceiptQuery = `SELECT ` + receiptColumns + ` FROM receipt
	WHERE key_id = $1 AND is_import AND ($2 = '' OR request_id = $2) ORDER BY revision DESC LIMIT 1`
	tilesQuery = `SELECT level, n, hashes FROM receipt_tile
	WHERE (level, n) IN (SELECT * FROM unnest(CAST($1 AS BIGINT[]), CAST($2 AS BIGINT[])))`
	placeReceiptsQuery = `UPDATE receipt SET place = given.place
	FROM unnest(CAST($1 AS BIGINT[]), CAST($2 AS BIGINT[])) AS given (seq, place)
	WHERE receipt.seq = given.seq AND receipt.place IS NULL`
	putTileQuery = `INSERT INTO receipt_tile (level, n, hashes) VALUES ($1, $2, $3)
	ON CONFLICT (level, n) DO UPDATE SET hashes = excluded.hashes`
	putHeadQuery = `UPDATE receipt_log SET size = $1, head = $2 WHERE one = 1`
)

// withReceipt adds to the common table expression "changed" of a query another
// one that adds a pending entry.
func withReceipt(query string, args []any, r *store.Receipt) (string, []any) {
	n := len(args)
	query = fmt.Sprintf(`%s, added AS (INSERT INTO receipt (key_id, revision, request_id, is_import, entry, row_digest, mac)
		SELECT CAST($%d AS TEXT), CAST($%d AS BIGINT), CAST($%d AS TEXT), CAST($%d AS BOOLEAN), CAST($%d AS BYTEA), CAST($%d AS BYTEA), CAST($%d AS BYTEA) FROM changed)`, query, n+1, n+2, n+3, n+4, n+5, n+6, n+7)
	return query, append(args, r.KeyID, r.Revision, r.RequestID, r.Import, r.Entry, r.RowDigest, r.MAC)
}

// scanReceipt scans receiptColumns.
func scanReceipt(row pgx.Row) (r store.Receipt, err error) {
	var place pgtype.Int8
	err = row.Scan(&r.Seq, &place, &r.KeyID, &r.Revision, &r.RequestID, &r.Import, &r.Entry, &r.RowDigest, &r.MAC)
	r.Index = -1
	if place.Valid {
		r.Index = place.Int64
	}
	return r, err
}

func collectReceipt(row pgx.CollectableRow) (store.Receipt, error) { return scanReceipt(row) }

// Log implements store.Store.
func (s *Store) Log(ctx context.Context) (log store.Log, err error) {
	err = s.read(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		log = store.Log{}
		err := c.QueryRow(ctx, logQuery).Scan(identifier(log.ID[:]), &log.Size, &log.Head)
		if errors.Is(err, pgx.ErrNoRows) {
			return errNoLog
		}
		return err
	})
	return log, err
}

var errNoLog = fmt.Errorf("%w: table receipt_log has lost its row", errRow)

// PendingReceipts implements store.Store.
func (s *Store) PendingReceipts(ctx context.Context, limit int) ([]store.Receipt, error) {
	return s.receipts(ctx, pendingReceiptsQuery, max(limit, 0))
}

// LogReceipts implements store.Store.
func (s *Store) LogReceipts(ctx context.Context, from int64, limit int) ([]store.Receipt, error) {
	return s.receipts(ctx, logReceiptsQuery, from, max(limit, 0))
}

func (s *Store) receipts(ctx context.Context, query string, args ...any) ([]store.Receipt, error) {
	return rowsOf(ctx, s, collectReceipt, query, args...)
}

// KeyReceipts implements store.Store.
func (s *Store) KeyReceipts(ctx context.Context, keyID string, offset, limit int) (list []store.Receipt, total int, err error) {
	err = s.snapshot(ctx, func(ctx context.Context, tx pgx.Tx) error {
		if err := tx.QueryRow(ctx, countReceiptsQuery, keyID).Scan(&total); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, keyReceiptsQuery, keyID, max(limit, 0), max(offset, 0))
		if err == nil {
			list, err = pgx.AppendRows([]store.Receipt(nil), rows, collectReceipt)
		}
		return err
	})
	return list, total, err
}

// ImportReceipt implements store.Store.
func (s *Store) ImportReceipt(ctx context.Context, keyID, requestID string) (r store.Receipt, err error) {
	err = s.read(ctx, func(ctx context.Context, c *pgxpool.Conn) (err error) {
		r, err = scanReceipt(c.QueryRow(ctx, importReceiptQuery, keyID, requestID))
		if errors.Is(err, pgx.ErrNoRows) {
			err = fmt.Errorf("receipt of an import into key %q: %w", keyID, store.ErrNotFound)
		}
		return err
	})
	if err != nil {
		return store.Receipt{}, err
	}
	return r, nil
}

// LogTiles implements store.Store.
func (s *Store) LogTiles(ctx context.Context, tiles []store.Tile) ([]store.Tile, error) {
	levels, numbers := make([]int64, len(tiles)), make([]int64, len(tiles))
	for i, t := range tiles {
		levels[i], numbers[i] = int64(t.Level), t.N
	}
	return rowsOf(ctx, s, func(row pgx.CollectableRow) (t store.Tile, err error) {
		err = row.Scan(&t.Level, &t.N, &t.Hashes)
		return t, err
	}, tilesQuery, levels, numbers)
}

// ExtendLog implements store.Store. The lock on the log's one row has those of
// several nodes wait for each other; the second finds another size.
func (s *Store) ExtendLog(ctx context.Context, x store.LogExtension) error {
	places := make([]int64, len(x.Entries))
	for i := range places {
		places[i] = x.Size + int64(i)
	}
	return s.transact(ctx, func(ctx context.Context, tx pgx.Tx) error {
		var size int64
		err := tx.QueryRow(ctx, lockLogQuery).Scan(&size)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return errNoLog
		case err != nil:
			return err
		case size != x.Size:
			return fmt.Errorf("log of %d entries, not %d: %w", size, x.Size, store.ErrConflict)
		}
		placed, err := tx.Exec(ctx, placeReceiptsQuery, x.Entries, places)
		if err != nil {
			return err
		}
		if placed.RowsAffected() != int64(len(places)) {
			return fmt.Errorf("an entry for the log is not pending: %w", store.ErrConflict)
		}
		var batch pgx.Batch
		for _, t := range x.Tiles {
			batch.Queue(putTileQuery, int64(t.Level), t.N, t.Hashes)
		}
		batch.Queue(putHeadQuery, x.Size+int64(len(places)), x.Head)
		return tx.SendBatch(ctx, &batch).Close()
	})
}
