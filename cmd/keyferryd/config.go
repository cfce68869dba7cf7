package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keyferry/keyferry/hsm"
)

// config is the configuration file. Secrets are not in it but in files that it
// names. Relative paths are relative to the directory of the file.
type config struct {
	Listen         string      `yaml:"listen"` // host:port
	TLS            *tlsConfig  `yaml:"tls,omitempty"`
	AllowPlainHTTP bool        `yaml:"allow_plain_http,omitempty"` // beyond loopback
	Region         string      `yaml:"region"`                     // as in ARNs
	Account        string      `yaml:"account"`                    // likewise
	AccessKeys     []accessKey `yaml:"access_keys"`
	Token          tokenConfig `yaml:"token"`
	Vault          vaultConfig `yaml:"vault,omitempty"`
	Store          storeConfig `yaml:"store"`
	Pairs          pairsConfig `yaml:"wrapping_pairs,omitempty"`
	// Custody of keys that do not ask for one (KeyStorageMechanism): sealed (the
	// default), or resident, for key material that must never be extractable.
	Custody  string         `yaml:"custody,omitempty"`
	Resident residentConfig `yaml:"resident,omitempty"`
	Log      logConfig      `yaml:"log,omitempty"`

	Metrics metricsConfig `yaml:"metrics,omitempty"`
}

type tlsConfig struct {
	CertFile string `yaml:"cert_file"` // PEM, the server's certificate first
	KeyFile  string `yaml:"key_file"`  // PEM
}

type accessKey struct {
	ID         string `yaml:"id"`
	SecretFile string `yaml:"secret_file"`
}

type tokenConfig struct {
	Module      string `yaml:"module"` // path of the PKCS#11 library
	Label       string `yaml:"label"`
	UserPINFile string `yaml:"user_pin_file"`
	// Pins are written by init, and say which token and which keys are ours.
	Pins pinsConfig `yaml:"pins,omitempty"`
	// InitArgs is what some libraries want to be initialised with, such as
	// "configDir=sql:/srv/keyferry/nss" of NSS.
	InitArgs string `yaml:"init_args,omitempty"`
	// Accept names what the token may lack; see hsm.Exceptions. Whether there is
	// CKA_TRUSTED is said in vault.trusted.
	Accept []hsm.Exception `yaml:"accept,omitempty"`
	// Environment is set before the library is loaded.
	Environment map[string]string `yaml:"environment,omitempty"`
	Sessions    int               `yaml:"sessions,omitempty"`
	// AllowPKCS1v15 offers RSAES_PKCS1_V1_5, which cannot be made safe against
	// a thief of the user PIN.
	AllowPKCS1v15 bool `yaml:"allow_pkcs1_v15,omitempty"`
	// Profile names how the token speaks SM2 and SM4; without it known answers
	// find it out. ProfilesFile adds profiles to those that are built in.
	Profile      string `yaml:"profile,omitempty"`
	ProfilesFile string `yaml:"profiles_file,omitempty"`
}

// vaultConfig says how vault keys become trusted.
type vaultConfig struct {
	// Trusted is empty where the security officer makes trusted keys,
	// "vendor-tool" where the vendor's own tool marks a key that is there, and
	// "unavailable" where the token has no CKA_TRUSTED and that is accepted.
	Trusted string `yaml:"trusted,omitempty"`
}

// The values of vault.trusted.
const (
	trustByVendor    = "vendor-tool"
	trustUnavailable = "unavailable"
)

// accept is what the configuration accepts that the token lacks.
func (c *config) accept() []hsm.Exception {
	out := slices.Clone(c.Token.Accept)
	if c.Vault.Trusted == trustUnavailable {
		out = append(out, hsm.TrustedUnavailable)
	}
	return out
}

// hsmConfig is the configuration of the token.
func (c *config) hsmConfig(log *slog.Logger) (hsm.Config, error) {
	profiles, err := c.Token.profiles()
	if err != nil {
		return hsm.Config{}, err
	}
	return hsm.Config{
		Module: c.Token.Module, InitArgs: c.Token.InitArgs, Label: c.Token.Label, Pins: c.Token.Pins.pins(),
		PIN:      func() ([]byte, error) { return readSecret(c.Token.UserPINFile, log) },
		Sessions: c.Token.Sessions, AllowPKCS1v15: c.Token.AllowPKCS1v15, Logger: log,
		Profile: c.Token.Profile, Profiles: profiles, Accept: c.accept(), Patience: tokenTimeout,
	}, nil
}

// tokenTimeout is how long a request waits for a token that is gone. Alibaba
// Cloud's SDKs wait for ten seconds, and are to hear of it.
const tokenTimeout = 5 * time.Second

type pinsConfig struct {
	Serial     string      `yaml:"serial,omitempty"`
	VaultAES   fingerprint `yaml:"vault_aes,omitempty"`
	VaultSM4   fingerprint `yaml:"vault_sm4,omitempty"`
	MACKey     fingerprint `yaml:"mac_key,omitempty"`
	ReceiptKey fingerprint `yaml:"receipt_key,omitempty"`
}

func (p pinsConfig) pins() hsm.Pins {
	return hsm.Pins{
		Serial: p.Serial, VaultAES: p.VaultAES.Fingerprint, VaultSM4: p.VaultSM4.Fingerprint,
		MACKey: p.MACKey.Fingerprint, ReceiptKey: p.ReceiptKey.Fingerprint,
	}
}

func pinsOf(p hsm.Pins) pinsConfig {
	return pinsConfig{
		Serial: p.Serial, VaultAES: fingerprint{p.VaultAES}, VaultSM4: fingerprint{p.VaultSM4},
		MACKey: fingerprint{p.MACKey}, ReceiptKey: fingerprint{p.ReceiptKey},
	}
}

// fingerprint is left out of a file when it is zero.
type fingerprint struct{ hsm.Fingerprint }

// IsZero is for yaml's omitempty.
func (f fingerprint) IsZero() bool { return f.Fingerprint == hsm.Fingerprint{} }

// pairsConfig sizes the pools of wrapping pairs; zero values are the engine's.
type pairsConfig struct {
	Specs       []hsm.PairSpec `yaml:"specs,omitempty"`
	Ready       int            `yaml:"ready,omitempty"`       // kept ready, for each spec and algorithm
	Outstanding int            `yaml:"outstanding,omitempty"` // before pairs are shared
}

// metricsConfig is off unless it says where to listen, which is never where the
// API is: whoever reaches it reads how many keys there are and what fails.
type metricsConfig struct {
	Listen string `yaml:"listen,omitempty"` // host:port, plain HTTP
}

// residentConfig is about key material that is kept as objects of the token.
type residentConfig struct {
	Limit int  `yaml:"limit,omitempty"` // of objects; 0: 2,000
	Only  bool `yaml:"only,omitempty"`  // refuse sealed keys, where custody is resident
}

// custody is what Custody names. The configuration is valid.
func (c *config) custody() hsm.Custody {
	if c.Custody == hsm.Resident.String() {
		return hsm.Resident
	}
	return hsm.Sealed
}

type logConfig struct {
	Level  string `yaml:"level,omitempty"`  // debug, info (the default), warn or error
	Format string `yaml:"format,omitempty"` // text (the default) or json
}

// loadConfig reads a configuration file. It refuses what it does not know,
// with the line.
func loadConfig(path string) (config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return config{}, fmt.Errorf("cannot read the configuration: %w", err)
	}
	cfg, err := parseConfig(text)
	if err != nil {
		return config{}, fmt.Errorf("%s: %w", path, err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return config{}, err
	}
	cfg.resolve(dir)
	return cfg, nil
}

func parseConfig(text []byte) (cfg config, err error) {
	err = decodeStrictly(text, &cfg)
	return cfg, err
}

// decodeStrictly decodes one document of YAML that holds nothing unknown.
func decodeStrictly(text []byte, into any) error {
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.KnownFields(true)
	if err := decoder.Decode(into); err != nil && !errors.Is(err, io.EOF) {
		return plainYAMLError(err)
	}
	if err := decoder.Decode(&struct{}{}); !errors.Is(err, io.EOF) {
		return errors.New("there is a second document in the file: remove it")
	}
	return nil
}

// profiles reads the operator's own profiles of SM2 and SM4.
func (c *tokenConfig) profiles() ([]hsm.Profile, error) {
	if c.ProfilesFile == "" {
		return nil, nil
	}
	text, err := os.ReadFile(c.ProfilesFile)
	if err != nil {
		return nil, fmt.Errorf("token.profiles_file: %w", err)
	}
	var list []hsm.Profile
	if err := decodeStrictly(text, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", c.ProfilesFile, err)
	}
	return list, nil
}

// plainYAMLError leaves out what only a reader of this source understands.
func plainYAMLError(err error) error {
	var typeError *yaml.TypeError
	if !errors.As(err, &typeError) {
		return err
	}
	problems := make([]error, len(typeError.Errors))
	for i, text := range typeError.Errors {
		text, _, _ = strings.Cut(text, " in type ")
		text, _, _ = strings.Cut(text, " into ") // "cannot unmarshal … into main.tlsConfig"
		problems[i] = errors.New(strings.Replace(text, "not found", "is unknown", 1))
	}
	return errors.Join(problems...)
}

// resolve makes the paths of a configuration in dir absolute.
func (c *config) resolve(dir string) {
	paths := append(c.Store.paths(), &c.Token.Module, &c.Token.UserPINFile, &c.Token.ProfilesFile)
	for i := range c.AccessKeys {
		paths = append(paths, &c.AccessKeys[i].SecretFile)
	}
	if c.TLS != nil {
		paths = append(paths, &c.TLS.CertFile, &c.TLS.KeyFile)
	}
	for _, path := range paths {
		if *path != "" && !filepath.IsAbs(*path) {
			*path = filepath.Join(dir, *path)
		}
	}
}

// hasDatabase is false only if there surely is none. Of a PostgreSQL only that
// itself can say.
func (c *config) hasDatabase() bool {
	if c.Store.Postgres != nil {
		return true
	}
	_, err := os.Stat(c.Store.SQLite)
	return !errors.Is(err, fs.ErrNotExist)
}

func (c *config) noDatabase() error {
	return fmt.Errorf("there is no database at %s: restore it, or on a new server make it with %q", c.Store.SQLite, "keyferryd init")
}

// applyEnvironment sets what the PKCS#11 library reads of the environment. It
// must come before the library is loaded.
func (c *config) applyEnvironment() error {
	for name, value := range c.Token.Environment {
		if err := os.Setenv(name, value); err != nil {
			return fmt.Errorf("token.environment: cannot set %s: %w", name, err)
		}
	}
	return nil
}

// regionOf and accountOf are what ARNs hold where the file says nothing.
func (c *config) regionOf() string  { return cmp.Or(c.Region, "local") }
func (c *config) accountOf() string { return cmp.Or(c.Account, "0") }
