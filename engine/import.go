package engine

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// ImportKeyMaterial imports wrapped material into a CMK. When it returns nil
// the material, its identity, its expiry, the CMK's state and the import's entry
// in the log of receipts are durable; after Unavailable they may be, as a whole. Any other error has changed nothing.
//
// The first import decides for ever which material a CMK has. Later ones bring
// back the same material, or give it another expiry.
//
// InvalidKeyMaterial is the one answer to a blob that does not decrypt, has
// the wrong length, was made for another pair or holds other material than the
// CMK's first or than the caller expects. It says nothing more, comes no
// sooner than Config.FailureFloor, and counts against the import token: after
// Config.FailureBudget of them the token is InvalidImportToken for ever.
func (e *Engine) ImportKeyMaterial(ctx context.Context, in ImportInput) (KeyMetadata, error) {
	start := time.Now() // not Config.Now: the floor is real time
	if err := in.check(e.now()); err != nil {
		return KeyMetadata{}, err
	}
	a, err := e.admit(ctx, &in)
	if err != nil {
		return KeyMetadata{}, err
	}
	defer e.attempts.end(a.token.id)
	err = e.importMaterial(ctx, &in, a)
	e.observer.Imported(a.token.algorithm, err)
	if err != nil {
		waitForFloor(ctx, start, e.failureFloor)
		if errors.Is(err, InvalidKeyMaterial) {
			err = &Error{Kind: InvalidKeyMaterial}
		}
		return KeyMetadata{}, err
	}
	return metadataOf(&a.row), nil
}

// waitForFloor waits until the time since start is a multiple of floor, so
// that nothing can be told from how long a refusal took, or until ctx ends.
func waitForFloor(ctx context.Context, start time.Time, floor time.Duration) {
	rest(ctx, floor-time.Since(start)%floor)
}

// importMaterial does an import that was admitted.
func (e *Engine) importMaterial(ctx context.Context, in *ImportInput, a *admitted) (err error) {
	imported, err := e.unwrap(ctx, in, a)
	if err != nil {
		return err
	}
	if m := &imported.Material; m.Custody == hsm.Resident {
		defer func() {
			if err != nil {
				e.giveUp(ctx, in.KeyID, hsm.ObjectID(m.Ref))
			}
		}()
	}
	for range maxConflicts {
		err := e.commitImport(ctx, in, a, &imported)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errOtherMaterial):
			return e.refuseMaterial(ctx, a)
		case errors.Is(err, store.ErrCondemned):
			return &Error{Kind: Unavailable, Hint: "the import took too long", cause: err}
		case !errors.Is(err, store.ErrConflict):
			return err
		}
		// Someone changed the CMK meanwhile. What the token measured stays
		// true; whether it may be imported is judged anew.
		if _, err := e.judge(ctx, in, a); err != nil {
			return err
		}
	}
	return errContended()
}

// check refuses what is wrong with a request by itself.
func (in *ImportInput) check(now time.Time) error {
	if err := checkKeyID(in.KeyID); err != nil {
		return err
	}
	const expiry = "KeyMaterialExpireUnix"
	switch {
	case len(in.ImportToken) == 0:
		return &Error{Kind: MissingParameter, Parameter: "ImportToken"}
	case in.ExpectCheckValue != nil && len(in.ExpectCheckValue) != hsm.KCVLen:
		return invalid(expectCheckValue, "a check value has 3 bytes")
	case in.ExpectMaterialID != nil && len(in.ExpectMaterialID) != hsm.MaterialIDLen:
		return invalid(expectMaterialID, "a material id has 32 bytes")
	case len(in.RequestID) > maxRequestID:
		return invalid("RequestId", fmt.Sprintf("at most %d bytes", maxRequestID))
	case in.ExpireAt.IsZero():
		return nil
	case in.ExpireAt.Nanosecond() != 0 || in.ExpireAt.UTC().Year() > 9999:
		return invalid(expiry, "whole seconds, before the year 10000")
	case !in.ExpireAt.After(now):
		return invalid(expiry, "it has passed")
	}
	return nil
}

// Names of parameters that the Alibaba Cloud KMS API does not have, as kmsapi
// has them.
const (
	expectCheckValue = "ExpectKeyCheckValue"
	expectMaterialID = "ExpectKeyMaterialId"
)

// admitted is an import that CMK and import token allow.
type admitted struct {
	row   store.Key // as of now, with the revision that is stored
	token importToken
	pair  store.Pair
}

// admit decides whether an import may go ahead. If so, its attempt has begun,
// for the caller to end.
func (e *Engine) admit(ctx context.Context, in *ImportInput) (*admitted, error) {
	token, wellFormed := parseImportToken(in.ImportToken)
	if !wellFormed {
		token = importToken{} // which no store knows
	}
	a := &admitted{token: token}
	for {
		n := e.attempts.begin(token.id)
		failures, err := e.judge(ctx, in, a)
		if err != nil {
			e.attempts.end(token.id)
			return nil, err
		}
		if e.attemptsAllowed(failures) >= n {
			return a, nil
		}
		// Those under way may yet use up what is left of the budget.
		if ended := e.attempts.withdraw(token.id); ended != nil {
			select {
			case <-ended:
			case <-ctx.Done():
				return nil, &Error{Kind: Unavailable, cause: ctx.Err()}
			}
		}
	}
}

// attemptsAllowed is how many imports with one import token may be under way at
// once. One may always be: whether the token is used up was judged before.
func (e *Engine) attemptsAllowed(failures int) int {
	left := e.failureBudget - failures
	if e.store.Shared() {
		left = (left + 7) / 8
	}
	return max(left, 1)
}

// judge reads CMK and import token as of one moment and refuses what either
// does not allow. It leaves in a what it read, and returns the failures of the
// import token.
func (e *Engine) judge(ctx context.Context, in *ImportInput, a *admitted) (failures int, err error) {
	stored, known, err := e.store.LoadImport(ctx, in.KeyID, a.token.id)
	if err != nil {
		return 0, keyError(err)
	}
	if stored.KeyID != in.KeyID {
		return 0, &Error{Kind: Internal, cause: errWrongRow}
	}
	if err := e.verifyRow(ctx, &stored); err != nil {
		return 0, err
	}
	row, there := asOf(stored, e.second())
	if !there {
		return 0, &Error{Kind: KeyNotFound}
	}
	if _, err := opImport.next(KeyState(row.State)); err != nil {
		return 0, err
	}
	if err := e.judgeToken(ctx, in, &a.token, &known); err != nil {
		return 0, err
	}
	a.row, a.pair = row, known.Pair
	return e.failures.most(known.ID, known.Failures), e.judgeRequest(in, a)
}

// judgeToken refuses an import token that is not ours, for another CMK, used
// up or expired, or that the store does not know as it presents itself.
func (e *Engine) judgeToken(ctx context.Context, in *ImportInput, token *importToken, known *store.ImportToken) error {
	if token.id == ([16]byte{}) {
		return &Error{Kind: InvalidImportToken}
	}
	if err := e.verifyImportToken(ctx, in.ImportToken); err != nil {
		return err
	}
	inStore := token.matches(known)
	used := e.failures.most(token.id, known.Failures)
	switch {
	case token.keyID != in.KeyID, inStore && (used >= e.failureBudget || used < 0):
		return &Error{Kind: InvalidImportToken}
	case due(token.expiresAt, e.second()):
		return &Error{Kind: ExpiredImportToken} // also when the sweep has removed its row
	case !inStore:
		return &Error{Kind: InvalidImportToken}
	}
	return nil
}

// judgeRequest refuses an algorithm that was switched off since, expectations
// that this token cannot check, and the lack of any where nothing else tells a
// damaged blob from a good one.
func (e *Engine) judgeRequest(in *ImportInput, a *admitted) error {
	spec, custody := ofKind(a.token.spec)
	if err := e.token.Offers(spec, a.token.algorithm); err != nil {
		return tokenError(err)
	}
	if custody != custodyOf(&a.row) {
		return &Error{Kind: InvalidImportToken}
	}
	if KeySpec(a.row.Spec) == AliyunSM4 && in.ExpectCheckValue != nil && e.token.Usable(hsm.SM4) != nil {
		return invalid(expectCheckValue, "this token has no SM4 to compute it with; expect a material id instead")
	}
	if a.token.algorithm == hsm.PKCS1v15 && e.token.ImplicitRejection() &&
		in.ExpectCheckValue == nil && in.ExpectMaterialID == nil {
		return invalid(expectMaterialID, "required with RSAES_PKCS1_V1_5 on this token, or a check value: "+
			"it answers a damaged blob with a random key")
	}
	return nil
}

// unwrap has the token unwrap, measure and seal the material. No lock of the
// engine is held meanwhile.
func (e *Engine) unwrap(ctx context.Context, in *ImportInput, a *admitted) (hsm.Imported, error) {
	_, err := e.pairOf(ctx, &a.pair)
	var imported hsm.Imported
	if err == nil {
		req := hsm.ImportRequest{
			Pair:      a.token.pair,
			Algorithm: a.token.algorithm,
			Wrapped:   in.EncryptedKeyMaterial,
			Spec:      KeySpec(a.row.Spec).materialSpec(),
			Context:   []byte(in.KeyID),
		}
		if custodyOf(&a.row) == hsm.Resident {
			imported, err = e.importResident(ctx, a, req)
		} else {
			imported, err = e.token.Import(ctx, req)
		}
	}
	var own *Error
	switch {
	case err == nil:
		return imported, nil
	case errors.As(err, &own):
		return hsm.Imported{}, err
	case errors.Is(err, hsm.ErrInvalidMaterial):
		return hsm.Imported{}, e.refuseMaterial(ctx, a)
	case errors.Is(err, hsm.ErrPairNotFound):
		return hsm.Imported{}, &Error{Kind: InvalidImportToken, Hint: "its public key is gone; ask for new parameters"}
	case errors.Is(err, hsm.ErrUntrusted):
		e.log.LogAttrs(ctx, slog.LevelError, "a wrapping pair is not ours; it is refused",
			slog.String("pair", pairName(a.token.pair)), slog.Any("error", err))
	}
	return hsm.Imported{}, tokenError(err)
}

// errOtherMaterial: the material is not the one that was expected.
var errOtherMaterial = errors.New("engine: other key material")

// commitImport makes the import durable in one transaction: material, identity,
// expiry, state and the entry in the log of receipts. It returns errOtherMaterial and store.ErrConflict as they
// are.
func (e *Engine) commitImport(ctx context.Context, in *ImportInput, a *admitted, imported *hsm.Imported) error {
	row := a.row
	first, known, err := identityOf(&row)
	if err != nil {
		return err
	}
	asExpected := equalOrNil(in.ExpectCheckValue, imported.CheckValue.Value[:])
	asExpected = equalOrNil(in.ExpectMaterialID, imported.Identity.MaterialID[:]) && asExpected
	if known {
		asExpected = imported.Identity.Equal(first) && asExpected
	}
	if !asExpected {
		return errOtherMaterial
	}
	state, err := opImport.next(KeyState(row.State))
	if err != nil {
		return err
	}
	material, err := imported.Material.MarshalBinary()
	if err != nil {
		return &Error{Kind: Internal, cause: err}
	}
	shortened := hasMaterial(&row) && sooner(in.ExpireAt, row.ExpireAt)
	row.State = string(state)
	row.KCV = imported.Identity.KCV[:]
	row.MaterialID = imported.Identity.MaterialID[:]
	row.CheckValueAlgorithm = imported.CheckValue.Algorithm
	row.CheckValue = imported.CheckValue.Value[:]
	row.Material = material
	row.ExpireAt = in.ExpireAt.UTC()
	row.WrappingAlgorithm = string(a.token.algorithm)
	row.PairID = a.token.pair[:]
	row.PairFingerprint = a.token.fingerprint[:]
	update := store.Update{Stale: shortened}
	if e.store.Shared() {
		update.Budget = &store.Budget{TokenID: a.token.id, Failures: e.failureBudget}
	}
	if err := e.commitRow(ctx, row, update, importEntry(in, a, imported)); err != nil {
		return err
	}
	e.endReplaced(ctx, &a.row, &row)
	a.row = row
	return nil
}

// sooner compares two times of expiry, of which zero is never.
func sooner(a, b time.Time) bool { return !a.IsZero() && (b.IsZero() || a.Before(b)) }

// equalOrNil compares in constant time what was measured with what was
// expected, if anything was.
func equalOrNil(expected, measured []byte) bool {
	return expected == nil || subtle.ConstantTimeCompare(expected, measured) == 1
}

// refuseMaterial counts a failure, durably, before anybody learns of it; a
// caller who hangs up does not keep it from being counted. If it cannot be
// counted the answer is the one that good material would have got as well.
func (e *Engine) refuseMaterial(ctx context.Context, a *admitted) error {
	e.failures.add(&a.token)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	failures, err := e.store.CountFailure(ctx, a.token.id)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return &Error{Kind: InvalidImportToken} // it expired meanwhile
	case err != nil:
		return storeError(err)
	}
	e.log.LogAttrs(ctx, slog.LevelWarn, "refused key material",
		slog.String("key_id", a.row.KeyID), slog.Int("failures", failures), slog.Int("allowed", e.failureBudget))
	if failures > e.failureBudget { // which other nodes used up meanwhile; see attempts
		return &Error{Kind: InvalidImportToken}
	}
	return &Error{Kind: InvalidKeyMaterial}
}
