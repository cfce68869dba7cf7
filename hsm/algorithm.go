package hsm

// Algorithm names how a customer wraps key material under a public key. A
// wrapping pair answers to exactly one Algorithm.
type Algorithm string

// The wrapping algorithms, by the names of the Alibaba Cloud KMS API.
const (
	OAEPSHA1   Algorithm = "RSAES_OAEP_SHA_1"   // RFC 8017 section 7.1, MGF1 with SHA-1, empty label
	OAEPSHA256 Algorithm = "RSAES_OAEP_SHA_256" // the same with SHA-256 for both
	PKCS1v15   Algorithm = "RSAES_PKCS1_V1_5"   // RFC 8017 section 7.2; see Config.AllowPKCS1v15
	SM2PKE     Algorithm = "SM2PKE"             // GM/T 0003.4
)

// PairSpec names the kind of a wrapping pair.
type PairSpec string

// The wrapping key specs.
const (
	RSA2048 PairSpec = "RSA_2048"
	RSA3072 PairSpec = "RSA_3072"
	RSA4096 PairSpec = "RSA_4096"
	ECSM2   PairSpec = "EC_SM2"
)

// Bits is the modulus length of an RSA spec, 0 for others.
func (s PairSpec) Bits() int {
	switch s {
	case RSA2048:
		return 2048
	case RSA3072:
		return 3072
	case RSA4096:
		return 4096
	}
	return 0
}
