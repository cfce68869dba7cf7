package receipt

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// Head is a signed statement of how long a log is and what it holds. Its text
// is a checkpoint (C2SP tlog-checkpoint) with three extension lines:
//
//	keyferry-receipts/<log id>
//	<number of entries>
//	<root hash of the tree, Base64>
//	time 2026-11-25T07:10:00Z
//	token <serial of the token>
//	previous <SHA-256 of the text of the head before it, or none>
//
// and is signed as a note (C2SP signed-note) under the name of its first line,
// by ECDSA over SHA-256 in DER, signature type 2, whose key id is the first
// four bytes of the SHA-256 of the SubjectPublicKeyInfo. Sigstore's Rekor signs
// its checkpoints in the same way.
type Head struct {
	Log         LogID
	Size        int64 // from 1 to maxSize
	Root        Hash
	Time        time.Time
	TokenSerial string
	Previous    Hash // zero: the first head of the log
}

// maxSize is more entries than any log has. Near 2^63 package tlog computes for
// ever, and whoever signs a head could have a customer's verification hang.
const maxSize = 1 << 50

const originPrefix = "keyferry-receipts/"

func (id LogID) origin() string { return originPrefix + id.String() }

// Text is the text that is signed.
func (h *Head) Text() string {
	w := writer(h.Log.origin() + "\n" + strconv.FormatInt(h.Size, 10) + "\n" + base64.StdEncoding.EncodeToString(h.Root[:]) + "\n")
	w.time("time", h.Time, none)
	w.word("token", h.TokenSerial)
	w.hash("previous", h.Previous)
	return string(w)
}

// Digest is what the next head says of this one.
func (h *Head) Digest() Hash { return digestText(h.Text()) }

// parseHead reads what Text writes, and nothing else.
func parseHead(text string) (Head, error) {
	var h Head
	parts := strings.SplitN(text, "\n", 4)
	if len(parts) != 4 || !strings.HasPrefix(parts[0], originPrefix) {
		return Head{}, fmt.Errorf("%w: it is no head of a log of receipts", ErrSyntax)
	}
	var err error
	if h.Log, err = ParseLogID(strings.TrimPrefix(parts[0], originPrefix)); err != nil {
		return Head{}, err
	}
	h.Size, err = strconv.ParseInt(parts[1], 10, 64)
	root, bad := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || bad != nil || h.Size < 1 || h.Size > maxSize || len(root) != len(h.Root) {
		return Head{}, fmt.Errorf("%w: size or root of the head", ErrSyntax)
	}
	copy(h.Root[:], root)
	r := reader{rest: parts[3]}
	h.Time = r.time("time", none)
	h.TokenSerial = r.word("token")
	h.Previous = r.hash("previous")
	if err := r.end(); err != nil {
		return Head{}, err
	}
	if h.Text() != text {
		return Head{}, fmt.Errorf("%w: the head is written in another way than it should be", ErrSyntax)
	}
	return h, nil
}

// SignHead signs a head. sign is given a SHA-256 and answers an ECDSA signature
// in DER. What it answers is verified: a head that is signed wrongly would
// never be noticed here, and by every customer.
func SignHead(h Head, key *PublicKey, sign func(digest [sha256.Size]byte) ([]byte, error)) ([]byte, error) {
	signer := &noteKey{name: h.Log.origin(), key: key, sign: sign}
	signed, err := note.Sign(&note.Note{Text: h.Text()}, signer)
	if err != nil {
		return nil, err
	}
	_, err = OpenHead(signed, key)
	return signed, err
}

// OpenHead verifies a signed head. Errors: ErrSyntax, ErrSignature, ErrKey.
func OpenHead(signed []byte, pinned *PublicKey) (Head, error) {
	name, _, _ := strings.Cut(string(signed), "\n")
	opened, err := note.Open(signed, note.VerifierList(&noteKey{name: name, key: pinned}))
	var invalid *note.InvalidSignatureError
	var unverified *note.UnverifiedNoteError
	switch {
	case errors.As(err, &invalid):
		return Head{}, ErrSignature
	case errors.As(err, &unverified):
		for _, sig := range unverified.Note.UnverifiedSigs {
			if sig.Hash == (&noteKey{key: pinned}).KeyHash() {
				return Head{}, ErrSignature // ours, under the name of another log
			}
		}
		return Head{}, fmt.Errorf("%w, whose fingerprint is %s", ErrKey, pinned.Fingerprint())
	case err != nil:
		return Head{}, fmt.Errorf("%w: the head is no signed note (%w)", ErrSyntax, err)
	}
	return parseHead(opened.Text)
}

// noteKey is a key as package note has them.
type noteKey struct {
	name string
	key  *PublicKey
	sign func([sha256.Size]byte) ([]byte, error)
}

// Name is the name that signatures carry.
func (k *noteKey) Name() string { return k.name }

// KeyHash is the key id that signatures carry.
func (k *noteKey) KeyHash() uint32 {
	sum := sha256.Sum256(k.key.spki)
	return binary.BigEndian.Uint32(sum[:])
}

// Sign signs the SHA-256 of text.
func (k *noteKey) Sign(text []byte) ([]byte, error) { return k.sign(sha256.Sum256(text)) }

// Verify reports whether a signature is one of text.
func (k *noteKey) Verify(text, signature []byte) bool {
	digest := sha256.Sum256(text)
	return ecdsa.VerifyASN1(k.key.key, digest[:], signature)
}

// PublicKey is a key that signs heads: ECDSA on P-256.
type PublicKey struct {
	spki []byte
	key  *ecdsa.PublicKey
}

const pemType = "PUBLIC KEY"

// ParsePublicKey reads a SubjectPublicKeyInfo, in PEM or in DER. Errors wrap
// ErrSyntax.
func ParsePublicKey(data []byte) (*PublicKey, error) {
	spki := data
	if bytes.Contains(data, []byte("-----BEGIN")) {
		block, rest := pem.Decode(data)
		if block == nil || block.Type != pemType || len(bytes.TrimSpace(rest)) > 0 {
			return nil, fmt.Errorf("%w: a public key in PEM is one block of type %s", ErrSyntax, pemType)
		}
		spki = block.Bytes
	}
	parsed, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("%w: the public key is no SubjectPublicKeyInfo", ErrSyntax)
	}
	key, ok := parsed.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%w: the public key is not one of ECDSA on P-256", ErrSyntax)
	}
	// The fingerprint is over bytes: there is one spelling.
	if canonical, err := x509.MarshalPKIXPublicKey(key); err != nil || !bytes.Equal(canonical, spki) {
		return nil, fmt.Errorf("%w: the public key is not in DER", ErrSyntax)
	}
	return &PublicKey{spki: bytes.Clone(spki), key: key}, nil
}

// PEM is the key in PEM.
func (k *PublicKey) PEM() []byte { return encodePEM(k.spki) }

// SPKI is the SubjectPublicKeyInfo in DER.
func (k *PublicKey) SPKI() []byte { return bytes.Clone(k.spki) }

// Fingerprint is the SHA-256 of the SubjectPublicKeyInfo in hexadecimal.
func (k *PublicKey) Fingerprint() string {
	return fmt.Sprintf("%x", sha256.Sum256(k.spki))
}

// HasFingerprint compares with a fingerprint in hexadecimal, in either case.
func (k *PublicKey) HasFingerprint(fingerprint string) bool {
	return subtle.ConstantTimeCompare([]byte(strings.ToLower(fingerprint)), []byte(k.Fingerprint())) == 1
}

// check refuses another key than k.
func (k *PublicKey) check(spki []byte) error {
	if !bytes.Equal(spki, k.spki) {
		return fmt.Errorf("%w, whose fingerprint is %s", ErrKey, k.Fingerprint())
	}
	return nil
}

func encodePEM(spki []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: spki}) }
