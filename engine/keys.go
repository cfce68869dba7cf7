package engine

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// The window of ScheduleKeyDeletion in days.
const (
	MinPendingDays = 7
	MaxPendingDays = 366
)

// maxListed bounds one page of ListKeys, which verifies every row of it.
const maxListed = 1000

// CreateKey makes a CMK that waits for its material.
func (e *Engine) CreateKey(ctx context.Context, in CreateKeyInput) (KeyMetadata, error) {
	if in.Spec == "" {
		in.Spec = AliyunAES256
	}
	if in.Spec.materialSpec() == "" {
		return KeyMetadata{}, invalid("KeySpec", "material can be imported into Aliyun_AES_256 and Aliyun_SM4 keys")
	}
	if !utf8.ValidString(in.Description) || utf8.RuneCountInString(in.Description) > MaxDescription {
		return KeyMetadata{}, invalid("Description", "at most 8192 characters of UTF-8")
	}
	custody, err := e.chooseCustody(in.Custody, in.Spec)
	if err != nil {
		return KeyMetadata{}, err
	}
	ids, err := newIDs()
	if err != nil {
		return KeyMetadata{}, err
	}
	row := store.Key{
		KeyID:        ids[0],
		KeyVersionID: ids[1],
		Revision:     1,
		Spec:         string(in.Spec),
		State:        string(PendingImport),
		Description:  in.Description,
		CreatedAt:    e.second(),
		Custody:      storedCustody(custody),
	}
	if err := e.sealRow(ctx, &row); err != nil {
		return KeyMetadata{}, err
	}
	if err := e.store.CreateKey(ctx, row); err != nil {
		return KeyMetadata{}, storeError(err)
	}
	return metadataOf(&row), nil
}

func newIDs() (ids [2]string, err error) {
	for i := range ids {
		id, err := uuid.NewRandom()
		if err != nil {
			return ids, &Error{Kind: Internal, cause: err}
		}
		ids[i] = id.String()
	}
	return ids, nil
}

// DescribeKey returns what may be known of a CMK, as of now: material that has
// expired and keys past their deletion are gone even before the sweep.
func (e *Engine) DescribeKey(ctx context.Context, keyID string) (KeyMetadata, error) {
	if err := checkKeyID(keyID); err != nil {
		return KeyMetadata{}, err
	}
	row, err := e.currentRow(ctx, keyRef{id: keyID})
	if err != nil {
		return KeyMetadata{}, err
	}
	return e.describe(&row), nil
}

// describe is metadataOf with what the token was found not to have.
func (e *Engine) describe(row *store.Key) KeyMetadata {
	m := metadataOf(row)
	if id, ok := objectOf(row); ok {
		m.MaterialLost, _ = e.residents.isLost(id, e.second())
	}
	return m
}

// ListKeys returns CMKs in order of creation, and how many there are in all.
// Each is described as of now; which ones are selected and counted follows
// what the last sweep made durable, at most Config.SweepInterval ago. A CMK
// whose row was tampered with is left out and logged. Limit 0 means 100.
func (e *Engine) ListKeys(ctx context.Context, in ListKeysInput) (keys []KeyMetadata, total int, err error) {
	if in.Limit == 0 {
		in.Limit = 100
	}
	if in.Limit < 0 || in.Limit > maxListed {
		return nil, 0, invalid("PageSize", "from 1 to 1000")
	}
	if in.Offset < 0 {
		return nil, 0, invalid("PageNumber", "")
	}
	filter := store.KeyFilter{KeyIDs: in.KeyIDs, States: names(in.States), Specs: names(in.Specs)}
	rows, total, err := e.store.ListKeys(ctx, filter, in.Offset, in.Limit)
	if err != nil {
		return nil, 0, storeError(err)
	}
	now := e.second()
	keys = make([]KeyMetadata, 0, len(rows))
	for i := range rows {
		err := e.verifyRow(ctx, &rows[i])
		if errors.Is(err, hsm.ErrUntrusted) {
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		if row, there := asOf(rows[i], now); there {
			keys = append(keys, e.describe(&row))
		}
	}
	return keys, total, nil
}

func names[T ~string](values []T) []string {
	var list []string
	for _, value := range values {
		list = append(list, string(value))
	}
	return list
}

// EnableKey lets a disabled CMK be used again. It changes nothing in one that
// is enabled.
func (e *Engine) EnableKey(ctx context.Context, keyID string) error {
	return e.change(ctx, keyID, opEnable, nil)
}

// DisableKey stops the use of a CMK: when it returns, no call that starts then
// uses it. It changes nothing in one that is disabled.
func (e *Engine) DisableKey(ctx context.Context, keyID string) error {
	return e.change(ctx, keyID, opDisable, nil)
}

// ScheduleKeyDeletion stops the use of a CMK and has it deleted, with its
// identity and everything encrypted under it, after so many days of 24 hours.
func (e *Engine) ScheduleKeyDeletion(ctx context.Context, keyID string, days int) error {
	if days < MinPendingDays || days > MaxPendingDays {
		return invalid("PendingWindowInDays", "from 7 to 366")
	}
	return e.change(ctx, keyID, opSchedule, func(row *store.Key) {
		row.DeleteAt = e.second().Add(time.Duration(days) * 24 * time.Hour)
	})
}

// CancelKeyDeletion keeps a CMK that is pending deletion: Enabled if it has
// material, PendingImport if not.
func (e *Engine) CancelKeyDeletion(ctx context.Context, keyID string) error {
	return e.change(ctx, keyID, opCancel, func(row *store.Key) {
		row.DeleteAt = time.Time{}
		if !hasMaterial(row) {
			row.State = string(PendingImport)
		}
	})
}

// DeleteKeyMaterial destroys a CMK's material, in the store and in the token.
// Only the same material can be imported again. It is no error if there is
// none.
func (e *Engine) DeleteKeyMaterial(ctx context.Context, keyID string) error {
	return e.change(ctx, keyID, opDeleteMaterial, dropMaterial)
}

// maxConflicts bounds how often a change starts over because someone else
// changed the row meanwhile.
const maxConflicts = 16

// errContended: that was often enough.
func errContended() error {
	return &Error{Kind: Unavailable, Hint: "the key is being changed by others all the time"}
}

// change does an operation on a CMK's row: the state as the table says, then
// edit. Nothing is written if nothing changes.
func (e *Engine) change(ctx context.Context, keyID string, op operation, edit func(*store.Key)) error {
	if err := checkKeyID(keyID); err != nil {
		return err
	}
	for range maxConflicts {
		stored, err := e.readRow(ctx, keyRef{id: keyID})
		if err != nil {
			return err
		}
		row, there := asOf(stored, e.second())
		if !there {
			return &Error{Kind: KeyNotFound}
		}
		state, err := op.next(KeyState(row.State))
		if err != nil {
			return err
		}
		row.State = string(state)
		if edit != nil {
			edit(&row)
		}
		if bytes.Equal(encodeRow(&row), encodeRow(&stored)) {
			return nil
		}
		err = e.commitRow(ctx, row, store.Update{}, e.deletionEntry(&stored, &row))
		if err == nil {
			e.endReplaced(ctx, &stored, &row)
		}
		if !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	return errContended()
}

// commitRow writes the next revision of a row, with an entry of the log of
// receipts if there is one, and then closes what was open of the one before, so
// that when it returns nobody starts to use that. It returns store.ErrConflict
// as it is. update says what is to be done besides. Other nodes hear of a row
// that may not be used, and of one that is Stale otherwise, as it is used for a
// shorter time than the one before.
func (e *Engine) commitRow(ctx context.Context, row store.Key, update store.Update, entry *receipt.Entry) error {
	_, refused := opUse.next(KeyState(row.State))
	row.Revision++
	update.Stale = update.Stale || refused != nil
	if entry != nil {
		update.Receipt = e.enter(&row, entry)
	}
	if err := e.sealRow(ctx, &row); err != nil {
		return err
	}
	finish(update.Receipt, &row)
	update.Key, update.Holding = row, holdingOf(&row)
	err := e.detach(ctx, func(ctx context.Context) error {
		err := e.store.UpdateKey(ctx, update)
		e.cache.drop(row.KeyID, row.KeyVersionID, changeWait)
		return err
	})
	if err == nil && entry != nil {
		e.entered.Add(1)
	}
	switch {
	case err == nil, errors.Is(err, store.ErrConflict):
		return err
	case errors.Is(err, store.ErrSpent):
		return &Error{Kind: InvalidImportToken}
	}
	return keyError(err)
}

// checkKeyID refuses what cannot be the plain identifier of a CMK. Ours are
// UUIDs; those of Alibaba's newer kind are well formed and not found.
func checkKeyID(keyID string) error {
	switch {
	case keyID == "":
		return &Error{Kind: MissingParameter, Parameter: "KeyId"}
	case strings.HasPrefix(keyID, "alias/"):
		return &Error{Kind: UnsupportedAlias}
	case len(keyID) > 64:
		return invalid("KeyId", "")
	}
	for i := range len(keyID) {
		switch c := keyID[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-':
		default:
			return invalid("KeyId", "")
		}
	}
	return nil
}
