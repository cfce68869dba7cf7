package hsm

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/emmansun/gmsm/sm2"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// PairID is the CKA_ID of a wrapping pair: 16 random bytes.
type PairID [16]byte

// String is the identifier in hexadecimal.
func (id PairID) String() string { return hex.EncodeToString(id[:]) }

// PairInfo describes a wrapping pair that was verified on the token.
type PairInfo struct {
	ID          PairID
	Spec        PairSpec
	Algorithm   Algorithm
	Custody     Custody     // of what is unwrapped under it
	SPKI        []byte      // SubjectPublicKeyInfo, DER, as the private half says; do not modify
	Fingerprint Fingerprint // SHA-256 of SPKI
}

// pair is a verified pair of one connection.
type pair struct {
	PairInfo
	label  pairLabel
	handle p11.Handle
	rsa    *rsa.PublicKey   // of an RSA pair
	sm2    *ecdsa.PublicKey // of an SM2 pair
	sm2By  SM2Numbers
}

// unwrapParams is how C_UnwrapKey is told the pair's algorithm, for a blob
// that may have to be written differently for it. The error says no more than
// that the blob cannot be one of this pair's.
func (p *pair) unwrapParams(blob []byte) (p11.Params, []byte, error) {
	switch {
	case p.sm2 != nil:
		m, blob, err := p.sm2By.sm2Blob(blob)
		return p11.Plain(m), blob, err
	case len(blob) != p.rsa.Size():
		return p11.Params{}, nil, errLength
	}
	return rsaParams(p.Algorithm), blob, nil
}

// encrypt wraps a public constant as a customer would wrap material.
func (p *pair) encrypt(known []byte) ([]byte, error) {
	if p.sm2 != nil {
		return sm2.Encrypt(rand.Reader, p.sm2, known, sm2Raw)
	}
	return encryptRSA(p.Algorithm, p.rsa, known)
}

// TokenPair is a pair as Pairs lists it, unverified.
type TokenPair struct {
	ID        PairID
	CreatedAt time.Time // as its label says
}

// GeneratePair makes a wrapping pair on the token and proves it by a round
// trip. It takes a tenth of a second or more of the token's time. instance, 16
// hexadecimal digits, and the time by the caller's clock mark the pair for
// Pairs.
//
// When an error is returned the pair may still be on the token; Pairs lists it.
func (t *Token) GeneratePair(ctx context.Context, instance string, now time.Time, spec PairSpec, alg Algorithm) (PairInfo, error) {
	return t.generatePair(ctx, spec, pairLabel{instance, alg, now, Sealed})
}

// GenerateResidentPair is GeneratePair for ImportResident. What is wrapped
// under such a pair becomes resident and nothing else: so says its
// CKA_UNWRAP_TEMPLATE.
func (t *Token) GenerateResidentPair(ctx context.Context, instance string, now time.Time, spec PairSpec, alg Algorithm) (PairInfo, error) {
	if err := t.Keeps(Resident, AES256); err != nil {
		return PairInfo{}, err
	}
	return t.generatePair(ctx, spec, pairLabel{instance, alg, now, Resident})
}

func (t *Token) generatePair(ctx context.Context, spec PairSpec, label pairLabel) (PairInfo, error) {
	alg := label.algorithm
	if err := t.Offers(spec, alg); err != nil {
		return PairInfo{}, err
	}
	var info PairInfo
	err := t.do(ctx, "generate a wrapping pair", func(c *connection, s *session) error {
		// Another identifier at each attempt: the last may have taken effect.
		var id PairID
		if _, err := rand.Read(id[:]); err != nil {
			return err
		}
		generate := c.generateRSA
		if alg == SM2PKE {
			generate = c.generateSM2
		}
		priv, err := generate(s.Session, id, label, spec)
		if err != nil {
			return err
		}
		p, err := c.verifyPair(s.Session, priv, id)
		if err == nil {
			err = c.knownAnswer(s.Session, p)
		}
		if err != nil {
			return errors.Join(err, destroyPair(s.Session, id))
		}
		c.pairs.Store(id, p)
		info = p.PairInfo
		return nil
	})
	if err != nil {
		return PairInfo{}, err
	}
	return info, nil
}

// generateRSA generates a pair on the token, not by copying one to it: a copy
// would have to be made from a copyable key, and of two such keys no attribute
// tells ours from a twin with other usages. The public half is not kept.
func (c *connection) generateRSA(s *p11.Session, id PairID, label pairLabel, spec PairSpec) (p11.Handle, error) {
	pub, priv, err := s.GenerateKeyPair(p11.RSAKeyPairGen,
		c.rules.template(rsaPublic(spec.Bits())...),
		c.rules.template(label.private(p11.KeyRSA, id, mechanism(label.algorithm))...))
	if err != nil {
		return 0, err
	}
	if gone := s.DestroyObject(pub); gone != nil {
		// It goes with the session; the pair has to go by itself.
		return 0, errors.Join(fmt.Errorf("%w: %w", p11.SessionClosed, gone), s.DestroyObject(priv))
	}
	return priv, nil
}

// pairLabel is the CKA_LABEL of a pair:
//
//	keyferry pair 0123456789abcdef RSAES_OAEP_SHA_1 1795445221
//
// and for resident material the same with " resident" behind it. It says which algorithm the pair is for where CKA_ALLOWED_MECHANISMS, which
// knows no hashes, does not.
type pairLabel struct {
	instance  string
	algorithm Algorithm
	made      time.Time
	custody   Custody
}

func (l pairLabel) String() string {
	s := fmt.Sprintf("%s%s %s %d", labelPair, l.instance, l.algorithm, l.made.Unix())
	if l.custody == Resident {
		s += " " + Resident.String()
	}
	return s
}

// private is the template of the private half.
func (l pairLabel) private(keyType uint64, id PairID, mechanisms ...p11.Mechanism) []p11.Attr {
	unwrapped := measured()
	if l.custody == Resident {
		unwrapped = resident()
	}
	return wrappingInto(unwrapped, keyType, true, id[:], l.String(), mechanisms...)
}

func parsePairLabel(label []byte) (l pairLabel, ok bool) {
	rest, ok := strings.CutPrefix(string(label), labelPair)
	fields := strings.Split(rest, " ")
	custody := Sealed
	if len(fields) == 4 && fields[3] == Resident.String() {
		custody, fields = Resident, fields[:3]
	}
	if !ok || len(fields) != 3 {
		return l, false
	}
	unix, err := strconv.ParseInt(fields[2], 10, 64)
	return pairLabel{fields[0], Algorithm(fields[1]), time.Unix(unix, 0).UTC(), custody}, err == nil
}

// mechanism is the one mechanism that pairs of an algorithm answer to.
func mechanism(alg Algorithm) p11.Mechanism {
	if alg == PKCS1v15 {
		return p11.RSAPKCS
	}
	return p11.RSAOAEP
}

// rsaParams is how C_UnwrapKey is told an RSA algorithm.
func rsaParams(alg Algorithm) p11.Params {
	switch alg {
	case PKCS1v15:
		return p11.Plain(p11.RSAPKCS)
	case OAEPSHA256:
		return p11.OAEP(p11.SHA256)
	default:
		return p11.OAEP(p11.SHA1)
	}
}

// Pair returns a wrapping pair after verifying it: its attributes are exactly
// ours, it was made in this token and never left it. The first call for a pair
// searches the token, for two seconds if need be: a pair made by another
// process may not be visible at once. Later ones do not.
//
// Errors: ErrPairNotFound, ErrUntrusted, ErrUnavailable.
func (t *Token) Pair(ctx context.Context, id PairID) (PairInfo, error) {
	// One that is known needs no session, which all may be busy.
	if c := t.conn.Load(); c != nil && !c.dead() {
		if p, ok := c.pairs.Load(id); ok {
			return p.(*pair).PairInfo, nil
		}
	}
	var info PairInfo
	err := t.do(ctx, "find a wrapping pair", func(c *connection, s *session) error {
		p, err := c.pair(ctx, s.Session, id)
		if err == nil {
			info = p.PairInfo
		}
		return err
	})
	if err != nil {
		return PairInfo{}, err
	}
	return info, nil
}

// SearchPatience is for how long an object is looked for that another process
// may just have made, every SearchInterval.
const (
	SearchPatience = 2 * time.Second
	SearchInterval = 100 * time.Millisecond
)

func (c *connection) pair(ctx context.Context, s *p11.Session, id PairID) (*pair, error) {
	if p, ok := c.pairs.Load(id); ok {
		return p.(*pair), nil
	}
	for deadline := time.Now().Add(SearchPatience); ; {
		p, err := c.searchPair(s, id)
		if err == nil {
			c.pairs.Store(id, p)
			return p, nil
		}
		if !errors.Is(err, ErrPairNotFound) || time.Now().After(deadline) {
			return nil, err
		}
		wait := time.NewTimer(SearchInterval)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
}

// searchPair finds the one object of that CKA_ID that is ours.
func (c *connection) searchPair(s *p11.Session, id PairID) (*pair, error) {
	tmpl := pairTemplate(p11.ClassPrivateKey, id)
	handles, err := s.FindObjects(tmpl)
	if err != nil {
		return nil, err
	}
	var found []*pair
	var gone []p11.Handle
	var refused error
	for _, h := range handles {
		p, err := c.verifyPair(s, h, id)
		switch {
		case err == nil:
			found = append(found, p)
		case errors.Is(err, ErrUntrusted):
			refused = err
		case worst(err) == p11.HandleFault:
			gone = append(gone, h)
		default:
			return nil, err
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, fmt.Errorf("%w: %d wrapping pairs have the identifier %s", ErrUntrusted, len(found), id)
	case refused != nil:
		return nil, fmt.Errorf("wrapping pair %s: %w", id, refused)
	}
	if err := errors.Join(vanished(s, tmpl, gone), c.absent(s)); err != nil {
		return nil, err
	}
	return nil, ErrPairNotFound
}

// vanished makes sure that objects, which were found and then not known, have
// been destroyed in between: then they are not found again. The error is one
// for do.
func vanished(s *p11.Session, tmpl *p11.Template, gone []p11.Handle) error {
	if len(gone) == 0 {
		return nil
	}
	again, err := s.FindObjects(tmpl)
	if err == nil && slices.ContainsFunc(again, func(h p11.Handle) bool { return slices.Contains(gone, h) }) {
		err = fmt.Errorf("%w: the token finds an object and does not know it", p11.SessionClosed)
	}
	return err
}

func pairTemplate(class uint64, id PairID) *p11.Template {
	return p11.NewTemplate(
		p11.ULong(p11.Class, class),
		p11.Bool(p11.OnToken, true),
		p11.Bool(p11.Private, true),
		p11.Bytes(p11.ID, id[:]),
	)
}

// verifyPair reads a pair back. What customers get is made of the private
// half's own modulus and exponent, never of a public object, which anyone with
// the PIN can replace.
func (c *connection) verifyPair(s *p11.Session, h p11.Handle, id PairID) (*pair, error) {
	values, err := s.Attributes(h, p11.Modulus, p11.PublicExponent, p11.Label)
	if err != nil {
		return nil, err
	}
	label, ok := parsePairLabel(values[p11.Label])
	if !ok {
		return nil, fmt.Errorf("%w: its label is of no kind that we make", ErrUntrusted)
	}
	if label.algorithm == SM2PKE {
		return c.verifySM2Pair(s, h, id, label)
	}
	pub := &rsa.PublicKey{N: new(big.Int).SetBytes(values[p11.Modulus])}
	if e := new(big.Int).SetBytes(values[p11.PublicExponent]); e.BitLen() < 32 {
		pub.E = int(e.Int64())
	}
	p := &pair{PairInfo: PairInfo{ID: id, Algorithm: label.algorithm, Custody: label.custody}, label: label, handle: h, rsa: pub}
	for _, spec := range []PairSpec{RSA2048, RSA3072, RSA4096} {
		if pub.N.BitLen() == spec.Bits() {
			p.Spec = spec
		}
	}
	if p.Spec == "" || pub.E != 65537 {
		return nil, fmt.Errorf("%w: its public key is of no kind that we make", ErrUntrusted)
	}
	want := label.private(p11.KeyRSA, id, mechanism(label.algorithm))
	if err := c.rules.readBack(s, h, join(want, provenance())); err != nil {
		return nil, err
	}
	if p.SPKI, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		return nil, err
	}
	p.Fingerprint = sha256.Sum256(p.SPKI)
	return p, nil
}

// Pairs lists the wrapping pairs of an instance that are on the token, for
// whoever destroys those that nobody knows.
func (t *Token) Pairs(ctx context.Context, instance string) ([]TokenPair, error) {
	var out []TokenPair
	err := t.do(ctx, "list the wrapping pairs", func(c *connection, s *session) error {
		out = nil
		tmpl := p11.NewTemplate(
			p11.ULong(p11.Class, p11.ClassPrivateKey),
			p11.Bool(p11.OnToken, true),
			p11.Bool(p11.Private, true), // anyone can make one that is not
			p11.Bool(p11.Unwrap, true),
		)
		handles, err := s.FindObjects(tmpl)
		if err != nil {
			return err
		}
		var gone []p11.Handle
		for _, h := range handles {
			values, err := s.Attributes(h, p11.ID, p11.Label)
			if worst(err) == p11.HandleFault {
				gone = append(gone, h)
				continue
			}
			if err != nil {
				return err
			}
			label, ok := parsePairLabel(values[p11.Label])
			if id := values[p11.ID]; ok && label.instance == instance && len(id) == len(PairID{}) {
				out = append(out, TokenPair{ID: PairID(id), CreatedAt: label.made})
			}
		}
		return errors.Join(vanished(s.Session, tmpl, gone), c.absent(s.Session))
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// DestroyPair destroys a pair in the token; captured material that was wrapped
// under it can never be opened again. It is no error if the pair is gone.
func (t *Token) DestroyPair(ctx context.Context, id PairID) error {
	return t.do(ctx, "destroy a wrapping pair", func(c *connection, s *session) error {
		c.pairs.Delete(id)
		if err := destroyPair(s.Session, id); err != nil {
			return err
		}
		return c.absent(s.Session)
	})
}

// destroyPair destroys every object of a pair, the private half first, and
// goes on past those that it cannot: a thief may have put one in the way.
func destroyPair(s *p11.Session, id PairID) error {
	var errs []error
	for _, class := range []uint64{p11.ClassPrivateKey, p11.ClassPublicKey} {
		handles, err := s.FindObjects(pairTemplate(class, id))
		if err != nil {
			return err
		}
		for _, h := range handles {
			if err := s.DestroyObject(h); worst(err) > p11.HandleFault {
				return err
			} else if worst(err) == p11.NoFault {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
