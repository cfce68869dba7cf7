// Package hsmtest counts and breaks the PKCS#11 calls of this process, for
// tests of hsm and of what is built on it. It hangs on the one seam through
// which every call goes, so the token behind it is a real one.
//
// A module is shared by the whole process: tests that use this package on one
// module must not run in parallel.
package hsmtest

import (
	"maps"
	"sync"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// TB is what this package needs of a testing.TB.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(fn func())
}

// Tap sees every call to one module.
type Tap struct {
	mu     sync.Mutex
	calls  map[string]int
	faults []*Fault
	log    []string
	holds  map[string]func()
	open   int
}

// Fault is a failure of one call. There are two kinds: a call that did nothing
// and failed, and one that took effect and was reported as failed.
type Fault struct {
	Call        string // "C_UnwrapKey"; "" for any
	After       int    // how many matching calls are let through first
	RV          uint32 // what is reported
	TookEffect  bool
	Times       int  // how many calls fail; 0 for one, -1 for all from then on
	fired       int  // how often it did
	interrupted bool // Before let this very call through to be spoiled by After
}

// On taps the module at path until the test ends.
func On(tb TB, path string) *Tap {
	tb.Helper()
	m := load(tb, path)
	tap := &Tap{calls: map[string]int{}}
	m.SetHook(tap)
	tb.Cleanup(func() { m.SetHook(nil) })
	return tap
}

// Keep keeps the module at path initialised until the test ends, for other
// clients of PKCS#11 in this process.
func Keep(tb TB, path string) {
	tb.Helper()
	load(tb, path)
}

func load(tb TB, path string) *p11.Module {
	tb.Helper()
	m, err := p11.Load(path, "")
	if err != nil {
		tb.Fatalf("hsmtest: %v", err)
	}
	tb.Cleanup(func() {
		if err := m.Close(); err != nil {
			tb.Fatalf("hsmtest: %v", err)
		}
	})
	return m
}

// Inject adds a fault. Faults are independent of each other.
func (t *Tap) Inject(f Fault) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.faults = append(t.faults, &f)
}

// Heal removes all faults and reports how many calls they have spoiled.
func (t *Tap) Heal() (fired int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.faults {
		fired += f.fired
	}
	t.faults = nil
	return fired
}

// Hold runs f before each call of fn, outside of any lock: a call that waits.
func (t *Tap) Hold(fn string, f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.holds == nil {
		t.holds = map[string]func(){}
	}
	t.holds[fn] = f
}

// Sessions is how many sessions are open of those that were opened since On, by
// what the token answered, and not by what it was reported to.
func (t *Tap) Sessions() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.open
}

// Calls returns how often each function was called since the last Reset.
func (t *Tap) Calls() map[string]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.calls)
}

// Sequence returns the functions in the order of their calls since Reset.
func (t *Tap) Sequence() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string(nil), t.log...)
}

// Reset forgets what was counted.
func (t *Tap) Reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.calls)
	t.log = nil
}

// Before implements the seam's hook.
func (t *Tap) Before(fn p11.Func) p11.RV {
	t.mu.Lock()
	hold := t.holds[string(fn)]
	t.mu.Unlock()
	if hold != nil {
		hold()
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls[string(fn)]++
	t.log = append(t.log, string(fn))
	for _, f := range t.faults {
		if !f.due(string(fn)) {
			continue
		}
		if f.TookEffect {
			f.interrupted = true
			return p11.OK
		}
		return p11.RV(f.RV)
	}
	return p11.OK
}

// After implements the seam's hook.
func (t *Tap) After(fn p11.Func, rv p11.RV) p11.RV {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case rv != p11.OK:
	case fn == "C_OpenSession":
		t.open++
	case fn == "C_CloseSession":
		t.open--
	case fn == "C_Finalize":
		t.open = 0
	}
	for _, f := range t.faults {
		if f.interrupted && (f.Call == "" || f.Call == string(fn)) {
			f.interrupted = false
			return p11.RV(f.RV)
		}
	}
	return rv
}

// due reports whether the fault strikes at this call.
func (f *Fault) due(fn string) bool {
	if f.Call != "" && f.Call != fn {
		return false
	}
	if f.After > 0 {
		f.After--
		return false
	}
	if f.Times >= 0 && f.fired >= max(f.Times, 1) {
		return false
	}
	f.fired++
	return true
}
