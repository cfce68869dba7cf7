package hsmtest

import (
	"bytes"
	"encoding/binary"
)

// Attributes of PKCS#11 v2.40 section 4.4, as SoftHSM2 writes them.
const (
	ckaSensitive   = 0x103
	ckaExtractable = 0x162
)

// Reveal edits the file of an object of SoftHSM2, as a thief of the files
// would, so that whoever has the PIN as well reads the object's value by
// C_GetAttributeValue.
func Reveal(file []byte) []byte {
	return setBool(setBool(file, ckaSensitive, false), ckaExtractable, true)
}

// setBool edits a boolean: type and kind (1), eight bytes each, big-endian,
// then one byte.
func setBool(file []byte, attribute uint64, v bool) []byte {
	head := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, attribute), 1)
	i := bytes.Index(file, head)
	if i < 0 || i+len(head) >= len(file) {
		return file
	}
	out := bytes.Clone(file)
	out[i+len(head)] = 0
	if v {
		out[i+len(head)] = 0xff
	}
	return out
}
