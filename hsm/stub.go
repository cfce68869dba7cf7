package hsm

// STUB: the lead replaces this file within the hour. Signatures are firm.

import (
	"context"
	"log/slog"
	"time"
)

// Fingerprint identifies a key by a SHA-256: of a pair, over its SubjectPublicKeyInfo;
// of a vault key or HMAC key, over what it makes of a public constant.
type Fingerprint [32]byte

// PairID is the CKA_ID of a wrapping pair.
type PairID [16]byte

// Pins are the fingerprints of the keys that Init made (or found) on the token; the configuration carries them.
type Pins struct {
	Serial     string
	VaultAES   Fingerprint
	VaultSM4   Fingerprint // zero: the token has no SM4
	MACKey     Fingerprint
	ReceiptKey Fingerprint // SHA-256 of its SubjectPublicKeyInfo
}

// Config says which token to open and how.
type Config struct {
	Module        string // path of the PKCS#11 library
	Label         string // of the token
	Pins          Pins   // Serial and fingerprints, all required
	PIN           func() ([]byte, error) // user PIN; called once at each open; the slice is wiped afterwards
	Sessions      int    // bound of the session pool; 0: 32
	AllowPKCS1v15 bool
	Logger        *slog.Logger // nil: discards
}

// Token is an open token. Safe for concurrent use.
type Token struct{}

// Open opens the token, proves its capabilities and its keys.
func Open(ctx context.Context, cfg Config) (*Token, error) { panic("stub") }

// Close ends all sessions. Keys of the token are lost handles afterwards.
func (t *Token) Close() error { panic("stub") }

// Offers returns nil if the token proved at open that it can do this, or an ErrUnsupported naming what is missing.
func (t *Token) Offers(spec PairSpec, alg Algorithm) error { panic("stub") }

// Usable returns nil if material of that spec can encrypt and decrypt on this token, or an ErrUnsupported.
func (t *Token) Usable(spec MaterialSpec) error { panic("stub") }

// ImplicitRejection reports whether a tampered PKCS1v15 blob unwraps to a random key here (an import by PKCS1v15 then
// needs an expected check value or material id).
func (t *Token) ImplicitRejection() bool { panic("stub") }

// PairInfo describes a wrapping pair that was verified on the token.
type PairInfo struct {
	ID          PairID
	Spec        PairSpec
	Algorithm   Algorithm
	SPKI        []byte // SubjectPublicKeyInfo, DER
	Fingerprint Fingerprint
}

// GeneratePair makes a pair on the token. instance (16 hex digits, store.Instance) marks it as ours for Pairs.
func (t *Token) GeneratePair(ctx context.Context, instance string, spec PairSpec, alg Algorithm) (PairInfo, error) {
	panic("stub")
}

// Pair verifies and returns a pair; handles are kept, so only the first call per pair searches. ErrPairNotFound, ErrUntrusted.
func (t *Token) Pair(ctx context.Context, id PairID) (PairInfo, error) { panic("stub") }

// TokenPair is a pair as listed by Pairs: not verified.
type TokenPair struct {
	ID        PairID
	CreatedAt time.Time // as its label says
}

// Pairs lists the pairs of that instance on the token, for the sweep.
func (t *Token) Pairs(ctx context.Context, instance string) ([]TokenPair, error) { panic("stub") }

// DestroyPair destroys the pair in the token. No error if it is gone already.
func (t *Token) DestroyPair(ctx context.Context, id PairID) error { panic("stub") }

// ImportRequest is wrapped material to unwrap, measure and seal.
type ImportRequest struct {
	Pair      PairID
	Algorithm Algorithm
	Wrapped   []byte
	Spec      MaterialSpec
	Context   []byte // the KeyId; the material id is bound to it
}

// Imported is material that the token holds, and what it measured of it.
type Imported struct {
	Material   Material
	Identity   Identity
	CheckValue CheckValue // for people; AES-ECB for SM4 material when the token has no SM4
}

// Import unwraps, measures, seals and destroys, on session objects only.
// ErrInvalidMaterial for every blob that is not what it should be; ErrPairNotFound; ErrUnavailable.
func (t *Token) Import(ctx context.Context, req ImportRequest) (Imported, error) { panic("stub") }

// OpenMaterial opens material into a Key. ErrUnsupported (SM4 without SM4), ErrUntrusted (blob does not open), ErrUnavailable.
func (t *Token) OpenMaterial(ctx context.Context, m Material) (*Key, error) { panic("stub") }

// Key is open material. Safe for concurrent use.
type Key struct{}

// Encrypt appends IV (12 bytes, random) ‖ ciphertext ‖ tag (16) to dst.
func (k *Key) Encrypt(ctx context.Context, dst, plaintext, aad []byte) ([]byte, error) { panic("stub") }

// Decrypt appends the plaintext of what Encrypt appended. ErrAuthentication, ErrKeyLost, ErrUnavailable.
func (k *Key) Decrypt(ctx context.Context, dst, ciphertext, aad []byte) ([]byte, error) { panic("stub") }

// Close waits for uses under way and destroys the session object. Idempotent.
func (k *Key) Close() error { panic("stub") }

// MAC is HMAC-SHA-256 in the token over the domain and the parts, each with its length.
func (t *Token) MAC(ctx context.Context, domain string, parts ...[]byte) ([32]byte, error) { panic("stub") }

// VerifyMAC recomputes and compares in constant time. ErrUntrusted on a mismatch.
func (t *Token) VerifyMAC(ctx context.Context, mac []byte, domain string, parts ...[]byte) error { panic("stub") }

// Random returns n bytes from the token's generator.
func (t *Token) Random(ctx context.Context, n int) ([]byte, error) { panic("stub") }

// InitConfig is what the SO's ceremony needs.
type InitConfig struct {
	Module, Label, Serial string // Serial "": the only token of that label
	SOPIN, UserPIN        func() ([]byte, error)
	Reseal                bool // vault.reseal: allowed, see design
}

// Init makes what is missing on the token (vault, HMAC key, receipt key), touches nothing that is there.
func Init(ctx context.Context, cfg InitConfig) (Pins, error) { panic("stub") }

// InitToken initialises an uninitialised slot and sets both PINs; returns the serial.
func InitToken(ctx context.Context, module, label string, soPIN, userPIN func() ([]byte, error)) (serial string, err error) {
	panic("stub")
}

// MinPINLen is the shortest PIN that Init and InitToken take: 22 characters of base64 carry 128 bits.
const MinPINLen = 22
