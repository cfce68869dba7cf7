package engine

import (
	"context"
	"time"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// Observer sees what an Engine does, for metrics. Its methods are called by
// many goroutines at once, on the way of requests, and must not wait. What it
// is told is of a bounded set of values and names no CMK: of a refused import,
// for instance, that it was refused and nothing more.
type Observer interface {
	// Imported: an import that its import token let through came to an end.
	// err is nil or an *Error.
	Imported(algorithm hsm.Algorithm, err error)
	// Used: a CMK was asked for by the data plane; cached says whether it was
	// open already.
	Used(cached bool)
	// Warned: a CMK nears the number of encryptions that AES-GCM allows.
	Warned()
	// SweptKey: expired material, or a CMK, was destroyed; SweptPair: a
	// wrapping pair. Swept: a sweep came to an end.
	SweptKey()
	SweptPair()
	Swept(err error)
}

// unobserved is the Observer of an Engine that has none.
type unobserved struct{}

// Imported does nothing.
func (unobserved) Imported(hsm.Algorithm, error) {}

// Used does nothing.
func (unobserved) Used(bool) {}

// Warned does nothing.
func (unobserved) Warned() {}

// SweptKey does nothing.
func (unobserved) SweptKey() {}

// SweptPair does nothing.
func (unobserved) SweptPair() {}

// Swept does nothing.
func (unobserved) Swept(error) {}

// Stats is what an Engine has at one moment.
type Stats struct {
	Offers   []WrappingOffer
	Pairs    []store.PairCount // of all nodes on the store; offers without pairs are not there
	OpenKeys int               // in the cache
	// DueSoon is how many CMKs lose their material, or end, within DueWithin,
	// at most MaxDue.
	DueSoon int
	// Room is as it was when it was last looked at, within a minute or so.
	Room Room
}

// Bounds of Stats.DueSoon.
const (
	DueWithin = 24 * time.Hour
	MaxDue    = 1000
)

// Stats asks the store, and so costs two reads.
func (e *Engine) Stats(ctx context.Context) (Stats, error) {
	s := Stats{Offers: e.Algorithms(), OpenKeys: e.cache.len(), Room: *e.room.Load()}
	var err error
	now := e.second()
	if s.Pairs, err = e.store.PairCounts(ctx, now); err != nil {
		return s, storeError(err)
	}
	due, err := e.store.DueKeys(ctx, now.Add(DueWithin), MaxDue)
	if err != nil {
		return s, storeError(err)
	}
	s.DueSoon = len(due)
	return s, nil
}

// len is how many keys are open in the cache.
func (c *cache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.recent.Len()
}
