package engine

import (
	"time"

	"github.com/keyferry/keyferry/hsm"
)

// KeySpec is what a CMK is, by the names of the Alibaba Cloud KMS API.
type KeySpec string

// The key specs of CMKs whose material can be imported.
const (
	AliyunAES256 KeySpec = "Aliyun_AES_256" // 32 bytes
	AliyunSM4    KeySpec = "Aliyun_SM4"     // 16 bytes
)

// KeyState is where a CMK is in its life.
type KeyState string

// The states of a CMK. One without material is PendingImport or PendingDeletion.
const (
	Enabled         KeyState = "Enabled"
	Disabled        KeyState = "Disabled"
	PendingDeletion KeyState = "PendingDeletion"
	PendingImport   KeyState = "PendingImport"
)

// Limits of the data plane.
const (
	MaxPlaintext         = 6 << 10 // bytes that Encrypt takes
	MaxEncryptionContext = 8192    // bytes of all names and values
	MaxDataKey           = 1024    // bytes of a data key
	MaxDescription       = 8192    // characters
)

// CreateKeyInput describes a new CMK. Its origin is always EXTERNAL.
type CreateKeyInput struct {
	Spec        KeySpec // "": AliyunAES256
	Description string
	Custody     hsm.Custody // 0: Config.Custody. The CMK has it for ever.
}

// KeyMetadata is what may be known of a CMK. Absent times are zero.
type KeyMetadata struct {
	KeyID        string
	KeyVersionID string // of the only version
	Spec         KeySpec
	State        KeyState
	Description  string
	CreatedAt    time.Time
	DeleteAt     time.Time // only in PendingDeletion
	ExpireAt     time.Time // of the material; zero: never, or no material
	Custody      hsm.Custody

	// MaterialLost: the token was found not to have the CMK's resident material
	// any more. The same material can be imported again.
	MaterialLost bool

	// Identity of the material, kept for ever after the first import; the
	// zero MaterialID before it.
	MaterialID [hsm.MaterialIDLen]byte
	CheckValue hsm.CheckValue
}

// ImportParameters are what a customer needs to wrap key material.
type ImportParameters struct {
	KeyID       string
	PublicKey   []byte // SubjectPublicKeyInfo, DER
	ImportToken []byte // opaque; good for one CMK, one pair and one algorithm
	ExpiresAt   time.Time
}

// ImportInput carries wrapped key material.
type ImportInput struct {
	KeyID                string
	EncryptedKeyMaterial []byte // as wrapped under ImportParameters.PublicKey
	ImportToken          []byte
	ExpireAt             time.Time // whole seconds; zero: never

	// What the customer expects. On a mismatch nothing is imported and the
	// answer is InvalidKeyMaterial.
	ExpectCheckValue []byte // nil, or 3 bytes by the algorithm of the CMK's spec
	ExpectMaterialID []byte // nil, or 32 bytes

	// RequestID names the request in the log of receipts. "": it has none.
	RequestID string
}

// DataKeyInput asks for a data key. NumberOfBytes wins over Spec.
type DataKeyInput struct {
	KeyID         string
	Spec          string // "AES_256" (also for ""), "AES_128"
	NumberOfBytes int    // 0, or 1 to MaxDataKey
	Context       map[string]string
}

// ReEncryptInput asks for what is encrypted in Blob to be encrypted under the
// CMK KeyID. Each side has its own encryption context.
type ReEncryptInput struct {
	Blob          []byte
	SourceContext map[string]string
	KeyID         string
	Context       map[string]string
}

// Ciphertext is what a use of a CMK answers.
type Ciphertext struct {
	KeyID        string
	KeyVersionID string
	Blob         []byte // key version (36, ASCII) ‖ IV (12) ‖ ciphertext ‖ tag (16)
}

// Plaintext is what was decrypted, or a new data key.
type Plaintext struct {
	KeyID        string
	KeyVersionID string
	Plaintext    []byte
}

// ListKeysInput selects CMKs; see store.KeyFilter for the filters.
type ListKeysInput struct {
	KeyIDs []string
	States []KeyState
	Specs  []KeySpec
	Offset int
	Limit  int
}
