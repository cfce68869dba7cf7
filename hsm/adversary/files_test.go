package adversary

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// The environment of an accomplice: this program once more, as a process of the
// thief's own, with a copy of the token's files.
const (
	accompliceEnv = "KEYFERRY_TEST_ACCOMPLICE" // what to do
	accompliceLib = "KEYFERRY_TEST_MODULE"
	accomplicePIN = "KEYFERRY_TEST_PIN_FILE"
	accompliceTok = "KEYFERRY_TEST_LABEL"
	accompliceArg = "KEYFERRY_TEST_BLOB"
)

// files has a copy of the token's files and the user PIN (T10).
func files(g *group) {
	for name, edit := range map[string]func([]byte) []byte{
		"unedited": func(b []byte) []byte { return b },
		"edited":   hsmtest.Reveal,
	} {
		want := hole("T10")
		if name == "unedited" {
			want = refused(pkcs11.CKR_ATTRIBUTE_SENSITIVE)
		}
		g.try("T10/read the vault of a copy, "+name, want, func() error {
			answer, err := g.accomplice("open", edit)
			if err != nil {
				return err
			}
			digest := sha256.Sum256(g.material)
			if answer != hex.EncodeToString(digest[:]) {
				g.t.Errorf("the accomplice answers %q", answer)
			}
			return nil
		})
	}
	g.try("D3/crash a process of one's own", hole("D3", pkcs11.CKR_KEY_TYPE_INCONSISTENT), func() error {
		answer, err := g.accomplice("crash", func(b []byte) []byte { return b })
		if err == nil && answer != "crashed" {
			g.t.Errorf("the accomplice answers %q", answer)
		}
		return err
	})
}

// accomplice runs one with a copy of the token whose files were edited, and
// returns what it says. A return value of PKCS#11 that it meets is an error.
func (g *group) accomplice(what string, edit func([]byte) []byte) (string, error) {
	home := g.t.TempDir()
	tokens := filepath.Join(home, "tokens", filepath.Base(g.soft.Files))
	conf, err := softhsm.WriteConf(home)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(tokens, 0o700); err != nil {
		return "", err
	}
	entries, err := os.ReadDir(g.soft.Files)
	if err != nil {
		return "", err
	}
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(g.soft.Files, entry.Name()))
		if err != nil {
			return "", err
		}
		if filepath.Ext(entry.Name()) == ".object" && entry.Name() != "token.object" {
			content = edit(content)
		}
		if err := os.WriteFile(filepath.Join(tokens, entry.Name()), content, 0o600); err != nil {
			return "", err
		}
	}
	cmd := exec.CommandContext(g.t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), softhsm.ConfEnv+"="+conf, accompliceEnv+"="+what, accompliceLib+"="+g.soft.Module,
		accomplicePIN+"="+g.soft.UserPINFile, accompliceTok+"="+g.soft.Label, accompliceArg+"="+hex.EncodeToString(g.sealed.Ref))
	out, err := cmd.Output()
	answer := strings.TrimSpace(string(out))
	if err != nil && what == "crash" && answer == "signing" {
		return "crashed", nil
	}
	var code uint
	if n, _ := fmt.Sscanf(answer, "CKR 0x%x", &code); n == 1 {
		return "", pkcs11.Error(code)
	}
	return answer, err
}

// accomplice is the other process. It says what it found by a digest, or by
// the first return value that stopped it.
func accomplice(what string) (exit int) {
	p := pkcs11.New(os.Getenv(accompliceLib))
	fail := func(err error) int {
		if code, ok := err.(pkcs11.Error); ok { //nolint:errorlint // miekg/pkcs11 wraps nothing
			fmt.Printf("CKR 0x%x\n", uint(code))
			return 0
		}
		fmt.Println(err)
		return 1
	}
	if err := p.Initialize(); err != nil {
		return fail(err)
	}
	defer func() { _ = p.Finalize() }()
	s := &scene{p: p}
	slots, err := p.GetSlotList(true)
	if err != nil {
		return fail(err)
	}
	for _, slot := range slots {
		if info, err := p.GetTokenInfo(slot); err == nil && info.Label == os.Getenv(accompliceTok) {
			if s.s, err = p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION); err != nil {
				return fail(err)
			}
		}
	}
	pin, err := os.ReadFile(os.Getenv(accomplicePIN))
	if err != nil {
		return fail(err)
	}
	if err := p.Login(s.s, pkcs11.CKU_USER, string(pin)); err != nil {
		return fail(err)
	}
	if what == "crash" {
		err = s.crash()
	} else {
		err = s.openWithVault()
	}
	if err != nil {
		return fail(err)
	}
	return 0
}

// openWithVault reads the vault's value and opens the blob with it.
func (s *scene) openWithVault() error {
	at := pkcs11.NewAttribute
	found, err := s.find(at(pkcs11.CKA_LABEL, "keyferry vault AES-256 v1"))
	if err != nil {
		return err
	}
	value, err := s.bytes(found[0], pkcs11.CKA_VALUE)
	if err != nil {
		return err
	}
	secret := []*pkcs11.Attribute{at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES)}
	key, err := s.p.CreateObject(s.s, append(secret[:2:2], at(pkcs11.CKA_VALUE, value), at(pkcs11.CKA_UNWRAP, true)))
	if err != nil {
		return err
	}
	blob, err := hex.DecodeString(os.Getenv(accompliceArg))
	if err != nil {
		return err
	}
	o, err := s.p.UnwrapKey(s.s, mechanism(pkcs11.CKM_AES_KEY_WRAP), key, blob,
		append(secret[:2:2], at(pkcs11.CKA_SENSITIVE, false), at(pkcs11.CKA_EXTRACTABLE, true)))
	if err != nil {
		return err
	}
	if value, err = s.bytes(o, pkcs11.CKA_VALUE); err != nil {
		return err
	}
	fmt.Printf("%x\n", sha256.Sum256(value))
	return nil
}

// crash signs by DSA with an AES key.
func (s *scene) crash() error {
	at := pkcs11.NewAttribute
	key, err := s.p.CreateObject(s.s, []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), at(pkcs11.CKA_VALUE, make([]byte, 32)), at(pkcs11.CKA_SIGN, true),
	})
	if err != nil {
		return err
	}
	if err := s.p.SignInit(s.s, mechanism(pkcs11.CKM_DSA), key); err != nil {
		return err
	}
	fmt.Println("signing")
	_, err = s.p.Sign(s.s, make([]byte, 20))
	return err
}
