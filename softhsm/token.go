package softhsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/keyferry/keyferry/hsm"
)

// TB is what New needs of a [testing.TB]. It is an interface of its own so
// that a program which imports this package does not carry package testing.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(fn func())
	TempDir() string
}

// Token is a throw-away token, initialised and dedicated to one test. Its
// fields are for hsm.Config and for programs that the test starts.
type Token struct {
	Module string // path of the PKCS#11 library
	Label  string // no other token has it
	Serial string

	// Conf is the configuration file of SoftHSM2. This process has it in its
	// environment already, and so has what it starts with os.Environ.
	Conf string

	// Files is the directory in which SoftHSM2 keeps this token, for tests
	// that damage it or take it away.
	Files string

	// Dir is a directory of this token's own, gone after the test. It holds
	// the PIN files.
	Dir string

	// SOPINFile and UserPINFile hold one PIN each and no line end; mode 0600.
	SOPINFile, UserPINFile string

	// SOPIN and UserPIN answer a copy of the PIN, which the caller may wipe.
	// They are functions so that no fmt verb prints a PIN.
	SOPIN, UserPIN func() ([]byte, error)

	// Pins is what the configuration pins: Serial, and with WithKeys the
	// fingerprints of the keys.
	Pins hsm.Pins
}

// Option changes what New makes.
type Option func(*options)

type options struct {
	keys, reseal bool
}

// WithKeys holds the SO's ceremony (hsm.Init) on the token, so that hsm.Open
// takes it.
func WithKeys() Option { return func(o *options) { o.keys = true } }

// WithReseal is WithKeys with hsm.InitConfig.Reseal.
func WithReseal() Option { return func(o *options) { o.keys, o.reseal = true, true } }

// New makes a token with random PINs for the time of the test. It fails the
// test where SoftHSM2 is missing: a test that silently runs without a token
// tests nothing.
//
// All tokens of a process share one directory, as SoftHSM2 wants it; it goes
// with the last of them. Tests may run in parallel.
func New(tb TB, opts ...Option) *Token {
	tb.Helper()
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	module, err := FindModule()
	if err != nil {
		tb.Fatalf("%v", err)
	}
	conf, err := home.enter()
	if err != nil {
		tb.Fatalf("softhsm: making the directory of the tokens: %v", err)
	}
	tb.Cleanup(func() {
		if err := home.leave(); err != nil {
			tb.Fatalf("softhsm: removing the directory of the tokens: %v", err)
		}
	})
	t := &Token{Module: module, Conf: conf, Dir: tb.TempDir(), Label: "test-" + hex.EncodeToString(random(8))}
	if err := t.initialise(o); err != nil {
		tb.Fatalf("softhsm: making a token: %v", err)
	}
	return t
}

// initialise gives t its PINs, the token itself and, if asked for, its keys.
func (t *Token) initialise(o options) (err error) {
	if t.SOPIN, t.SOPINFile, err = t.newPIN("so-pin"); err != nil {
		return err
	}
	if t.UserPIN, t.UserPINFile, err = t.newPIN("user-pin"); err != nil {
		return err
	}
	if t.Serial, err = home.initToken(t); err != nil {
		return err
	}
	t.Pins.Serial = t.Serial
	if t.Files, err = home.files(t.Serial); err != nil || !o.keys {
		return err
	}
	t.Pins, err = hsm.Init(context.Background(), hsm.InitConfig{
		Module: t.Module, Label: t.Label, Pins: t.Pins,
		SOPIN: t.SOPIN, UserPIN: t.UserPIN, Reseal: o.reseal,
	})
	return err
}

// newPIN makes a PIN of 192 random bits and writes it to a file in t.Dir.
func (t *Token) newPIN(name string) (pin func() ([]byte, error), file string, err error) {
	text := []byte(base64.RawURLEncoding.EncodeToString(random(24)))
	file = filepath.Join(t.Dir, name)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return nil, "", err
	}
	return func() ([]byte, error) { return bytes.Clone(text), nil }, file, nil
}

// Config is the configuration with which hsm.Open opens the token.
func (t *Token) Config() hsm.Config {
	return hsm.Config{Module: t.Module, Label: t.Label, Pins: t.Pins, PIN: t.UserPIN}
}

// Open opens the token with Config and closes it after the test.
func (t *Token) Open(tb TB) *hsm.Token {
	tb.Helper()
	token, err := hsm.Open(context.Background(), t.Config())
	if err != nil {
		tb.Fatalf("softhsm: opening the token: %v", err)
	}
	tb.Cleanup(func() {
		if err := token.Close(); err != nil {
			tb.Fatalf("softhsm: closing the token: %v", err)
		}
	})
	return token
}

// home is the one directory of tokens of this process.
var home directory

// directory is made when its first user enters and removed when the last one
// leaves. It keeps its path for the life of the process, because a module that
// is still loaded keeps it too.
type directory struct {
	mu    sync.Mutex
	path  string // "" until the first enter
	users int
}

// enter counts one user more and answers the configuration file, which is in
// the environment from then on.
func (d *directory) enter() (conf string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.path == "" {
		d.path, err = os.MkdirTemp("", "keyferry-softhsm-")
	} else {
		err = os.MkdirAll(d.path, 0o700)
	}
	if err != nil {
		return "", err
	}
	if conf, err = WriteConf(d.path); err != nil {
		return "", err
	}
	if err = os.Setenv(ConfEnv, conf); err != nil { // cgo programs hand it on to C
		return "", err
	}
	d.users++
	return conf, nil
}

// leave removes the directory with its last user.
func (d *directory) leave() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.users--; d.users > 0 {
		return nil
	}
	return os.RemoveAll(d.path)
}

// initToken initialises one token at a time: SoftHSM2 shows one free slot, and
// two tests that take it at once would take the same one.
func (d *directory) initToken(t *Token) (serial string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return hsm.InitToken(context.Background(), t.Module, t.Label, t.SOPIN, t.UserPIN)
}

// files finds a token by its serial number, which SoftHSM2 makes of the last
// 16 hexadecimal digits of the directory's name, a UUID.
func (d *directory) files(serial string) (string, error) {
	if len(serial) != 16 {
		return "", fmt.Errorf("the serial number %q is not one of SoftHSM2", serial)
	}
	pattern := filepath.Join(d.path, "tokens", "*-"+serial[:4]+"-"+serial[4:])
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%d directories fit %s", len(found), pattern)
	}
	if err != nil {
		return "", err
	}
	return found[0], nil
}

// random answers n random bytes; crypto/rand ends the program rather than fail.
func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}
