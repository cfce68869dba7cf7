package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// doctor runs the doctor of a site, and returns what it says in both forms.
func (s *site) doctor(t testing.TB, status int) (d diagnosis, text string) {
	t.Helper()
	for _, args := range [][]string{{"doctor", "--quick"}, {"doctor", "--quick", "--json"}} {
		stdout, stderr, err := s.keyferryd(t, args...)
		got := 0
		if err != nil {
			var exit *exec.ExitError
			require.ErrorAs(t, err, &exit)
			got = exit.ExitCode()
			require.Regexp(t, `\Akeyferryd: [^\n]*\n\z`, stderr)
		}
		require.Equal(t, status, got, "%s%s", stdout, stderr)
		if len(args) == 2 {
			text = stdout
		} else {
			require.NoError(t, json.Unmarshal([]byte(stdout), &d), "%s", stdout)
		}
	}
	return d, text
}

// snapshot is a digest of every file of a token but token.object, to which
// SoftHSM2 writes when somebody logs in.
func snapshot(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() || entry.Name() == "token.object" {
			return err
		}
		content, err := os.ReadFile(path)
		files[path] = fmt.Sprintf("%x", sha256.Sum256(content))
		return err
	}))
	require.NotEmpty(t, files)
	return files
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	s := newSite(t, "")
	good, err := os.ReadFile(s.config)
	require.NoError(t, err)

	// Before there is a token.
	d, _ := s.doctor(t, statusProblem)
	require.Nil(t, d.Token)
	require.Contains(t, fmt.Sprint(d.Problems), "init --init-token")

	s.init(t, "--init-token", "--so-pin-file", s.file("so-pin"))
	pinned, err := os.ReadFile(s.config)
	require.NoError(t, err)

	t.Run("healthy, beside a server, and nothing is written", func(t *testing.T) {
		server := startTestServer(t, s.dir, "serve", "--config", s.config)
		newCustomer(t, s.client(server, nil))
		s.doctor(t, 0) // beside it
		require.NoError(t, server.stop())
		before := snapshot(t, filepath.Join(s.dir, "tokens"))
		d, text := s.doctor(t, 0)
		require.Equal(t, before, snapshot(t, filepath.Join(s.dir, "tokens")))
		require.True(t, d.Ready)
		require.Equal(t, "site", d.Token.Label)
		require.Positive(t, d.Objects.Pairs)
		for _, g := range d.Guarantees {
			require.True(t, g.Holds, g.Statement)
		}
		require.Len(t, d.Guarantees, len(guarantees))
		require.Empty(t, d.Exceptions)
		require.Contains(t, text, `"keyferryd serve" starts`)
		for _, limit := range d.Limits {
			require.Contains(t, text, limit)
		}
		require.Len(t, d.Holes, 9)
		tried, said := "open", "listed"
		if d.Token.Library.Description == softhsm.OurDescription {
			tried, said = "closed", "patched"
		}
		for _, h := range d.Holes {
			want := said
			if h.ID == "O3" || h.ID == "O8" {
				want = tried
			}
			require.Equal(t, want, h.State, h.ID)
		}
		require.Equal(t, said == "listed", strings.Contains(text, "has every key (holes T9, T12, T13, T14, T15, T16)"))
		pin, err := os.ReadFile(s.file("user-pin"))
		require.NoError(t, err)
		require.NotContains(t, text, strings.TrimSpace(string(pin)))
	})
	t.Run("not pinned", func(t *testing.T) {
		s.write(t, "keyferryd.yaml", string(good))
		d, text := s.doctor(t, 0)
		require.False(t, d.Ready)
		require.Contains(t, strings.Join(d.Next, "\n"), "pin the vault AES-256 that is on the token")
		require.Contains(t, text, `"keyferryd init" would`)
	})
	s.write(t, "keyferryd.yaml", string(pinned))
	d, _ = s.doctor(t, 0)
	cfg, err := parseConfig(pinned)
	require.NoError(t, err)
	for name, c := range map[string]struct{ old, new, says string }{
		"another vault":                {cfg.Token.Pins.VaultAES.String(), strings.Repeat("11", 32), "not on the token"},
		"another serial":               {cfg.Token.Pins.Serial, "0000000000000000", "not the pinned"},
		"wrong PIN":                    {"user_pin_file: user-pin", "user_pin_file: so-pin", "it was tried once"},
		"guessable secret":             {"secret_file: secret", "secret_file: short", "can be guessed"},
		"no database":                  {"sqlite: keyferry.db", "sqlite: other.db", "there is no database"},
		"not a database":               {"sqlite: keyferry.db", "sqlite: keyferryd.yaml", "is no database of SQLite"},
		"a profile it lacks":           {"label: site", "label: site\n  profile: luna", "has neither SM4 nor SM2"},
		"no such exception":            {"label: site", "label: site\n  accept: [everything]", "there is no exception"},
		"no such trust":                {"access_keys:", "vault: {trusted: perhaps}\naccess_keys:", "neither vendor-tool nor unavailable"},
		"no configuration of SoftHSM2": {"SOFTHSM2_CONF: ", "SOFTHSM2_CONF: /nowhere", "cannot read the configuration that SOFTHSM2_CONF names"},
		"a size it lacks":              {"access_keys:", "wrapping_pairs: {specs: [RSA_1024]}\naccess_keys:", "RSA_1024"},
	} {
		t.Run(name, func(t *testing.T) {
			s.write(t, "short", "123")
			require.Contains(t, string(pinned), c.old)
			s.write(t, "keyferryd.yaml", strings.Replace(string(pinned), c.old, c.new, 1))
			d, text := s.doctor(t, statusProblem)
			require.False(t, d.Ready)
			require.Contains(t, fmt.Sprint(d.Problems), c.says)
			require.Contains(t, text, c.says)
		})
	}
	t.Run("custody resident", func(t *testing.T) {
		s.write(t, "keyferryd.yaml", strings.Replace(string(pinned), "access_keys:", "custody: resident\naccess_keys:", 1))
		status := statusProblem
		for _, f := range d.Capabilities {
			if f.ID == hsm.FindValueLen && f.Verdict == hsm.Proven {
				status = 0
			}
		}
		d, _ := s.doctor(t, status)
		require.Equal(t, status == 0, d.Ready)
		if status != 0 {
			_, stderr, err := s.keyferryd(t, "serve")
			require.Error(t, err)
			require.Contains(t, stderr, "CKA_VALUE_LEN")
			require.Contains(t, stderr, "take custody (and resident.only) out of the configuration")
		}
		require.Equal(t, status != 0, strings.Contains(fmt.Sprint(d.Problems), "custody: resident asks for what the token has not"))
	})
	t.Run("sizes of pairs", func(t *testing.T) {
		s.write(t, "keyferryd.yaml", strings.Replace(string(pinned), "access_keys:", "wrapping_pairs: {specs: [RSA_3072]}\naccess_keys:", 1))
		d, text := s.doctor(t, 0)
		for _, w := range d.Wrapping {
			require.False(t, w.Offered && w.Spec != hsm.RSA3072, w.Spec)
			require.True(t, w.Offered || w.Spec != hsm.RSA3072 || w.Algorithm != hsm.OAEPSHA1)
		}
		require.Contains(t, text, "the token could; RSA_2048 is not in wrapping_pairs.specs")
	})
	t.Run("superfluous exception", func(t *testing.T) {
		s.write(t, "keyferryd.yaml", strings.Replace(string(pinned), "label: site", "label: site\n  accept: [copyable-ignored]", 1))
		d, _ := s.doctor(t, 0)
		require.True(t, d.Ready)
		require.Contains(t, fmt.Sprint(d.Warnings), "take it out of the configuration")
	})
}

// TestServeOnNSS has keyferryd work on a token that keeps few of the rules:
// not before the operator has accepted each of them by its name.
func TestServeOnNSS(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	modules, err := filepath.Glob("/usr/lib/*-linux-gnu*/libsoftokn3.so")
	require.NoError(t, err)
	certutil, err := exec.LookPath("certutil")
	if err != nil || len(modules) == 0 {
		t.Skip("NSS is not installed (packages libnss3 and libnss3-tools), or unpacked where programs do not find its libraries")
	}
	s := newSite(t, "")
	module, err := softhsm.FindModule()
	require.NoError(t, err)
	text, err := os.ReadFile(s.config)
	require.NoError(t, err)
	s.write(t, "pin", "a PIN of these tests, long enough")
	out, err := exec.CommandContext(t.Context(), certutil, "-N", "-d", "sql:"+s.dir, "-f", s.file("pin")).CombinedOutput()
	require.NoError(t, err, "%s", out)
	config := strings.NewReplacer(module, modules[0], "label: site", "label: NSS Certificate DB\n  init_args: configDir=sql:"+s.dir,
		"user_pin_file: user-pin", "user_pin_file: pin").Replace(string(text))
	s.write(t, "keyferryd.yaml", config)

	made, stderr, err := s.keyferryd(t, "init", "--init-token", "--so-pin-file", s.file("so-pin"))
	require.Error(t, err)
	require.Contains(t, made, "is there already; it was not touched", "NSS finds it by token.init_args alone: %s", stderr)
	require.Contains(t, stderr, "vault: {trusted: unavailable} and token: {accept: [")
	require.Contains(t, stderr, "the PIN holds every key")
	d, said := s.doctor(t, statusProblem)
	require.Len(t, d.Exceptions, 8)
	require.Contains(t, said, "vault: {trusted: unavailable}")
	for i, g := range d.Guarantees {
		require.Equal(t, i == 0, g.Holds, g.Statement)
	}

	// What it says to write is written.
	var names []string
	for _, e := range d.Exceptions {
		if e.Name != hsm.TrustedUnavailable {
			names = append(names, string(e.Name))
		}
	}
	config = strings.Replace(config, "  init_args:", "  accept: ["+strings.Join(names, ", ")+"]\n  init_args:", 1)
	s.write(t, "keyferryd.yaml", "vault: {trusted: unavailable}\n"+config)
	require.Contains(t, s.init(t), "Back up the token now")
	d, _ = s.doctor(t, 0)
	require.True(t, d.Ready)

	server := startTestServer(t, s.dir, "serve", "--config", s.config)
	c := s.client(server, nil)
	customer := newCustomer(t, c)
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", customer.params(wrapped(t, byok.OAEPSHA1, customer.publicKey, customer.material)), nil))
	require.Equal(t, "Enabled", customer.state(t).KeyState)
	var sealed struct{ CiphertextBlob string }
	require.NoError(t, c.call(t.Context(), "Encrypt", map[string]string{"KeyId": customer.keyID, "Plaintext": "aGVsbG8="}, &sealed))
	var opened struct{ Plaintext string }
	require.NoError(t, c.call(t.Context(), "Decrypt", map[string]string{"CiphertextBlob": sealed.CiphertextBlob}, &opened))
	require.Equal(t, "aGVsbG8=", opened.Plaintext)
	require.NoError(t, server.stop())
}
