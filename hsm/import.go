package hsm

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // RSAES_OAEP_SHA_1 is what customers may ask for
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// ImportRequest is wrapped material to unwrap, measure and seal.
type ImportRequest struct {
	Pair      PairID
	Algorithm Algorithm
	Wrapped   []byte
	Spec      MaterialSpec
	Context   []byte // at most 65535 bytes; the material id is bound to it
}

// Imported is material in the token's custody, and what the token measured.
type Imported struct {
	Material   Material
	Identity   Identity
	CheckValue CheckValue // SM4 material has an AES-ECB one where the token has no SM4

	// Attributes of the object that came out of the customer's unwrap, as the
	// token reported them, in words of the form CKA_SENSITIVE=true. They are
	// shared; do not change them.
	Attributes []string
}

// Import unwraps material in the token, measures it, seals it and destroys it,
// on session objects only: after a crash the token holds nothing of it.
//
// Every blob that does not decrypt, is of another length than the spec's or
// was made for another pair gets ErrInvalidMaterial and nothing else, after
// the same known-answer operation on the token that tells such a blob from a
// sick token. Other errors: ErrPairNotFound, ErrUntrusted, ErrUnsupported,
// ErrUnavailable.
func (t *Token) Import(ctx context.Context, req ImportRequest) (Imported, error) {
	if req.Spec.Len() == 0 {
		return Imported{}, fmt.Errorf("%w: material spec %q", ErrUnsupported, req.Spec)
	}
	if len(req.Context) > math.MaxUint16 {
		return Imported{}, fmt.Errorf("%w: a context of %d bytes", ErrUnsupported, len(req.Context))
	}
	var out Imported
	err := t.do(ctx, "import key material", func(c *connection, s *session) error {
		p, err := c.pair(ctx, s.Session, req.Pair)
		if err != nil {
			return err
		}
		if err := p.isFor(Sealed, req.Algorithm); err != nil {
			return err
		}
		out, err = c.admit(s, p, func() (Imported, error) { return c.unwrapMeasureSeal(s, p, req) })
		return err
	})
	if err != nil {
		return Imported{}, err
	}
	return out, nil
}

// admit runs one import. Its errors are those of do, and errRefused turned
// into ErrInvalidMaterial once the token has proved itself healthy.
func (c *connection) admit(s *session, p *pair, take func() (Imported, error)) (Imported, error) {
	out, err := take()
	switch {
	case err == nil:
		return out, nil
	case worst(err) == p11.HandleFault:
		// Another node may have destroyed the pair.
		c.pairs.Delete(p.ID)
		if _, err := c.searchPair(s.Session, p.ID); err != nil {
			return Imported{}, err
		}
		return Imported{}, fmt.Errorf("%w: %w", p11.SessionClosed, err)
	case !inputMayCause(err):
		return Imported{}, err
	}
	// The blob is at fault, or the token is: let the token show that it can,
	// and then repeat what it said.
	if sick := c.knownAnswer(s.Session, p); sick != nil {
		if worst(sick) > p11.NoFault {
			return Imported{}, sick
		}
		return Imported{}, fmt.Errorf("%w: the token fails a known answer: %w", p11.DeviceError, sick)
	}
	if out, err = take(); err == nil || !inputMayCause(err) {
		return out, err
	}
	return Imported{}, ErrInvalidMaterial
}

// blobRoom holds every RFC 3394 blob that is made here.
const blobRoom = 64

// errLength: the material does not have the length of its spec.
var errLength = errors.New("hsm: material has another length")

func (c *connection) unwrapMeasureSeal(s *session, p *pair, req ImportRequest) (_ Imported, err error) {
	params, wrapped, err := p.unwrapParams(req.Wrapped)
	if err != nil {
		return Imported{}, err
	}
	key, err := s.Unwrap(params, p.handle, wrapped, c.measured)
	if err != nil {
		// Reasons that are none may hide that it took effect.
		_, unwell := failed(err)
		s.spoilt = s.spoilt || unwell
		return Imported{}, err
	}
	defer func() {
		if gone := s.DestroyObject(key); gone != nil {
			// A session whose objects do not go is closed, and they with it.
			err = fmt.Errorf("%w: %w", p11.SessionClosed, gone)
		}
	}()
	if a, differs, err := s.Differs(key, c.measured); err != nil {
		return Imported{}, err
	} else if differs {
		return Imported{}, fmt.Errorf("%w: %s of an unwrapped key is not what was asked for", ErrUntrusted, attributeName(a))
	}
	var out Imported
	if out.Identity.KCV, err = measureKCV(s.Session, p11.AESECB, key); err != nil {
		return Imported{}, err
	}
	// From here on it is an AES key of some length: no customer's fault is left
	// but another length than the spec's.
	if out.Identity.MaterialID, err = c.measureID(s.Session, key, req.Context); err != nil {
		return Imported{}, c.own("AES-CMAC", err)
	}
	// SM4 material waits in the AES vault while the token has no SM4.
	v := c.vaults[req.Spec]
	if v == nil {
		v = c.vaults[AES256]
	}
	blob, err := s.Wrap(p11.Plain(p11.AESKeyWrap), v.handle, key, make([]byte, blobRoom))
	if err != nil {
		return Imported{}, c.own("sealing", err)
	}
	// RFC 3394 adds 8 bytes. Lengths that are no AES key's never got here:
	// CKM_AES_ECB does not initialise with them.
	if len(blob) != req.Spec.Len()+8 {
		return Imported{}, errLength
	}
	out.Attributes = c.attributes
	out.Material = Material{Custody: Sealed, Spec: req.Spec, Vault: v.fingerprint, Ref: blob}
	out.CheckValue = CheckValue{Algorithm: CheckValueAES, Value: out.Identity.KCV}
	if req.Spec == SM4 && v == c.vaults[SM4] {
		out.CheckValue.Algorithm = CheckValueSM4
		if out.CheckValue.Value, err = v.checkValue(s.Session, blob); err != nil {
			return Imported{}, c.own("opening what was sealed", err)
		}
	}
	return out, nil
}

// own is for errors that no customer's input causes.
func (c *connection) own(what string, err error) error {
	if worst(err) == p11.NoFault {
		return fmt.Errorf("%w: %s: %w", ErrUnavailable, what, err)
	}
	return c.blame(err)
}

// checkValue opens a blob for the check value by its own cipher.
func (v *vault) checkValue(s *p11.Session, blob []byte) (kcv [KCVLen]byte, err error) {
	key, err := s.Unwrap(p11.Plain(p11.AESKeyWrap), v.handle, blob, v.opened)
	if err == nil {
		kcv, err = measureKCV(s, v.kind.cipher.ecb, key)
		if gone := s.DestroyObject(key); gone != nil {
			err = fmt.Errorf("%w: %w", p11.SessionClosed, gone)
		}
	}
	return kcv, err
}

// measureKCV encrypts a zero block in the token. The block is the hash key of
// GCM: three bytes leave this function, the rest is wiped.
func measureKCV(s *p11.Session, ecb p11.Mechanism, key p11.Handle) (kcv [KCVLen]byte, err error) {
	var zero, block [aes.BlockSize]byte
	defer clear(block[:])
	out, err := s.Encrypt(p11.Plain(ecb), key, zero[:], block[:])
	if err != nil {
		return kcv, err
	}
	if len(out) != aes.BlockSize {
		return kcv, fmt.Errorf("hsm: the token's block has %d bytes", len(out))
	}
	copy(kcv[:], out)
	return kcv, nil
}

// MaterialIDInput is what the i-th AES-CMAC of a material id, i from 1, is
// computed over: the label (31 bytes) ‖ i (1 byte) ‖ the length of the context
// (2 bytes, big-endian) ‖ the context. The last four bytes of the label's
// first block are greater than any counter of AES-GCM, so that no block is
// ever input to both.
func MaterialIDInput(i byte, context []byte) []byte {
	out := append([]byte("Keyferry material identifier v1"), i)
	out = binary.BigEndian.AppendUint16(out, uint16(len(context)))
	return append(out, context...)
}

func (c *connection) measureID(s *p11.Session, key p11.Handle, context []byte) (id [MaterialIDLen]byte, err error) {
	cmac := nativeCMAC
	if c.rules.builtCMAC {
		cmac = builtCMAC
	}
	for i := range 2 {
		out, err := cmac(s, key, MaterialIDInput(byte(i+1), context))
		if err != nil {
			return id, err
		}
		copy(id[i*aes.BlockSize:], out[:])
	}
	return id, nil
}

// knownAnswer unwraps and measures a known key under the pair.
func (c *connection) knownAnswer(s *p11.Session, p *pair) error {
	wrapped, err := p.encrypt(publicConstant)
	if err != nil {
		return err
	}
	params, wrapped, err := p.unwrapParams(wrapped)
	if err != nil {
		return err
	}
	tmpl := c.measured
	if p.Custody == Resident {
		if tmpl, err = c.rules.passing(p.label); err != nil {
			return err
		}
	}
	key, err := s.Unwrap(params, p.handle, wrapped, tmpl)
	if err != nil {
		return err
	}
	kcv, err := measureKCV(s, p11.AESECB, key)
	if err = errors.Join(err, s.DestroyObject(key)); err != nil {
		return err
	}
	if !bytes.Equal(kcv[:], zeroBlock(publicConstant)[:KCVLen]) {
		return errors.New("hsm: the token measures a known key wrongly")
	}
	return nil
}

// zeroBlock is a zero block encrypted by AES under a key that is public.
func zeroBlock(key []byte) []byte {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // only ever called with a constant
	}
	var out [aes.BlockSize]byte
	block.Encrypt(out[:], out[:])
	return out[:]
}

// encryptRSA wraps a public constant as a customer would wrap material.
func encryptRSA(alg Algorithm, pub *rsa.PublicKey, known []byte) ([]byte, error) {
	switch alg {
	case PKCS1v15:
		return rsa.EncryptPKCS1v15(rand.Reader, pub, known)
	case OAEPSHA256:
		return rsa.EncryptOAEP(sha256.New(), rand.Reader, pub, known, nil)
	default:
		return rsa.EncryptOAEP(sha1.New(), rand.Reader, pub, known, nil) //nolint:gosec // RSAES_OAEP_SHA_1
	}
}
