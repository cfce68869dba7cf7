package cryptoki

/*
#include "calls.h"
*/
import "C"

import (
	"bytes"
	"encoding/binary"
	"slices"
	"unsafe"
)

// attrRoom is how many bytes Attributes reads of one attribute at the most: a
// modulus of 4096 bits, or the longest label.
const attrRoom = 512

// uLongs are the attributes of type CK_ULONG that are read back.
var uLongs = []Attribute{Class, KeyType, ModulusBits, ValueLen}

// Values are attributes as a token reports them. An attribute that the token
// does not have, or does not tell, is absent.
type Values map[Attribute][]byte

// Bool returns a CK_BBOOL, and whether the token reported it as one.
func (v Values) Bool(t Attribute) (value, ok bool) {
	b, ok := v[t]
	return ok && len(b) == 1 && b[0] != 0, ok && len(b) == 1
}

// ULong returns a CK_ULONG, and whether the token reported it as one.
func (v Values) ULong(t Attribute) (uint64, bool) {
	b, ok := v[t]
	if !ok || len(b) != 8 {
		return 0, false
	}
	return binary.NativeEndian.Uint64(b), true
}

// Attributes reads attributes of an object in one call. Attributes longer
// than 512 bytes are reported as absent.
func (s *Session) Attributes(o Handle, types ...Attribute) (Values, error) {
	list, buf := s.room(len(types))
	defer C.free(unsafe.Pointer(list))
	attrs := unsafe.Slice(list, len(types))
	for i, t := range types {
		attrs[i]._type = C.ck_ulong(t)
		attrs[i].value = unsafe.Pointer(&buf[i*attrRoom])
		attrs[i].len = attrRoom
		if slices.Contains(uLongs, t) {
			attrs[i].len = 8 // NSS takes no other length
		}
	}
	rv := s.m.direct("C_GetAttributeValue", func() C.ck_rv {
		return C.kf_attributes(s.m.f, C.ck_ulong(s.h), C.ck_ulong(o), list, C.ck_ulong(len(types)))
	})
	switch rv {
	case OK, AttributeSensitive, AttributeTypeInvalid, BufferTooSmall: // some may be there: section 5.7
	default:
		return nil, rv
	}
	out := make(Values, len(types))
	for i, t := range types {
		if n := uint64(attrs[i].len); n <= attrRoom {
			out[t] = slices.Clone(buf[i*attrRoom:][:n])
		}
	}
	return out, nil
}

// room is C memory for n attributes and their values.
func (s *Session) room(n int) (*C.ck_attribute, []byte) {
	p := C.calloc(C.size_t(n), C.sizeof_ck_attribute+attrRoom)
	list := (*C.ck_attribute)(p)
	values := unsafe.Slice((*byte)(unsafe.Add(p, n*C.sizeof_ck_attribute)), n*attrRoom)
	return list, values
}

// NestedEquals reports whether the attribute t of an object, CKA_WRAP_TEMPLATE
// or CKA_UNWRAP_TEMPLATE, is exactly want, in any order. A token that does not
// report it gives false and no error.
func (s *Session) NestedEquals(o Handle, t Attribute, want []Attr) (bool, error) {
	outer, _ := s.room(1)
	defer C.free(unsafe.Pointer(outer))
	get := func() RV {
		outer._type = C.ck_ulong(t)
		return s.m.direct("C_GetAttributeValue", func() C.ck_rv {
			return C.kf_attributes(s.m.f, C.ck_ulong(s.h), C.ck_ulong(o), outer, 1)
		})
	}
	// First how many there are, then their types and lengths, then values.
	switch rv := get(); rv {
	case OK:
	case AttributeSensitive, AttributeTypeInvalid:
		return false, nil
	default:
		return false, rv
	}
	n := int(outer.len) / C.sizeof_ck_attribute
	if int(outer.len)%C.sizeof_ck_attribute != 0 || n != len(want) {
		return false, nil
	}
	inner, buf := s.room(n)
	defer C.free(unsafe.Pointer(inner))
	outer.value = unsafe.Pointer(inner)
	if rv := get(); rv != OK {
		return false, rv
	}
	attrs := unsafe.Slice(inner, n)
	for i := range attrs {
		if uint64(attrs[i].len) > attrRoom {
			return false, nil
		}
		attrs[i].value = unsafe.Pointer(&buf[i*attrRoom])
	}
	if rv := get(); rv != OK {
		return false, rv
	}
	for _, w := range want {
		i := slices.IndexFunc(attrs, func(a C.ck_attribute) bool { return Attribute(a._type) == w.Type })
		if i < 0 || uint64(attrs[i].len) > attrRoom || !slices.Equal(buf[i*attrRoom:][:attrs[i].len], w.value) {
			return false, nil
		}
	}
	return true, nil
}

// Differs reads back every attribute of a flat template in one call and returns
// the first that the token does not report as it was asked for. It is for hot
// paths, and allocates only in C.
func (s *Session) Differs(o Handle, t *Template) (Attribute, bool, error) {
	n := len(t.attrs)
	room := 0
	for _, a := range t.attrs {
		room += len(a.value)
	}
	// Room for exactly what is expected: whatever is longer is reported as
	// CK_UNAVAILABLE_INFORMATION, and so differs.
	p := C.calloc(1, C.size_t(n*C.sizeof_ck_attribute+room))
	defer C.free(p)
	attrs := unsafe.Slice((*C.ck_attribute)(p), n)
	values := unsafe.Slice((*byte)(unsafe.Add(p, n*C.sizeof_ck_attribute)), room)
	at := 0
	for i, a := range t.attrs {
		attrs[i]._type = C.ck_ulong(a.Type)
		attrs[i].value = unsafe.Pointer(&values[at])
		attrs[i].len = C.ck_ulong(len(a.value))
		at += len(a.value)
	}
	rv := s.m.before("C_GetAttributeValue")
	if rv == OK {
		rv = s.m.after("C_GetAttributeValue", RV(C.kf_attributes(s.m.f, C.ck_ulong(s.h), C.ck_ulong(o), (*C.ck_attribute)(p), C.ck_ulong(n))))
	}
	switch rv {
	case OK, AttributeSensitive, AttributeTypeInvalid, BufferTooSmall: // some may be there: section 5.7
	default:
		return 0, false, rv
	}
	at = 0
	for i, a := range t.attrs {
		if int(attrs[i].len) != len(a.value) || !bytes.Equal(values[at:at+len(a.value)], a.value) {
			return a.Type, true, nil
		}
		at += len(a.value)
	}
	return 0, false, nil
}
