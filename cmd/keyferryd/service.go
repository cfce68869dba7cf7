package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/kmsapi"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// service is everything of a server but its port.
type service struct {
	handler http.Handler
	engine  *engine.Engine
	token   *hsm.Token
	store   store.Store
	metrics *metrics // nil: nobody asks for them
}

// minSecretLen is for secrets of access keys, in bytes. Whoever records a signed
// request can guess at its secret for ever.
const minSecretLen = 16

// openService opens what a valid configuration names.
func openService(ctx context.Context, cfg *config, log *slog.Logger) (_ *service, err error) {
	secrets := map[string]acs.Secret{}
	for _, key := range cfg.AccessKeys {
		secret, err := readSecret(key.SecretFile, log)
		if err != nil {
			return nil, fmt.Errorf("the secret of access key %s: %w", key.ID, err)
		}
		if len(secret) < minSecretLen {
			clear(secret)
			return nil, fmt.Errorf("the secret of access key %s can be guessed: put at least %d random characters into %s", key.ID, minSecretLen, key.SecretFile)
		}
		secrets[key.ID] = acs.NewSecret(secret)
		clear(secret)
	}
	s := &service{}
	if cfg.Metrics.Listen != "" {
		s.metrics = newMetrics()
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	// The store first: a second server on one SQLite database must not get as
	// far as the token.
	if s.store, err = openStore(ctx, &cfg.Store, log); err != nil {
		return nil, err
	}
	if s.metrics != nil {
		s.store = &measuredStore{s.store, s.metrics}
	}
	if s.token, err = openToken(ctx, cfg, log); err != nil {
		return nil, err
	}
	engineConfig := engine.Config{
		Token: s.token, Store: s.store, Logger: log,
		PoolSize: cfg.Pairs.Ready, PairBound: cfg.Pairs.Outstanding, PairSpecs: cfg.Pairs.Specs,
		Custody: cfg.custody(), OnlyCustody: cfg.Resident.Only, ResidentLimit: cfg.Resident.Limit,
	}
	if s.metrics != nil {
		engineConfig.Observer = s.metrics
	}
	if s.engine, err = engine.New(ctx, engineConfig); err != nil {
		return nil, custodyAdvice(err, cfg)
	}
	apiConfig := kmsapi.Config{
		Engine: s.engine, Nonces: s.store, Logger: log,
		Secret: func(id string) ([]byte, bool) {
			secret, ok := secrets[id]
			return secret.Bytes(), ok
		},
		Region: cfg.regionOf(), Account: cfg.accountOf(),
	}
	if s.metrics != nil {
		s.metrics.watch(s.engine, s.token)
		apiConfig.Observe = s.metrics.answered
	}
	api, err := kmsapi.New(apiConfig)
	if err != nil {
		return nil, err
	}
	s.handler = route(api, healthHandler(s.engine, log))
	return s, nil
}

// route hands everything to the API but questions about the server's health.
// http.ServeMux would answer some requests itself, in a form that no client of
// the API reads, and redirect others, with their query, to another path.
func route(api, health http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == healthPath && (r.Method == http.MethodGet || r.Method == http.MethodHead) {
			health.ServeHTTP(w, r)
			return
		}
		api.ServeHTTP(w, r)
	})
}

// openToken opens the token, and says what to do where it does not open.
func openToken(ctx context.Context, cfg *config, log *slog.Logger) (*hsm.Token, error) {
	if err := cfg.applyEnvironment(); err != nil {
		return nil, err
	}
	if err := checkModule(cfg.Token.Module); err != nil {
		return nil, err
	}
	open, err := cfg.hsmConfig(log)
	if err != nil {
		return nil, err
	}
	open.PIN = longEnough(open.PIN)
	token, err := hsm.Open(ctx, open)
	return token, tokenAdvice(err, cfg)
}

// longEnough refuses a PIN that init would not have taken, before the token
// counts a try.
func longEnough(read func() ([]byte, error)) func() ([]byte, error) {
	return func() ([]byte, error) {
		pin, err := read()
		if err == nil && len(pin) < hsm.MinPINLen {
			clear(pin)
			return nil, fmt.Errorf("%w: %w", hsm.ErrPIN, hsm.ErrShortPIN)
		}
		return pin, err
	}
}

// checkModule is here because the loader's own words for a missing file help
// nobody who has not yet installed anything.
func checkModule(path string) error {
	if info, err := os.Stat(path); err != nil || info.IsDir() {
		return fmt.Errorf("there is no PKCS#11 module at %s: install it, or name the right file in token.module", path)
	}
	return nil
}

// tokenAdvice adds what to do to what is wrong with a token.
func tokenAdvice(err error, cfg *config) error {
	var lacks *hsm.ExceptionError
	var gone *hsm.PinnedKeyError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &lacks):
		return fmt.Errorf("%w: in the configuration that is %s", err, acceptance(lacks.Needs, cfg))
	case errors.Is(err, hsm.ErrShortPIN):
		return fmt.Errorf("%w: put the token's PIN into %s (the token was not shown what is there)", err, cfg.Token.UserPINFile)
	case errors.Is(err, hsm.ErrSOPIN):
		return fmt.Errorf("%w: name a file with the right one with --so-pin-file (no PIN is tried twice)", err)
	case errors.Is(err, hsm.ErrPIN):
		return fmt.Errorf("%w: put the right PIN into %s (it was tried once and will not be tried again)", err, cfg.Token.UserPINFile)
	case errors.As(err, &gone):
		return fmt.Errorf("%w: %s", err, keyGone)
	case errors.Is(err, hsm.ErrUntrusted):
		return fmt.Errorf("%w: check that token.module, token.label and token.pins name the token that %q was run on", err, "keyferryd init")
	case errors.Is(err, hsm.ErrUnavailable):
		return fmt.Errorf("%w: %s", err, cmp.Or(softHSMConf(cfg),
			"check token.module, token.label, token.init_args and token.environment, or "+otherwise(cfg)))
	}
	return err
}

// keyGone is what to do where a pinned key is not on the token; init would
// refuse, too.
const keyGone = "restore the token's backup, or correct token.pins; to begin anew, without the keys that are gone, remove token.pins and run \"keyferryd init\""

// otherwise is what to do where the configuration is right and there is no
// token: once there was one, init makes no other in its place.
func otherwise(cfg *config) string {
	if cfg.Token.Pins.Serial == "" {
		return "make the token with \"keyferryd init --init-token\""
	}
	return "if the token that token.pins names is gone, restore its backup; to begin anew, without the keys that it held, remove token.pins"
}

// custodyAdvice adds what to do where the token cannot keep what custody asks for.
func custodyAdvice(err error, cfg *config) error {
	if cfg.custody() != hsm.Resident || !errors.Is(err, engine.UnsupportedOp) && !errors.Is(err, hsm.ErrUnsupported) {
		return err
	}
	return fmt.Errorf("custody: resident asks for what the token has not: %w: take custody (and resident.only) out of the configuration, or use another token; %q says what this one can do",
		err, "keyferryd doctor")
}

// softHSMConf says what is wrong with the configuration file of SoftHSM2, which
// itself answers no more than CKR_GENERAL_ERROR, or that it has no token. It is
// empty for other modules, and where the file can be read.
func softHSMConf(cfg *config) string {
	if !strings.Contains(filepath.Base(cfg.Token.Module), "softhsm") {
		return ""
	}
	const write = "name the right one in the configuration: token: {environment: {" + softhsm.ConfEnv + ": /path/of/softhsm2.conf}}"
	path := os.Getenv(softhsm.ConfEnv)
	if path == "" {
		return "SoftHSM2 looks for its configuration where its package has it, because " + softhsm.ConfEnv + " is not set; " + write +
			", or " + otherwise(cfg)
	}
	file, err := os.Open(path)
	if err != nil {
		return fmt.Sprintf("SoftHSM2 cannot read the configuration that %s names (%v); %s", softhsm.ConfEnv, err, write)
	}
	_ = file.Close()
	return ""
}

// acceptance is what to write into a configuration to accept exceptions beside
// those that it accepts already.
func acceptance(needs []hsm.Need, cfg *config) string {
	var lines []string
	names := cfg.Token.Accept
	for _, n := range needs {
		if n.Exception == hsm.TrustedUnavailable {
			lines = append(lines, "vault: {trusted: "+trustUnavailable+"}")
		} else {
			names = append(slices.Clip(names), n.Exception)
		}
	}
	if len(names) > len(cfg.Token.Accept) {
		var list []string
		for _, n := range names {
			list = append(list, string(n))
		}
		lines = append(lines, "token: {accept: ["+strings.Join(list, ", ")+"]}")
	}
	return strings.Join(lines, " and ")
}

// close ends everything in the order in which it depends on each other.
func (s *service) close() error {
	var errs []error
	if s.engine != nil {
		errs = append(errs, s.engine.Close())
	}
	if s.token != nil {
		errs = append(errs, s.token.Close())
	}
	if s.store != nil {
		errs = append(errs, s.store.Close())
	}
	return errors.Join(errs...)
}

// newLogger writes to w as a valid configuration says.
func newLogger(cfg logConfig, w io.Writer) *slog.Logger {
	level, err := cfg.level()
	if err != nil {
		level = slog.LevelInfo
	}
	options := &slog.HandlerOptions{Level: level}
	if cfg.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
