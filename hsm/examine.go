package hsm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Examination is what Examine found on a token.
type Examination struct {
	Token        TokenInfo
	Capabilities *Capabilities
	// Rules is nil if the token can be used with what is accepted, else the
	// ErrUnsupported that Open would return.
	Rules error
	// Keys are those that Init makes, in a fixed order.
	Keys []KeyState
	// Trusted are the objects with CKA_TRUSTED.
	Trusted []TrustedObject
	Objects ObjectCounts
}

// TokenInfo is what a token says of itself. Nothing but the label and the
// serial decides anything.
type TokenInfo struct {
	Label        string `json:"label"`
	Serial       string `json:"serial"`
	Manufacturer string `json:"manufacturer"`
	Model        string `json:"model"`
	MaxSessions  int    `json:"max_sessions"` // 0: it does not say, or has no limit
	Memory       Memory `json:"private_memory"`
	// Library is what the module says of itself. It decides nothing either; but
	// whoever loads a module, and gives it the PIN, believes it in any case.
	Library Library `json:"library"`
}

// Library is what a module says of itself.
type Library struct {
	Manufacturer string `json:"manufacturer"`
	Description  string `json:"description"`
	Version      string `json:"version"` // such as 2.6
}

// KeyState says what became of one of Init's keys.
type KeyState struct {
	Name   string      // "vault AES-256", "vault SM4", "MAC key" or "receipt key"
	Wanted bool        // Open needs it on this token
	Pinned Fingerprint // zero: the configuration pins none
	Found  []Fingerprint
	// Err is why Open refuses what there is, nil if it does not.
	Err error
}

// Missing reports whether the key has still to be made or pinned by Init.
func (k KeyState) Missing() bool { return len(k.Found) == 0 || k.Pinned == Fingerprint{} }

// TrustedObject is an object with CKA_TRUSTED. One that is not a vault key of
// ours voids everything.
type TrustedObject struct {
	Label string
	Err   error // why it is not ours, nil if it is
}

// ObjectCounts are the objects that are stored on the token.
type ObjectCounts struct {
	Keys  int `json:"keys"`  // of every kind, seen by the user
	Pairs int `json:"pairs"` // private halves of wrapping pairs among them
	// Resident is how many look like resident material, of any database.
	Resident int `json:"resident"`
}

// Examine finds out what Open and Init would find, and more, without changing
// anything: it makes session objects alone and destroys them. It logs in once.
// cfg needs no pins. With thorough it takes seconds, to generate an RSA pair of
// every size.
//
// An error means that the token could not be examined: ErrPIN, ErrUntrusted
// (no such token, or two), ErrUnavailable. What is wrong with the token itself
// is in the Examination.
//
// When ctx ends it returns, even where a call to the token has not.
func Examine(ctx context.Context, cfg Config, thorough bool) (*Examination, error) {
	if cfg.PIN == nil {
		return nil, errors.New("hsm: Config.PIN is nil")
	}
	if err := errors.Join(ctx.Err(), validateAccept(cfg.Accept)); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return leaving(ctx, func() (*Examination, error) { return examine(cfg, thorough) }, func(*Examination, error) {})
}

func examine(cfg Config, thorough bool) (_ *Examination, err error) {
	mod, err := p11.Load(cfg.Module, cfg.InitArgs)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrUnavailable, err)
	}
	defer func() { err = errors.Join(err, mod.Close()) }()
	tok, err := findToken(mod, cfg.Label, cfg.Pins.Serial)
	if err != nil {
		return nil, err
	}
	lib, err := mod.Library()
	if err != nil {
		return nil, fault("ask the module for itself", err)
	}
	s, err := mod.OpenSession(tok.Slot)
	if err != nil {
		return nil, fault("open a session", err)
	}
	defer func() { _ = s.Close() }()
	if err := login(s, p11.NormalUser, cfg.PIN); err != nil {
		return nil, err
	}
	x := &Examination{Token: TokenInfo{
		Label: tok.Label, Serial: tok.Serial, Manufacturer: tok.Manufacturer, Model: tok.Model, MaxSessions: int(tok.MaxSessions),
		Memory:  Memory{tok.FreePrivate, tok.TotalPrivate},
		Library: Library{lib.Manufacturer, lib.Description, fmt.Sprintf("%d.%d", lib.Major, lib.Minor)},
	}}
	p := prober{
		mod: mod, slot: tok.Slot, log: cfg.Logger, v15: cfg.AllowPKCS1v15, thorough: thorough, profile: cfg.Profile, profiles: cfg.Profiles,
	}
	if x.Capabilities, err = p.probe(); err != nil {
		return nil, fault("probe the token", err)
	}
	r, refused := x.Capabilities.accepted(cfg.Accept)
	if x.Rules = refused; refused != nil {
		r = x.Capabilities.rules // as far as it goes
	}
	return x, fault("examine the token", errors.Join(x.trusted(s, r), x.keys(s, r, cfg.Pins), x.count(s)))
}

// trusted lists the objects with CKA_TRUSTED.
func (x *Examination) trusted(s *p11.Session, r rules) error {
	r = r.trusting()
	handles, err := s.FindObjects(p11.NewTemplate(p11.Bool(p11.Trusted, true)))
	if errors.Is(err, p11.AttributeTypeInvalid) {
		return nil
	}
	if err != nil {
		return err
	}
	kinds := x.Capabilities.sm.vaultKinds()
	for _, h := range handles {
		values, err := s.Attributes(h, p11.Label)
		if err != nil {
			return err
		}
		object := TrustedObject{Label: string(values[p11.Label])}
		object.Err = fmt.Errorf("%w: it is no vault key of ours", ErrUntrusted)
		for _, kind := range kinds {
			if kind.label == object.Label {
				_, object.Err = verifyVault(s, r, h, kind)
			}
		}
		if worst(object.Err) > p11.HandleFault {
			return object.Err
		}
		x.Trusted = append(x.Trusted, object)
	}
	return nil
}

// keys finds out what became of Init's keys.
func (x *Examination) keys(s *p11.Session, r rules, pins Pins) error {
	proven := x.Capabilities.sm
	vaults, refused := findVaults(s, r, proven)
	if worst(refused) > p11.HandleFault {
		return refused
	}
	fingerprints := func(list []*vault) (out []Fingerprint) {
		for _, v := range list {
			out = append(out, v.fingerprint)
		}
		return out
	}
	macs, err := findMACKeys(s, r)
	if worst(err) > p11.HandleFault {
		return err
	}
	receipts, lost := findReceiptKeys(s, r)
	if worst(lost) > p11.HandleFault {
		return lost
	}
	x.Keys = []KeyState{
		{Name: "vault AES-256", Wanted: true, Pinned: pins.VaultAES, Found: fingerprints(vaults[AES256]), Err: refused},
		{Name: "vault SM4", Wanted: proven.sm4 == nil, Pinned: pins.VaultSM4, Found: fingerprints(vaults[SM4]), Err: refused},
		{Name: "MAC key", Wanted: true, Pinned: pins.MACKey, Found: macs, Err: err},
		{Name: "receipt key", Wanted: true, Pinned: pins.ReceiptKey, Found: receipts, Err: lost},
	}
	for i := range x.Keys {
		k := &x.Keys[i]
		slices.SortFunc(k.Found, func(a, b Fingerprint) int { return slices.Compare(a[:], b[:]) })
		k.Found = slices.Compact(k.Found) // copies of one key are one key
		if k.Err == nil && k.Pinned != (Fingerprint{}) && !slices.Contains(k.Found, k.Pinned) {
			k.Err = fmt.Errorf("%w: %w", ErrUntrusted, &PinnedKeyError{k.Name, k.Pinned})
		}
	}
	return nil
}

func (x *Examination) count(s *p11.Session) error {
	for _, class := range []uint64{p11.ClassSecretKey, p11.ClassPrivateKey, p11.ClassPublicKey} {
		handles, err := s.FindObjects(p11.NewTemplate(p11.ULong(p11.Class, class), p11.Bool(p11.OnToken, true)))
		if err != nil {
			return err
		}
		x.Objects.Keys += len(handles)
		if class == p11.ClassPublicKey {
			continue
		}
		for _, h := range handles {
			values, err := s.Attributes(h, p11.Label)
			if worst(err) > p11.HandleFault {
				return err
			}
			if _, ok := parsePairLabel(values[p11.Label]); ok && class == p11.ClassPrivateKey {
				x.Objects.Pairs++
			}
			if _, ok := parseResidentLabel(values[p11.Label]); ok && class == p11.ClassSecretKey {
				x.Objects.Resident++
			}
		}
	}
	return nil
}
