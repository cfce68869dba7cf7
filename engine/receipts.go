package engine

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"

	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// maxRequestID bounds ImportInput.RequestID, in bytes.
const maxRequestID = 128

// importEntry is what an import says of itself. commitRow adds what is the same
// for every entry.
func importEntry(in *ImportInput, a *admitted, imported *hsm.Imported) *receipt.Entry {
	return &receipt.Entry{
		Kind:              receipt.Import,
		RequestID:         in.RequestID,
		WrappingAlgorithm: string(a.token.algorithm),
		WrappingKey:       a.token.fingerprint,
		Ciphertext:        sha256.Sum256(in.EncryptedKeyMaterial),
		ExpireAt:          in.ExpireAt.UTC(),
		Custody:           imported.Material.Custody.String(),
		Attributes:        imported.Attributes,
	}
}

// deletionEntry is what a change says of material that it takes away, nil if it
// takes none.
func (e *Engine) deletionEntry(stored, row *store.Key) *receipt.Entry {
	if !hasMaterial(stored) || hasMaterial(row) {
		return nil
	}
	reason := receipt.Requested
	if due(stored.ExpireAt, e.second()) {
		reason = receipt.Expired
	}
	return &receipt.Entry{Kind: receipt.Deletion, Reason: reason}
}

// enter completes an entry of a row's new revision, and points the row to it.
// The row must be sealed after that and the entry be finished then.
func (e *Engine) enter(row *store.Key, entry *receipt.Entry) *store.Receipt {
	entry.Log = e.logID
	entry.KeyID, entry.KeySpec, entry.Revision = row.KeyID, row.Spec, row.Revision
	entry.Time, entry.TokenSerial = e.second(), e.token.Serial()
	copy(entry.MaterialID[:], row.MaterialID)
	copy(entry.KCV[:], row.CheckValue)
	entry.KCVAlgorithm = row.CheckValueAlgorithm
	copy(entry.Previous[:], row.Receipt)
	text := entry.Text()
	hash := receipt.HashOf(text)
	row.Receipt = hash[:]
	return &store.Receipt{
		Index: -1, KeyID: row.KeyID, Revision: row.Revision, RequestID: entry.RequestID,
		Import: entry.Kind == receipt.Import, Entry: text,
	}
}

// finish gives an entry the MAC of the row that points to it: one MAC of the
// token is for both.
func finish(r *store.Receipt, row *store.Key) {
	if r != nil {
		digest := sha256.Sum256(encodeRow(row))
		r.RowDigest, r.MAC = digest[:], row.MAC
	}
}

// verifyReceipt refuses an entry that this token's engines did not write.
func (e *Engine) verifyReceipt(ctx context.Context, r *store.Receipt) error {
	hash := receipt.HashOf(r.Entry)
	err := e.authority.verify(ctx, receiptDomain, receiptRecord(r.RowDigest, hash[:]), r.MAC)
	if errors.Is(err, hsm.ErrUntrusted) {
		e.log.LogAttrs(ctx, slog.LevelError, "an entry of the log of receipts was changed by someone else; it is not signed",
			slog.String("key_id", r.KeyID), slog.Int64("revision", r.Revision))
	}
	if err != nil {
		return tokenError(err)
	}
	return nil
}

// ReceiptInput says which receipt is asked for.
type ReceiptInput struct {
	KeyID     string
	RequestID string // of the import; "": the last import
	// Since adds a proof that the log continues its state of so many entries.
	// 0, and more than the log has, add none.
	Since int64
}

// Receipt returns the receipt of an import, also of a CMK that is gone. If no
// signed head covers the import yet, one is signed first, with all entries that
// wait for it.
func (e *Engine) Receipt(ctx context.Context, in ReceiptInput) (*receipt.Receipt, error) {
	if err := checkKeyID(in.KeyID); err != nil {
		return nil, err
	}
	if in.Since < 0 {
		return nil, invalid("Since", "a number of entries")
	}
	if err := e.checkPointer(ctx, in.KeyID); err != nil {
		return nil, err
	}
	stored, err := e.importReceipt(ctx, in)
	if err == nil && stored.Index < 0 {
		if err := e.extendLog(ctx); err != nil {
			return nil, err
		}
		stored, err = e.importReceipt(ctx, in)
	}
	switch {
	case err != nil:
		return nil, err
	case stored.Index < 0:
		return nil, &Error{Kind: Internal, cause: errors.New("the entry of the log of receipts is not one of ours")}
	}
	return e.prove(ctx, &stored, in.Since)
}

func (e *Engine) importReceipt(ctx context.Context, in ReceiptInput) (store.Receipt, error) {
	stored, err := e.store.ImportReceipt(ctx, in.KeyID, in.RequestID)
	if errors.Is(err, store.ErrNotFound) {
		_, total, err := e.store.KeyReceipts(ctx, in.KeyID, 0, 0)
		if err == nil && total == 0 {
			_, err = e.store.Key(ctx, in.KeyID)
		}
		if err != nil {
			return store.Receipt{}, keyError(err)
		}
		return store.Receipt{}, &Error{Kind: ReceiptNotFound}
	}
	if err != nil {
		return store.Receipt{}, storeError(err)
	}
	return stored, nil
}

// checkPointer makes sure that the entry that a CMK's row names as its last is
// there. A CMK that is gone has no row to tell.
func (e *Engine) checkPointer(ctx context.Context, keyID string) error {
	for range maxConflicts {
		row, err := e.readRow(ctx, keyRef{id: keyID})
		if errors.Is(err, KeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		place, err := e.placeOf(ctx, keyID, row.Receipt)
		if err != nil {
			return err
		}
		if place == 0 {
			return nil
		}
		again, err := e.store.Key(ctx, keyID)
		if err == nil && again.Revision != row.Revision {
			continue // changed meanwhile
		}
		if place < 0 {
			e.log.LogAttrs(ctx, slog.LevelError, "an entry of the log of receipts is gone, or was changed by someone else", slog.String("key_id", keyID))
			return &Error{Kind: Internal, cause: errors.New("the last entry of the key is not in the log of receipts")}
		}
		e.log.LogAttrs(ctx, slog.LevelError, "the log of receipts has later entries of a key than its row: someone put back the row of before",
			slog.String("key_id", keyID), slog.Int("entries", place))
		return nil
	}
	return nil
}

// placeOf is how many entries of a CMK are later than the one with a hash, -1
// if there is none with it. No hash is before every entry.
func (e *Engine) placeOf(ctx context.Context, keyID string, hash []byte) (int, error) {
	const page = 64
	for offset := 0; ; offset += page {
		list, total, err := e.store.KeyReceipts(ctx, keyID, offset, page)
		if err != nil {
			return 0, storeError(err)
		}
		for i := range list {
			if have := receipt.HashOf(list[i].Entry); bytes.Equal(have[:], hash) {
				return offset + i, nil
			}
		}
		switch {
		case offset+len(list) < total && len(list) > 0:
		case len(hash) == 0:
			return total, nil
		default:
			return -1, nil
		}
	}
}

// prove makes a receipt of an entry that has a place. What does not verify here
// is not handed out: somebody has changed the database.
func (e *Engine) prove(ctx context.Context, stored *store.Receipt, since int64) (*receipt.Receipt, error) {
	log, err := e.readLog(ctx)
	if err != nil {
		return nil, err
	}
	r := &receipt.Receipt{
		Index: stored.Index, Entry: stored.Entry, EntryHash: receipt.HashOf(stored.Entry),
		Head: log.signed, PublicKey: e.receiptKey.SPKI(),
	}
	if stored.Index >= log.head.Size {
		return nil, &Error{Kind: Internal, cause: errors.New("an entry has a place beyond the head of its log")}
	}
	if r.Proof, err = log.proveEntry(stored.Index); err != nil {
		return nil, e.spoiltLog(ctx, err)
	}
	if since > 0 && since <= log.head.Size {
		r.Since = &receipt.Consistency{Size: since}
		if r.Since.Proof, err = log.proveSince(since); err != nil {
			return nil, e.spoiltLog(ctx, err)
		}
	}
	if _, _, err := r.Verify(e.receiptKey); err != nil {
		return nil, e.spoiltLog(ctx, err)
	}
	return r, nil
}

// KeyReceipt is one entry of a CMK.
type KeyReceipt struct {
	Index int64 // in the log, -1 while no head covers it
	Entry []byte
}

// KeyReceipts returns the entries of a CMK, also of one that is gone, the last
// first, as they are in the database, and how many there are in all. Limit 0
// means 100.
func (e *Engine) KeyReceipts(ctx context.Context, keyID string, offset, limit int) (list []KeyReceipt, total int, err error) {
	if err := checkKeyID(keyID); err != nil {
		return nil, 0, err
	}
	if limit == 0 {
		limit = 100
	}
	if limit < 0 || limit > maxListed {
		return nil, 0, invalid("PageSize", "from 1 to 1000")
	}
	if offset < 0 {
		return nil, 0, invalid("PageNumber", "")
	}
	stored, total, err := e.store.KeyReceipts(ctx, keyID, offset, limit)
	if err == nil && total == 0 {
		_, err = e.store.Key(ctx, keyID)
	}
	if err != nil {
		return nil, 0, keyError(err)
	}
	for i := range stored {
		list = append(list, KeyReceipt{Index: stored[i].Index, Entry: stored[i].Entry})
	}
	return list, total, nil
}
