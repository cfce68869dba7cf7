package engine

import (
	"container/list"
	"context"
	"errors"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyferry/keyferry/hsm"
)

// openKey is a CMK that is Enabled and whose material is open in the token.
// All but epoch, looked, users and cached never changes.
type openKey struct {
	keyID     string
	versionID string
	expireAt  int64  // Unix seconds; math.MaxInt64: never
	aad       []byte // how the associated data of this CMK begins
	key       openMaterial
	uses      *counter

	// What the row was when it was last read: see freshness.
	revision int64
	epoch    atomic.Uint64 // store.Store's before that
	looked   atomic.Int64  // when that began, in nanoseconds of Engine.elapsed

	// Of cache.mu. The last user of a key that is out of the cache closes it.
	users  int
	cached bool
}

// openMaterial is what the data plane needs of an hsm.Key.
type openMaterial interface {
	Encrypt(ctx context.Context, dst, plaintext, aad []byte) ([]byte, error)
	Decrypt(ctx context.Context, dst, ciphertext, aad []byte) ([]byte, error)
	CloseWithin(d time.Duration) error
}

// How long those wait for a key to be closed in the token who want it closed: who
// changed its CMK, and who only wants the room. What takes longer, because a use
// hangs, goes on without them. In any case no use begins any more.
const (
	changeWait = time.Second
	roomWait   = 100 * time.Millisecond
)

// cache keeps at most size open keys, those used last. It holds no lock while
// it waits for the store or the token, and a hit asks neither.
//
// A change of a CMK is a commit and then a drop. So that nobody who starts
// after the drop uses what was there before the commit, a drop also disowns
// the loads under way: what they bring is not kept, and nobody joins them.
type cache struct {
	size    int
	load    func(ctx context.Context, id keyRef) (*openKey, error)
	discard func(k *openKey, wait time.Duration)
	used    func(cached bool)

	mu      sync.Mutex
	keys    map[keyRef]*list.Element // of *openKey, by KeyID and by KeyVersionID
	recent  *list.List               // the one used last in front
	loading map[keyRef]*load
	closed  bool
}

// A load is the opening of a key that others wait for.
type load struct {
	done  chan struct{}
	err   error // after done
	stale bool  // of cache.mu: the key was dropped meanwhile
}

func newCache(size int, open func(context.Context, keyRef) (*openKey, error), discard func(*openKey, time.Duration), used func(cached bool)) *cache {
	return &cache{
		size: size, load: open, discard: discard, used: used,
		keys:    make(map[keyRef]*list.Element),
		recent:  list.New(),
		loading: make(map[keyRef]*load),
	}
}

// get returns an open key, from the cache or by opening it; of several that
// ask for one at once, one opens it. The caller releases it.
func (c *cache) get(ctx context.Context, ref keyRef) (*openKey, error) {
	for {
		c.mu.Lock()
		if k := c.hit(ref); k != nil {
			c.mu.Unlock()
			c.used(true)
			return k, nil
		}
		if c.closed {
			c.mu.Unlock()
			return nil, &Error{Kind: Unavailable, cause: errClosed}
		}
		if l := c.loading[ref]; l != nil {
			c.mu.Unlock()
			if err := l.wait(ctx); err != nil {
				return nil, err
			}
			continue
		}
		l := &load{done: make(chan struct{})}
		c.loading[ref] = l
		c.mu.Unlock()
		c.used(false)

		k, err := c.fill(ctx, ref, l)
		if k != nil || err != nil {
			return k, err
		}
	}
}

// hit returns the cached key of that name, if there is one. The caller holds
// cache.mu.
func (c *cache) hit(ref keyRef) *openKey {
	element := c.keys[ref]
	if element == nil {
		return nil
	}
	c.recent.MoveToFront(element)
	k := element.Value.(*openKey)
	k.users++
	return k
}

// wait waits for someone else's load. That it was given up by the one who
// started it is no reason for others to fail: they start over.
func (l *load) wait(ctx context.Context) error {
	select {
	case <-l.done:
		if interrupted(l.err) {
			return nil
		}
		return l.err
	case <-ctx.Done():
		return &Error{Kind: Unavailable, cause: ctx.Err()}
	}
}

// fill opens a key and keeps it. It returns neither key nor error if the key
// was dropped meanwhile and has to be read again.
func (c *cache) fill(ctx context.Context, ref keyRef, l *load) (*openKey, error) {
	var k *openKey
	err := errPanicked
	defer func() {
		if errors.Is(err, errPanicked) { // others wait for this load
			c.mu.Lock()
			defer c.mu.Unlock()
			c.ended(ref, l)
			l.err = &Error{Kind: Internal, cause: errPanicked}
			close(l.done)
		}
	}()
	k, err = c.load(ctx, ref)
	var closing []*openKey
	c.mu.Lock()
	c.ended(ref, l)
	switch {
	case err != nil:
		l.err = err
	case l.stale || c.closed:
		closing = append(closing, k)
		k = nil
	case c.keys[keyRef{id: k.keyID}] != nil:
		// Loaded by its other name at the same time.
		closing = append(closing, k)
		k = c.hit(ref)
	default:
		k.users, k.cached = 1, true
		element := c.recent.PushFront(k)
		for _, ref := range refsOf(k.keyID, k.versionID) {
			c.keys[ref] = element
		}
		closing = c.evict()
	}
	close(l.done)
	c.mu.Unlock()
	for _, k := range closing {
		c.discard(k, roomWait)
	}
	return k, err
}

// errPanicked: a load ended without a result.
var errPanicked = errors.New("opening the key panicked")

// ended removes a load from those that others may join. The caller holds
// cache.mu.
func (c *cache) ended(ref keyRef, l *load) {
	if c.loading[ref] == l {
		delete(c.loading, ref)
	}
}

// evict takes the keys that were not used for longest out of a cache that is
// too large and returns those to close. The caller holds cache.mu.
func (c *cache) evict() (closing []*openKey) {
	for c.recent.Len() > c.size {
		k := c.recent.Back().Value.(*openKey)
		if c.takeOut(k) {
			closing = append(closing, k)
		}
	}
	return closing
}

// takeOut removes a key from the cache and reports whether nobody uses it, so
// that it is for the caller to close. The caller holds cache.mu.
func (c *cache) takeOut(k *openKey) (unused bool) {
	c.recent.Remove(c.keys[keyRef{id: k.keyID}])
	for _, ref := range refsOf(k.keyID, k.versionID) {
		delete(c.keys, ref)
	}
	k.cached = false
	return k.users == 0
}

// release ends what get began.
func (c *cache) release(k *openKey) {
	c.mu.Lock()
	k.users--
	last := k.users == 0 && !k.cached
	c.mu.Unlock()
	if last {
		c.discard(k, roomWait)
	}
}

// drop closes what is open of a CMK that was changed. When it returns, whoever
// starts to use the CMK reads it anew, and uses under way have ended, unless they
// take longer than wait.
func (c *cache) drop(keyID, versionID string, wait time.Duration) {
	c.mu.Lock()
	for _, ref := range refsOf(keyID, versionID) {
		if l := c.loading[ref]; l != nil {
			l.stale = true
			delete(c.loading, ref)
		}
	}
	var k *openKey
	if element := c.keys[keyRef{id: keyID}]; element != nil {
		k = element.Value.(*openKey)
	}
	c.mu.Unlock()
	if k != nil {
		c.dropOpen(k, wait)
	}
}

// dropOpen closes one open key, at once even if someone is about to use it.
func (c *cache) dropOpen(k *openKey, wait time.Duration) {
	c.mu.Lock()
	unused := k.cached && c.takeOut(k)
	c.mu.Unlock()
	if unused {
		c.discard(k, wait)
		return
	}
	// Whoever uses it last closes it again, which says what went wrong here.
	_ = k.key.CloseWithin(wait)
}

// close closes every key and lets no new one in.
func (c *cache) close() {
	c.mu.Lock()
	c.closed = true
	open := make([]*openKey, 0, c.recent.Len())
	for element := c.recent.Front(); element != nil; element = element.Next() {
		open = append(open, element.Value.(*openKey))
	}
	c.mu.Unlock()
	for _, k := range open {
		_ = k.key.CloseWithin(0) // of all at once
	}
	for _, k := range open {
		c.dropOpen(k, closeTimeout)
	}
}

// openRow is how the cache loads a key: it reads the row, believes it only
// with its MAC, and opens the material in the token.
func (e *Engine) openRow(ctx context.Context, ref keyRef) (*openKey, error) {
	for range maxConflicts {
		k, err := e.tryOpenRow(ctx, ref)
		if !errors.Is(err, errReplaced) {
			return k, err
		}
	}
	return nil, errContended()
}

func (e *Engine) tryOpenRow(ctx context.Context, ref keyRef) (*openKey, error) {
	epoch, looked := e.store.Epoch(), e.elapsed()
	row, err := e.currentRow(ctx, ref)
	if err != nil {
		return nil, err
	}
	if _, err := opUse.next(KeyState(row.State)); err != nil {
		return nil, err
	}
	var material hsm.Material
	if err := material.UnmarshalBinary(row.Material); err != nil {
		return nil, &Error{Kind: Internal, cause: err}
	}
	var key *hsm.Key
	if custodyOf(&row) == hsm.Resident {
		key, err = e.openResident(ctx, &row, material)
	} else {
		key, err = e.token.OpenMaterial(ctx, material)
	}
	var own *Error
	if errors.As(err, &own) || errors.Is(err, errReplaced) {
		return nil, err
	}
	if err != nil {
		if errors.Is(err, hsm.ErrUntrusted) {
			e.log.LogAttrs(ctx, slog.LevelError, "the material of a key does not open in this token",
				slog.String("key_id", row.KeyID), slog.Any("error", err))
		}
		return nil, tokenError(err)
	}
	k := &openKey{
		keyID:     row.KeyID,
		versionID: row.KeyVersionID,
		expireAt:  math.MaxInt64,
		aad:       aadHead(row.KeyID, row.KeyVersionID),
		key:       key,
		uses:      e.usage.hold(row.KeyID),
		revision:  row.Revision,
	}
	k.epoch.Store(epoch)
	k.looked.Store(int64(looked))
	if !row.ExpireAt.IsZero() {
		k.expireAt = row.ExpireAt.Unix()
	}
	return k, nil
}

// discardKey ends an open key that nobody uses any more.
func (e *Engine) discardKey(k *openKey, wait time.Duration) {
	if err := k.key.CloseWithin(wait); err != nil && wait > 0 {
		e.log.LogAttrs(context.Background(), slog.LevelWarn, "an open key could not be closed in the token",
			slog.String("key_id", k.keyID), slog.Any("error", err))
	}
	e.usage.letGo(k.uses)
}
