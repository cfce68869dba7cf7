package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
)

const fullConfig = `listen: 127.0.0.1:8443
tls: {cert_file: cert.pem, key_file: /etc/key.pem}
region: cn-test
account: "42"
access_keys:
  - {id: one, secret_file: one}
  - {id: two, secret_file: /run/two}
token:
  module: lib.so
  label: keyferry
  user_pin_file: pin
  pins:
    serial: 0123456789012345
    vault_aes: 0101010101010101010101010101010101010101010101010101010101010101
    mac_key: "0202020202020202020202020202020202020202020202020202020202020202"
    receipt_key: 03030303030303030303030303030303030303030303030303030303030303ff
  environment: {SOFTHSM2_CONF: /x}
  sessions: 8
  allow_pkcs1_v15: true
store: {sqlite: db}
wrapping_pairs: {specs: [RSA_2048, RSA_4096], ready: 2, outstanding: 3}
log: {level: warn, format: json}
metrics: {listen: "127.0.0.1:9464"}
`

func TestLoadConfig(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c.yaml")
	require.NoError(t, os.WriteFile(path, []byte(fullConfig), 0o600))
	cfg, err := loadConfig(path)
	require.NoError(t, err)
	require.NoError(t, cfg.validate())
	// Relative paths are relative to the file, wherever one stands.
	require.Equal(t, filepath.Join(dir, "cert.pem"), cfg.TLS.CertFile)
	require.Equal(t, "/etc/key.pem", cfg.TLS.KeyFile)
	require.Equal(t, filepath.Join(dir, "one"), cfg.AccessKeys[0].SecretFile)
	require.Equal(t, "/run/two", cfg.AccessKeys[1].SecretFile)
	require.Equal(t, filepath.Join(dir, "lib.so"), cfg.Token.Module)
	require.Equal(t, filepath.Join(dir, "pin"), cfg.Token.UserPINFile)
	require.Equal(t, filepath.Join(dir, "db"), cfg.Store.SQLite)
	require.Equal(t, "0123456789012345", cfg.Token.Pins.Serial, "a serial is no number")
	require.Equal(t, hsm.Fingerprint{0: 1, 1: 1}, hsm.Fingerprint{cfg.Token.Pins.VaultAES.Fingerprint[0], cfg.Token.Pins.VaultAES.Fingerprint[1]})
	require.True(t, cfg.Token.Pins.VaultSM4.IsZero())
	require.True(t, cfg.Token.AllowPKCS1v15)
	require.Equal(t, pairsConfig{Specs: []hsm.PairSpec{hsm.RSA2048, hsm.RSA4096}, Ready: 2, Outstanding: 3}, cfg.Pairs)
}

func TestConfigIsStrict(t *testing.T) {
	for name, c := range map[string]struct{ text, says string }{
		"unknown field":                 {"listen: x\ntoken:\n  modul: y\n", "line 3: field modul is unknown"},
		"unknown at the top":            {"lsten: x\n", "line 1: field lsten is unknown"},
		"twice":                         {"listen: x\nlisten: y\n", `line 2: mapping key "listen" already defined at line 1`},
		"wrong kind":                    {"tls: yes\n", "line 1: cannot unmarshal"},
		"no number":                     {"token:\n  sessions: many\n", "line 2: cannot unmarshal"},
		"no fingerprint":                {"token:\n  pins:\n    vault_aes: abc\n", "a fingerprint has 64 hexadecimal digits"},
		"two documents":                 {"listen: x\n---\nlisten: y\n", "second document"},
		"no YAML":                       {"listen: [\n", "yaml"},
		"a secret where a file belongs": {"access_keys:\n  - {id: a, secret: hunter2}\n", "line 2: field secret is unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseConfig([]byte(c.text))
			require.ErrorContains(t, err, c.says)
			require.NotContains(t, err.Error(), "main.", "no Go types")
			require.NotContains(t, err.Error(), "hunter2")
		})
	}
	cfg, err := parseConfig(nil)
	require.NoError(t, err)
	require.Error(t, cfg.validate())
}

func TestValidateReturnsEverything(t *testing.T) {
	cfg, err := parseConfig([]byte(`
listen: nowhere
region: "a:b"
access_keys: [{id: one, secret_file: x}, {id: one, secret_file: y}, {id: two}]
token: {sessions: -1}
wrapping_pairs: {specs: [RSA_1024], ready: -1}
log: {level: loud, format: xml}
metrics: {listen: somewhere}
custody: kept
resident: {limit: -1, only: true}
`))
	require.NoError(t, err)
	text := cfg.validate().Error()
	for _, says := range []string{
		"token.module is missing", "token.label is missing", "token.user_pin_file is missing", "listen must be host:port",
		`run "keyferryd init"`, "store.sqlite is missing", `"one" is there twice`, "access_keys[2] needs id and secret_file",
		"region is part of ARNs", "RSA_1024", "token.sessions is negative", "wrapping_pairs.ready is negative", "log.level", "log.format",
		"metrics.listen must be host:port",
		`custody: "kept"`, "resident.limit is negative", "resident.only needs",
	} {
		require.Contains(t, text, says)
	}
}

func TestMetricsAreNeverOnThePortOfTheAPI(t *testing.T) {
	for listen, fine := range map[string]bool{
		"": true, "127.0.0.1:9464": true, "127.0.0.1:8443": false, "nowhere": false,
	} {
		cfg := config{Listen: "127.0.0.1:8443", Metrics: metricsConfig{Listen: listen}}
		require.Equal(t, fine, cfg.validateMetrics() == nil, listen)
	}
}

func TestPlainHTTPOnlyOnLoopback(t *testing.T) {
	for listen, plain := range map[string]bool{
		"127.0.0.1:80": true, "127.9.9.9:80": true, "[::1]:80": true, "localhost:80": true,
		"0.0.0.0:80": false, ":80": false, "[::]:80": false, "192.0.2.1:80": false, "kms.example:80": false, "localhost.example:80": false,
	} {
		cfg := config{Listen: listen}
		require.Equal(t, plain, cfg.validateListen() == nil, listen)
		cfg.AllowPlainHTTP = true
		require.NoError(t, cfg.validateListen(), listen)
		cfg = config{Listen: listen, TLS: &tlsConfig{CertFile: "c", KeyFile: "k"}}
		require.NoError(t, cfg.validateListen(), listen)
		cfg.TLS.KeyFile = ""
		require.Error(t, cfg.validateListen(), listen)
	}
}

func TestWithPins(t *testing.T) {
	pins := hsm.Pins{Serial: "0042", VaultAES: hsm.Fingerprint{1}, MACKey: hsm.Fingerprint{2}, ReceiptKey: hsm.Fingerprint{3}}
	block := `  pins:
    serial: "0042"
    vault_aes: "01` + strings.Repeat("00", 31) + `"
    mac_key: "02` + strings.Repeat("00", 31) + `"
    receipt_key: "03` + strings.Repeat("00", 31) + `"
`
	for name, c := range map[string]struct{ before, after string }{
		"added in the middle": {
			"token: # ours\n  label: a  # a\n\n# next\nstore: {sqlite: x}\n",
			"token: # ours\n  label: a  # a\n" + block + "\n# next\nstore: {sqlite: x}\n",
		},
		"added at the end, without a last newline": {"token:\n  label: a", "token:\n  label: a\n" + block},
		"added after nested fields": {
			"token:\n  environment:\n    A: b\n\n    C: d\nlisten: x\n",
			"token:\n  environment:\n    A: b\n\n    C: d\n" + block + "listen: x\n",
		},
		"replaced": {
			"token:\n  pins:\n    serial: old\n    vault_aes: " + strings.Repeat("aa", 32) + "\n  label: a\n",
			"token:\n" + block + "  label: a\n",
		},
		"replaced, empty":     {"token:\n  pins:\n  label: a\n", "token:\n" + block + "  label: a\n"},
		"replaced, in a line": {"token:\n  pins: {}\n  label: a\n", "token:\n" + block + "  label: a\n"},
		"other indentation":   {"token:\n      label: a\n", "token:\n      label: a\n" + strings.ReplaceAll("\n"+block, "\n  ", "\n      ")[1:]},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := withPins([]byte(c.before), pins)
			require.NoError(t, err)
			want, err := parseConfig([]byte(c.after))
			require.NoError(t, err)
			require.Equal(t, pins, want.Token.Pins.pins())
			require.Equal(t, unquoted(c.after), unquoted(string(got)))
			again, err := withPins(got, pins)
			require.NoError(t, err)
			require.Equal(t, string(got), string(again))
		})
	}
	for name, text := range map[string]string{
		"no token":       "listen: x\n",
		"in a line":      "token: {label: a}\n",
		"not a mapping":  "token: a\n",
		"block text":     "token:\n  label: |\n    a\n    b\n",
		"nothing at all": "",
		"no YAML":        "token: [",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := withPins([]byte(text), pins)
			require.Error(t, err)
		})
	}
}

// unquoted leaves it to the encoder which scalars it quotes.
func unquoted(text string) string { return strings.ReplaceAll(text, `"`, "") }

func TestReadSecret(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "secret")
	for _, c := range []struct {
		mode    os.FileMode
		text    string
		warning bool
		refused string
	}{
		{0o600, "pin\n", false, ""},
		{0o400, "pin\r\n", false, ""},
		{0o444, "pin", true, ""},
		{0o640, "pin", true, ""},
		{0o602, "pin", false, "chmod 600"},
		{0o660, "pin", false, "chmod 600"},
		{0o600, "\n", false, "is empty"},
	} {
		require.NoError(t, os.RemoveAll(path))
		require.NoError(t, os.WriteFile(path, []byte(c.text), 0o600))
		require.NoError(t, os.Chmod(path, c.mode))
		var log strings.Builder
		secret, err := readSecret(path, slog.New(slog.NewTextHandler(&log, nil)))
		if c.refused != "" {
			require.ErrorContains(t, err, c.refused)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, "pin", string(secret))
		require.Equal(t, c.warning, strings.Contains(log.String(), "level=WARN"), log.String())
	}
	_, err := readSecret(filepath.Join(dir, "gone"), slog.New(slog.DiscardHandler))
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	for _, text := range []string{"first", "second, and longer"} {
		require.NoError(t, writeFile(path, []byte(text), 0o640))
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, text, string(got))
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o640), info.Mode().Perm())
	}
	require.Error(t, writeFile(filepath.Join(path, "below a file"), nil, 0o600))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "taken"), 0o700))
	require.Error(t, writeFile(filepath.Join(dir, "taken"), nil, 0o600))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 2, "nothing half-written is left")
}

func TestProfilesFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "profiles.yaml")
	token := tokenConfig{ProfilesFile: file}
	_, err := token.profiles()
	require.ErrorContains(t, err, "profiles_file")
	require.NoError(t, os.WriteFile(file, []byte(
		"- name: ours\n  sm4: {key_type: 0x80000106, ecb: 0x80000108, gcm: 0x8000010f}\n  sm2: {key_type: 3, key_pair_gen: 0x80008001, raw: 0x80008200}\n"), 0o600))
	list, err := token.profiles()
	require.NoError(t, err)
	require.Equal(t, []hsm.Profile{{
		Name: "ours",
		SM4:  hsm.SM4Numbers{KeyType: 0x80000106, ECB: 0x80000108, GCM: 0x8000010f},
		SM2:  hsm.SM2Numbers{KeyType: 3, KeyPairGen: 0x80008001, Raw: 0x80008200},
	}}, list)
	require.NoError(t, os.WriteFile(file, []byte("- {name: ours, sm9: 1}\n"), 0o600))
	_, err = token.profiles()
	require.ErrorContains(t, err, "sm9 is unknown")
	none, err := (&tokenConfig{}).profiles()
	require.NoError(t, err)
	require.Empty(t, none)
}
