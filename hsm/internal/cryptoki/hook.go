package cryptoki

// Func is the name of a PKCS#11 function, "C_UnwrapKey".
type Func string

// Hook sees every call that goes through a Module. Tests count calls with it
// and inject the two kinds of fault: one in which the call did nothing, and
// one in which it took effect and was reported as failed.
type Hook interface {
	// Before returns OK to let the call happen, or what to report instead of it.
	Before(Func) RV
	// After returns what to report of a call that happened and answered rv.
	After(f Func, rv RV) RV
}

// SetHook installs h, or removes it with nil. Calls under way may miss it.
func (m *Module) SetHook(h Hook) {
	if h == nil {
		m.hook.Store(nil)
		return
	}
	m.hook.Store(&h)
}

func (m *Module) before(f Func) RV {
	if h := m.hook.Load(); h != nil {
		return (*h).Before(f)
	}
	return OK
}

func (m *Module) after(f Func, rv RV) RV {
	if h := m.hook.Load(); h != nil {
		return (*h).After(f, rv)
	}
	return rv
}
