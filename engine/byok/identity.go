package byok

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"math"

	"github.com/emmansun/gmsm/sm4"
)

// KCVLen is the length of a key check value in bytes.
const KCVLen = 3

// KCV is the key check value of material: the first three bytes of a zero
// block encrypted under it by the cipher of its key spec. It is for people to
// compare and no identity: another key with the same value is soon found.
//
// Errors wrap ErrKeySpec or ErrMaterial.
func KCV(keySpec string, material []byte) ([KCVLen]byte, error) {
	want := MaterialLen(keySpec)
	if want == 0 {
		return [KCVLen]byte{}, fmt.Errorf("%w %q", ErrKeySpec, keySpec)
	}
	if len(material) != want {
		return [KCVLen]byte{}, fmt.Errorf("%w: %d bytes, but %s has %d", ErrMaterial, len(material), keySpec, want)
	}
	newCipher := aes.NewCipher
	if keySpec == SM4 {
		newCipher = sm4.NewCipher
	}
	block, err := newCipher(material)
	if err != nil { // the length is right
		return [KCVLen]byte{}, fmt.Errorf("%w: %w", ErrMaterial, err)
	}
	// The whole block is the hash key of GCM: no more than the value leaves.
	var b [aes.BlockSize]byte
	block.Encrypt(b[:], b[:])
	kcv := [KCVLen]byte(b[:KCVLen])
	clear(b[:])
	return kcv, nil
}

// MaterialIDLen is the length of a material id in bytes.
const MaterialIDLen = 32

// materialIDLabel keeps this use of the material apart from all others. Its
// first block ends in bytes that no counter of GCM reaches, so that none of
// its inputs is ever one of CMAC's.
const materialIDLabel = "Keyferry material identifier v1"

// MaterialID identifies material of 32 or 16 bytes within a CMK:
//
//	AES-CMAC(K, M(1)) ‖ AES-CMAC(K, M(2))
//	M(i) = "Keyferry material identifier v1" ‖ i (1 byte) ‖ len(keyID) (2 bytes, big-endian) ‖ keyID
//
// where K is the material as an AES key, AES-128 for SM4 too, and keyID is
// the KeyId that the service gave the CMK. It tells nothing of the material,
// and who holds the same material under another CMK finds another id.
//
// Errors wrap ErrKeyID or ErrMaterial.
func MaterialID(keyID string, material []byte) ([MaterialIDLen]byte, error) {
	var id [MaterialIDLen]byte
	if keyID == "" || len(keyID) > math.MaxUint16 {
		return id, fmt.Errorf("%w: it has %d bytes", ErrKeyID, len(keyID))
	}
	if len(material) != 16 && len(material) != 32 {
		return id, fmt.Errorf("%w: %d bytes, neither 32 nor 16", ErrMaterial, len(material))
	}
	block, err := aes.NewCipher(material)
	if err != nil { // the length is right
		return id, fmt.Errorf("%w: %w", ErrMaterial, err)
	}
	for i := range 2 {
		message := append([]byte(materialIDLabel), byte(i+1))
		message = binary.BigEndian.AppendUint16(message, uint16(len(keyID)))
		message = append(message, keyID...)
		mac := cmac(block, message)
		copy(id[i*aes.BlockSize:], mac[:])
	}
	return id, nil
}

// cmac is the CMAC of NIST SP 800-38B, section 6.2, with a whole block as tag.
func cmac(block cipher.Block, message []byte) [aes.BlockSize]byte {
	var subkey, x [aes.BlockSize]byte
	block.Encrypt(subkey[:], subkey[:])
	double(&subkey) // K1
	for len(message) > aes.BlockSize {
		for i := range x {
			x[i] ^= message[i]
		}
		block.Encrypt(x[:], x[:])
		message = message[aes.BlockSize:]
	}
	if len(message) < aes.BlockSize {
		double(&subkey) // K2
		x[len(message)] ^= 0x80
	}
	for i, b := range message {
		x[i] ^= b
	}
	for i, b := range subkey {
		x[i] ^= b
	}
	block.Encrypt(x[:], x[:])
	clear(subkey[:])
	return x
}

// double multiplies by x in GF(2^128), section 6.1, in constant time.
func double(b *[aes.BlockSize]byte) {
	carry := b[0] >> 7
	for i := range len(b) - 1 {
		b[i] = b[i]<<1 | b[i+1]>>7
	}
	b[len(b)-1] = b[len(b)-1]<<1 ^ 0x87*carry
}
