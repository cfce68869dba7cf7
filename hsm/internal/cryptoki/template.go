package cryptoki

/*
#include "calls.h"
*/
import "C"

import (
	"encoding/binary"
	"runtime"
	"slices"
	"unsafe"
)

// Attr is one attribute of a template.
type Attr struct {
	Type   Attribute
	value  []byte
	nested []Attr // for WrapTemplate and UnwrapTemplate
}

// Bool is an attribute of type CK_BBOOL.
func Bool(t Attribute, v bool) Attr {
	if v {
		return Attr{Type: t, value: []byte{1}}
	}
	return Attr{Type: t, value: []byte{0}}
}

// ULong is an attribute of type CK_ULONG.
func ULong(t Attribute, v uint64) Attr {
	return Attr{Type: t, value: binary.NativeEndian.AppendUint64(nil, v)}
}

// Bytes is an attribute of bytes. It keeps v.
func Bytes(t Attribute, v []byte) Attr { return Attr{Type: t, value: v} }

// Mechanisms is CKA_ALLOWED_MECHANISMS. Tokens compare it byte for byte: the
// order matters.
func Mechanisms(ms ...Mechanism) Attr {
	var v []byte
	for _, m := range ms {
		v = binary.NativeEndian.AppendUint64(v, uint64(m))
	}
	return Attr{Type: AllowedMechanisms, value: v}
}

// Nested is CKA_WRAP_TEMPLATE or CKA_UNWRAP_TEMPLATE.
func Nested(t Attribute, attrs []Attr) Attr { return Attr{Type: t, nested: attrs} }

// Template is a list of attributes in C memory, made once and used in any
// number of calls. It is immutable, safe for concurrent use, and freed with
// the Go value: a call keeps that alive until it returns.
type Template struct {
	attrs []Attr
	c     *C.ck_attribute
}

// NewTemplate packs attrs in their order, which some tokens care about.
func NewTemplate(attrs ...Attr) *Template {
	var mem arena
	t := &Template{attrs: slices.Clone(attrs), c: mem.pack(attrs)}
	runtime.AddCleanup(t, func(m arena) { m.free() }, mem)
	return t
}

// Attrs returns a copy of what the template was made of.
func (t *Template) Attrs() []Attr { return slices.Clone(t.attrs) }

func (t *Template) len() C.ck_ulong { return C.ck_ulong(len(t.attrs)) }

// arena is C memory that is freed as one.
type arena []unsafe.Pointer

func (m *arena) pack(attrs []Attr) *C.ck_attribute {
	p := C.calloc(C.size_t(max(len(attrs), 1)), C.sizeof_ck_attribute)
	*m = append(*m, p)
	list := unsafe.Slice((*C.ck_attribute)(p), len(attrs))
	for i, a := range attrs {
		list[i]._type = C.ck_ulong(a.Type)
		switch {
		case a.nested != nil:
			list[i].value = unsafe.Pointer(m.pack(a.nested))
			list[i].len = C.ck_ulong(len(a.nested) * C.sizeof_ck_attribute)
		case len(a.value) > 0:
			list[i].value = C.CBytes(a.value)
			list[i].len = C.ck_ulong(len(a.value))
			*m = append(*m, list[i].value)
		}
	}
	return (*C.ck_attribute)(p)
}

func (m arena) free() {
	for _, p := range m {
		C.free(p)
	}
}

// Value is the attribute's bytes, nil for a nested template.
func (a Attr) Value() []byte { return a.value }

// Nested is the nested template, nil for any other attribute.
func (a Attr) Nested() []Attr { return a.nested }

// Mechanisms is the list of a CKA_ALLOWED_MECHANISMS.
func (a Attr) Mechanisms() []Mechanism {
	var out []Mechanism
	for v := a.value; len(v) >= 8; v = v[8:] {
		out = append(out, Mechanism(binary.NativeEndian.Uint64(v)))
	}
	return out
}
