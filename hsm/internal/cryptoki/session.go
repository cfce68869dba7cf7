package cryptoki

/*
#cgo noescape kf_unwrap
#cgo nocallback kf_unwrap
#cgo noescape kf_wrap
#cgo nocallback kf_wrap
#cgo noescape kf_encrypt_init
#cgo nocallback kf_encrypt_init
#cgo noescape kf_decrypt_init
#cgo nocallback kf_decrypt_init
#cgo noescape kf_sign_init
#cgo nocallback kf_sign_init
#cgo noescape kf_encrypt
#cgo nocallback kf_encrypt
#cgo noescape kf_decrypt
#cgo nocallback kf_decrypt
#cgo noescape kf_sign
#cgo nocallback kf_sign
#cgo noescape kf_destroy
#cgo nocallback kf_destroy
#include "calls.h"
*/
import "C"

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// Handle is the handle of an object. It is valid in every session of this
// process; a session object dies with the session that made it.
type Handle uint

// Session is one session. It is for one goroutine at a time.
type Session struct {
	m *Module
	h pkcs11.SessionHandle
}

// User is who logs in.
type User uint

// The users of a token; PKCS#11 v2.40 section 2.4.
const (
	SO         User = 0
	NormalUser User = 1
)

// OpenSession opens a session on the token in a slot; all are read-write.
func (m *Module) OpenSession(slot uint) (*Session, error) {
	s := &Session{m: m}
	var h C.ck_ulong
	rv := m.direct("C_OpenSession", func() C.ck_rv {
		return C.kf_open(m.f, C.ck_ulong(slot), pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION, &h)
	})
	if rv != OK {
		return nil, rv
	}
	s.h = pkcs11.SessionHandle(h)
	return s, nil
}

// Close ends the session and destroys its session objects. It is tried twice: a
// session that stays open is lost to everybody.
func (s *Session) Close() error {
	end := func() error {
		return s.m.direct("C_CloseSession", func() C.ck_rv { return C.kf_close(s.m.f, C.ck_ulong(s.h)) }).err()
	}
	if end() == nil {
		return nil
	}
	err := end()
	if errors.Is(err, SessionHandleInvalid) {
		return nil
	}
	return err
}

// LoggedIn reports whether the normal user is logged in.
func (s *Session) LoggedIn() (bool, error) {
	var info C.ck_session_info
	err := s.m.direct("C_GetSessionInfo", func() C.ck_rv { return C.kf_session_info(s.m.f, C.ck_ulong(s.h), &info) }).err()
	const rwUser = 3 // CKS_RW_USER_FUNCTIONS
	return info.state == rwUser, err
}

// Login logs the whole application in. It never retries.
func (s *Session) Login(u User, pin []byte) error {
	return s.m.direct("C_Login", func() C.ck_rv {
		return C.kf_login(s.m.f, C.ck_ulong(s.h), C.ck_ulong(u), bytesPtr(pin), C.ck_ulong(len(pin)))
	}).err()
}

// Logout logs the whole application out.
func (s *Session) Logout() error {
	return s.m.direct("C_Logout", func() C.ck_rv { return C.kf_logout(s.m.f, C.ck_ulong(s.h)) }).err()
}

// InitPIN sets the user PIN; the SO must be logged in.
func (s *Session) InitPIN(pin []byte) error {
	return s.m.direct("C_InitPIN", func() C.ck_rv {
		return C.kf_init_pin(s.m.f, C.ck_ulong(s.h), bytesPtr(pin), C.ck_ulong(len(pin)))
	}).err()
}

// made returns the handle that a call made. After a failure there is none to
// know: whoever made a session object then discards the session with it.
func made(rv RV, h C.ck_ulong) (Handle, error) {
	if rv != OK {
		return 0, rv
	}
	return Handle(h), nil
}

// CreateObject makes an object of known attributes. Only public constants are
// ever given to it.
func (s *Session) CreateObject(t *Template) (Handle, error) {
	var h C.ck_ulong
	rv := s.m.direct("C_CreateObject", func() C.ck_rv {
		return C.kf_create(s.m.f, C.ck_ulong(s.h), t.c, t.len(), &h)
	})
	runtime.KeepAlive(t)
	return made(rv, h)
}

// CopyObject copies an object with some attributes changed.
func (s *Session) CopyObject(o Handle, t *Template) (Handle, error) {
	var h C.ck_ulong
	rv := s.m.direct("C_CopyObject", func() C.ck_rv {
		return C.kf_copy(s.m.f, C.ck_ulong(s.h), C.ck_ulong(o), t.c, t.len(), &h)
	})
	runtime.KeepAlive(t)
	return made(rv, h)
}

// DestroyObject destroys an object.
func (s *Session) DestroyObject(o Handle) error {
	return s.m.direct("C_DestroyObject", func() C.ck_rv {
		return C.kf_destroy(s.m.f, C.ck_ulong(s.h), C.ck_ulong(o))
	}).err()
}

// SetAttributes changes attributes of an object.
func (s *Session) SetAttributes(o Handle, t *Template) error {
	rv := s.m.direct("C_SetAttributeValue", func() C.ck_rv {
		return C.kf_set(s.m.f, C.ck_ulong(s.h), C.ck_ulong(o), t.c, t.len())
	})
	runtime.KeepAlive(t)
	return rv.err()
}

// DigestKey begins a digest and feeds it a key. The session has a digest under
// way afterwards, whatever it answers: close it.
func (s *Session) DigestKey(mech Mechanism, key Handle) error {
	rv := s.m.direct("C_DigestInit", func() C.ck_rv { return C.kf_digest_init(s.m.f, C.ck_ulong(s.h), C.ck_ulong(mech)) })
	if rv != OK {
		return rv
	}
	return s.m.direct("C_DigestKey", func() C.ck_rv { return C.kf_digest_key(s.m.f, C.ck_ulong(s.h), C.ck_ulong(key)) }).err()
}

// FindObjects returns every object that matches.
func (s *Session) FindObjects(t *Template) ([]Handle, error) {
	f, h := s.m.f, C.ck_ulong(s.h)
	rv := s.m.direct("C_FindObjectsInit", func() C.ck_rv { return C.kf_find_init(f, h, t.c, t.len()) })
	runtime.KeepAlive(t)
	if rv != OK {
		return nil, rv
	}
	var out []Handle
	var err error
	for {
		var batch [64]C.ck_ulong
		var n C.ck_ulong
		rv := s.m.direct("C_FindObjects", func() C.ck_rv { return C.kf_find(f, h, &batch[0], C.ck_ulong(len(batch)), &n) })
		if rv != OK {
			err = rv
			break
		}
		if uint64(n) > uint64(len(batch)) {
			err = fmt.Errorf("cryptoki: module claims to have found %d objects of %d", uint64(n), len(batch))
			break
		}
		for _, o := range batch[:n] {
			out = append(out, Handle(o))
		}
		if n == 0 {
			break
		}
	}
	final := s.m.direct("C_FindObjectsFinal", func() C.ck_rv { return C.kf_find_final(f, h) }).err()
	if err = errors.Join(err, final); err != nil {
		return nil, err
	}
	return out, nil
}

// GenerateKey makes a secret key.
func (s *Session) GenerateKey(mech Mechanism, t *Template) (Handle, error) {
	var h C.ck_ulong
	m := C.kf_mech{_type: C.ck_ulong(mech)}
	rv := s.m.direct("C_GenerateKey", func() C.ck_rv {
		return C.kf_generate(s.m.f, C.ck_ulong(s.h), &m, t.c, t.len(), &h)
	})
	runtime.KeepAlive(t)
	return made(rv, h)
}

// GenerateKeyPair makes a key pair.
func (s *Session) GenerateKeyPair(mech Mechanism, public, private *Template) (pub, priv Handle, err error) {
	var hpub, hpriv C.ck_ulong
	m := C.kf_mech{_type: C.ck_ulong(mech)}
	rv := s.m.direct("C_GenerateKeyPair", func() C.ck_rv {
		return C.kf_generate_pair(s.m.f, C.ck_ulong(s.h), &m, public.c, public.len(), private.c, private.len(), &hpub, &hpriv)
	})
	runtime.KeepAlive(public)
	runtime.KeepAlive(private)
	return Handle(hpub), Handle(hpriv), rv.err()
}

// Params is a mechanism with its parameters.
type Params struct {
	m       C.kf_mech
	iv, aad []byte
}

// Plain is a mechanism without parameters.
func Plain(m Mechanism) Params { return Params{m: C.kf_mech{_type: C.ck_ulong(m)}} }

// OAEP is CKM_RSA_PKCS_OAEP with the same hash for the label and for MGF1,
// and the empty label; RFC 8017 section 7.1.
func OAEP(hash Mechanism) Params {
	mgf := C.ck_ulong(mgf1SHA1)
	if hash == SHA256 {
		mgf = mgf1SHA256
	}
	return Params{m: C.kf_mech{_type: C.ck_ulong(RSAOAEP), kind: C.KF_OAEP, hash: C.ck_ulong(hash), mgf: mgf}}
}

// GCM is an AES-GCM mechanism with a 128-bit tag; NIST SP 800-38D.
func GCM(m Mechanism, iv, aad []byte) Params {
	return Params{m: C.kf_mech{_type: C.ck_ulong(m), kind: C.KF_GCM, tag_bits: 128}, iv: iv, aad: aad}
}

// CBC is a mechanism whose parameter is an initialisation vector; NIST SP
// 800-38A.
func CBC(m Mechanism, iv []byte) Params {
	return Params{m: C.kf_mech{_type: C.ck_ulong(m), kind: C.KF_IV}, iv: iv}
}

// CTR is CKM_AES_CTR, counting in the last 32 bits of a first block of 16 bytes.
func CTR(m Mechanism, first []byte) Params {
	return Params{m: C.kf_mech{_type: C.ck_ulong(m), kind: C.KF_CTR}, iv: first}
}

// Unwrap unwraps a key inside the token. Empty input is answered as the token
// would answer it, without a call: some modules crash on it.
func (s *Session) Unwrap(p Params, key Handle, wrapped []byte, t *Template) (Handle, error) {
	if len(wrapped) == 0 {
		return 0, WrappedKeyLenRange
	}
	var h C.ck_ulong
	rv := s.m.before("C_UnwrapKey")
	if rv == OK {
		rv = s.m.after("C_UnwrapKey", RV(C.kf_unwrap(s.m.f, C.ck_ulong(s.h), &p.m, C.ck_ulong(key),
			unsafe.Pointer(&wrapped[0]), C.ck_ulong(len(wrapped)), t.c, t.len(), &h)))
	}
	runtime.KeepAlive(t)
	return made(rv, h)
}

// Wrap wraps a key inside the token into buf and returns what was written.
func (s *Session) Wrap(p Params, wrapping, key Handle, buf []byte) ([]byte, error) {
	if rv := s.m.before("C_WrapKey"); rv != OK {
		return nil, rv
	}
	n := C.ck_ulong(len(buf))
	rv := RV(C.kf_wrap(s.m.f, C.ck_ulong(s.h), &p.m, C.ck_ulong(wrapping), C.ck_ulong(key), unsafe.Pointer(&buf[0]), &n))
	return written(s.m.after("C_WrapKey", rv), buf, n)
}

// Encrypt encrypts data into buf and returns what was written.
func (s *Session) Encrypt(p Params, key Handle, data, buf []byte) ([]byte, error) {
	if rv := s.m.before("C_EncryptInit"); rv != OK {
		return nil, rv
	}
	rv := RV(C.kf_encrypt_init(s.m.f, C.ck_ulong(s.h), &p.m, C.ck_ulong(key),
		bytesPtr(p.iv), C.ck_ulong(len(p.iv)), bytesPtr(p.aad), C.ck_ulong(len(p.aad))))
	if rv = s.m.after("C_EncryptInit", rv); rv != OK {
		return nil, rv
	}
	if rv := s.m.before("C_Encrypt"); rv != OK {
		return nil, &InterruptedError{rv}
	}
	n := C.ck_ulong(len(buf))
	rv = RV(C.kf_encrypt(s.m.f, C.ck_ulong(s.h), bytesPtr(data), C.ck_ulong(len(data)), unsafe.Pointer(&buf[0]), &n))
	return written(s.m.after("C_Encrypt", rv), buf, n)
}

// Decrypt decrypts data into buf and returns what was written.
func (s *Session) Decrypt(p Params, key Handle, data, buf []byte) ([]byte, error) {
	if rv := s.m.before("C_DecryptInit"); rv != OK {
		return nil, rv
	}
	rv := RV(C.kf_decrypt_init(s.m.f, C.ck_ulong(s.h), &p.m, C.ck_ulong(key),
		bytesPtr(p.iv), C.ck_ulong(len(p.iv)), bytesPtr(p.aad), C.ck_ulong(len(p.aad))))
	if rv = s.m.after("C_DecryptInit", rv); rv != OK {
		return nil, rv
	}
	if rv := s.m.before("C_Decrypt"); rv != OK {
		return nil, &InterruptedError{rv}
	}
	n := C.ck_ulong(len(buf))
	rv = RV(C.kf_decrypt(s.m.f, C.ck_ulong(s.h), bytesPtr(data), C.ck_ulong(len(data)), unsafe.Pointer(&buf[0]), &n))
	return written(s.m.after("C_Decrypt", rv), buf, n)
}

// Sign signs or authenticates data into buf and returns what was written.
func (s *Session) Sign(p Params, key Handle, data, buf []byte) ([]byte, error) {
	if rv := s.m.before("C_SignInit"); rv != OK {
		return nil, rv
	}
	rv := RV(C.kf_sign_init(s.m.f, C.ck_ulong(s.h), &p.m, C.ck_ulong(key)))
	if rv = s.m.after("C_SignInit", rv); rv != OK {
		return nil, rv
	}
	if rv := s.m.before("C_Sign"); rv != OK {
		return nil, &InterruptedError{rv}
	}
	n := C.ck_ulong(len(buf))
	rv = RV(C.kf_sign(s.m.f, C.ck_ulong(s.h), bytesPtr(data), C.ck_ulong(len(data)), unsafe.Pointer(&buf[0]), &n))
	return written(s.m.after("C_Sign", rv), buf, n)
}

// InterruptedError reports a call that never happened although the operation
// it belongs to was begun: the session still has that operation active.
type InterruptedError struct{ RV RV }

func (e *InterruptedError) Error() string { return e.RV.Error() + " with an operation active" }

// Unwrap returns the return value.
func (e *InterruptedError) Unwrap() error { return e.RV }

func written(rv RV, buf []byte, n C.ck_ulong) ([]byte, error) {
	if rv != OK {
		return nil, rv
	}
	if uint64(n) > uint64(len(buf)) {
		return nil, fmt.Errorf("cryptoki: module claims to have written %d bytes into %d", uint64(n), len(buf))
	}
	return buf[:n], nil
}

// Random fills buf from the token's generator.
func (s *Session) Random(buf []byte) error {
	return s.m.direct("C_GenerateRandom", func() C.ck_rv {
		return C.kf_random(s.m.f, C.ck_ulong(s.h), bytesPtr(buf), C.ck_ulong(len(buf)))
	}).err()
}
