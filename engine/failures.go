package engine

import (
	"sync"
	"time"
)

// failures counts the refusals of import tokens beside the store, which counts
// them durably: a store whose counts someone sets back, or which cannot count
// just now, does not give this process more tries than the budget.
type failures struct {
	mu     sync.Mutex
	counts map[[16]byte]*failure
}

type failure struct {
	n         int
	expiresAt time.Time // of the import token
}

// add counts one refusal.
func (f *failures) add(token *importToken) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.counts == nil {
		f.counts = make(map[[16]byte]*failure)
	}
	if f.counts[token.id] == nil {
		f.counts[token.id] = &failure{expiresAt: token.expiresAt}
	}
	f.counts[token.id].n++
}

// most is the greater of what is counted here and in the store.
func (f *failures) most(id [16]byte, stored int) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.counts[id]; c != nil {
		return max(c.n, stored)
	}
	return stored
}

// forget drops the counts of tokens that have expired.
func (f *failures) forget(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, c := range f.counts {
		if due(c.expiresAt, now) {
			delete(f.counts, id)
		}
	}
}
