package hsm

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// publicConstant is wrapped by a vault and authenticated by a MAC key to tell
// which they are: 32 bytes, public by intent.
var publicConstant = []byte("Keyferry fingerprint constant v1")

// vault is a vault key of one connection.
type vault struct {
	handle      p11.Handle
	fingerprint Fingerprint
	kind        vaultKind
	trusted     bool          // it has CKA_TRUSTED
	reseal      bool          // what it pins of CKA_EXTRACTABLE
	canary      []byte        // a blob that it opens
	opened      *p11.Template // of what it opens
}

// vaultKinds are the vaults that a token can have.
func (proven sm) vaultKinds() map[MaterialSpec]vaultKind {
	kinds := map[MaterialSpec]vaultKind{AES256: {labelVaultAES, aesNumbers}}
	if proven.sm4 == nil {
		kinds[SM4] = vaultKind{labelVaultSM4, proven.profile.SM4.cipher()}
	}
	return kinds
}

// findKeys finds the pinned vaults and MAC key, and refuses a token that
// carries anything else with CKA_TRUSTED: one trusted key of known value opens
// every blob.
func (c *connection) findKeys(s *p11.Session) error {
	pins := c.t.cfg.Pins
	found, err := findVaults(s, c.rules, c.sm)
	if err != nil {
		return err
	}
	if c.rules.without(TrustedUnavailable) && !c.caps.needs(TrustedUnavailable) && found.trusted() {
		c.rules = c.rules.trusting()
	}
	pinned := map[MaterialSpec]Fingerprint{AES256: pins.VaultAES, SM4: pins.VaultSM4}
	c.vaults = map[MaterialSpec]*vault{}
	for spec, vaults := range found {
		for _, v := range vaults {
			// Several objects of one fingerprint are copies of one key.
			if v.fingerprint != pinned[spec] {
				if !v.trusted {
					continue // anyone with the PIN makes one: the fingerprint decides
				}
				return fmt.Errorf("%w: the token has the %s vault key %s, which is not the pinned one", ErrUntrusted, spec, v.fingerprint)
			}
			c.vaults[spec] = v
		}
	}
	if c.vaults[AES256] == nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, &PinnedKeyError{"AES-256 vault", pins.VaultAES})
	}
	if c.vaults[SM4] == nil && pins.VaultSM4 != (Fingerprint{}) {
		if c.sm.sm4 != nil {
			return fmt.Errorf("%w: the SM4 vault is pinned, and %w", ErrUnavailable, c.sm.sm4)
		}
		return fmt.Errorf("%w: %w", ErrUnavailable, &PinnedKeyError{"SM4 vault", pins.VaultSM4})
	}
	macs, handles, err := macKeys(s, c.rules)
	if err != nil {
		return err
	}
	if i := slices.Index(macs, pins.MACKey); i >= 0 {
		c.mac = handles[i]
	} else {
		return fmt.Errorf("%w: %w", ErrUnavailable, &PinnedKeyError{"MAC key", pins.MACKey})
	}
	return c.findReceiptKey(s)
}

// vaults are those of a token by what they are for.
type vaults map[MaterialSpec][]*vault

// trusted reports whether there are any, and all of them are trusted.
func (v vaults) trusted() bool {
	all := slices.Concat(slices.Collect(maps.Values(v))...)
	return len(all) > 0 && !slices.ContainsFunc(all, func(v *vault) bool { return !v.trusted })
}

// findVaults reads back every object with CKA_TRUSTED and returns the vault
// keys. ErrUntrusted if one is anything else. Where trust was given up, vault
// keys without it are returned too, of the kinds that have none with it.
func findVaults(s *p11.Session, r rules, proven sm) (vaults, error) {
	out, err := trustedVaults(s, r.trusting(), proven)
	if err != nil || !r.without(TrustedUnavailable) {
		return out, err
	}
	for spec, kind := range proven.vaultKinds() {
		if len(out[spec]) > 0 {
			continue
		}
		if out[spec], err = plainVaults(s, r, kind); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// plainVaults returns the vault keys without CKA_TRUSTED. Lookalikes are passed
// over.
func plainVaults(s *p11.Session, r rules, kind vaultKind) (out []*vault, err error) {
	handles, err := s.FindObjects(p11.NewTemplate(
		p11.ULong(p11.Class, p11.ClassSecretKey),
		p11.Bool(p11.OnToken, true),
		p11.Bytes(p11.Label, []byte(kind.label)),
	))
	if err != nil {
		return nil, err
	}
	for _, h := range handles {
		v, err := verifyVault(s, r, h, kind)
		switch {
		case err == nil:
			out = append(out, v)
		case errors.Is(err, ErrUntrusted):
		default:
			return nil, err
		}
	}
	return out, nil
}

func trustedVaults(s *p11.Session, r rules, proven sm) (vaults, error) {
	kinds := proven.vaultKinds()
	handles, err := s.FindObjects(p11.NewTemplate(p11.Bool(p11.Trusted, true)))
	if errors.Is(err, p11.AttributeTypeInvalid) {
		return vaults{}, nil
	}
	if err != nil {
		return nil, err
	}
	out := vaults{}
	for _, h := range handles {
		values, err := s.Attributes(h, p11.Label)
		if err != nil {
			return nil, err
		}
		label := string(values[p11.Label])
		var spec MaterialSpec
		for of, kind := range kinds {
			if kind.label == label {
				spec = of
			}
		}
		switch {
		case spec != "":
		case label == labelVaultSM4:
			return nil, fmt.Errorf("the token has an SM4 vault and cannot use it: %w", proven.sm4)
		default:
			return nil, fmt.Errorf("%w: object %q has CKA_TRUSTED and is no vault key of ours; the token must be dedicated", ErrUntrusted, label)
		}
		v, err := verifyVault(s, r, h, kinds[spec])
		if err != nil {
			return nil, fmt.Errorf("object %q has CKA_TRUSTED and is no vault key of ours; the token must be dedicated: %w", label, err)
		}
		v.trusted = true
		out[spec] = append(out[spec], v)
	}
	return out, nil
}

// verifyVault reads a vault key back and names it by its fingerprint.
func verifyVault(s *p11.Session, r rules, h p11.Handle, kind vaultKind) (*vault, error) {
	v := &vault{handle: h, kind: kind}
	// A token that has learnt CKM_AES_CMAC since keeps the vault that it has.
	other := r
	other.builtCMAC = !r.builtCMAC
	var refused error
	for _, as := range []struct {
		rules
		reseal bool
	}{{r, false}, {r, true}, {other, false}, {other, true}} {
		err := as.readBack(s, h, join(kind.vaultKey(as.reseal), provenance()))
		if err == nil {
			v.reseal, v.opened = as.reseal, as.template(opened(kind.cipher, as.reseal)...)
			break
		}
		if refused == nil {
			refused = err
		}
	}
	if v.opened == nil {
		return nil, refused
	}
	var err error
	if v.canary, err = wrapConstant(s, r, h); err != nil {
		return nil, err
	}
	v.fingerprint = sha256.Sum256(v.canary)
	return v, nil
}

// wrapConstant wraps half of the public constant, which every kind of vault
// opens, under a vault key; RFC 3394 is deterministic, so the result names it.
func wrapConstant(s *p11.Session, r rules, vault p11.Handle) ([]byte, error) {
	known, err := s.CreateObject(r.template(knownAES(publicConstant[:16])...))
	if err != nil {
		return nil, err
	}
	blob, err := s.Wrap(p11.Plain(p11.AESKeyWrap), vault, known, make([]byte, blobRoom))
	if err != nil {
		return nil, err
	}
	return blob, s.DestroyObject(known)
}

// findMACKeys returns the fingerprints of macKeys.
func findMACKeys(s *p11.Session, r rules) ([]Fingerprint, error) {
	list, _, err := macKeys(s, r)
	return list, err
}

// macKeys returns the objects that look like our MAC key and read back as one.
// Lookalikes are passed over: the fingerprint decides.
func macKeys(s *p11.Session, r rules) (fingerprints []Fingerprint, handles []p11.Handle, err error) {
	found, err := s.FindObjects(p11.NewTemplate(
		p11.ULong(p11.Class, p11.ClassSecretKey),
		p11.Bool(p11.OnToken, true),
		p11.Bytes(p11.Label, []byte(labelMAC)),
	))
	if err != nil {
		return nil, nil, err
	}
	for _, h := range found {
		if r.readBack(s, h, join(macKey(), provenance())) != nil {
			continue
		}
		sum, err := s.Sign(p11.Plain(p11.SHA256HMAC), h, macInput(fingerprintDomain, publicConstant), make([]byte, macLen))
		if err != nil {
			return nil, nil, err
		}
		fingerprints, handles = append(fingerprints, sha256.Sum256(sum)), append(handles, h)
	}
	return fingerprints, handles, nil
}

// findReceiptKeys returns the fingerprints of receiptKeys.
func findReceiptKeys(s *p11.Session, r rules) (list []Fingerprint, err error) {
	keys, err := receiptKeys(s, r)
	for _, key := range keys {
		list = append(list, key.fingerprint())
	}
	return list, err
}

// receiptKeys returns the receipt keys, by the public half whose private half
// reads back as ours and signs for it, and those that it found before an error.
func receiptKeys(s *p11.Session, r rules) (keys []*signer, err error) {
	handles, err := s.FindObjects(p11.NewTemplate(
		p11.ULong(p11.Class, p11.ClassPrivateKey),
		p11.Bool(p11.OnToken, true),
		p11.Bytes(p11.Label, []byte(labelReceipt)),
	))
	if err != nil {
		return nil, err
	}
	var untrusted error
	for _, h := range handles {
		values, err := s.Attributes(h, p11.ID)
		if err != nil {
			return keys, err
		}
		id := values[p11.ID]
		_, private := receiptKey(id)
		if r.readBack(s, h, join(private, provenance())) != nil {
			continue
		}
		spki, err := receiptSPKI(s, h, id)
		switch {
		case errors.Is(err, ErrUntrusted): // a lookalike must not hide what comes after it
			untrusted = err
		case err != nil:
			return keys, err
		default:
			keys = append(keys, &signer{h, spki})
		}
	}
	return keys, untrusted
}

// receiptSPKI finds the public half that verifies what the private half signs:
// an object's word for being the other half proves nothing.
func receiptSPKI(s *p11.Session, private p11.Handle, id []byte) ([]byte, error) {
	digest := sha256.Sum256(publicConstant)
	sig, err := s.Sign(p11.Plain(p11.ECDSA), private, digest[:], make([]byte, 64))
	if err != nil {
		return nil, err
	}
	handles, err := s.FindObjects(p11.NewTemplate(p11.ULong(p11.Class, p11.ClassPublicKey), p11.Bytes(p11.ID, id)))
	if err != nil {
		return nil, err
	}
	for _, h := range handles {
		values, err := s.Attributes(h, p11.ECPoint)
		if err != nil {
			return nil, err
		}
		pub, err := parseECPoint(values[p11.ECPoint])
		if err == nil && verifyRaw(pub, digest[:], sig) {
			return x509.MarshalPKIXPublicKey(pub)
		}
	}
	return nil, fmt.Errorf("%w: no public half on the token verifies what the receipt key signs", ErrUntrusted)
}

func parseECPoint(der []byte) (*ecdsa.PublicKey, error) {
	point, err := barePoint(der)
	if err != nil {
		return nil, err
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
}

// verifyRaw verifies r ‖ s, as PKCS#11 has ECDSA signatures.
func verifyRaw(pub *ecdsa.PublicKey, digest, sig []byte) bool {
	der, err := signatureDER(sig)
	return err == nil && ecdsa.VerifyASN1(pub, digest, der)
}
