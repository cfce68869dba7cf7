package hsm

import (
	"bytes"
	"crypto/aes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// oidSM2 is sm2p256v1, 1.2.156.10197.1.301, in DER.
var oidSM2 = []byte{0x06, 0x08, 0x2a, 0x81, 0x1c, 0xcf, 0x55, 0x01, 0x82, 0x2d}

// mechanisms are those that unwrap, raw first, as far as the vendor has them.
func (n SM2Numbers) mechanisms() []p11.Mechanism {
	var out []p11.Mechanism
	for _, m := range []uint32{n.Raw, n.DER} {
		if m != 0 {
			out = append(out, p11.Mechanism(m))
		}
	}
	return out
}

// sm2Public is the public half of an SM2 pair. It is private, so that no one
// without the PIN replaces it.
func sm2Public(n SM2Numbers, onToken bool, id []byte) []p11.Attr {
	return join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassPublicKey),
			p11.ULong(p11.KeyType, uint64(n.KeyType)),
			p11.Bytes(p11.ECParams, oidSM2),
			p11.Bytes(p11.ID, id),
			p11.Bool(p11.OnToken, onToken),
			p11.Bool(p11.Private, true),
		},
		usage(publicUsages),
		frozen(),
	)
}

// barePoint unpacks CKA_EC_POINT: a DER OCTET STRING, or bare as some have it.
func barePoint(der []byte) ([]byte, error) {
	var inner []byte
	if rest, err := asn1.Unmarshal(der, &inner); err == nil && len(rest) == 0 {
		der = inner
	}
	if len(der) != 65 || der[0] != 4 {
		return nil, errors.New("hsm: CKA_EC_POINT is no uncompressed point")
	}
	return der, nil
}

// proveSM2 unwraps a known key under a pair made for it, in each layout that
// the profile has a number for.
func proveSM2(s *p11.Session, has map[p11.Mechanism]bool, p Profile) error {
	n := p.SM2
	switch {
	case n.KeyPairGen == 0 || !has[p11.Mechanism(n.KeyPairGen)]:
		return fmt.Errorf("%w: no SM2 mechanism of profile %q", ErrUnsupported, p.Name)
	case n.KeyType == 0:
		return fmt.Errorf("%w: profile %q does not know the key type of SM2", ErrUnsupported, p.Name)
	case len(n.mechanisms()) == 0:
		return fmt.Errorf("%w: SM2 without encryption (profile %q)", ErrUnsupported, p.Name)
	}
	id := []byte("probe")
	public, priv, err := s.GenerateKeyPair(p11.Mechanism(n.KeyPairGen),
		p11.NewTemplate(sm2Public(n, false, id)...),
		p11.NewTemplate(wrappingPrivate(uint64(n.KeyType), id, "keyferry probe", n.mechanisms()...)...))
	if err != nil {
		return fmt.Errorf("%w: SM2 pairs of profile %q (%w)", ErrUnsupported, p.Name, err)
	}
	values, err := s.Attributes(public, p11.ECPoint)
	for _, m := range n.mechanisms() {
		if err == nil {
			err = proveSM2Unwrap(s, n, m, priv, values[p11.ECPoint])
		}
	}
	if err = errors.Join(err, s.DestroyObject(public), s.DestroyObject(priv)); err != nil {
		return fmt.Errorf("%w: SM2PKE of profile %q (%w)", ErrUnsupported, p.Name, err)
	}
	return nil
}

func proveSM2Unwrap(s *p11.Session, n SM2Numbers, m p11.Mechanism, priv p11.Handle, ecPoint []byte) error {
	point, err := barePoint(ecPoint)
	if err != nil {
		return err
	}
	pub, err := sm2.NewPublicKey(point)
	if err != nil {
		return err
	}
	blob, err := sm2.Encrypt(rand.Reader, pub, publicConstant, sm2Raw)
	if err == nil && m == p11.Mechanism(n.DER) {
		blob, err = sm2.PlainCiphertext2ASN1(blob, sm2.C1C3C2)
	}
	if err != nil {
		return err
	}
	if m, blob, err = n.sm2Blob(blob); err != nil {
		return err
	}
	key, err := s.Unwrap(p11.Plain(m), priv, blob, p11.NewTemplate(measured()...))
	if err != nil {
		return err
	}
	var out [aes.BlockSize]byte
	got, err := s.Encrypt(p11.Plain(p11.AESECB), key, out[:], make([]byte, aes.BlockSize))
	if err == nil && !bytes.Equal(got, zeroBlock(publicConstant)) {
		err = errors.New("unwraps to another key")
	}
	return errors.Join(err, s.DestroyObject(key))
}

// sm2Raw is Alibaba's layout: 04 ‖ x ‖ y ‖ C3 ‖ C2.
var sm2Raw = sm2.NewPlainEncrypterOpts(sm2.MarshalUncompressed, sm2.C1C3C2)

// sm2Blob chooses the mechanism for a customer's ciphertext by its first byte:
// 0x04 begins the raw layout, 0x30 the ASN.1 of GM/T 0009. Where the token has
// only one of the two, the ciphertext is written in that; nothing secret is
// touched by it.
func (n SM2Numbers) sm2Blob(blob []byte) (p11.Mechanism, []byte, error) {
	if len(blob) == 0 {
		return 0, nil, errLength
	}
	var raw, der []byte
	var err error
	switch blob[0] {
	case 0x04:
		raw = blob
		if n.Raw == 0 {
			der, err = sm2.PlainCiphertext2ASN1(raw, sm2.C1C3C2)
		}
	case 0x30:
		// Tokens also read BER, and pass over what follows it.
		if raw, err = sm2.ASN1Ciphertext2Plain(blob, sm2Raw); err == nil {
			der, err = sm2.PlainCiphertext2ASN1(raw, sm2.C1C3C2)
		}
		if !bytes.Equal(der, blob) {
			err = errLength
		}
	default:
		err = errLength
	}
	if err != nil {
		return 0, nil, errLength
	}
	if blob[0] == 0x30 && n.DER != 0 || n.Raw == 0 {
		return p11.Mechanism(n.DER), der, nil
	}
	if n.RawOrder == C1C2C3 {
		if raw, err = sm2.AdjustCiphertextSplicingOrder(raw, sm2.C1C3C2, sm2.C1C2C3); err != nil {
			return 0, nil, errLength
		}
	}
	return p11.Mechanism(n.Raw), raw, nil
}

// generateSM2 generates an SM2 pair on the token, with its public half: the
// private half has no attribute for the point.
func (c *connection) generateSM2(s *p11.Session, id PairID, label pairLabel, _ PairSpec) (p11.Handle, error) {
	n := c.sm.profile.SM2
	_, priv, err := s.GenerateKeyPair(p11.Mechanism(n.KeyPairGen),
		c.rules.template(sm2Public(n, true, id[:])...),
		c.rules.template(label.private(uint64(n.KeyType), id, n.mechanisms()...)...))
	return priv, err
}

// verifySM2Pair reads an SM2 pair back. That a public object belongs to it is
// proven by a round trip: anyone with the PIN can make one that says so.
func (c *connection) verifySM2Pair(s *p11.Session, h p11.Handle, id PairID, label pairLabel) (*pair, error) {
	if c.sm.sm2 != nil {
		return nil, c.sm.sm2
	}
	n := c.sm.profile.SM2
	want := label.private(uint64(n.KeyType), id, n.mechanisms()...)
	if err := c.rules.readBack(s, h, join(want, provenance())); err != nil {
		return nil, err
	}
	publics, err := s.FindObjects(pairTemplate(p11.ClassPublicKey, id))
	if err != nil {
		return nil, err
	}
	for _, o := range publics {
		values, err := s.Attributes(o, p11.ECPoint)
		if err != nil {
			return nil, err
		}
		p := &pair{PairInfo: PairInfo{ID: id, Spec: ECSM2, Algorithm: SM2PKE, Custody: label.custody}, label: label, handle: h, sm2By: n}
		point, err := barePoint(values[p11.ECPoint])
		if err != nil {
			continue
		}
		if p.sm2, err = sm2.NewPublicKey(point); err != nil {
			continue
		}
		// Twice: a token that failed once is no reason to disown a pair.
		err = c.knownAnswer(s, p)
		if err != nil && worst(err) == p11.NoFault {
			err = c.knownAnswer(s, p)
		}
		if worst(err) > p11.NoFault {
			return nil, err
		} else if err != nil {
			continue
		}
		if p.SPKI, err = smx509.MarshalPKIXPublicKey(p.sm2); err != nil {
			return nil, err
		}
		p.Fingerprint = sha256.Sum256(p.SPKI)
		return p, nil
	}
	return nil, fmt.Errorf("%w: no public half on the token is that of the pair", ErrUntrusted)
}
