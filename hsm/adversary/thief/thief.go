// Package thief makes the PKCS#11 calls of an attacker that miekg/pkcs11 would
// not: with arguments that change during the call, with results written over
// arguments, with empty templates and NULL pointers.
//
// It is for the adversary suite alone: cgo is not to be had in test files. It
// loads no module that somebody else in the process has not initialised, knows
// no PIN, and uses sessions that its caller opened.
package thief

/*
#cgo CFLAGS: -std=gnu11 -Wall -Wextra -Wno-deprecated-non-prototype
#cgo linux LDFLAGS: -ldl -lpthread
#include <stdlib.h>
#include "thief.h"
*/
import "C"

import (
	"encoding/binary"
	"fmt"
	"slices"
	"unsafe"
)

// RV is a return value of PKCS#11.
type RV uint

// Module is a PKCS#11 module that somebody in this process has initialised.
type Module struct{ f *C.functions_t }

// Load finds the functions of the module at path.
func Load(path string) (*Module, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	f := C.thief_load(name)
	if f == nil {
		return nil, fmt.Errorf("thief: %s is no PKCS#11 module", path)
	}
	return &Module{f}, nil
}

// Attribute is one attribute of a template: its number and its value.
type Attribute struct {
	Type  uint
	Value []byte
}

// Bool is the value of a CK_BBOOL.
func Bool(v bool) []byte {
	if v {
		return []byte{1}
	}
	return []byte{0}
}

// ULong is the value of a CK_ULONG, or of a list of them.
func ULong(vs ...uint) []byte {
	var out []byte
	for _, v := range vs {
		out = binary.NativeEndian.AppendUint64(out, uint64(v))
	}
	return out
}

// Attributes that this package names.
const (
	sensitive       = 0x103
	extractable     = 0x162
	modifiable      = 0x170
	copyable        = 0x171
	wrapWithTrusted = 0x210
	unwrapTemplate  = 0x40000212
)

// UnwrapTemplate reads CKA_UNWRAP_TEMPLATE of a key: with it in hand a thief
// unwraps as the owner does. The attributes come in an order in which tokens
// take them: COPYABLE and MODIFIABLE last.
func (m *Module) UnwrapTemplate(session, object uint) ([]Attribute, error) {
	const most, room = 64, 256
	mem := C.calloc(most, C.sizeof_attribute_t+room)
	defer C.free(mem)
	outer := (*C.attribute_t)(C.calloc(1, C.sizeof_attribute_t))
	defer C.free(unsafe.Pointer(outer))
	list := unsafe.Slice((*C.attribute_t)(mem), most)
	values := unsafe.Slice((*byte)(unsafe.Add(mem, most*C.sizeof_attribute_t)), most*room)
	get := func() error {
		*outer = C.attribute_t{_type: unwrapTemplate, value: mem, len: most * C.sizeof_attribute_t}
		if rv := C.thief_attributes(m.f, C.ulong_t(session), C.ulong_t(object), outer, 1); rv != 0 {
			return fmt.Errorf("thief: CKA_UNWRAP_TEMPLATE is not to be read: CKR 0x%X", uint(rv))
		}
		return nil
	}
	if err := get(); err != nil { // types and lengths
		return nil, err
	}
	n := int(outer.len / C.sizeof_attribute_t)
	for i := range n {
		list[i].value, list[i].len = unsafe.Pointer(&values[i*room]), room
	}
	if err := get(); err != nil { // values
		return nil, err
	}
	out := make([]Attribute, n)
	for i, a := range list[:n] {
		out[i] = Attribute{uint(a._type), slices.Clone(values[i*room:][:a.len])}
	}
	last := map[uint]int{copyable: 1, modifiable: 2}
	slices.SortStableFunc(out, func(a, b Attribute) int { return last[a.Type] - last[b.Type] })
	return out, nil
}

// Peek is C_GetAttributeValue of a harmless attribute and a secret one in one
// call. It returns what was written where the secret one should go.
func (m *Module) Peek(session, object, harmless, secret uint) (leaked []byte, rv RV) {
	const room = 1024
	mem := C.calloc(2, C.sizeof_attribute_t+room)
	defer C.free(mem)
	list := unsafe.Slice((*C.attribute_t)(mem), 2)
	buf := unsafe.Slice((*byte)(unsafe.Add(mem, 2*C.sizeof_attribute_t)), 2*room)
	list[0] = C.attribute_t{_type: C.ulong_t(harmless), value: unsafe.Pointer(&buf[0]), len: room}
	list[1] = C.attribute_t{_type: C.ulong_t(secret), value: unsafe.Pointer(&buf[room]), len: room}
	rv = RV(C.thief_attributes(m.f, C.ulong_t(session), C.ulong_t(object), &list[0], 2))
	written := slices.Clone(buf[room:])
	for len(written) > 0 && written[len(written)-1] == 0 {
		written = written[:len(written)-1]
	}
	return written, rv
}

// Copy is C_CopyObject. It passes an empty template as one of no attributes; a
// nil one as NULL, as miekg/pkcs11 passes both.
func (m *Module) Copy(session, object uint, attrs []Attribute) (handle uint, rv RV) {
	var list *C.attribute_t
	if attrs != nil {
		t := newTemplate(attrs)
		defer t.free()
		list = t.list
	}
	var h C.ulong_t
	rv = RV(C.thief_copy(m.f, C.ulong_t(session), C.ulong_t(object), list, C.ulong_t(len(attrs)), &h))
	return uint(h), rv
}

// DigestKey digests the value of a key, whole, by C_DigestInit, C_DigestKey
// and C_DigestFinal.
func (m *Module) DigestKey(session, hash, object uint) (digest []byte, rv RV) {
	buf := make([]byte, 64)
	n := C.ulong_t(len(buf))
	rv = RV(C.thief_digest_key(m.f, C.ulong_t(session), C.ulong_t(hash), C.ulong_t(object), (*C.byte_t)(&buf[0]), &n))
	return buf[:n], rv
}

// DerivationData is the parameter of CKM_AES_ECB_ENCRYPT_DATA and its kin: a
// pointer to the data, in C memory that is not freed, and its length.
func DerivationData(data []byte) []byte {
	return append(ULong(uint(uintptr(C.CBytes(data)))), ULong(uint(len(data)))...)
}

// Nested is the value of CKA_WRAP_TEMPLATE and CKA_UNWRAP_TEMPLATE, in C memory
// that is not freed.
func Nested(attrs []Attribute) []byte {
	t := newTemplate(attrs)
	return C.GoBytes(unsafe.Pointer(t.list), C.int(len(attrs)*C.sizeof_attribute_t))
}

// template is attributes in C memory, where threads may change them.
type template struct {
	list *C.attribute_t
	n    C.ulong_t
}

func newTemplate(attrs []Attribute) template {
	t := template{
		list: (*C.attribute_t)(C.calloc(C.size_t(len(attrs)+1), C.sizeof_attribute_t)),
		n:    C.ulong_t(len(attrs)),
	}
	for i, a := range attrs {
		at := &unsafe.Slice(t.list, len(attrs))[i]
		at._type, at.len = C.ulong_t(a.Type), C.ulong_t(len(a.Value))
		if len(a.Value) > 0 {
			at.value = C.CBytes(a.Value)
		}
	}
	return t
}

func (t template) free() {
	for _, a := range unsafe.Slice(t.list, int(t.n)) {
		C.free(a.value)
	}
	C.free(unsafe.Pointer(t.list))
}
