// Package cryptoki is the seam between Keyferry and a PKCS#11 module.
//
// Everything that Keyferry asks of a token goes through a Module and its
// Sessions, in typed constants and with buffers known to be large enough, and
// past one Hook. miekg/pkcs11 loads and initialises the module and does the
// calls that neither take templates nor return data; see calls.h for the rest.
//
// A call cannot be interrupted: it takes as long as the token takes.
package cryptoki

/*
#cgo CFLAGS: -std=gnu11
#cgo linux LDFLAGS: -ldl
#include "calls.h"
*/
import "C"

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// Module is a loaded and initialised PKCS#11 library. Safe for concurrent use.
type Module struct {
	path string
	args string // the initialisation string, for the next C_Initialize
	ctx  *pkcs11.Ctx
	f    *C.ck_functions
	hook atomic.Pointer[Hook]

	mu   sync.Mutex // guards what follows
	refs int
	ours bool // we initialised it, so we finalise it
}

var loaded = struct {
	sync.Mutex
	modules map[string]*Module
}{modules: map[string]*Module{}}

// Load loads the library at path, or shares it if it is loaded already, and
// initialises it unless somebody in this process has. A library stays mapped
// for the life of the process; Close finalises it with the last user.
//
// args is the string that some modules want from C_Initialize in pReserved, ""
// for none. Who shares a module must want it initialised alike.
func Load(path, args string) (*Module, error) {
	loaded.Lock()
	defer loaded.Unlock()
	m := loaded.modules[path]
	if m == nil {
		if _, err := open(path); err != nil {
			return nil, err
		}
		ctx := pkcs11.New(path)
		if ctx == nil {
			return nil, fmt.Errorf("cryptoki: cannot load %s", path)
		}
		m = &Module{path: path, ctx: ctx, f: functionsOf(ctx)}
		loaded.modules[path] = m
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refs > 0 && m.args != args {
		return nil, fmt.Errorf("cryptoki: %s is initialised with another string in this process", path)
	}
	if m.refs == 0 {
		m.args = args
		if err := m.initialize(); err != nil {
			return nil, fmt.Errorf("cryptoki: C_Initialize of %s: %w", path, err)
		}
	}
	m.refs++
	return m, nil
}

func open(path string) (*C.ck_functions, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	var why *C.char
	f := C.kf_load(name, &why)
	switch {
	case f != nil:
		return f, nil
	case why != nil:
		return nil, fmt.Errorf("cryptoki: cannot load the PKCS#11 module: %s", C.GoString(why))
	}
	return nil, fmt.Errorf("cryptoki: %s is not a PKCS#11 module", path)
}

// functionsOf returns the functions that miekg/pkcs11 calls, so that all calls
// go to one instance of the module: some, p11-kit's client among them, make
// another at each C_GetFunctionList. A Ctx holds a pointer to
//
//	struct ctx { void *handle; CK_FUNCTION_LIST_PTR sym; };
//
// which it does not export. go.mod pins the version in which this is so.
func functionsOf(ctx *pkcs11.Ctx) *C.ck_functions {
	inner := *(**struct {
		handle unsafe.Pointer
		sym    *C.ck_functions
	})(unsafe.Pointer(ctx))
	return inner.sym
}

// initialize is called with mu held.
func (m *Module) initialize() error {
	var reserved *C.char
	if m.args != "" {
		reserved = C.CString(m.args)
		defer C.free(unsafe.Pointer(reserved))
	}
	err := m.direct("C_Initialize", func() C.ck_rv { return C.kf_initialize(m.f, reserved) }).err()
	if errors.Is(err, AlreadyInitialized) {
		m.ours = false
		return nil
	}
	m.ours = err == nil
	return err
}

// Reinitialize initialises the module again after it, or the token behind it,
// went away. It is harmless if that has been done meanwhile; with finalize set
// a module that is still initialised, and by us alone, is finalised first.
func (m *Module) Reinitialize(finalize bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if finalize && m.ours && m.refs == 1 {
		if err := m.call("C_Finalize", m.ctx.Finalize); err != nil && !errors.Is(err, NotInitialized) {
			return err
		}
	}
	ours := m.ours
	err := m.initialize()
	if err == nil && !m.ours {
		m.ours = ours // still initialised, by whoever did it before
	}
	return err
}

// Close gives up one use of the module.
func (m *Module) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refs--
	if m.refs > 0 || !m.ours {
		return nil
	}
	m.ours = false
	err := m.call("C_Finalize", m.ctx.Finalize)
	if errors.Is(err, NotInitialized) {
		return nil
	}
	return err
}

// asRV turns what miekg/pkcs11 returns into a return value; the error is one
// that no token made.
func asRV(err error) (RV, error) {
	if err == nil {
		return OK, nil
	}
	var e pkcs11.Error
	if errors.As(err, &e) {
		return RV(e), nil
	}
	return OK, err
}

// Token is what C_GetTokenInfo says of the token in a slot.
type Token struct {
	Slot                        uint
	Label, Serial               string
	Manufacturer, Model         string
	Initialized, PINInitialized bool
	MaxSessions                 uint // 0: the token does not say, or has no limit

	// Of the user PIN: a wrong one was entered since the last login; one more
	// locks it; it is locked. Not every token says so.
	PINCountLow, PINFinalTry, PINLocked bool
}

// CKF_ flags of C_GetTokenInfo.
const (
	flagUserPINInitialized = 0x008
	flagTokenInitialized   = 0x400
	flagUserPINCountLow    = 0x10000
	flagUserPINFinalTry    = 0x20000
	flagUserPINLocked      = 0x40000
)

// Tokens lists the tokens that are present. An error may come with a list: it is
// then about a slot whose token cannot be asked.
func (m *Module) Tokens() ([]Token, error) {
	var slots []uint
	err := m.call("C_GetSlotList", func() (err error) { slots, err = m.ctx.GetSlotList(true); return })
	if err != nil {
		return nil, err
	}
	var out []Token
	var sick error
	for _, slot := range slots {
		var info pkcs11.TokenInfo
		err := m.call("C_GetTokenInfo", func() (err error) { info, err = m.ctx.GetTokenInfo(slot); return })
		if errors.Is(err, TokenNotPresent) || errors.Is(err, TokenNotRecognized) {
			continue
		}
		if err != nil {
			sick = fmt.Errorf("slot %d: %w", slot, err)
			continue
		}
		t := Token{
			Slot: slot, Label: trim(info.Label), Serial: trim(info.SerialNumber),
			Manufacturer: trim(info.ManufacturerID), Model: trim(info.Model),
			Initialized:    info.Flags&flagTokenInitialized != 0,
			PINInitialized: info.Flags&flagUserPINInitialized != 0,
			PINCountLow:    info.Flags&flagUserPINCountLow != 0,
			PINFinalTry:    info.Flags&flagUserPINFinalTry != 0,
			PINLocked:      info.Flags&flagUserPINLocked != 0,
		}
		// CK_EFFECTIVELY_INFINITE is 0, and some say it as a huge number.
		if info.MaxSessionCount < 1<<31 {
			t.MaxSessions = info.MaxSessionCount
		}
		out = append(out, t)
	}
	return out, sick
}

// trim removes the padding of PKCS#11's fixed-length strings.
func trim(s string) string { return strings.TrimRight(s, " \x00") }

// MechanismList lists what the token in a slot says it can do.
func (m *Module) MechanismList(slot uint) (map[Mechanism]bool, error) {
	var list []*pkcs11.Mechanism
	err := m.call("C_GetMechanismList", func() (err error) { list, err = m.ctx.GetMechanismList(slot); return })
	if err != nil {
		return nil, err
	}
	out := make(map[Mechanism]bool, len(list))
	for _, e := range list {
		out[Mechanism(e.Mechanism)] = true
	}
	return out, nil
}

// InitToken initialises the token in a slot, destroying everything on it. The
// label is padded to its 32 bytes.
func (m *Module) InitToken(slot uint, soPIN []byte, label string) error {
	var padded [32]byte
	copy(padded[:], strings.Repeat(" ", len(padded)))
	copy(padded[:], label)
	return m.direct("C_InitToken", func() C.ck_rv {
		return C.kf_init_token(m.f, C.ck_ulong(slot), bytesPtr(soPIN), C.ck_ulong(len(soPIN)), bytesPtr(padded[:]))
	}).err()
}

// direct makes one call of calls.h through the hook.
func (m *Module) direct(f Func, do func() C.ck_rv) RV {
	if rv := m.before(f); rv != OK {
		return rv
	}
	return m.after(f, RV(do()))
}

// bytesPtr is a pointer to b's bytes that is never nil: modules refuse NULL
// even for no data.
func bytesPtr(b []byte) unsafe.Pointer {
	if len(b) == 0 {
		return unsafe.Pointer(&zero[0])
	}
	return unsafe.Pointer(&b[0])
}

var zero [1]byte

// KeySizes returns the least and the greatest key size of a mechanism, in
// bits for RSA. MechanismInvalid if the token does not have it.
func (m *Module) KeySizes(slot uint, mech Mechanism) (least, greatest int, err error) {
	var info pkcs11.MechanismInfo
	err = m.call("C_GetMechanismInfo", func() (err error) {
		info, err = m.ctx.GetMechanismInfo(slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(uint(mech), nil)})
		return
	})
	return int(info.MinKeySize), int(info.MaxKeySize), err
}
