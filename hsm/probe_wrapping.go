package hsm

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// rsaAlgorithms are those of RSA pairs, the one that is off by default last.
var rsaAlgorithms = []Algorithm{OAEPSHA1, OAEPSHA256, PKCS1v15}

// probePair makes an RSA pair of session objects as pairs of customers are
// made, but for all mechanisms: real ones answer to one each.
func (p *prober) probePair(bits int) (public, private p11.Handle, pub *rsa.PublicKey, err error) {
	r := p.caps.rules
	public, private, err = p.home.GenerateKeyPair(p11.RSAKeyPairGen,
		r.template(rsaPublic(bits)...),
		r.template(wrappingPrivate(p11.KeyRSA, []byte("probe"), "keyferry probe", p11.RSAPKCS, p11.RSAOAEP)...))
	if err != nil {
		return 0, 0, nil, err
	}
	values, err := p.home.Attributes(private, p11.Modulus)
	if err != nil {
		p.destroy(public, private)
		return 0, 0, nil, err
	}
	return public, private, &rsa.PublicKey{N: new(big.Int).SetBytes(values[p11.Modulus]), E: 65537}, nil
}

// wrapping probes what customers wrap by, and what becomes of it.
func (p *prober) wrapping() error {
	_, greatest, err := p.mod.KeySizes(p.slot, p11.RSAKeyPairGen)
	if err := p.lost(err); err != nil {
		return err
	}
	p.caps.maxModulus = greatest
	public, private, pub, err := p.probePair(RSA2048.Bits())
	if err := p.lost(err); err != nil {
		return err
	}
	if err != nil && !p.caps.rules.without(UnwrapTemplateIgnored) {
		p.need(UnwrapTemplateIgnored, "C_GenerateKeyPair with it: %v", err)
		if public, private, pub, err = p.probePair(RSA2048.Bits()); err != nil {
			if err := p.lost(err); err != nil {
				return err
			}
		}
	}
	if err != nil {
		p.refuse("RSA pairs that unwrap, with the attributes of ours (C_GenerateKeyPair: %w)", err)
		return nil
	}
	defer p.destroy(public, private)
	if err := p.provenance(private); err != nil {
		return err
	}
	for _, alg := range rsaAlgorithms {
		if alg == PKCS1v15 && !p.v15 {
			p.caps.wrapping[alg] = fmt.Errorf("%w: %s is switched off", ErrUnsupported, alg)
			p.rsaFinding(alg, Off, "")
			continue
		}
		err := p.unwraps(private, pub, alg)
		if err := p.lost(err); err != nil {
			return err
		}
		if err != nil {
			p.caps.wrapping[alg] = fmt.Errorf("%w: %s (%w)", ErrUnsupported, alg, err)
			p.log.Info("wrapping algorithm is not offered", "algorithm", alg, "cause", err)
			p.rsaFinding(alg, verdict(err), "%v", err)
			continue
		}
		p.caps.wrapping[alg] = nil
		if err := p.sizes(alg); err != nil {
			return err
		}
	}
	if p.v15 && p.caps.wrapping[PKCS1v15] == nil {
		if err := p.implicit(private, pub); err != nil {
			return err
		}
	}
	for _, alg := range rsaAlgorithms {
		if p.caps.wrapping[alg] == nil {
			return errors.Join(p.unwrapped(private, pub, alg), p.lengths(private, pub, alg), p.valueLen(private, pub, alg))
		}
	}
	if p.caps.sm.sm2 != nil {
		p.refuse("none of the wrapping algorithms works (%w)", p.caps.wrapping[OAEPSHA1])
	}
	return nil
}

// provenance compares a generated pair with what is asked of one.
func (p *prober) provenance(private p11.Handle) error {
	err := readBack(p.home, private, provenance())
	if err := p.lost(err); err != nil {
		return err
	}
	p.finding(FindProvenance, err)
	if err != nil {
		p.need(ProvenanceUnreported, "of a generated pair %s", reason(err))
	}
	want := wrappingPrivate(p11.KeyRSA, []byte("probe"), "keyferry probe", p11.RSAPKCS, p11.RSAOAEP)
	if err := p.caps.rules.readBack(p.home, private, want); err != nil {
		if err := p.lost(err); err != nil {
			return err
		}
		p.refuse("the token does not keep the attributes of a wrapping pair (%w)", err)
	}
	return nil
}

// unwraps unwraps a known key by alg and checks that it is that key.
func (p *prober) unwraps(private p11.Handle, pub *rsa.PublicKey, alg Algorithm) error {
	wrapped, err := encryptRSA(alg, pub, kaKey)
	if err != nil {
		return err
	}
	key, err := p.home.Unwrap(rsaParams(alg), private, wrapped, p.caps.rules.template(measured()...))
	if err != nil {
		return err
	}
	defer p.destroy(key)
	return p.isKey(key, kaKey)
}

func (p *prober) rsaFinding(alg Algorithm, v Verdict, format string, args ...any) {
	for _, spec := range []PairSpec{RSA2048, RSA3072, RSA4096} {
		p.wrappingFinding(alg, spec, v, format, args...)
	}
}

func (p *prober) wrappingFinding(alg Algorithm, spec PairSpec, v Verdict, format string, args ...any) {
	p.caps.Findings = append(p.caps.Findings, Finding{
		ID:        fmt.Sprintf(findWrappingPattern, alg, spec),
		Statement: fmt.Sprintf("%s unwraps under pairs of %s", alg, spec),
		Verdict:   v, Evidence: fmt.Sprintf(format, args...),
	})
}

// sizes finds out about the other sizes of an algorithm that works. Generating
// a pair of each takes seconds and is for doctors.
func (p *prober) sizes(alg Algorithm) error {
	p.wrappingFinding(alg, RSA2048, Proven, "")
	for _, spec := range []PairSpec{RSA3072, RSA4096} {
		switch {
		case spec.Bits() > p.caps.maxModulus:
			p.wrappingFinding(alg, spec, Absent, "the token reports RSA keys of at most %d bits", p.caps.maxModulus)
		case !p.thorough:
			p.wrappingFinding(alg, spec, Proven, "with 2048 bits; the token reports RSA keys of up to %d bits", p.caps.maxModulus)
		default:
			public, private, pub, err := p.probePair(spec.Bits())
			if err == nil {
				err = p.unwraps(private, pub, alg)
				p.destroy(public, private)
			}
			if err := p.lost(err); err != nil {
				return err
			}
			if err != nil {
				p.caps.maxModulus = spec.Bits() - 1
				p.wrappingFinding(alg, spec, verdict(err), "%v", err)
				continue
			}
			p.wrappingFinding(alg, spec, Proven, "")
		}
	}
	return nil
}

// implicit looks whether garbage unwraps to something.
func (p *prober) implicit(private p11.Handle, pub *rsa.PublicKey) error {
	wrapped, err := encryptRSA(PKCS1v15, pub, kaKey)
	if err != nil {
		return err
	}
	// Times two to the power of the public exponent: a plaintext twice as
	// large, whose second byte cannot be the 2 of the padding.
	m := new(big.Int).Exp(big.NewInt(2), big.NewInt(int64(pub.E)), pub.N)
	m.Mod(m.Mul(m, new(big.Int).SetBytes(wrapped)), pub.N)
	h, err := p.home.Unwrap(rsaParams(PKCS1v15), private, m.FillBytes(wrapped), p.caps.rules.template(measured()...))
	if err == nil {
		p.destroy(h)
		p.caps.implicitRejection = true
		p.found(FindImplicit, Proven, "C_UnwrapKey of a tampered blob: CKR_OK")
		return nil
	}
	if err := p.lost(err); err != nil {
		return err
	}
	p.found(FindImplicit, Absent, "C_UnwrapKey of a tampered blob: %v", err)
	return nil
}

// unwrapped looks at a key that came by a customer's way.
func (p *prober) unwrapped(private p11.Handle, pub *rsa.PublicKey, alg Algorithm) error {
	r := p.caps.rules
	wrapped, err := encryptRSA(alg, pub, kaKey)
	if err != nil {
		return err
	}
	key, err := p.home.Unwrap(rsaParams(alg), private, wrapped, r.template(measured()...))
	if err != nil {
		return err
	}
	defer p.destroy(key)
	if err := r.readBack(p.home, key, measured()); err != nil {
		if err := p.lost(err); err != nil {
			return err
		}
		p.refuse("the token does not keep the attributes of an unwrapped key (%w); the key was destroyed", err)
	}
	if what, err := p.readsValue(key); err == nil {
		p.refuse("the token gives away what it unwraps (%s: CKR_OK); the key was destroyed", what)
	}
	values, err := p.home.Attributes(key, p11.CheckValue)
	if err != nil {
		return p.lost(err)
	}
	kcv, told := values[p11.CheckValue]
	switch {
	case !told || len(kcv) == 0:
		p.found(FindCheckValue, Absent, "it is not reported")
	case !bytes.Equal(kcv, zeroBlock(kaKey)[:KCVLen]):
		p.found(FindCheckValue, Wrong, "it is another value, of %d bytes", len(kcv))
	default:
		p.found(FindCheckValue, Proven, "")
	}
	if !r.without(UnwrapTemplateIgnored) {
		if _, err := bound(p.home, rsaParams(alg), private, wrapped, r.keep(measured())); err != nil {
			if err := p.lost(err); err != nil {
				return err
			}
			p.need(UnwrapTemplateIgnored, "RSA pairs: %s", reason(err))
		}
	}
	return p.others(key)
}

// lengths proves that the measures of an import tell every length: by the
// unwrap, by AES-ECB, or by what is sealed. Tokens that report lengths do not
// report them alike.
func (p *prober) lengths(private p11.Handle, pub *rsa.PublicKey, alg Algorithm) error {
	long := slices.Concat(kaKey, kaKey)
	var told, refused []string
	odd := 0
	for _, n := range []int{16, 24, 31, 33} {
		wrapped, err := encryptRSA(alg, pub, long[:n])
		if err != nil {
			return err
		}
		key, err := p.home.Unwrap(rsaParams(alg), private, wrapped, p.caps.rules.template(measured()...))
		if err == nil {
			_, err = p.s.Encrypt(p11.Plain(p11.AESECB), key, kaBlock, make([]byte, 32))
			p.destroy(key)
			switch {
			case n == 16 || n == 24: // the sealed blob tells
			case err == nil:
				told = append(told, fmt.Sprintf("%d bytes pass for an AES key", n))
			}
		} else if n == 31 || n == 33 {
			odd++
			refused = append(refused, fmt.Sprintf("%d bytes: %v", n, err))
		}
		if err := p.lost(err); err != nil {
			return err
		}
	}
	if odd == 2 {
		p.found(FindLengthsRefused, Proven, "%s, %s", refused[0], refused[1])
	} else {
		p.found(FindLengthsRefused, Ignored, "C_UnwrapKey takes them")
	}
	if len(told) > 0 {
		p.found(FindLengths, Wrong, "%v", told)
		p.refuse("telling the length of a key (%v)", told)
		return nil
	}
	p.found(FindLengths, Proven, "")
	return nil
}

// valueLen finds out whether the token reports the length of what it unwraps
// truly, for lengths that AES has, and takes no other for one of them. Material
// can be resident if it does: nothing else tells the length of a key that is
// not extractable. Those here are, as the pair pins it.
func (p *prober) valueLen(private p11.Handle, pub *rsa.PublicKey, alg Algorithm) error {
	found, evidence := Proven, ""
	known := bytes.Repeat(publicConstant, 2)
	for _, n := range []int{16, 24, 32, 0, 15, 17, 31, 33, 64} {
		wrapped, err := encryptRSA(alg, pub, known[:n])
		if err != nil {
			return err
		}
		h, err := p.home.Unwrap(rsaParams(alg), private, wrapped, p.caps.rules.template(measured()...))
		if err := p.lost(err); err != nil {
			return err
		}
		if err != nil {
			if n == 16 || n == 24 || n == 32 {
				found, evidence = Unknown, fmt.Sprintf("C_UnwrapKey of %d bytes: %v", n, err)
				break
			}
			continue // a length that is refused is as good as told
		}
		values, err := p.home.Attributes(h, p11.ValueLen)
		p.destroy(h)
		if err := p.lost(err); err != nil {
			return err
		}
		if got, told := values.ULong(p11.ValueLen); !told {
			found, evidence = Absent, "it is not reported"
		} else if got != uint64(n) {
			found, evidence = Wrong, fmt.Sprintf("it is %d for %d bytes", got, n)
		}
		if found != Proven {
			break
		}
	}
	p.found(FindValueLen, found, "%s", evidence)
	switch found {
	case Proven:
		p.found(FindResident, Proven, "")
		return nil
	case Unknown:
		p.caps.resident = fmt.Errorf("%w: resident key material: %s", ErrUnsupported, evidence)
	default:
		p.caps.resident = fmt.Errorf("%w: resident key material: the token does not report truly how long an unwrapped key is (CKA_VALUE_LEN: %s), "+
			"and nothing else tells the length of a key that is not extractable", ErrUnsupported, evidence)
	}
	p.found(FindResident, Absent, "%s", strings.TrimPrefix(reason(p.caps.resident), "resident key material: "))
	return nil
}

// others probes what a thief of the PIN learns without any right to it. Keys
// of full length stay unknown: these are findings, not refusals.
func (p *prober) others(key p11.Handle) error {
	s, err := p.mod.OpenSession(p.slot)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }() // with the digest under way
	err = s.DigestKey(p11.SHA256, key)
	switch {
	case err == nil:
		p.found(FindDigestKey, Ignored, "C_DigestKey: CKR_OK")
	case worst(err) >= p11.TokenFault:
		return err
	default:
		p.found(FindDigestKey, Proven, "C_DigestKey: %v", err)
	}
	found, err := p.s.FindObjects(p11.NewTemplate(p11.ULong(p11.Class, p11.ClassSecretKey), p11.Bytes(p11.Value, kaKey)))
	if err := p.lost(err); err != nil {
		return err
	}
	if err == nil && slices.Contains(found, key) {
		p.found(FindByValue, Ignored, "it finds one")
	} else {
		p.found(FindByValue, Proven, "")
	}
	return nil
}
