package hsm

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// bare is a session object of a public constant without any attribute that a
// token may not know.
func bare(keyType uint64, value []byte, usages ...p11.Attribute) []p11.Attr {
	return join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassSecretKey),
			p11.ULong(p11.KeyType, keyType),
			p11.Bytes(p11.Value, value),
			p11.Bool(p11.OnToken, false),
			p11.Bool(p11.Private, true),
			p11.Bool(p11.Sensitive, true),
			p11.Bool(p11.Extractable, true),
		},
		usage(secretUsages, usages...),
	)
}

// ciphers probes what material and the token's own keys are used with.
func (p *prober) ciphers() error {
	key, err := p.home.CreateObject(p11.NewTemplate(bare(p11.KeyAES, kaKey, p11.Encrypt, p11.Decrypt, p11.Sign)...))
	if err != nil {
		if err := p.lost(err); err != nil {
			return err
		}
		p.refuse("session objects of known values, by which keys are told apart (C_CreateObject: %w)", err)
		return nil
	}
	defer p.destroy(key)
	block, err := aes.NewCipher(kaKey)
	if err != nil {
		return err
	}
	two := append(bytes.Clone(kaBlock), kaCMAC...)
	iv := kaKey[:aes.BlockSize]
	cbc, ctr := make([]byte, len(two)), make([]byte, len(two))
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(cbc, two)
	cipher.NewCTR(block, iv).XORKeyStream(ctr, two)
	results := map[string]error{}
	for _, c := range []struct {
		id   string
		mech p11.Params
		want []byte
		in   []byte
	}{
		{FindECB, p11.Plain(p11.AESECB), encrypted(kaKey, kaBlock), kaBlock},
		{FindCBC, p11.CBC(p11.AESCBC, iv), cbc, two},
		{FindCTR, p11.CTR(p11.AESCTR, iv), ctr, two},
	} {
		got, err := p.s.Encrypt(c.mech, key, c.in, make([]byte, 64))
		if err := p.lost(err); err != nil {
			return err
		}
		results[c.id] = answer(got, err, c.want)
		p.finding(c.id, results[c.id])
	}
	got, err := p.s.Sign(p11.Plain(p11.AESCMAC), key, kaBlock, make([]byte, aes.BlockSize))
	if err := p.lost(err); err != nil {
		return err
	}
	native := answer(got, err, kaCMAC)
	p.finding(FindCMAC, native)
	built := errors.Join(results[FindECB], results[FindCBC])
	p.finding(FindBuiltCMAC, built)
	switch {
	case results[FindECB] != nil:
		p.refuse("CKM_AES_ECB, by which keys are measured (%w)", results[FindECB])
	case native != nil && built != nil:
		p.refuse("CKM_AES_CMAC, by which keys are identified (%w), and CKM_AES_CBC to build it of (%w)", native, built)
	case native != nil:
		p.caps.rules.builtCMAC = true
	}
	return errors.Join(p.gcm(key, block), p.macs(), p.random())
}

// gcm also finds out who chooses the IV: some tokens do it themselves.
func (p *prober) gcm(key p11.Handle, block cipher.Block) error {
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return err
	}
	err = compareGCM(p.s, p11.AESGCM, key, gcm)
	if err := p.lost(err); err != nil {
		return err
	}
	if err != nil {
		iv := make([]byte, gcmIVLen)
		_, own := p.s.Encrypt(p11.GCM(p11.AESGCM, iv, nil), key, kaBlock, make([]byte, 64))
		if err := p.lost(own); err != nil {
			return err
		}
		if own == nil && !bytes.Equal(iv, make([]byte, gcmIVLen)) {
			err = fmt.Errorf("%w: the token takes no IV and makes its own", errWrong)
		}
		p.caps.gcm = fmt.Errorf("%w: CKM_AES_GCM (%w)", ErrUnsupported, err)
	}
	p.finding(FindGCM, err)
	return nil
}

// macs probes the MAC key's mechanism by RFC 2104, and the receipt key's by a
// pair of its own.
func (p *prober) macs() error {
	key, err := p.home.CreateObject(p11.NewTemplate(bare(p11.KeyGenericSecret, kaKey, p11.Sign)...))
	if err == nil {
		mac := hmac.New(sha256.New, kaKey)
		_, _ = mac.Write(kaBlock)
		var got []byte
		got, err = p.s.Sign(p11.Plain(p11.SHA256HMAC), key, kaBlock, make([]byte, macLen))
		err = answer(got, err, mac.Sum(nil))
		p.destroy(key)
	}
	if err := p.lost(err); err != nil {
		return err
	}
	p.finding(FindHMAC, err)
	if err != nil {
		p.refuse("CKM_SHA256_HMAC, by which records are authenticated (%w)", err)
	}
	err = p.ecdsa()
	if err := p.lost(err); err != nil {
		return err
	}
	p.finding(FindECDSA, err)
	if err != nil {
		p.refuse("CKM_ECDSA on P-256, by which receipts are signed (%w)", err)
	}
	return nil
}

func (p *prober) ecdsa() error {
	public, private, err := p.home.GenerateKeyPair(p11.ECKeyPairGen,
		p11.NewTemplate(p11.Bytes(p11.ECParams, oidP256), p11.Bool(p11.OnToken, false), p11.Bool(p11.Verify, true)),
		p11.NewTemplate(p11.Bool(p11.OnToken, false), p11.Bool(p11.Private, true), p11.Bool(p11.Sensitive, true), p11.Bool(p11.Sign, true)))
	if err != nil {
		return err
	}
	defer p.destroy(public, private)
	digest := sha256.Sum256(publicConstant)
	sig, err := p.s.Sign(p11.Plain(p11.ECDSA), private, digest[:], make([]byte, 64))
	if err != nil {
		return err
	}
	values, err := p.home.Attributes(public, p11.ECPoint)
	if err != nil {
		return err
	}
	pub, err := parseECPoint(values[p11.ECPoint])
	if err != nil {
		return err
	}
	if !verifyRaw(pub, digest[:], sig) {
		return errWrong
	}
	return nil
}

func (p *prober) random() error {
	var a, b [32]byte
	err := errors.Join(p.s.Random(a[:]), p.s.Random(b[:]))
	if err := p.lost(err); err != nil {
		return err
	}
	if err == nil && (a == b || a == [32]byte{} || b == [32]byte{}) {
		err = errWrong
	}
	p.finding(FindRandom, err)
	if err != nil {
		p.refuse("C_GenerateRandom (%w)", err)
	}
	return nil
}
