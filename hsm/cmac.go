package hsm

import (
	"crypto/aes"
	"crypto/subtle"
	"fmt"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

type block = [aes.BlockSize]byte

// nativeCMAC is AES-CMAC (NIST SP 800-38B) by CKM_AES_CMAC.
func nativeCMAC(s *p11.Session, key p11.Handle, input []byte) (sum block, err error) {
	out, err := s.Sign(p11.Plain(p11.AESCMAC), key, input, make([]byte, aes.BlockSize))
	if err == nil && copy(sum[:], out) != len(sum) {
		err = fmt.Errorf("hsm: the token's AES-CMAC has %d bytes", len(out))
	}
	return sum, err
}

// builtCMAC is AES-CMAC of a token that has CKM_AES_ECB and CKM_AES_CBC only.
// input must not be empty. What it is masked with comes of the encryption of a
// zero block, as the KCV does, and is wiped like it: whoever had it could forge
// CMACs of that material, and would not know the material.
func builtCMAC(s *p11.Session, key p11.Handle, input []byte) (sum block, err error) {
	var mask, zero block
	defer clear(mask[:])
	out, err := s.Encrypt(p11.Plain(p11.AESECB), key, zero[:], mask[:])
	if err != nil {
		return sum, err
	}
	if len(out) != len(mask) {
		return sum, fmt.Errorf("hsm: the token's block has %d bytes", len(out))
	}
	double(&mask)
	// Section 6.2: the last block, padded if it is short, is masked.
	whole := (len(input) + aes.BlockSize - 1) / aes.BlockSize * aes.BlockSize
	masked := make([]byte, whole)
	defer clear(masked)
	if copy(masked, input) < whole {
		masked[len(input)] = 0x80
		double(&mask)
	}
	last := masked[whole-aes.BlockSize:]
	subtle.XORBytes(last, last, mask[:])
	chain := make([]byte, whole+aes.BlockSize) // some tokens want room for padding
	defer clear(chain)
	if out, err = s.Encrypt(p11.CBC(p11.AESCBC, zero[:]), key, masked, chain); err != nil {
		return sum, err
	}
	if len(out) != whole {
		return sum, fmt.Errorf("hsm: the token's AES-CBC has %d bytes for %d", len(out), whole)
	}
	copy(sum[:], out[whole-aes.BlockSize:])
	return sum, nil
}

// double multiplies by x in the field of section 5.3, in constant time.
func double(b *block) {
	var carry byte
	for i := len(b) - 1; i >= 0; i-- {
		b[i], carry = b[i]<<1|carry, b[i]>>7
	}
	b[len(b)-1] ^= 0x87 & -carry
}
