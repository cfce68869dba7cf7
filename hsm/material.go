package hsm

import (
	"bytes"
	"crypto/subtle"
	"errors"
	"fmt"
)

// MaterialSpec names a kind of key material by what it is used as.
type MaterialSpec string

// The kinds of key material a customer can import.
const (
	AES256 MaterialSpec = "AES_256" // 32 bytes, FIPS 197
	SM4    MaterialSpec = "SM4"     // 16 bytes, GB/T 32907
)

// Len is the length of the material in bytes, 0 for an unknown spec.
func (s MaterialSpec) Len() int {
	switch s {
	case AES256:
		return 32
	case SM4:
		return 16
	}
	return 0
}

// Custody is how a token keeps material between uses.
type Custody byte

// The custodies.
const (
	// Sealed material is kept outside the token as a blob wrapped under a vault
	// key of the token, and exists in the token only while it is used.
	Sealed Custody = 1
	// Resident material is an object of the token for as long as it lives, and
	// was never extractable there; see ImportResident.
	Resident Custody = 2
)

// String is the custody's name.
func (c Custody) String() string {
	switch c {
	case Sealed:
		return "sealed"
	case Resident:
		return "resident"
	}
	return fmt.Sprintf("custody %d", byte(c))
}

// Material is key material in the token's custody, in the form that is stored.
// It is no secret by itself: without the token that made it, it opens nothing.
// A Material is immutable.
type Material struct {
	Custody Custody
	Spec    MaterialSpec
	Vault   Fingerprint // sealed: of the vault key that opens it
	Ref     []byte      // sealed: the RFC 3394 blob, 8 bytes longer than the material; resident: the ObjectID
}

// materialVersion is the first byte of an encoded Material.
const materialVersion = 1

var materialSpecs = map[byte]MaterialSpec{1: AES256, 2: SM4}

// MarshalBinary encodes m as
//
//	version (1) ‖ custody (1) ‖ spec (1) ‖ vault fingerprint (32) ‖ reference
func (m Material) MarshalBinary() ([]byte, error) {
	for code, spec := range materialSpecs {
		if spec == m.Spec {
			head := []byte{materialVersion, byte(m.Custody), code}
			return bytes.Join([][]byte{head, m.Vault[:], m.Ref}, nil), nil
		}
	}
	return nil, fmt.Errorf("hsm: no encoding for material spec %q", m.Spec)
}

// UnmarshalBinary decodes what MarshalBinary wrote. It copies data.
func (m *Material) UnmarshalBinary(data []byte) error {
	const head = 3 + len(Fingerprint{})
	if len(data) <= head {
		return errors.New("hsm: material record is too short")
	}
	if data[0] != materialVersion {
		return fmt.Errorf("hsm: material record of version %d is not understood", data[0])
	}
	spec, ok := materialSpecs[data[2]]
	custody := Custody(data[1])
	if !ok || custody != Sealed && (custody != Resident || len(data) != head+len(ObjectID{})) {
		return fmt.Errorf("hsm: material record with custody %d and spec %d is not understood", data[1], data[2])
	}
	*m = Material{Custody: custody, Spec: spec, Ref: bytes.Clone(data[head:])}
	copy(m.Vault[:], data[3:])
	return nil
}

// KCVLen is the length of a key check value in bytes.
const KCVLen = 3

// MaterialIDLen is the length of a material id in bytes.
const MaterialIDLen = 32

// Identity is what the token measured of a material. It decides whether a
// re-import carries the same material. Both parts are public values.
type Identity struct {
	// KCV is the leftmost bytes of the encryption of a zero block by AES with
	// the material as key, whatever the material is used as.
	KCV [KCVLen]byte
	// MaterialID is two AES-CMACs (NIST SP 800-38B) keyed by the material over
	// a label, a counter byte and ImportRequest.Context; see MaterialIDInput.
	MaterialID [MaterialIDLen]byte
}

// Equal compares in constant time.
func (id Identity) Equal(other Identity) bool {
	kcv := subtle.ConstantTimeCompare(id.KCV[:], other.KCV[:])
	mid := subtle.ConstantTimeCompare(id.MaterialID[:], other.MaterialID[:])
	return kcv&mid == 1
}

// CheckValue is the standard key check value for people to compare: the
// leftmost 3 bytes of a zero block encrypted under the material.
type CheckValue struct {
	Algorithm string // "AES-ECB" or "SM4-ECB"
	Value     [KCVLen]byte
}

// The algorithms of a CheckValue.
const (
	CheckValueAES = "AES-ECB"
	CheckValueSM4 = "SM4-ECB"
)
