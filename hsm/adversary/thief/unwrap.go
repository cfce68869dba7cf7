package thief

/*
#include <stdlib.h>
#include "thief.h"
*/
import "C"

import (
	"slices"
	"unsafe"
)

// Unwrapping is a C_UnwrapKey to attack.
type Unwrapping struct {
	Module    *Module
	Session   uint
	Mechanism uint
	OAEP      bool // the mechanism has the parameters of OAEP with SHA-1
	Key       uint
	Blob      []byte
	Template  []Attribute
}

// Loot is what an attack brought.
type Loot struct {
	Tries    int    // calls
	Accepted int    // how many of them the token answered with CKR_OK
	Value    []byte // CKA_VALUE as it was read; nil if it never was
}

// Once is C_UnwrapKey.
func (u Unwrapping) Once() (handle uint, rv RV) {
	var h C.ulong_t
	u.with(func(c *C.unwrap_t) { rv = RV(C.thief_unwrap(c, &h)) })
	return uint(h), rv
}

// WithNULL is C_UnwrapKey with NULL for each of its pointers in turn: the
// mechanism, the blob, the template, the result.
func (u Unwrapping) WithNULL() (rvs [4]RV) {
	u.with(func(c *C.unwrap_t) {
		for i, without := range []C.int{C.NO_MECHANISM, C.NO_BLOB, C.NO_TEMPLATE, C.NO_HANDLE} {
			rvs[i] = RV(C.thief_unwrap_null(c, without))
		}
	})
	return rvs
}

// Aliased is one call whose result is written over the values of SENSITIVE and
// WRAP_WITH_TRUSTED.
func (u Unwrapping) Aliased() Loot {
	types := []C.ulong_t{sensitive, wrapWithTrusted}
	return u.attack(func(c *C.unwrap_t, out *C.loot_t) { C.thief_alias(c, &types[0], C.ulong_t(len(types)), out) })
}

// RaceTemplate has a second thread change SENSITIVE and WRAP_WITH_TRUSTED in
// the template to false, and EXTRACTABLE to true where it is not, during calls.
func (u Unwrapping) RaceTemplate(tries int) Loot {
	types, want := []C.ulong_t{sensitive, wrapWithTrusted}, []C.byte_t{0, 0}
	if u.bool(extractable) == 0 {
		types, want = append(types, extractable), append(want, 1)
	}
	return u.attack(func(c *C.unwrap_t, out *C.loot_t) {
		C.thief_race_template(c, &types[0], &want[0], C.ulong_t(len(types)), C.ulong_t(tries), out)
	})
}

func (u Unwrapping) bool(t uint) byte {
	i := slices.IndexFunc(u.Template, func(a Attribute) bool { return a.Type == t })
	return u.Template[i].Value[0]
}

// RaceMechanism has a second thread change the mechanism to another and back
// during calls, until one of them is answered with CKR_OK.
func (u Unwrapping) RaceMechanism(other uint, tries int) Loot {
	return u.attack(func(c *C.unwrap_t, out *C.loot_t) { C.thief_race_mechanism(c, C.ulong_t(other), C.ulong_t(tries), out) })
}

// RaceResult has a second thread write the handle of an own object, which
// anybody may read, where the call writes its result.
func (u Unwrapping) RaceResult(own uint, tries int) Loot {
	return u.attack(func(c *C.unwrap_t, out *C.loot_t) { C.thief_race_result(c, C.ulong_t(own), C.ulong_t(tries), out) })
}

// RaceObject has a second thread, with a session of its own, find the object
// in the making and set SENSITIVE to false in it. Bulky attributes before
// SENSITIVE in the template give it the time.
func (u Unwrapping) RaceObject(session2 uint, tries int) Loot {
	return u.attack(func(c *C.unwrap_t, out *C.loot_t) { C.thief_race_object(c, C.ulong_t(session2), C.ulong_t(tries), out) })
}

// RaceCopy copies Key by C_CopyObject with an empty template while a second
// thread, with a session of its own, copies what is being made, and unwraps
// Blob under that. Template is not used. Every try may leave an object on the
// token that nobody can destroy.
func (u Unwrapping) RaceCopy(session2 uint, tries int) Loot {
	return u.attack(func(c *C.unwrap_t, out *C.loot_t) { C.thief_race_copy(c, C.ulong_t(session2), C.ulong_t(tries), out) })
}

func (u Unwrapping) attack(f func(*C.unwrap_t, *C.loot_t)) Loot {
	out := (*C.loot_t)(C.calloc(1, C.sizeof_loot_t))
	defer C.free(unsafe.Pointer(out))
	u.with(func(c *C.unwrap_t) { f(c, out) })
	loot := Loot{Tries: int(out.tries), Accepted: int(out.ok)}
	if out.len > 0 {
		loot.Value = C.GoBytes(unsafe.Pointer(&out.value), C.int(out.len))
	}
	return loot
}

// with puts everything into C memory.
func (u Unwrapping) with(f func(*C.unwrap_t)) {
	t := newTemplate(u.Template)
	defer t.free()
	blob := C.CBytes(u.Blob)
	defer C.free(blob)
	c := (*C.unwrap_t)(C.calloc(1, C.sizeof_unwrap_t))
	defer C.free(unsafe.Pointer(c))
	*c = C.unwrap_t{
		f: u.Module.f, session: C.ulong_t(u.Session), key: C.ulong_t(u.Key),
		mechanism: C.mechanism_t{_type: C.ulong_t(u.Mechanism)},
		blob:      (*C.byte_t)(blob), blob_len: C.ulong_t(len(u.Blob)),
		template: t.list, count: t.n,
	}
	if u.OAEP {
		const sha1, mgf1SHA1, dataSpecified = 0x220, 1, 1
		c.oaep = C.oaep_t{hash: sha1, mgf: mgf1SHA1, source: dataSpecified}
		c.mechanism.len = C.sizeof_oaep_t
	}
	f(c)
}
