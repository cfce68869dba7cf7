package hsm

import (
	"bytes"
	"crypto/cipher"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm4"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Profile is how a token speaks SM4 and SM2. PKCS#11 has no numbers for them
// (v3.2 neither), and those of vendors clash, so a profile is named in the
// Config or proven by known answers, and never guessed from a number.
//
// A number of zero means that the vendor has none, or that no source gives it.
// SM4 without GCM is measured and refused, though the token may have CBC and
// CMAC: to encrypt and then MAC, the material would have to be two keys, and
// PKCS#11 has no way of deriving them in the token that tokens share.
type Profile struct {
	Name string     `yaml:"name"`
	SM4  SM4Numbers `yaml:"sm4"`
	SM2  SM2Numbers `yaml:"sm2"`
}

// SM4Numbers are a vendor's CKK_ and CKM_ numbers of SM4 (GB/T 32907).
type SM4Numbers struct {
	KeyType uint32 `yaml:"key_type"`
	ECB     uint32 `yaml:"ecb"`
	GCM     uint32 `yaml:"gcm"`  // with CK_GCM_PARAMS; RFC 8998
	CMAC    uint32 `yaml:"cmac"` // of 16 bytes
}

// SM2Numbers are a vendor's numbers of SM2 public key encryption (GM/T 0003.4).
type SM2Numbers struct {
	KeyType    uint32 `yaml:"key_type"` // of key pairs; 3 is CKK_EC, with the curve in CKA_EC_PARAMS
	KeyPairGen uint32 `yaml:"key_pair_gen"`
	Raw        uint32 `yaml:"raw"` // C_UnwrapKey of C1 (04 ‖ x ‖ y) and what RawOrder says
	DER        uint32 `yaml:"der"` // C_UnwrapKey of the ASN.1 of GM/T 0009
	// RawOrder is the layout that Raw takes: C1C3C2, as the standard has it and
	// as "" means, or C1C2C3, as before the standard. Customers send C1C3C2 in
	// either case.
	RawOrder string `yaml:"raw_order"`
}

// The values of SM2Numbers.RawOrder: C2 is as long as the material, C3 has 32
// bytes.
const (
	C1C3C2 = "C1C3C2"
	C1C2C3 = "C1C2C3"
)

// BuiltinProfiles are the profiles that sources give: our own SoftHSM2 (see
// softhsm/patches), Sansec's swpkcs11.h, xipki's tables for TASS, Koal's IDL
// and Luna's cryptoki_v2.h. Those that lack a key type are completed in the
// configuration by who has the vendor's header.
func BuiltinProfiles() []Profile {
	return []Profile{
		{
			Name: "softhsm",
			SM4:  SM4Numbers{KeyType: 0x80000106, ECB: 0x80000108, GCM: 0x8000010f, CMAC: 0x80000110},
			SM2:  SM2Numbers{KeyType: p11.KeyEC, KeyPairGen: 0x80008001, Raw: 0x80008200, DER: 0x80008201},
		},
		{
			Name: "sansec",
			SM4:  SM4Numbers{KeyType: 0x80000106, ECB: 0x80000108},
			SM2:  SM2Numbers{KeyType: 0x80000004, KeyPairGen: 0x80008001, Raw: 0x80008200, DER: 0x80008201},
		},
		{
			Name: "tass",
			SM4:  SM4Numbers{KeyType: 0x80000002, ECB: 0x80000108},
			SM2:  SM2Numbers{KeyType: 0x80000004, KeyPairGen: 0x80008001, Raw: 0x80008200},
		},
		{
			Name: "koal",
			SM4:  SM4Numbers{ECB: 0x80000108, GCM: 0x8000010f},
			SM2:  SM2Numbers{KeyPairGen: 0x80008001, Raw: 0x80008200},
		},
		{
			Name: "luna",
			SM4:  SM4Numbers{KeyType: 0x80000015, ECB: 0x80000b11},
			SM2:  SM2Numbers{KeyType: 0x80000016, KeyPairGen: 0x80000b20},
		},
	}
}

// Validate reports what is wrong with a profile by itself.
func (p Profile) Validate() error {
	var errs []error
	if p.Name == "" {
		errs = append(errs, errors.New("hsm: a profile has no name"))
	}
	if p.SM4 != (SM4Numbers{}) && p.SM4.ECB == 0 {
		errs = append(errs, fmt.Errorf("hsm: profile %q has no number for SM4-ECB, by which SM4 is proven", p.Name))
	}
	if p.SM2 != (SM2Numbers{}) && p.SM2.KeyPairGen == 0 {
		errs = append(errs, fmt.Errorf("hsm: profile %q has no number for SM2 key pair generation", p.Name))
	}
	if o := p.SM2.RawOrder; o != "" && o != C1C3C2 && o != C1C2C3 {
		errs = append(errs, fmt.Errorf("hsm: profile %q has SM2 ciphertexts laid out as %q, which is neither %s nor %s", p.Name, o, C1C3C2, C1C2C3))
	}
	return errors.Join(errs...)
}

// sm is what a token proved of SM4 and SM2, under which numbers.
type sm struct {
	profile *Profile
	sm4     error // nil: proven
	sm2     error
}

// The known answer of GB/T 32907 appendix A.1.
var (
	sm4Key, _    = hex.DecodeString("0123456789abcdeffedcba9876543210")
	sm4Cipher, _ = hex.DecodeString("681edf34d206965e86b3e94f536e4246")
)

// findProfile proves which profile a token speaks. The profile that is named
// is the only one tried; else the one whose every number that it has is proven
// and that has the most. Two that prove equally much and differ are refused.
func findProfile(mod *p11.Module, slot uint, s *p11.Session, named string, extra []Profile) (sm, error) {
	missing := sm{
		sm4: fmt.Errorf("%w: no SM4 mechanism", ErrUnsupported),
		sm2: fmt.Errorf("%w: no SM2 mechanism", ErrUnsupported),
	}
	has, err := mod.MechanismList(slot)
	if err != nil {
		return missing, err
	}
	profiles := slices.Concat(extra, BuiltinProfiles())
	if named != "" {
		i := slices.IndexFunc(profiles, func(p Profile) bool { return p.Name == named })
		if i < 0 {
			return missing, fmt.Errorf("%w: no profile is named %q", ErrUnsupported, named)
		}
		return proveProfile(s, has, profiles[i])
	}
	best, most := []sm{missing}, 0
	for _, p := range profiles {
		proven, err := proveProfile(s, has, p)
		if err != nil {
			return missing, err
		}
		n := 0
		if proven.sm4 == nil {
			n++
		}
		if proven.sm2 == nil {
			n++
		}
		switch {
		case n > most:
			best, most = []sm{proven}, n
		case n == most && n > 0 && !slices.ContainsFunc(best, func(b sm) bool { return b.profile.SM4 == p.SM4 && b.profile.SM2 == p.SM2 }):
			best = append(best, proven)
		}
	}
	if len(best) > 1 {
		var names []string
		for _, b := range best {
			names = append(names, b.profile.Name)
		}
		err := fmt.Errorf("%w: the token answers to several profiles (%s); name one", ErrUnsupported, strings.Join(names, ", "))
		return sm{sm4: err, sm2: err}, nil
	}
	return best[0], nil
}

// proveProfile proves the numbers of one profile. The error is about the token.
func proveProfile(s *p11.Session, has map[p11.Mechanism]bool, p Profile) (sm, error) {
	out := sm{profile: &p}
	for _, part := range []struct {
		prove func(*p11.Session, map[p11.Mechanism]bool, Profile) error
		out   *error
	}{{proveSM4, &out.sm4}, {proveSM2, &out.sm2}} {
		err := part.prove(s, has, p)
		if worst(err) > p11.NoFault {
			return out, err
		}
		*part.out = err
	}
	return out, nil
}

func proveSM4(s *p11.Session, has map[p11.Mechanism]bool, p Profile) error {
	n := p.SM4
	switch {
	case n.ECB == 0 || !has[p11.Mechanism(n.ECB)]:
		return fmt.Errorf("%w: no SM4 mechanism of profile %q", ErrUnsupported, p.Name)
	case n.KeyType == 0:
		return fmt.Errorf("%w: profile %q does not know the key type of SM4", ErrUnsupported, p.Name)
	case n.GCM == 0 || !has[p11.Mechanism(n.GCM)]:
		return fmt.Errorf("%w: SM4 without SM4-GCM (profile %q)", ErrUnsupported, p.Name)
	}
	key, err := s.CreateObject(p11.NewTemplate(knownSM4(n, sm4Key)...))
	if err != nil {
		return fmt.Errorf("%w: SM4 keys of profile %q (%w)", ErrUnsupported, p.Name, err)
	}
	var out [sm4.BlockSize]byte
	got, err := s.Encrypt(p11.Plain(p11.Mechanism(n.ECB)), key, sm4Key, out[:])
	if err == nil && !bytes.Equal(got, sm4Cipher) {
		err = errors.New("wrong answer")
	}
	if err == nil {
		err = proveGCM(s, p11.Mechanism(n.GCM), key, sm4Key)
	}
	if err = errors.Join(err, s.DestroyObject(key)); err != nil {
		return fmt.Errorf("%w: SM4 of profile %q (%w)", ErrUnsupported, p.Name, err)
	}
	return nil
}

// proveGCM proves a GCM mechanism in both directions with an SM4 key of known
// value.
func proveGCM(s *p11.Session, mech p11.Mechanism, key p11.Handle, value []byte) error {
	block, err := sm4.NewCipher(value)
	if err != nil {
		return err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return err
	}
	return compareGCM(s, mech, key, gcm)
}

// compareGCM compares a GCM of the token with one of this process.
func compareGCM(s *p11.Session, mech p11.Mechanism, key p11.Handle, gcm cipher.AEAD) error {
	iv, aad := kaCMAC[:gcmIVLen], kaKey
	want := gcm.Seal(nil, iv, kaBlock, aad)
	got, err := s.Encrypt(p11.GCM(mech, iv, aad), key, kaBlock, make([]byte, len(want)))
	if err != nil || !bytes.Equal(got, want) {
		return errors.Join(errors.New("GCM encryption gives another answer"), err)
	}
	plain, err := s.Decrypt(p11.GCM(mech, iv, aad), key, want, make([]byte, len(want)))
	if err != nil || !bytes.Equal(plain, kaBlock) {
		return errors.Join(errors.New("GCM decryption gives another answer"), err)
	}
	want[0] ^= 1
	if _, err = s.Decrypt(p11.GCM(mech, iv, aad), key, want, make([]byte, len(want))); err == nil {
		return errors.New("GCM does not check the tag")
	}
	if worst(err) > p11.NoFault {
		return err
	}
	return nil
}
