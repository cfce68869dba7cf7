// Package byok is the customer's half of bringing a key: what is done with
// key material before it leaves the customer, in pure Go, and what a customer
// computes to compare with what the service measured.
//
// Start with [Wrap]; [KCV] and [MaterialID] identify the material on both
// sides. The functions take the names of the Alibaba Cloud KMS API, keep no
// reference to the material and are safe for concurrent use. Wiping material
// is the caller's, who owns it. No error holds any of it.
package byok

import "errors"

// The wrapping algorithms.
const (
	OAEPSHA1   = "RSAES_OAEP_SHA_1"   // RFC 8017 section 7.1, MGF1 with SHA-1, empty label
	OAEPSHA256 = "RSAES_OAEP_SHA_256" // the same with SHA-256 for both
	PKCS1v15   = "RSAES_PKCS1_V1_5"   // RFC 8017 section 7.2
	SM2PKE     = "SM2PKE"             // GB/T 32918.4
)

// The key specs whose material can be imported.
const (
	AES256 = "Aliyun_AES_256"
	SM4    = "Aliyun_SM4"
)

// Kinds of errors. Every error of this package wraps one of them, and says
// more.
var (
	ErrAlgorithm = errors.New("byok: unknown wrapping algorithm")
	ErrKeySpec   = errors.New("byok: unknown key spec")
	ErrPublicKey = errors.New("byok: public key is no good")
	ErrMaterial  = errors.New("byok: key material is no good")
	ErrKeyID     = errors.New("byok: key id is no good")
)

// MaterialLen is the length in bytes of the material of a key spec, 0 for an
// unknown one.
func MaterialLen(keySpec string) int {
	switch keySpec {
	case AES256:
		return 32
	case SM4:
		return 16
	}
	return 0
}
