package engine

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"time"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// rowDomain labels the MAC of a CMK's row that has no receipt yet,
// receiptDomain that of one that has, and of the entry it points to.
const (
	rowDomain     = "keyferry/row/v1"
	receiptDomain = "keyferry/row/v2"
)

// encodeRow is what the MAC of a row is over: a record of every column but the
// MAC and the receipt, in an order that never changes. Nil and empty are the
// same here, and wherever the engine reads a row.
func encodeRow(row *store.Key) []byte {
	b := make([]byte, 0, 512+len(row.Description))
	b = appendField(b, row.KeyID)
	b = appendField(b, row.KeyVersionID)
	b = appendUint(b, uint64(row.Revision))
	b = appendField(b, row.Spec)
	b = appendField(b, row.State)
	b = appendField(b, row.Description)
	b = appendTime(b, row.CreatedAt)
	b = appendTime(b, row.DeleteAt)
	b = appendField(b, row.KCV)
	b = appendField(b, row.MaterialID)
	b = appendField(b, row.CheckValueAlgorithm)
	b = appendField(b, row.CheckValue)
	b = appendField(b, row.Material)
	b = appendTime(b, row.ExpireAt)
	b = appendField(b, row.WrappingAlgorithm)
	b = appendField(b, row.PairID)
	b = appendField(b, row.PairFingerprint)
	if row.Custody == "" { // as all rows were once
		return b
	}
	return appendField(b, row.Custody)
}

// authenticated is what the MAC of a row is over: encodeRow, or, of a row with a
// receipt, a record of the SHA-256 of encodeRow and the hash of the receipt's
// entry. So one MAC is for both: whoever has the digest of the row and the
// entry can verify it too, when the row has long changed.
func authenticated(row *store.Key) (domain string, record []byte) {
	encoded := encodeRow(row)
	if len(row.Receipt) == 0 {
		return rowDomain, encoded
	}
	digest := sha256.Sum256(encoded)
	return receiptDomain, receiptRecord(digest[:], row.Receipt)
}

func receiptRecord(rowDigest, entryHash []byte) []byte {
	return appendField(appendField(nil, rowDigest), entryHash)
}

// sealRow puts the MAC on a row that is about to be written.
func (e *Engine) sealRow(ctx context.Context, row *store.Key) error {
	domain, record := authenticated(row)
	mac, err := e.authority.sign(ctx, domain, record)
	if err != nil {
		return tokenError(err)
	}
	row.MAC = mac
	return nil
}

// SealRow puts on a row the MAC that an Engine on that token would, for programs
// that fill a store without one, such as benchmarks. It makes nothing of the row
// true, and gives whoever may use the token nothing new.
func SealRow(ctx context.Context, token *hsm.Token, row *store.Key) error {
	domain, record := authenticated(row)
	mac, err := token.MAC(ctx, domain, record)
	if err != nil {
		return tokenError(err)
	}
	row.MAC = mac[:]
	return nil
}

// verifyRow refuses a row that this token did not write in exactly this form.
// Nothing of a row is believed before.
func (e *Engine) verifyRow(ctx context.Context, row *store.Key) error {
	domain, record := authenticated(row)
	err := e.authority.verify(ctx, domain, record, row.MAC)
	if errors.Is(err, hsm.ErrUntrusted) {
		e.log.LogAttrs(ctx, slog.LevelError, "the row of a key was changed by someone else; it is refused",
			slog.String("key_id", row.KeyID), slog.Int64("revision", row.Revision))
	}
	if err != nil {
		return tokenError(err)
	}
	return nil
}

// keyRef is how a request names a CMK.
type keyRef struct {
	id      string
	version bool // id is a KeyVersionID
}

// refsOf are the two names of a CMK.
func refsOf(keyID, versionID string) [2]keyRef {
	return [2]keyRef{{id: keyID}, {id: versionID, version: true}}
}

// readRow returns a CMK's row, verified, and exactly as it is stored.
func (e *Engine) readRow(ctx context.Context, ref keyRef) (store.Key, error) {
	var row store.Key
	var err error
	var id string
	if ref.version {
		row, err = e.store.KeyByVersion(ctx, ref.id)
		id = row.KeyVersionID
	} else {
		row, err = e.store.Key(ctx, ref.id)
		id = row.KeyID
	}
	if err != nil {
		return store.Key{}, keyError(err)
	}
	if id != ref.id {
		return store.Key{}, &Error{Kind: Internal, cause: errWrongRow}
	}
	if err := e.verifyRow(ctx, &row); err != nil {
		return store.Key{}, err
	}
	return row, nil
}

// currentRow is a CMK's row as of now, verified.
func (e *Engine) currentRow(ctx context.Context, ref keyRef) (store.Key, error) {
	stored, err := e.readRow(ctx, ref)
	if err != nil {
		return store.Key{}, err
	}
	row, there := asOf(stored, e.second())
	if !there {
		return store.Key{}, &Error{Kind: KeyNotFound}
	}
	return row, nil
}

var errWrongRow = errors.New("the store answered the row of another key")

// asOf is the row as it is at now, whether or not the sweep has been there:
// material that has expired is gone. It reports false for a CMK that is gone
// as a whole. Times count by the second: at ExpireAt it is over.
func asOf(row store.Key, now time.Time) (_ store.Key, there bool) {
	if due(row.DeleteAt, now) {
		return store.Key{}, false
	}
	if hasMaterial(&row) && due(row.ExpireAt, now) {
		dropMaterial(&row)
	}
	return row, true
}

// due reports whether a time that is set has come.
func due(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }

func hasMaterial(row *store.Key) bool { return len(row.Material) > 0 }

// dropMaterial forgets the material and all that is true only of it. What
// stays is its identity: only the same material may come back.
func dropMaterial(row *store.Key) {
	row.Material = nil
	row.ExpireAt = time.Time{}
	row.WrappingAlgorithm = ""
	row.PairID, row.PairFingerprint = nil, nil
	if KeyState(row.State) != PendingDeletion {
		row.State = string(PendingImport)
	}
}

// identityOf returns the identity of a CMK's material, if it ever had any.
func identityOf(row *store.Key) (id hsm.Identity, known bool, err error) {
	if len(row.KCV) == 0 && len(row.MaterialID) == 0 {
		return hsm.Identity{}, false, nil
	}
	if len(row.KCV) != len(id.KCV) || len(row.MaterialID) != len(id.MaterialID) {
		return hsm.Identity{}, false, &Error{Kind: Internal, cause: errors.New("the row holds an identity of a wrong length")}
	}
	copy(id.KCV[:], row.KCV)
	copy(id.MaterialID[:], row.MaterialID)
	return id, true, nil
}

func metadataOf(row *store.Key) KeyMetadata {
	m := KeyMetadata{
		KeyID:        row.KeyID,
		KeyVersionID: row.KeyVersionID,
		Spec:         KeySpec(row.Spec),
		State:        KeyState(row.State),
		Description:  row.Description,
		CreatedAt:    row.CreatedAt,
		DeleteAt:     row.DeleteAt,
		ExpireAt:     row.ExpireAt,
		Custody:      custodyOf(row),
		CheckValue:   hsm.CheckValue{Algorithm: row.CheckValueAlgorithm},
	}
	copy(m.MaterialID[:], row.MaterialID)
	copy(m.CheckValue.Value[:], row.CheckValue)
	return m
}
