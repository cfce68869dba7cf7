package hsm

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// capabilities are what a token proved by known answers. What it advertises
// counts for nothing: SoftHSM2 2.6.1 lists OAEP and does SHA-1 only.
type capabilities struct {
	wrapping          map[Algorithm]error // nil: proven; else why not
	maxModulus        int                 // bits
	implicitRejection bool
	resident          error // nil: material can be resident; else why not
	sm                sm
}

func (c *capabilities) offers(spec PairSpec, alg Algorithm) error {
	why, known := c.wrapping[alg]
	switch {
	case (spec == ECSM2) != (alg == SM2PKE):
		return fmt.Errorf("%w: wrapping algorithm %q with pairs of spec %q", ErrUnsupported, alg, spec)
	case alg == SM2PKE:
		return c.sm.sm2
	case spec.Bits() == 0:
		return fmt.Errorf("%w: wrapping pairs of spec %q", ErrUnsupported, spec)
	case !known:
		return fmt.Errorf("%w: wrapping algorithm %q", ErrUnsupported, alg)
	case why != nil:
		return why
	case spec.Bits() > c.maxModulus:
		return fmt.Errorf("%w: RSA keys of more than %d bits", ErrUnsupported, c.maxModulus)
	}
	return nil
}

// The known answers are those of NIST SP 800-38B appendix D.3, example 10:
// AES-256 CMAC of one block.
var (
	kaKey, _   = hex.DecodeString("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
	kaBlock, _ = hex.DecodeString("6bc1bee22e409f96e93d7e117393172a")
	kaCMAC, _  = hex.DecodeString("28a7023f452e8f82bd4bf28d8c37c35c")
)

// probe proves everything that the token is used for, on session objects. An
// error means that the token cannot be used at all.
func (c *connection) probe(s *p11.Session) (*capabilities, error) {
	caps := &capabilities{wrapping: map[Algorithm]error{}, sm: c.sm}
	var err error
	if _, caps.maxModulus, err = c.t.mod.KeySizes(c.slot, p11.RSAKeyPairGen); err != nil {
		return nil, err
	}
	// One pair for all probes. Real pairs answer to one mechanism each.
	pub, priv, err := s.GenerateKeyPair(p11.RSAKeyPairGen,
		p11.NewTemplate(rsaPublic(RSA2048.Bits())...),
		p11.NewTemplate(wrappingPrivate(p11.KeyRSA, false, []byte("probe"), "keyferry probe", p11.RSAPKCS, p11.RSAOAEP)...))
	if err != nil {
		return nil, err
	}
	defer func() {
		_ = s.DestroyObject(pub) // session objects: gone with the session at the latest
		_ = s.DestroyObject(priv)
	}()
	values, err := s.Attributes(priv, p11.Modulus)
	if err != nil {
		return nil, err
	}
	public := &rsa.PublicKey{N: new(big.Int).SetBytes(values[p11.Modulus]), E: 65537}
	var key p11.Handle // material that the customer's path brought in
	for _, alg := range []Algorithm{OAEPSHA1, OAEPSHA256, PKCS1v15} {
		if alg == PKCS1v15 && !c.t.cfg.AllowPKCS1v15 {
			caps.wrapping[alg] = fmt.Errorf("%w: %s is switched off", ErrUnsupported, alg)
			continue
		}
		h, err := c.probeAlgorithm(s, priv, public, alg)
		caps.wrapping[alg] = err
		if err != nil {
			c.t.log.Info("wrapping algorithm is not offered", "algorithm", alg, "cause", err)
			continue
		}
		if key != 0 {
			err = s.DestroyObject(key)
		}
		key = h
		if err != nil {
			return nil, err
		}
		if alg == PKCS1v15 {
			if caps.implicitRejection, err = c.probeImplicitRejection(s, priv, public); err != nil {
				return nil, err
			}
		}
	}
	if key == 0 {
		return nil, fmt.Errorf("%w: none of the wrapping algorithms works", ErrUnsupported)
	}
	if err := readBack(s, key, measured()); err != nil {
		return nil, fmt.Errorf("the token does not keep the attributes of an unwrapped key: %w", err)
	}
	if err := c.probeMeasures(s, key); err != nil {
		return nil, err
	}
	if err := c.probePins(s, priv, public, caps); err != nil {
		return nil, err
	}
	if caps.resident = c.probeResident(s, priv, public, caps); worst(caps.resident) > p11.NoFault {
		return nil, caps.resident
	}
	blob, err := s.Wrap(p11.Plain(p11.AESKeyWrap), c.vaults[AES256].handle, key, make([]byte, blobRoom))
	if err != nil {
		return nil, fmt.Errorf("%w: sealing by CKM_AES_KEY_WRAP (%w)", ErrUnsupported, err)
	}
	if err := s.DestroyObject(key); err != nil {
		return nil, err
	}
	return caps, c.probeUse(s, blob)
}

// probeAlgorithm unwraps a known key by alg and checks that it is that key.
func (c *connection) probeAlgorithm(s *p11.Session, priv p11.Handle, pub *rsa.PublicKey, alg Algorithm) (p11.Handle, error) {
	wrapped, err := encryptRSA(alg, pub, kaKey)
	if err != nil {
		return 0, err
	}
	key, err := s.Unwrap(rsaParams(alg), priv, wrapped, c.measured)
	if err != nil {
		return 0, fmt.Errorf("%w: %s (%w)", ErrUnsupported, alg, err)
	}
	var out [aes.BlockSize]byte
	got, err := s.Encrypt(p11.Plain(p11.AESECB), key, kaBlock, out[:])
	block, _ := aes.NewCipher(kaKey) // 32 bytes: no error
	want := make([]byte, aes.BlockSize)
	block.Encrypt(want, kaBlock)
	if err != nil || !bytes.Equal(got, want) {
		return 0, errors.Join(fmt.Errorf("%w: %s unwraps to another key", ErrUnsupported, alg), err, s.DestroyObject(key))
	}
	return key, nil
}

// probeMeasures proves AES-CMAC, and that AES-ECB tells a length that is no
// AES key's.
func (c *connection) probeMeasures(s *p11.Session, key p11.Handle) error {
	var out [aes.BlockSize]byte
	got, err := s.Sign(p11.Plain(p11.AESCMAC), key, kaBlock, out[:])
	if err != nil || !bytes.Equal(got, kaCMAC) {
		return errors.Join(fmt.Errorf("%w: CKM_AES_CMAC", ErrUnsupported), err)
	}
	return nil
}

// probeImplicitRejection looks whether garbage unwraps to something.
func (c *connection) probeImplicitRejection(s *p11.Session, priv p11.Handle, pub *rsa.PublicKey) (bool, error) {
	wrapped, err := encryptRSA(PKCS1v15, pub, kaKey)
	if err != nil {
		return false, err
	}
	// Times two to the power of the public exponent: a plaintext twice as
	// large, whose second byte cannot be the 2 of the padding.
	m := new(big.Int).Exp(big.NewInt(2), big.NewInt(int64(pub.E)), pub.N)
	m.Mod(m.Mul(m, new(big.Int).SetBytes(wrapped)), pub.N)
	h, err := s.Unwrap(rsaParams(PKCS1v15), priv, m.FillBytes(wrapped), c.measured)
	switch {
	case err == nil:
		return true, s.DestroyObject(h)
	case worst(err) > p11.NoFault:
		return false, err
	}
	return false, nil
}

// probePins proves that CKA_UNWRAP_TEMPLATE binds whoever unwraps: the wrapped
// material of customers is open to every holder of the PIN otherwise.
func (c *connection) probePins(s *p11.Session, priv p11.Handle, pub *rsa.PublicKey, caps *capabilities) error {
	for alg, err := range caps.wrapping {
		if err != nil {
			continue
		}
		wrapped, err := encryptRSA(alg, pub, kaKey)
		if err != nil {
			return err
		}
		return bound(s, rsaParams(alg), priv, wrapped, measured())
	}
	return nil
}

// bound proves that a key unwraps by its template only.
func bound(s *p11.Session, params p11.Params, key p11.Handle, wrapped []byte, tmpl []p11.Attr) error {
	for _, pin := range []p11.Attr{p11.Bool(p11.Sensitive, false), p11.Bool(p11.WrapWithTrusted, false)} {
		i := slices.IndexFunc(tmpl, func(a p11.Attr) bool { return a.Type == pin.Type })
		weaker := slices.Clone(tmpl)
		weaker[i] = pin
		h, err := s.Unwrap(params, key, wrapped, p11.NewTemplate(weaker...))
		if err == nil {
			return errors.Join(fmt.Errorf("%w: CKA_UNWRAP_TEMPLATE does not bind %s, so the PIN alone would hold every key",
				ErrUnsupported, attributeName(pin.Type)), s.DestroyObject(h))
		}
		if worst(err) > p11.NoFault {
			return err
		}
	}
	return nil
}

// probeUse opens a blob of a known key and proves AES-GCM with it.
func (c *connection) probeUse(s *p11.Session, blob []byte) error {
	v := c.vaults[AES256]
	key, err := s.Unwrap(p11.Plain(p11.AESKeyWrap), v.handle, blob, v.opened)
	if err != nil {
		return fmt.Errorf("%w: opening by CKM_AES_KEY_WRAP (%w)", ErrUnsupported, err)
	}
	defer func() { _ = s.DestroyObject(key) }()
	if err := readBack(s, key, v.opened.Attrs()); err != nil {
		return err
	}
	if err := bound(s, p11.Plain(p11.AESKeyWrap), v.handle, blob, v.opened.Attrs()); err != nil {
		return err
	}
	block, err := aes.NewCipher(kaKey)
	if err != nil {
		return err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return err
	}
	if err := compareGCM(s, p11.AESGCM, key, gcm); err != nil {
		return fmt.Errorf("%w: CKM_AES_GCM (%w)", ErrUnsupported, err)
	}
	return nil
}
