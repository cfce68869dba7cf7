package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// Material in the custody hsm.Resident is an object of the token, and so must
// be there exactly as long as a row refers to it, whatever ends a process in
// between. A journal in the store sees to that:
//
//   - before an object is made, an entry says that there may be one (Expected);
//   - the transaction that has a row refer to it makes the entry Kept, and fails
//     if somebody condemned it meanwhile;
//   - the transaction that has the row refer to another object, or to none,
//     makes the entry Condemned;
//   - the object of a Condemned entry is destroyed, and only then the entry is
//     removed.
//
// An entry that stays Expected for too long is condemned by whoever finds it.
// That race is decided by the store, so it does not depend on clocks: the age
// only keeps nodes from ending the imports of others.

// youngResident is how old an entry, or an object without one, is before it is
// believed to be left over.
const youngResident = 10 * time.Minute

// residentWarning is the part of the limit, in percent, from which on an
// operator is warned.
const residentWarning = 80

// Room is how much of the token key material takes, at one moment.
type Room struct {
	// Objects of resident material that the journal has, of all nodes on the
	// store, and how many there may be. Both are 0 where material is not
	// resident.
	Objects, Limit int
	// Memory is what the token says of itself.
	Memory hsm.Memory
	// At is when that was found out.
	At time.Time
}

// Low reports whether 80 percent of the objects that there may be are there, or
// of the token's memory are used.
func (r *Room) Low() bool {
	return r.Limit > 0 && r.Objects*100 >= r.Limit*residentWarning || r.Memory.Low()
}

// watchInterval is how often a node looks at the room that is left.
const watchInterval = time.Minute

// watchRoom looks at the room that is left, and says when it becomes low.
func (e *Engine) watchRoom(ctx context.Context) error {
	r := &Room{At: e.second()}
	if slices.Contains(e.custodies, hsm.Resident) {
		entries, err := e.store.Residents(ctx, time.Time{}, 0)
		if err != nil {
			return storeError(err)
		}
		r.Objects, r.Limit = len(entries), e.residentLimit
	}
	var err error
	if r.Memory, err = e.token.Memory(ctx); err != nil {
		return tokenError(err)
	}
	before := e.room.Swap(r)
	low, wasLow := r.Low(), before != nil && before.Low()
	switch {
	case low && !wasLow:
		e.log.LogAttrs(ctx, slog.LevelWarn, "the token is nearly full of key material", slog.Int("objects", r.Objects), slog.Int("limit", r.Limit),
			slog.Uint64("free_memory", r.Memory.Free), slog.Uint64("memory", r.Memory.Total))
	case wasLow && !low:
		e.log.LogAttrs(ctx, slog.LevelInfo, "the token has room for key material again", slog.Int("objects", r.Objects), slog.Int("limit", r.Limit))
	}
	return nil
}

// custodyOf is how a CMK's material is kept.
func custodyOf(row *store.Key) hsm.Custody {
	if row.Custody == hsm.Resident.String() {
		return hsm.Resident
	}
	return hsm.Sealed
}

// storedCustody is a custody as rows have it.
func storedCustody(c hsm.Custody) string {
	if c == hsm.Resident {
		return c.String()
	}
	return ""
}

// holdingOf says what the token holds of a row, nil if it never holds anything.
func holdingOf(row *store.Key) *store.Holding {
	if custodyOf(row) != hsm.Resident {
		return nil
	}
	h := &store.Holding{}
	if id, ok := objectOf(row); ok {
		h.ID = id[:]
	}
	return h
}

// objectOf returns the object that a row refers to.
func objectOf(row *store.Key) (id hsm.ObjectID, ok bool) {
	var m hsm.Material
	if !hasMaterial(row) || m.UnmarshalBinary(row.Material) != nil || m.Custody != hsm.Resident {
		return id, false
	}
	return hsm.ObjectID(m.Ref), true
}

// Of the pairs of both custodies each has pools of its own. What stands for the
// spec of a pair in its row and in its import tokens is its kind: the spec, and
// for resident material the custody behind it. So neither a row nor a token
// that was made for one custody serves the other.
const residentKind = " resident"

func kindOf(spec hsm.PairSpec, custody hsm.Custody) hsm.PairSpec {
	if custody == hsm.Resident {
		return spec + residentKind
	}
	return spec
}

func ofKind(kind hsm.PairSpec) (hsm.PairSpec, hsm.Custody) {
	if n := len(kind) - len(residentKind); n > 0 && kind[n:] == residentKind {
		return kind[:n], hsm.Resident
	}
	return kind, hsm.Sealed
}

// custodies are those that CMKs can have here, the one of new CMKs first.
func custodies(token *hsm.Token, custody hsm.Custody, only bool) ([]hsm.Custody, error) {
	if err := token.Keeps(custody, hsm.AES256); err != nil {
		return nil, tokenError(err)
	}
	out := []hsm.Custody{custody}
	for _, other := range []hsm.Custody{hsm.Sealed, hsm.Resident} {
		if !only && other != custody && token.Keeps(other, hsm.AES256) == nil {
			out = append(out, other)
		}
	}
	return out, nil
}

// chooseCustody is the custody of a new CMK.
func (e *Engine) chooseCustody(asked hsm.Custody, spec KeySpec) (hsm.Custody, error) {
	if asked == 0 {
		asked = e.custodies[0]
	}
	if err := e.token.Keeps(asked, spec.materialSpec()); err != nil {
		return 0, tokenError(err)
	}
	if !slices.Contains(e.custodies, asked) {
		return 0, &Error{Kind: UnsupportedOp, Hint: fmt.Sprintf("key material is %s here", e.custodies[0])}
	}
	return asked, nil
}

// pooled are the kinds of pairs that are kept ready: those for new CMKs, and
// the others once one was asked for.
func (e *Engine) pooled() []WrappingOffer {
	out := e.offersFor(e.custodies[0])
	if e.bothPools.Load() {
		for _, other := range e.custodies[1:] {
			out = append(out, e.offersFor(other)...)
		}
	}
	return out
}

func (e *Engine) offersFor(custody hsm.Custody) []WrappingOffer {
	out := slices.Clone(e.offers)
	for i := range out {
		out[i].Spec = kindOf(out[i].Spec, custody)
	}
	return out
}

// makesPairs reports whether pairs of a kind are made here.
func (e *Engine) makesPairs(kind WrappingOffer) bool {
	spec, custody := ofKind(kind.Spec)
	return slices.Contains(e.offers, WrappingOffer{spec, kind.Algorithm}) && slices.Contains(e.custodies, custody)
}

// residents are the objects that rows refer to and that the token was found
// not to have.
type residents struct {
	mu   sync.Mutex
	lost map[hsm.ObjectID]time.Time // when that was found out
}

// lostFor is how long the token is not asked again for a lost object: it is
// searched for over seconds, and a session is taken meanwhile.
const lostFor = time.Minute

func (r *residents) lose(id hsm.ObjectID, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lost == nil {
		r.lost = make(map[hsm.ObjectID]time.Time)
	}
	r.lost[id] = now
}

func (r *residents) find(id hsm.ObjectID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.lost, id)
}

// isLost reports whether an object was missed, and whether that was just now.
func (r *residents) isLost(id hsm.ObjectID, now time.Time) (lost, recently bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at, lost := r.lost[id]
	return lost, lost && now.Sub(at) < lostFor
}

// errReplaced: the row does not refer to that object any more.
var errReplaced = errors.New("engine: the key was changed while its material was opened")

// openResident returns the material of a row that is an object of the token.
// One that is not there may be new, made by another node, or old: replaced or
// destroyed since the row was read. So the row is read again with each search;
// errReplaced.
func (e *Engine) openResident(ctx context.Context, row *store.Key, m hsm.Material) (*hsm.Key, error) {
	identity, known, err := identityOf(row)
	if err != nil {
		return nil, err
	}
	if m.Custody != hsm.Resident || !known {
		return nil, &Error{Kind: Internal, cause: errors.New("the row's material is in another custody than the key's")}
	}
	id, now := hsm.ObjectID(m.Ref), e.second()
	if _, recently := e.residents.isLost(id, now); recently {
		return nil, errMaterialLost()
	}
	for deadline := time.Now().Add(hsm.SearchPatience); ; {
		key, err := e.token.OpenResident(ctx, m, e.instance, []byte(row.KeyID), identity)
		if err == nil {
			e.residents.find(id)
			return key, nil
		}
		if !errors.Is(err, hsm.ErrMaterialGone) {
			return nil, err
		}
		again, err := e.currentRow(ctx, keyRef{id: row.KeyID})
		if err != nil {
			return nil, err
		}
		if held, ok := objectOf(&again); !ok || held != id {
			return nil, errReplaced
		}
		if time.Now().After(deadline) {
			break
		}
		if rest(ctx, hsm.SearchInterval); ctx.Err() != nil {
			return nil, &Error{Kind: Unavailable, cause: ctx.Err()}
		}
	}
	e.residents.lose(id, now)
	e.logLost(ctx, row.KeyID, id)
	return nil, errMaterialLost()
}

func errMaterialLost() error {
	return &Error{Kind: MaterialLost, Hint: "its object is not in the token any more; import the same material again"}
}

func (e *Engine) logLost(ctx context.Context, keyID string, id hsm.ObjectID) {
	e.log.LogAttrs(ctx, slog.LevelError, "the material of a key is not in the token any more; restore the token, or have its owner import it again",
		slog.String("key_id", keyID), slog.String("object", id.String()))
}

// importResident has the token unwrap and measure material into an object that
// stays. Its errors are those of the token, and *Error.
func (e *Engine) importResident(ctx context.Context, a *admitted, req hsm.ImportRequest) (hsm.Imported, error) {
	var id hsm.ObjectID
	rand.Read(id[:]) // never fails: crypto/rand
	limit := e.residentLimit
	if _, again := objectOf(&a.row); again {
		limit = 0 // one object takes the place of another
	}
	now := e.second()
	err := e.store.AddResident(ctx, store.Resident{ID: id, KeyID: a.row.KeyID, Node: e.node, Since: now}, limit)
	switch {
	case errors.Is(err, store.ErrLimit):
		e.log.LogAttrs(ctx, slog.LevelError, "the token holds as much key material as it may; no more is imported into other keys",
			slog.Int("limit", limit))
		return hsm.Imported{}, &Error{Kind: LimitExceeded, Hint: "the token holds as much key material as it may"}
	case err != nil:
		return hsm.Imported{}, storeError(err)
	}
	token, cancel := outlast(ctx)
	defer cancel()
	imported, err := e.token.ImportResident(token, hsm.ResidentRequest{ImportRequest: req, ID: id, Instance: e.instance, Now: now})
	switch {
	case err == nil:
		return imported, nil
	case errors.Is(err, hsm.ErrUnavailable):
		// The token may do it yet. The entry is left, and goes when it is old.
	default:
		e.giveUp(ctx, a.row.KeyID, id)
	}
	if errors.Is(err, hsm.ErrFull) {
		e.log.LogAttrs(ctx, slog.LevelError, "the token is full", slog.Any("error", err))
		err = &Error{Kind: LimitExceeded, Hint: "the token is full"}
	}
	return hsm.Imported{}, err
}

// outlast is a context until its deadline, also after it was cancelled. Callers
// who hang up would each leave an entry, and maybe an object, until it is old:
// soon there would be as many as there may be.
func outlast(ctx context.Context) (context.Context, context.CancelFunc) {
	lasting := context.WithoutCancel(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		return context.WithDeadline(lasting, deadline)
	}
	return lasting, func() {}
}

// giveUp ends an import that is not to be, unless it was committed after all.
// What it cannot do the sweep does.
func (e *Engine) giveUp(ctx context.Context, keyID string, id hsm.ObjectID) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	err := e.store.CondemnResident(ctx, id)
	if errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNotFound) {
		return // committed, or ended by someone else
	}
	if err == nil {
		err = e.endCondemned(ctx, keyID, id)
	}
	if err != nil {
		e.log.LogAttrs(ctx, slog.LevelWarn, "an object of a refused import is left to the sweep",
			slog.String("object", id.String()), slog.Any("error", err))
	}
}

// endCondemned destroys the object of a Condemned entry and removes that.
func (e *Engine) endCondemned(ctx context.Context, keyID string, id hsm.ObjectID) error {
	if err := e.destroyResident(ctx, keyID, id); err != nil {
		return err
	}
	return e.store.RemoveResidents(ctx, [][16]byte{id})
}

// endReplaced destroys the object that a row referred to before it was
// committed otherwise: who replaces or deletes material finds it gone from the
// token. What it cannot do in time the sweep does.
func (e *Engine) endReplaced(ctx context.Context, before, after *store.Key) {
	id, had := objectOf(before)
	if now, has := objectOf(after); !had || has && now == id {
		return
	}
	ctx, expire := outlast(ctx)
	defer expire()
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	if err := e.endCondemned(ctx, before.KeyID, id); err != nil {
		e.log.LogAttrs(ctx, slog.LevelWarn, "key material that was deleted or replaced is still in the token; it is left to the sweep",
			slog.String("key_id", before.KeyID), slog.String("object", id.String()), slog.Any("error", err))
	}
}

// errHeld: a row refers to an object that was to be destroyed.
var errHeld = errors.New("engine: a key still refers to the object; its entry in the journal was changed by someone else")

// destroyResident destroys an object that no row refers to.
func (e *Engine) destroyResident(ctx context.Context, keyID string, id hsm.ObjectID) error {
	row, err := e.store.Key(ctx, keyID)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if held, ok := objectOf(&row); ok && held == id {
		return errHeld
	}
	return e.token.DestroyResident(ctx, e.instance, id)
}

// sweepResidents destroys the objects of condemned entries, and condemns those
// that were expected for too long. One that cannot be destroyed must not save
// those behind it.
func (e *Engine) sweepResidents(ctx context.Context, now time.Time) error {
	var failed error
	skipped := make(map[[16]byte]bool)
	for {
		limit := sweepBatch + len(skipped)
		due, err := e.store.Residents(ctx, now.Add(-youngResident), limit)
		if err != nil {
			return errors.Join(failed, err)
		}
		var gone [][16]byte
		for _, r := range due {
			if skipped[r.ID] {
				continue
			}
			if r.State == store.ResidentExpected {
				err = e.store.CondemnResident(ctx, r.ID)
			}
			if err == nil {
				err = e.destroyResident(ctx, r.KeyID, r.ID)
			}
			if err == nil {
				gone = append(gone, r.ID)
				continue
			}
			skipped[r.ID] = true
			if !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrNotFound) {
				failed = errors.Join(failed, fmt.Errorf("object %x: %w", r.ID, err))
			}
			err = nil
		}
		if len(gone) > 0 {
			if err := e.store.RemoveResidents(ctx, gone); err != nil {
				return errors.Join(failed, err)
			}
		}
		if len(due) < limit || ctx.Err() != nil {
			return failed
		}
	}
}

// reconcileResidents brings token and journal together, at the start and now
// and then. Objects of this store that the journal does not know are destroyed
// when they are old; kept ones that the token does not have are reported.
func (e *Engine) reconcileResidents(ctx context.Context) error {
	if !slices.Contains(e.custodies, hsm.Resident) {
		return nil
	}
	// The token first: an object that is made meanwhile has its entry already.
	objects, err := e.token.Residents(ctx, e.instance)
	if err != nil {
		return tokenError(err)
	}
	entries, err := e.store.Residents(ctx, time.Time{}, 0)
	if err != nil {
		return storeError(err)
	}
	now := e.second()
	known := make(map[hsm.ObjectID]bool, len(entries))
	for i := range entries {
		known[entries[i].ID] = true
	}
	for _, o := range objects {
		if known[o.ID] || now.Sub(o.CreatedAt) < youngResident {
			continue
		}
		err := e.destroyResident(ctx, string(o.Context), o.ID)
		if err != nil {
			e.log.LogAttrs(ctx, slog.LevelError, "key material that no key refers to cannot be destroyed; look at it in the token",
				slog.String("object", o.ID.String()), slog.Any("error", err))
			continue
		}
		e.log.LogAttrs(ctx, slog.LevelWarn, "destroyed key material that the journal did not know",
			slog.String("object", o.ID.String()), slog.String("key_id", string(o.Context)))
	}
	return e.findLost(ctx, entries, objects, now)
}

// findLost reports kept objects that the token does not list, now either: they
// may have been made after it was asked first.
func (e *Engine) findLost(ctx context.Context, entries []store.Resident, objects []hsm.ResidentObject, now time.Time) error {
	there := make(map[hsm.ObjectID]bool, len(objects))
	for again := false; ; again = true {
		for _, o := range objects {
			there[o.ID] = true
		}
		lost := slices.DeleteFunc(slices.Clone(entries), func(r store.Resident) bool {
			return r.State != store.ResidentKept || there[r.ID]
		})
		if len(lost) == 0 {
			return nil
		}
		if again {
			for _, r := range lost {
				e.residents.lose(r.ID, now)
				e.logLost(ctx, r.KeyID, r.ID)
			}
			return nil
		}
		var err error
		if objects, err = e.token.Residents(ctx, e.instance); err != nil {
			return tokenError(err)
		}
	}
}
