package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"time"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/sqlite"
)

// storeConfig names one database: a file for one server, or a PostgreSQL for
// any number of them.
type storeConfig struct {
	SQLite   string          `yaml:"sqlite,omitempty"` // path of the database file
	Postgres *postgresConfig `yaml:"postgres,omitempty"`
}

type postgresConfig struct {
	// DSN is a connection string of libpq without a password. One with a
	// password, or anything else that is nobody's business, is in DSNFile.
	DSN          string `yaml:"dsn,omitempty"`
	DSNFile      string `yaml:"dsn_file,omitempty"`
	PasswordFile string `yaml:"password_file,omitempty"`
	Connections  int    `yaml:"connections,omitempty"`
	// AllowInsecure permits a network on which the database does not prove who
	// it is.
	AllowInsecure bool `yaml:"allow_insecure,omitempty"`
}

// paths are those that may be relative to the configuration file.
func (c *storeConfig) paths() []*string {
	paths := []*string{&c.SQLite}
	if c.Postgres != nil {
		paths = append(paths, &c.Postgres.DSNFile, &c.Postgres.PasswordFile)
	}
	return paths
}

func (c *storeConfig) validate() error {
	p := c.Postgres
	switch {
	case c.SQLite == "" && p == nil:
		return errors.New("store.sqlite is missing: name the database file, or a PostgreSQL in store.postgres")
	case p == nil:
		return nil
	case c.SQLite != "":
		return errors.New("store has both sqlite and postgres: remove the one that is not the database")
	}
	var errs []error
	if (p.DSN == "") == (p.DSNFile == "") {
		errs = append(errs, errors.New("store.postgres needs dsn or dsn_file, one of them"))
	}
	if hasPassword(p.DSN) {
		errs = append(errs, errors.New("store.postgres.dsn holds a password: put that into a file and name it in password_file"))
	}
	if p.Connections < 0 {
		errs = append(errs, errors.New("store.postgres.connections is negative"))
	}
	return errors.Join(errs...)
}

// hasPassword reports whether a connection string looks as if it held one. In
// doubt it does.
func hasPassword(dsn string) bool {
	if u, err := url.Parse(dsn); err == nil && u.User != nil {
		if _, set := u.User.Password(); set {
			return true
		}
	}
	return strings.Contains(dsn, "password")
}

// storeTimeout is how long a request waits for a database that does not answer.
// Alibaba Cloud's SDKs wait for ten seconds, and are to hear of it.
const storeTimeout = 5 * time.Second

// config reads what the configuration keeps in files.
func (c *postgresConfig) config(log *slog.Logger) (postgres.Config, error) {
	cfg := postgres.Config{DSN: c.DSN, Connections: c.Connections, AllowInsecure: c.AllowInsecure, Timeout: storeTimeout, Logger: log}
	for _, secret := range []struct {
		field, file string
		into        *string
	}{{"dsn_file", c.DSNFile, &cfg.DSN}, {"password_file", c.PasswordFile, &cfg.Password}} {
		if secret.file == "" {
			continue
		}
		text, err := readSecret(secret.file, log)
		if err != nil {
			return postgres.Config{}, fmt.Errorf("store.postgres.%s: %w", secret.field, err)
		}
		*secret.into = string(text)
		clear(text)
	}
	return cfg, nil
}

// openStore opens the database that a valid configuration names.
func openStore(ctx context.Context, cfg *storeConfig, log *slog.Logger) (store.Store, error) {
	if cfg.Postgres == nil {
		s, err := sqlite.Open(ctx, sqlite.Config{Path: cfg.SQLite, Logger: log})
		if err != nil {
			return nil, err
		}
		return s, nil
	}
	pg, err := cfg.Postgres.config(log)
	if err != nil {
		return nil, err
	}
	s, err := postgres.Open(ctx, pg)
	if err != nil {
		return nil, storeAdvice(err)
	}
	return s, nil
}

// adviceError is an error that knows what to do.
type adviceError advice

func (e *adviceError) Error() string { return e.What + ": " + e.Do }

// storeAdvice adds what to do to what is wrong with a PostgreSQL.
func storeAdvice(err error) error {
	var schema *postgres.SchemaError
	switch {
	case errors.As(err, &schema) && schema.Have == 0:
		return &adviceError{"the database has no tables yet", `run "keyferryd migrate" once`}
	case errors.As(err, &schema) && schema.Have < schema.Want:
		return &adviceError{
			fmt.Sprintf("the database has schema version %d and this program needs version %d", schema.Have, schema.Want),
			`back it up and run "keyferryd migrate" once, or restore the database that was here`,
		}
	case errors.As(err, &schema):
		return err
	case errors.Is(err, store.ErrUnavailable):
		return fmt.Errorf("%w: check store.postgres, and that the server runs", err)
	}
	return err
}
