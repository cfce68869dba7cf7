package hsm

import (
	"bytes"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// The known answer of RFC 3394 section 4.6: 256 bits of key data with a
// 256-bit key. The tokens' keys of the probes have these public values.
var (
	rfcKEK, _  = hex.DecodeString("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
	rfcKey, _  = hex.DecodeString("00112233445566778899aabbccddeeff000102030405060708090a0b0c0d0e0f")
	rfcBlob, _ = hex.DecodeString("28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21")
	// Under the same key by RFC 5649.
	kwpBlob, _ = hex.DecodeString("4a8029243027353b0694cf1bd8fc745bb0ce8a739b19b1960b12426d4c39cfeda926d103ab34e9f6")
)

// subject is the template of a key that a probe unwraps, with one attribute
// changed in its place or added at the end: some tokens set them in their
// order.
func subject(changed ...p11.Attr) []p11.Attr {
	out := join([]p11.Attr{
		p11.ULong(p11.Class, p11.ClassSecretKey),
		p11.ULong(p11.KeyType, p11.KeyAES),
		p11.Bool(p11.OnToken, false),
		p11.Bool(p11.Private, true),
		p11.Bool(p11.Sensitive, true),
		p11.Bool(p11.Extractable, true),
	}, usage(secretUsages, p11.Encrypt, p11.Decrypt, p11.Sign))
	for _, c := range changed {
		if i := slices.IndexFunc(out, func(a p11.Attr) bool { return a.Type == c.Type }); i >= 0 {
			out[i] = c
		} else {
			out = append(out, c)
		}
	}
	return out
}

// kek makes a key that wraps and unwraps, of a public value.
func (p *prober) kek(more ...p11.Attr) (p11.Handle, error) {
	return p.home.CreateObject(p11.NewTemplate(join(bare(p11.KeyAES, rfcKEK, p11.Wrap, p11.Unwrap), more)...))
}

// unwrap unwraps the known key under a kek.
func (p *prober) unwrap(kek p11.Handle, tmpl []p11.Attr) (p11.Handle, error) {
	return p.home.Unwrap(p11.Plain(p11.AESKeyWrap), kek, rfcBlob, p11.NewTemplate(tmpl...))
}

// source is where the known key is unwrapped from.
type source struct {
	params p11.Params
	key    p11.Handle
	blob   []byte
	kek    bool // it wraps, too
}

// pairSource makes a pair without any attribute that a token may not know, for
// tokens without AES key wrap.
func (p *prober) pairSource() (source, error) {
	public, private, err := p.home.GenerateKeyPair(p11.RSAKeyPairGen,
		p11.NewTemplate(p11.ULong(p11.ModulusBits, uint64(RSA2048.Bits())), p11.Bytes(p11.PublicExponent, []byte{1, 0, 1}), p11.Bool(p11.OnToken, false)),
		p11.NewTemplate(p11.Bool(p11.OnToken, false), p11.Bool(p11.Private, true), p11.Bool(p11.Sensitive, true), p11.Bool(p11.Unwrap, true)))
	if err != nil {
		return source{}, err
	}
	p.destroy(public)
	values, err := p.home.Attributes(private, p11.Modulus)
	if err != nil {
		return source{}, err
	}
	blob, err := encryptRSA(OAEPSHA1, &rsa.PublicKey{N: new(big.Int).SetBytes(values[p11.Modulus]), E: 65537}, rfcKey)
	return source{params: rsaParams(OAEPSHA1), key: private, blob: blob}, err
}

// attributes probes AES key wrap, and what becomes of the attributes of a key
// that it unwraps.
func (p *prober) attributes() error {
	kek, err := p.kek()
	if err := p.lost(err); err != nil {
		return err
	}
	if err != nil {
		p.refuse("AES keys of known values that wrap (%w)", err)
		return nil
	}
	p.known = source{p11.Plain(p11.AESKeyWrap), kek, rfcBlob, true}
	if err := p.keyWrap(kek); err != nil {
		return err
	}
	if p.caps.Finding(FindKeyWrap).Verdict != Proven {
		p.destroy(kek)
		if p.known, err = p.pairSource(); err != nil {
			return p.lost(err)
		}
	}
	defer p.destroy(p.known.key)
	wraps := func(key p11.Handle) (string, error) { return p.wraps(kek, key) }
	for _, probe := range []struct {
		id     string
		needs  Exception // "" if the token is refused instead
		attr   p11.Attr
		defies func(key p11.Handle) (string, error) // an attempt that must be refused
	}{
		{FindSensitive, "", p11.Bool(p11.Sensitive, true), p.readsValue},
		{FindExtractable, "", p11.Bool(p11.Extractable, false), p.readsValue},
		{FindUnextractable, WrapsUnextractable, p11.Bool(p11.Extractable, false), wraps},
		{FindWrapTrusted, TrustedUnavailable, p11.Bool(p11.WrapWithTrusted, true), wraps},
		{FindCopyable, CopyableIgnored, p11.Bool(p11.Copyable, false), p.copies},
		{FindModifiable, ModifiableIgnored, p11.Bool(p11.Modifiable, false), p.modifies},
		{FindAllowed, AllowedMechanismsIgnored, p11.Mechanisms(p11.AESECB), p.usesOthers},
		{FindDestroyable, DestroyableIgnored, p11.Bool(p11.Destroyable, false), p.destroys},
	} {
		v, evidence, err := p.attribute(probe.attr, probe.defies)
		if err != nil {
			return err
		}
		p.found(probe.id, v, "%s", evidence)
		switch {
		case v == Proven:
		case probe.needs == "":
			p.refuse("the token does not keep %s of an unwrapped key (%s), so it gives keys away; the key was destroyed", attributeName(probe.attr.Type), evidence)
		default:
			p.need(probe.needs, "%s", evidence)
		}
	}
	return p.trusted()
}

// attribute unwraps the known key with one attribute and tries to defy it.
func (p *prober) attribute(attr p11.Attr, defies func(p11.Handle) (string, error)) (Verdict, string, error) {
	key, err := p.home.Unwrap(p.known.params, p.known.key, p.known.blob, p11.NewTemplate(subject(attr)...))
	if err != nil && worst(err) == p11.NoFault && attr.Type == p11.Sensitive {
		// Some take no CKA_EXTRACTABLE=true beside it.
		key, err = p.home.Unwrap(p.known.params, p.known.key, p.known.blob, p11.NewTemplate(subject(attr, p11.Bool(p11.Extractable, false))...))
	}
	if err := p.lost(err); err != nil {
		return "", "", err
	}
	if err != nil {
		return Absent, fmt.Sprintf("C_UnwrapKey with it: %v", err), nil
	}
	defer p.destroy(key)
	what, err := defies(key)
	if err := p.lost(err); err != nil {
		return "", "", err
	}
	if err == nil {
		return Ignored, what + ": CKR_OK", nil
	}
	refusal := fmt.Sprintf("%s: %v", what, err)
	if err := readBack(p.home, key, []p11.Attr{attr}); err != nil {
		if err := p.lost(err); err != nil {
			return "", "", err
		}
		return Ignored, refusal + ", but it does not read back", nil
	}
	return Proven, refusal, nil
}

// keyWrap probes wrapping in both directions.
func (p *prober) keyWrap(kek p11.Handle) error {
	key, err := p.unwrap(kek, subject())
	if err == nil {
		err = p.isKey(key, rfcKey)
	}
	if err == nil {
		var got []byte
		got, err = p.s.Wrap(p11.Plain(p11.AESKeyWrap), kek, key, make([]byte, blobRoom))
		err = answer(got, err, rfcBlob)
	}
	p.destroy(key)
	if err := p.lost(err); err != nil {
		return err
	}
	p.finding(FindKeyWrap, err)
	if err != nil {
		// Also where all material is to be resident: the vault's fingerprint, by
		// which a token and a restored backup of it are known, is a wrapping, and
		// so is every test of what the PIN alone may do with other keys.
		p.refuse("CKM_AES_KEY_WRAP of keys that are extractable, by which key material is sealed and by which, in every custody, the vault is known (%w)", err)
		return nil
	}
	padded, err := p.home.Unwrap(p11.Plain(p11.AESKeyWrapKWP), kek, kwpBlob, p11.NewTemplate(subject()...))
	if err == nil {
		if err = p.isKey(padded, rfcKey); err == nil {
			var got []byte
			got, err = p.s.Wrap(p11.Plain(p11.AESKeyWrapKWP), kek, padded, make([]byte, blobRoom))
			err = answer(got, err, kwpBlob)
		}
		p.destroy(padded)
	}
	if err := p.lost(err); err != nil {
		return err
	}
	p.finding(FindKeyWrapKWP, err)
	return nil
}

// isKey tells by AES-ECB whether an object is the key of that value.
func (p *prober) isKey(key p11.Handle, value []byte) error {
	got, err := p.s.Encrypt(p11.Plain(p11.AESECB), key, kaBlock, make([]byte, 2*len(kaBlock)))
	return answer(got, err, encrypted(value, kaBlock))
}

func (p *prober) readsValue(key p11.Handle) (string, error) {
	const what = "C_GetAttributeValue of CKA_VALUE"
	values, err := p.home.Attributes(key, p11.Value)
	if err == nil && len(values[p11.Value]) == 0 {
		err = p11.AttributeSensitive // as it is told of one of several attributes
	}
	return what, err
}

func (p *prober) wraps(kek, key p11.Handle) (string, error) {
	if !p.known.kek {
		return "without AES key wrap", errors.New("not tried") // the token is refused for that
	}
	_, err := p.s.Wrap(p11.Plain(p11.AESKeyWrap), kek, key, make([]byte, blobRoom))
	return "C_WrapKey under a key of a known value", err
}

func (p *prober) copies(key p11.Handle) (string, error) {
	h, err := p.home.CopyObject(key, p11.NewTemplate(p11.Bool(p11.OnToken, false)))
	if err == nil {
		p.destroy(h)
	}
	return "C_CopyObject", err
}

func (p *prober) modifies(key p11.Handle) (string, error) {
	return "C_SetAttributeValue", p.home.SetAttributes(key, p11.NewTemplate(p11.Bytes(p11.Label, []byte("changed"))))
}

func (p *prober) usesOthers(key p11.Handle) (string, error) {
	if p.caps.Finding(FindCMAC).Verdict == Proven {
		_, err := p.s.Sign(p11.Plain(p11.AESCMAC), key, kaBlock, make([]byte, 16))
		return "CKM_AES_CMAC with a key that is for CKM_AES_ECB", err
	}
	_, err := p.s.Encrypt(p11.CBC(p11.AESCBC, kaBlock), key, kaBlock, make([]byte, 32))
	return "CKM_AES_CBC with a key that is for CKM_AES_ECB", err
}

func (p *prober) destroys(key p11.Handle) (string, error) {
	return "C_DestroyObject", p.home.DestroyObject(key)
}

// trusted tries to do as the user what only the security officer may.
func (p *prober) trusted() error {
	const what = "C_CreateObject by the user"
	h, err := p.kek(p11.Bool(p11.Trusted, true))
	if err := p.lost(err); err != nil {
		return err
	}
	switch {
	case errors.Is(err, p11.AttributeTypeInvalid):
		p.found(FindTrusted, Absent, "%s with CKA_TRUSTED: %v", what, err)
	case err != nil:
		p.found(FindTrusted, Proven, "%s with CKA_TRUSTED: %v", what, err)
		return nil
	default:
		p.destroy(h)
		p.found(FindTrusted, Ignored, "%s with CKA_TRUSTED: CKR_OK", what)
	}
	p.need(TrustedUnavailable, "%s", p.caps.Finding(FindTrusted).Evidence)
	return nil
}

// templates probes what binds whoever wraps and unwraps.
func (p *prober) templates() error {
	if !p.known.kek {
		return nil
	}
	r := p.caps.rules
	pinned := r.keep(opened(aesNumbers, false))
	v, evidence, err := p.binds(p11.Nested(p11.UnwrapTemplate, pinned), pinned)
	if err != nil {
		return err
	}
	p.found(FindUnwrapTemplate, v, "%s", evidence)
	if v != Proven {
		p.need(UnwrapTemplateIgnored, "%s", evidence)
	}
	v, evidence, err = p.bindsWrapping()
	if err != nil {
		return err
	}
	p.found(FindWrapTemplate, v, "%s", evidence)
	if v != Proven {
		p.need(WrapTemplateIgnored, "%s", evidence)
	}
	return p.copyable()
}

// binds makes a key with CKA_UNWRAP_TEMPLATE and tries to unwrap otherwise.
func (p *prober) binds(nested p11.Attr, pinned []p11.Attr) (Verdict, string, error) {
	kek, err := p.kek(nested)
	if err := p.lost(err); err != nil {
		return "", "", err
	}
	if err != nil {
		return Absent, fmt.Sprintf("a key with it: %v", err), nil
	}
	defer p.destroy(kek)
	equal, err := p.home.NestedEquals(kek, nested.Type, pinned)
	if err := p.lost(err); err != nil {
		return "", "", err
	}
	if err != nil || !equal {
		return Ignored, "it does not read back", nil
	}
	key, err := p.unwrap(kek, pinned)
	if err := p.lost(err); err != nil {
		return "", "", err
	}
	if err != nil {
		return Wrong, fmt.Sprintf("C_UnwrapKey with exactly it: %v", err), nil
	}
	p.destroy(key)
	evidence, err := bound(p.home, p11.Plain(p11.AESKeyWrap), kek, rfcBlob, pinned)
	if err := p.lost(err); err != nil {
		return "", "", err
	}
	if err != nil {
		return Ignored, reason(err), nil
	}
	return Proven, evidence, p.merges(kek, pinned)
}

// merges tells tokens that fill in from those that compare. Either will do:
// Keyferry repeats every attribute.
func (p *prober) merges(kek p11.Handle, pinned []p11.Attr) error {
	short := slices.DeleteFunc(slices.Clone(pinned), func(a p11.Attr) bool { return a.Type == p11.Extractable })
	key, err := p.unwrap(kek, short)
	if err := p.lost(err); err != nil {
		return err
	}
	if err != nil {
		p.found(FindTemplateMerged, Absent, "C_UnwrapKey without an attribute of it: %v", err)
		return nil
	}
	defer p.destroy(key)
	err = readBack(p.home, key, pinned)
	if err := p.lost(err); err != nil {
		return err
	}
	p.finding(FindTemplateMerged, err)
	return nil
}

// bound proves that a key unwraps by its template only, and says what refused
// another. A token that puts the pinned value in the place of the other binds
// as well.
func bound(s *p11.Session, params p11.Params, key p11.Handle, wrapped []byte, tmpl []p11.Attr) (evidence string, err error) {
	for _, pin := range []p11.Attr{p11.Bool(p11.Sensitive, false), p11.Bool(p11.WrapWithTrusted, false), p11.Bool(p11.Sign, true), p11.Bool(p11.Wrap, true)} {
		i := slices.IndexFunc(tmpl, func(a p11.Attr) bool { return a.Type == pin.Type })
		if i < 0 || bytes.Equal(tmpl[i].Value(), pin.Value()) {
			continue
		}
		weaker := slices.Clone(tmpl)
		weaker[i] = pin
		h, err := s.Unwrap(params, key, wrapped, p11.NewTemplate(weaker...))
		if err == nil {
			kept := readBack(s, h, tmpl[i:i+1])
			if gone := s.DestroyObject(h); worst(gone) >= p11.SessionFault || worst(kept) >= p11.SessionFault {
				return "", errors.Join(kept, gone)
			}
			if kept != nil {
				return "", fmt.Errorf("%w: CKA_UNWRAP_TEMPLATE does not bind %s, so the PIN alone would hold every key",
					ErrUnsupported, attributeName(pin.Type))
			}
			continue
		}
		if worst(err) > p11.NoFault {
			return "", err
		}
		evidence = fmt.Sprintf("C_UnwrapKey against it: %v", err)
	}
	return evidence, nil
}

// bindsWrapping makes a key with CKA_WRAP_TEMPLATE and tries to wrap another
// kind of key under it.
func (p *prober) bindsWrapping() (Verdict, string, error) {
	kek, err := p.kek(p11.Nested(p11.WrapTemplate, p.caps.rules.keep(vaultWrapTemplate())))
	if err := p.lost(err); err != nil {
		return "", "", err
	}
	if err != nil {
		return Absent, fmt.Sprintf("a key with it: %v", err), nil
	}
	defer p.destroy(kek)
	other, err := p.home.CreateObject(p11.NewTemplate(bare(p11.KeyGenericSecret, kaKey, p11.Sign)...))
	if err := p.lost(err); err != nil {
		return "", "", err
	}
	if err != nil {
		return Unknown, fmt.Sprintf("a key of another kind: %v", err), nil
	}
	defer p.destroy(other)
	what, err := p.wraps(kek, other)
	if err := p.lost(err); err != nil {
		return "", "", err
	}
	if err == nil {
		return Ignored, what + " with it: CKR_OK", nil
	}
	equal, lost := p.home.NestedEquals(kek, p11.WrapTemplate, p.caps.rules.keep(vaultWrapTemplate()))
	if lost != nil || !equal {
		return Ignored, "it does not read back", p.lost(lost)
	}
	return Proven, fmt.Sprintf("C_WrapKey against it: %v", err), nil
}

// copyable probes whether a copy can be made to look as if it could not be
// one. PKCS#11 v2.40 section 4.1.1 allows it.
func (p *prober) copyable() error {
	if p.caps.rules.without(CopyableIgnored) {
		p.found(FindCopiesCopyable, Unknown, "CKA_COPYABLE is not kept")
		return nil
	}
	key, err := p.kek()
	if err == nil {
		defer p.destroy(key)
		var h p11.Handle
		if h, err = p.home.CopyObject(key, p11.NewTemplate(p11.Bool(p11.Copyable, false))); err == nil {
			kept := readBack(p.home, h, []p11.Attr{p11.Bool(p11.Copyable, false)})
			p.destroy(h)
			if kept == nil {
				p.found(FindCopiesCopyable, Ignored, "C_CopyObject with CKA_COPYABLE=false: CKR_OK")
				p.need(CopiesHideTwins, "C_CopyObject with CKA_COPYABLE=false: CKR_OK")
				return nil
			}
			err = kept
		}
	}
	if err := p.lost(err); err != nil {
		return err
	}
	p.found(FindCopiesCopyable, Proven, "C_CopyObject with CKA_COPYABLE=false: %v", err)
	return nil
}
