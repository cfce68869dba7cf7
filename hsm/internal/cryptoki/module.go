// Package cryptoki is the seam between Keyferry and a PKCS#11 module.
//
// Everything that Keyferry asks of a token goes through a Module and its
// Sessions, in typed constants and with buffers known to be large enough, and
// past one Hook. The calls are made by calls.h, which says why; session handles
// and flags are those of miekg/pkcs11.
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
	"math"
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
		f, err := open(path)
		if err != nil {
			return nil, err
		}
		m = &Module{path: path, f: f}
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
		if err := m.finalize(); err != nil && !errors.Is(err, NotInitialized) {
			return err
		}
	}
	ours := m.ours
	err := m.initialize()
	if !m.ours {
		m.ours = ours // still initialised, or to be by the next attempt, as before
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
	err := m.finalize()
	if errors.Is(err, NotInitialized) {
		return nil
	}
	return err
}

func (m *Module) finalize() error {
	return m.direct("C_Finalize", func() C.ck_rv { return C.kf_finalize(m.f) }).err()
}

// Library is what C_GetInfo says of the module.
type Library struct {
	Manufacturer, Description string
	Major, Minor              int
}

// Library asks the module for itself.
func (m *Module) Library() (Library, error) {
	var info C.ck_info
	if err := m.direct("C_GetInfo", func() C.ck_rv { return C.kf_info(m.f, &info) }).err(); err != nil {
		return Library{}, err
	}
	return Library{trim(info.manufacturer[:]), trim(info.description[:]), int(info.version.major), int(info.version.minor)}, nil
}

// Token is what C_GetTokenInfo says of the token in a slot.
type Token struct {
	Slot                        uint
	Label, Serial               string
	Manufacturer, Model         string
	Initialized, PINInitialized bool
	MaxSessions                 uint // 0: the token does not say, or has no limit
	// Of memory for private objects, in bytes. Both are 0 where the token does
	// not say (CK_UNAVAILABLE_INFORMATION).
	FreePrivate, TotalPrivate uint64

	// Of the user PIN: a wrong one was entered since the last login; one more
	// locks it; it is locked. Not every token says so.
	PINCountLow, PINFinalTry, PINLocked bool
}

// Tokens lists the tokens that are present. An error may come with a list: it is
// then about a slot whose token cannot be asked.
func (m *Module) Tokens() ([]Token, error) {
	slots, err := m.list("C_GetSlotList", func(out, n *C.ck_ulong) C.ck_rv { return C.kf_slots(m.f, out, n) })
	if err != nil {
		return nil, err
	}
	var out []Token
	var sick error
	for _, slot := range slots {
		t, err := m.Token(uint(slot))
		if errors.Is(err, TokenNotPresent) || errors.Is(err, TokenNotRecognized) {
			continue
		}
		if err != nil {
			sick = fmt.Errorf("slot %d: %w", uint(slot), err)
			continue
		}
		out = append(out, t)
	}
	return out, sick
}

// Token asks for the token in a slot.
func (m *Module) Token(slot uint) (Token, error) {
	var info C.ck_token_info
	if err := m.direct("C_GetTokenInfo", func() C.ck_rv { return C.kf_token_info(m.f, C.ck_ulong(slot), &info) }).err(); err != nil {
		return Token{}, err
	}
	t := Token{
		Slot: slot, Label: trim(info.label[:]), Serial: trim(info.serial[:]),
		Manufacturer: trim(info.manufacturer[:]), Model: trim(info.model[:]),
		Initialized:    info.flags&pkcs11.CKF_TOKEN_INITIALIZED != 0,
		PINInitialized: info.flags&pkcs11.CKF_USER_PIN_INITIALIZED != 0,
		PINCountLow:    info.flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0,
		PINFinalTry:    info.flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0,
		PINLocked:      info.flags&pkcs11.CKF_USER_PIN_LOCKED != 0,
	}
	// CK_EFFECTIVELY_INFINITE is 0, and some say it as a huge number.
	if info.max_sessions < 1<<31 {
		t.MaxSessions = uint(info.max_sessions)
	}
	t.FreePrivate, t.TotalPrivate = memory(uint64(info.free_private), uint64(info.total_private))
	return t, nil
}

// memory is what a token says of its memory, or zeros where it says nothing:
// CK_UNAVAILABLE_INFORMATION, in 64 bits or, by those who know no others, in
// 32, or numbers that are none, such as NSS's one byte.
func memory(free, total uint64) (uint64, uint64) {
	const least = 1 << 10
	for _, n := range []uint64{free, total} {
		if n == math.MaxUint64 || n == math.MaxUint32 {
			return 0, 0
		}
	}
	if total < least || free > total {
		return 0, 0
	}
	return free, total
}

// list makes a call that returns a list, again where that has grown between
// the question for its length and the answer.
func (m *Module) list(f Func, get func(out, n *C.ck_ulong) C.ck_rv) ([]C.ck_ulong, error) {
	const tries = 3
	var rv RV
	for range tries {
		var n C.ck_ulong
		var out []C.ck_ulong
		rv = m.direct(f, func() C.ck_rv {
			if rv := get(nil, &n); rv != 0 || n == 0 {
				return rv
			}
			out = make([]C.ck_ulong, n)
			return get(&out[0], &n)
		})
		switch {
		case rv == BufferTooSmall:
		case rv != OK:
			return nil, rv
		case uint64(n) > uint64(len(out)):
			return nil, fmt.Errorf("cryptoki: module claims to have listed %d of %d", uint64(n), len(out))
		default:
			return out[:n], nil
		}
	}
	return nil, rv
}

// trim removes the padding of PKCS#11's fixed-length strings.
func trim(b []C.ck_byte) string {
	return strings.TrimRight(string(unsafe.Slice((*byte)(&b[0]), len(b))), " \x00")
}

// MechanismList lists what the token in a slot says it can do.
func (m *Module) MechanismList(slot uint) (map[Mechanism]bool, error) {
	list, err := m.list("C_GetMechanismList", func(out, n *C.ck_ulong) C.ck_rv {
		return C.kf_mechanisms(m.f, C.ck_ulong(slot), out, n)
	})
	if err != nil {
		return nil, err
	}
	out := make(map[Mechanism]bool, len(list))
	for _, mech := range list {
		out[Mechanism(mech)] = true
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
	var info C.ck_mechanism_info
	err = m.direct("C_GetMechanismInfo", func() C.ck_rv {
		return C.kf_mechanism_info(m.f, C.ck_ulong(slot), C.ck_ulong(mech), &info)
	}).err()
	return int(info.min_key), int(info.max_key), err
}
