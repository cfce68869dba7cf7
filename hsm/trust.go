package hsm

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// MarkError is the ErrMark of Init: a vault key is on the token, complete but
// for CKA_TRUSTED, which the vendor's own tool sets.
type MarkError struct{ Objects []MarkObject }

// MarkObject is a key to mark as trusted. Handles change from process to
// process, so it is named by its label and its CKA_ID.
type MarkObject struct {
	Label string
	ID    []byte // CKA_ID, 16 random bytes
	New   bool   // made by this very Init
}

// String describes the object to a person.
func (o MarkObject) String() string {
	return fmt.Sprintf("secret key (AES-256) with CKA_LABEL %q and CKA_ID %s", o.Label, hex.EncodeToString(o.ID))
}

func (e *MarkError) Error() string {
	var list []string
	for _, o := range e.Objects {
		list = append(list, o.String())
	}
	return fmt.Sprintf("%v: %s", ErrMark, strings.Join(list, ", "))
}

// Is makes it an ErrMark.
func (e *MarkError) Is(target error) bool { return target == ErrMark }

// makeVaults makes vault keys of the kinds that are missing, in the way in
// which this token gets trusted ones, and returns the rules that they keep.
func makeVaults(s *p11.Session, r rules, caps *Capabilities, cfg InitConfig, kinds []vaultKind) (rules, error) {
	if cfg.VendorTrust {
		return r, markVaults(s, r, cfg, kinds)
	}
	if !r.without(TrustedUnavailable) {
		return r, trustedCeremony(s, r, cfg, kinds)
	}
	full := r.trusting()
	there, err := trustedVaults(s, full, caps.sm)
	if err != nil {
		return r, err
	}
	if !caps.needs(TrustedUnavailable) && (there.trusted() || cfg.SOPIN != nil) {
		// Nothing says yet that the security officer cannot do it.
		err := trustedCeremony(s, full, cfg, kinds)
		if err == nil || !errors.Is(err, ErrUnsupported) || there.trusted() {
			return full, err
		}
		if err := s.Logout(); err != nil && !errors.Is(err, p11.UserNotLoggedIn) {
			return r, err
		}
		if err := login(s, p11.NormalUser, cfg.UserPIN); err != nil {
			return r, err
		}
	}
	for _, kind := range kinds {
		if _, err := s.GenerateKey(p11.AESKeyGen, r.template(kind.plain(cfg.Reseal)...)); err != nil {
			return r, fmt.Errorf("%w: cannot generate a vault key (%w)", ErrUnsupported, err)
		}
	}
	return r, nil
}

// markVaults makes the vault keys that are not there yet, and returns the
// MarkError that names them all. A key is given to be marked only if it was
// generated in the token and is in every way as a vault must be: a mark on
// another's key would be a thief's.
func markVaults(s *p11.Session, r rules, cfg InitConfig, kinds []vaultKind) error {
	stop := &MarkError{}
	for _, kind := range kinds {
		there, err := unmarked(s, r, kind, cfg.Reseal)
		if err != nil {
			return err
		}
		fresh := len(there) == 0
		if fresh {
			id := make([]byte, 16)
			if _, err := rand.Read(id); err != nil {
				return err
			}
			tmpl := r.template(join([]p11.Attr{p11.Bytes(p11.ID, id)}, kind.plain(cfg.Reseal))...)
			if _, err := s.GenerateKey(p11.AESKeyGen, tmpl); err != nil {
				return fmt.Errorf("%w: cannot generate a vault key (%w)", ErrUnsupported, err)
			}
			if there, err = unmarked(s, r, kind, cfg.Reseal); err != nil {
				return err
			}
		}
		switch len(there) {
		case 0:
			return fmt.Errorf("%w: the vault key that was just made does not read back as it was asked for", ErrUntrusted)
		case 1:
			stop.Objects = append(stop.Objects, MarkObject{Label: kind.label, ID: there[0], New: fresh})
		default:
			var ids []string
			for _, id := range there {
				ids = append(ids, hex.EncodeToString(id))
			}
			return fmt.Errorf("%w: %d keys labelled %q wait to be marked as trusted, with CKA_ID %s; destroy those that no run of init named to you",
				ErrUntrusted, len(there), kind.label, strings.Join(ids, ", "))
		}
	}
	return stop
}

// unmarked returns the CKA_ID of each key that is a vault but for CKA_TRUSTED.
func unmarked(s *p11.Session, r rules, kind vaultKind, reseal bool) (ids [][]byte, err error) {
	handles, err := s.FindObjects(p11.NewTemplate(
		p11.ULong(p11.Class, p11.ClassSecretKey),
		p11.Bool(p11.OnToken, true),
		p11.Bytes(p11.Label, []byte(kind.label)),
	))
	if err != nil {
		return nil, err
	}
	for _, h := range handles {
		err := r.readBack(s, h, join(kind.plain(reseal), provenance()))
		if errors.Is(err, ErrUntrusted) {
			continue
		}
		if err != nil {
			return nil, err
		}
		values, err := s.Attributes(h, p11.ID)
		if err != nil {
			return nil, err
		}
		ids = append(ids, values[p11.ID])
	}
	return ids, nil
}

// plain is a vault key as the user generates it, on the token and in its final
// form but for CKA_TRUSTED.
func (v vaultKind) plain(reseal bool) []p11.Attr {
	return join(v.common(reseal), []p11.Attr{
		p11.ULong(p11.ValueLen, 32),
		p11.Bool(p11.OnToken, true),
		p11.Bool(p11.Private, true),
		p11.Bool(p11.Destroyable, false),
	}, frozen())
}

// trustedCeremony is the part of the ceremony that needs both users, within one
// session, whose objects the keys are until they are copied to the token.
func trustedCeremony(s *p11.Session, r rules, cfg InitConfig, kinds []vaultKind) error {
	if cfg.SOPIN == nil {
		return fmt.Errorf("%w: a vault key is missing, and only the security officer can make it", ErrSOPIN)
	}
	if err := s.Logout(); err != nil {
		return err
	}
	if err := login(s, p11.SO, longEnough(ErrSOPIN, cfg.SOPIN)); err != nil {
		return err
	}
	var born []p11.Handle
	for _, kind := range kinds {
		h, err := s.GenerateKey(p11.AESKeyGen, r.template(kind.birth(cfg.Reseal)...))
		if err != nil {
			return fmt.Errorf("%w: the security officer cannot generate a trusted key (%w)", ErrUnsupported, err)
		}
		born = append(born, h)
	}
	if err := s.Logout(); err != nil {
		return err
	}
	if err := login(s, p11.NormalUser, cfg.UserPIN); err != nil {
		return err
	}
	for _, h := range born {
		if _, err := s.CopyObject(h, r.template(vaultPlacement()...)); err != nil {
			return fmt.Errorf("%w: cannot copy a vault key to the token (%w)", ErrUnsupported, err)
		}
		if err := s.DestroyObject(h); err != nil {
			return err
		}
	}
	return nil
}
