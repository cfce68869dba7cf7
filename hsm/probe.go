package hsm

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// The known answers are those of NIST SP 800-38B appendix D.3, example 10:
// AES-256 CMAC of one block.
var (
	kaKey, _   = hex.DecodeString("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
	kaBlock, _ = hex.DecodeString("6bc1bee22e409f96e93d7e117393172a")
	kaCMAC, _  = hex.DecodeString("28a7023f452e8f82bd4bf28d8c37c35c")
)

// prober probes one token. Everything that it makes are session objects of two
// sessions that end with it, and public constants are all that it puts into
// them.
type prober struct {
	mod  *p11.Module
	slot uint
	log  *slog.Logger
	has  map[p11.Mechanism]bool
	home *p11.Session // owns the objects
	s    *p11.Session // uses them: some probes leave a session in an unknown state

	v15      bool // try RSAES_PKCS1_V1_5, too
	thorough bool // generate a pair of every size
	profile  string
	profiles []Profile

	known source
	caps  *Capabilities
	fatal []error
}

// probe finds out what the token can do; the user must be logged in. An error
// is about this time, not about the token: what the token cannot do is in the
// Capabilities.
func (p prober) probe() (_ *Capabilities, err error) {
	p.caps = &Capabilities{wrapping: map[Algorithm]error{}}
	if p.has, err = p.mod.MechanismList(p.slot); err != nil {
		return nil, err
	}
	defer func() {
		for _, s := range []*p11.Session{p.home, p.s} {
			if s != nil {
				_ = s.Close() // and with it its objects
			}
		}
	}()
	for _, s := range []**p11.Session{&p.home, &p.s} {
		if *s, err = p.mod.OpenSession(p.slot); err != nil {
			return nil, err
		}
	}
	if p.caps.sm, err = findProfile(p.mod, p.slot, p.home, p.profile, p.profiles); err != nil {
		return nil, err
	}
	for _, part := range []func() error{p.ciphers, p.attributes, p.templates, p.wrapping} {
		if err := part(); err != nil {
			return nil, err
		}
	}
	p.finding(FindSM4, p.caps.sm.sm4)
	p.finding(FindSM2, p.caps.sm.sm2)
	p.caps.refusal = errors.Join(p.fatal...)
	for _, f := range p.caps.Findings {
		p.log.Debug("token probed", slog.String("finding", f.ID), slog.String("verdict", string(f.Verdict)), slog.String("evidence", f.Evidence))
	}
	return p.caps, nil
}

// lost reports an answer that is about the session or the token of this time.
// A session in an unknown state is replaced.
func (p *prober) lost(err error) error {
	switch w := worst(err); {
	case w >= p11.TokenFault:
		return err
	case w == p11.SessionFault:
		_ = p.s.Close()
		s, err := p.mod.OpenSession(p.slot)
		if err != nil {
			return err
		}
		p.s = s
	}
	return nil
}

// errWrong is an answer that is not the known one.
var errWrong = errors.New("another answer than the known one")

// verdict sorts an error of a probe.
func verdict(err error) Verdict {
	switch {
	case err == nil:
		return Proven
	case errors.Is(err, errWrong):
		return Wrong
	}
	return Absent
}

func (p *prober) found(id string, v Verdict, format string, args ...any) {
	statement := statements[id]
	p.caps.Findings = append(p.caps.Findings, Finding{ID: id, Statement: statement, Verdict: v, Evidence: fmt.Sprintf(format, args...)})
}

// finding is found for what an error says all about.
func (p *prober) finding(id string, err error) {
	if err == nil {
		p.found(id, Proven, "")
		return
	}
	p.found(id, verdict(err), "%s", reason(err))
}

// reason is an error without its kind.
func reason(err error) string {
	text := strings.ReplaceAll(err.Error(), "\n", ": ")
	for _, kind := range []error{ErrUnsupported, ErrUntrusted} {
		text = strings.TrimPrefix(text, kind.Error()+": ")
	}
	return text
}

// refuse says what no exception mends.
func (p *prober) refuse(format string, args ...any) {
	p.fatal = append(p.fatal, fmt.Errorf("%w: "+format, append([]any{ErrUnsupported}, args...)...))
}

// need says that the token needs an exception.
func (p *prober) need(e Exception, format string, args ...any) {
	if p.caps.rules.without(e) {
		return
	}
	p.caps.rules = p.caps.rules.plus(e)
	p.caps.Needs = append(p.caps.Needs, Need{Exception: e, Evidence: fmt.Sprintf(format, args...)})
}

// answer makes an operation's answer an error.
func answer(got []byte, err error, want []byte) error {
	if err == nil && !bytes.Equal(got, want) {
		return errWrong
	}
	return err
}

// destroy destroys a session object of a probe. One that cannot be goes with
// its session.
func (p *prober) destroy(handles ...p11.Handle) {
	for _, h := range handles {
		_ = p.home.DestroyObject(h)
	}
}

// encrypted is a block encrypted by AES under a key that is public.
func encrypted(key, block []byte) []byte {
	c, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // only ever called with a constant
	}
	out := make([]byte, aes.BlockSize)
	c.Encrypt(out, block)
	return out
}

// tellExceptions says which rules are given up on this token, and which
// acceptance is none.
func (c *connection) tellExceptions() {
	for _, e := range c.rules.left {
		c.t.log.Warn("a rule is not kept on this token, as accepted", "exception", e, "lost", e.Loses())
	}
	for _, e := range c.t.cfg.Accept {
		if !c.rules.without(e) {
			c.t.log.Warn("an exception is accepted that this token does not need: take it out of the configuration", "exception", e)
		}
	}
}

// proveVault seals and opens a public constant under the vault of the token,
// and tries to defy its template.
func (c *connection) proveVault(s *p11.Session) error {
	v := c.vaults[AES256]
	known, err := s.CreateObject(c.rules.template(knownAES(kaKey)...))
	if err != nil {
		return err
	}
	blob, err := s.Wrap(p11.Plain(p11.AESKeyWrap), v.handle, known, make([]byte, blobRoom))
	if err = errors.Join(err, s.DestroyObject(known)); err != nil {
		return fmt.Errorf("%w: sealing by CKM_AES_KEY_WRAP (%w)", ErrUnsupported, err)
	}
	key, err := s.Unwrap(p11.Plain(p11.AESKeyWrap), v.handle, blob, v.opened)
	if err != nil {
		return fmt.Errorf("%w: opening by CKM_AES_KEY_WRAP (%w)", ErrUnsupported, err)
	}
	defer func() { _ = s.DestroyObject(key) }() // gone with the session at the latest
	if err := readBack(s, key, v.opened.Attrs()); err != nil {
		return err
	}
	if !c.rules.without(UnwrapTemplateIgnored) {
		if _, err := bound(s, p11.Plain(p11.AESKeyWrap), v.handle, blob, v.opened.Attrs()); err != nil {
			return err
		}
	}
	if c.caps.gcm != nil {
		return nil // Usable says so
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
