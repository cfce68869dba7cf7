package engine

import "sync"

// attempts knows how many imports with one import token are under way. The
// store counts the failures that are over; without those that may still come,
// many requests at once would each see budget left and together overdraw it.
//
// An import is admitted if the failures read after begin, and the number that
// begin returned, do not exceed the budget together. That is enough: of those
// that began before it, each had either ended by then, and its failure is in
// the count, or is in the number.
//
// Other nodes of the store have attempts under way of which this one does not
// know. To ask the store before each would cost a commit for every import that
// is good. What is asked instead is what an answer tells: a failure is counted
// before it is answered, and an import is committed only while the count is
// below the budget (store.Budget). So of all that nodes have under way beyond
// the budget, good or bad, nobody learns anything: each gets the answer that the
// import token is invalid, at the same times. And there is little of it: each node
// has under way at most an eighth of what the store has left, or one.
type attempts struct {
	mu      sync.Mutex
	running map[[16]byte]*running
}

type running struct {
	n     int
	ended chan struct{} // closed when one ends; nil if nobody waits for it
}

// begin returns how many are under way, this one included.
func (a *attempts) begin(id [16]byte) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.running == nil {
		a.running = make(map[[16]byte]*running)
	}
	r := a.running[id]
	if r == nil {
		r = &running{}
		a.running[id] = r
	}
	r.n++
	return r.n
}

// end ends an attempt and wakes those that withdrew.
func (a *attempts) end(id [16]byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.running[id]
	a.less(id, r)
	r.wake()
}

// withdraw takes back an attempt for which there may be no budget left. The
// channel is closed when another one ends; it is nil if none is under way. It
// wakes the others that withdrew only if it was the last: as long as one is
// left, whoever began after this one saw no more budget than this one did.
func (a *attempts) withdraw(id [16]byte) <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.running[id]
	if a.less(id, r); r.n == 0 {
		r.wake()
		return nil
	}
	if r.ended == nil {
		r.ended = make(chan struct{})
	}
	return r.ended
}

func (a *attempts) less(id [16]byte, r *running) {
	if r.n--; r.n == 0 {
		delete(a.running, id)
	}
}

func (r *running) wake() {
	if r.ended != nil {
		close(r.ended)
		r.ended = nil
	}
}
