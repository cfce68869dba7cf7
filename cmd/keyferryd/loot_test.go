package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// lootCommand is this binary as a thief of the token's files and the PIN, who
// reads every key of a software token (softhsm.KnownHoles T10). So the tests
// learn what they have to look for elsewhere.
const lootCommand = "keyferryd-test-loot"

// lootOf reads the values of the keys in a copy of the tokens below a
// directory. They come through a pipe and are in no file.
func lootOf(t testing.TB, module, dir, pinFile string) (keys []*secret) {
	t.Helper()
	home := t.TempDir()
	conf, err := softhsm.WriteConf(home)
	require.NoError(t, err)
	files, err := filepath.Glob(filepath.Join(dir, "tokens", "*", "*"))
	require.NoError(t, err)
	for _, file := range files {
		content, err := os.ReadFile(file)
		require.NoError(t, err)
		if name := filepath.Base(file); filepath.Ext(name) == ".object" && name != "token.object" {
			content = hsmtest.Reveal(content)
		}
		relative, err := filepath.Rel(dir, file)
		require.NoError(t, err)
		require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(home, relative)), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(home, relative), content, 0o600))
	}
	exe, err := exec.LookPath(lootCommand)
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), exe, module, pinFile)
	cmd.Env = append(os.Environ(), softhsm.ConfEnv+"="+conf)
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	require.NoError(t, err)
	var found map[string][]byte
	require.NoError(t, json.Unmarshal(text, &found))
	for name, value := range found {
		keys = append(keys, &secret{tokenKey, name, value})
	}
	return keys
}

func loot() {
	found, err := readKeys(os.Args[1], os.Args[2])
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(found)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "loot:", err)
		os.Exit(1)
	}
}

// privateParts are the attributes that nobody may learn.
var privateParts = map[uint]string{
	pkcs11.CKA_VALUE: "value", pkcs11.CKA_PRIVATE_EXPONENT: "private exponent",
	pkcs11.CKA_PRIME_1: "first prime", pkcs11.CKA_PRIME_2: "second prime",
	pkcs11.CKA_EXPONENT_1: "first exponent", pkcs11.CKA_EXPONENT_2: "second exponent", pkcs11.CKA_COEFFICIENT: "coefficient",
}

// readKeys reads what is private of every secret and private key of the
// module's one token.
func readKeys(module, pinFile string) (map[string][]byte, error) {
	p := pkcs11.New(module)
	if p == nil {
		return nil, fmt.Errorf("cannot load %s", module)
	}
	if err := p.Initialize(); err != nil {
		return nil, err
	}
	slots, err := p.GetSlotList(true)
	if err != nil {
		return nil, err
	}
	session, err := p.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return nil, err
	}
	pin, err := os.ReadFile(pinFile)
	if err != nil {
		return nil, err
	}
	if err := p.Login(session, pkcs11.CKU_USER, strings.TrimSpace(string(pin))); err != nil {
		return nil, err
	}
	found := map[string][]byte{}
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY} {
		if err := p.FindObjectsInit(session, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, class)}); err != nil {
			return nil, err
		}
		objects, _, err := p.FindObjects(session, 1000)
		if err != nil {
			return nil, err
		}
		if err := p.FindObjectsFinal(session); err != nil {
			return nil, err
		}
		for i, o := range objects {
			label, err := p.GetAttributeValue(session, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil)})
			if err != nil {
				return nil, err
			}
			for part, name := range privateParts {
				value, err := p.GetAttributeValue(session, o, []*pkcs11.Attribute{pkcs11.NewAttribute(part, nil)})
				if err == nil && len(value[0].Value) >= fragment { // keys have those of their type only
					found[fmt.Sprintf("%s of %s (%d.%d)", name, label[0].Value, class, i)] = value[0].Value
				}
			}
		}
	}
	return found, nil
}
