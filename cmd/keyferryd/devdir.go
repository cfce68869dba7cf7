package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"syscall"

	"go.yaml.in/yaml/v3"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// The files of a dev directory, beside those of package softhsm (softhsm2.conf
// and tokens) and of the store (the database's companions).
const (
	devConfigFile = "keyferryd.yaml" // written when all that it names is there but the database
	devDatabase   = "keyferry.db"
	devTokens     = "tokens"
	devSOPIN      = "so-pin"
	devUserPIN    = "user-pin"
	devSecret     = "access-key-secret"
	devUnfinished = "setup-unfinished" // there until the database is made, too
	devLock       = "dev.lock"

	devCredentials = "credentials.json" // written at every start, for clients
	devTokenFile   = "token.json"       // likewise, for other users of the token
)

const (
	devLabel = "keyferry-dev"
	// A region that clients know, for some of them check its name.
	devRegion  = "cn-hangzhou"
	devAccount = "1000000000000001"
)

// devDir is the directory of "keyferryd dev", locked.
type devDir struct {
	path string // absolute
	lock *os.File
}

// openDevDir makes the directory if it is missing and takes its lock, which
// the kernel gives back however this process ends.
func openDevDir(path string) (*devDir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the data directory: %w", err)
	}
	if err := onlyOf(os.Geteuid(), path); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(path, devLock), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot use the data directory: %w", err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("%s is in use by another keyferryd: stop it first or choose another --data", path)
	}
	d := &devDir{path: path, lock: lock}
	if err := d.onlyOurs(); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// onlyOf refuses a file or directory that anybody but that user, and root, can
// have written to.
func onlyOf(uid int, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("cannot use the data directory: %w", err)
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || int(stat.Uid) != uid {
		return fmt.Errorf("%s belongs to another user: choose a --data of your own", path)
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return fmt.Errorf("%s can be written by others (mode %04o): chmod go-w it, if you know all that is in it", path, mode)
	}
	return nil
}

// onlyOurs refuses a directory with anything in it that others can have made:
// a configuration names the library that is loaded into this process.
func (d *devDir) onlyOurs() error {
	dir, err := filepath.EvalSymlinks(d.path)
	if err != nil {
		return err
	}
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = onlyOf(os.Geteuid(), path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // other programs may use the token
		}
		return err
	})
}

func (d *devDir) close() { _ = d.lock.Close() }

func (d *devDir) file(name string) string { return filepath.Join(d.path, name) }

func (d *devDir) has(name string) bool {
	_, err := os.Lstat(d.file(name))
	return err == nil
}

// setUp returns the directory's configuration, after making everything that it
// names if this is the first start, or the first one that gets to the end.
func (d *devDir) setUp(ctx context.Context, module string) (config, error) {
	if d.has(devConfigFile) {
		return d.comeBack(ctx, module)
	}
	if !d.has(devUnfinished) {
		// What is there was not made here; it might be somebody's only token.
		for _, name := range []string{devTokens, devDatabase, devSOPIN, devUserPIN, devSecret} {
			if d.has(name) {
				return config{}, fmt.Errorf("%s is there but %s is not: restore it, or choose an empty directory", d.file(name), devConfigFile)
			}
		}
		if err := writeFile(d.file(devUnfinished), nil, 0o600); err != nil {
			return config{}, err
		}
	}
	return d.make(ctx, module)
}

// finished removes the mark of a set-up that is whole now, with its database.
func (d *devDir) finished() error {
	if err := os.Remove(d.file(devUnfinished)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// make sets everything up from the start. Whatever an earlier attempt left is
// of no use to anyone: no key was ever imported into it.
func (d *devDir) make(ctx context.Context, module string) (config, error) {
	if err := os.RemoveAll(d.file(devTokens)); err != nil {
		return config{}, err
	}
	for _, name := range []string{devSOPIN, devUserPIN, devSecret} {
		if err := writeSecret(d.file(name)); err != nil {
			return config{}, err
		}
	}
	cfg := config{
		Listen:     "127.0.0.1:0",
		Region:     devRegion,
		Account:    devAccount,
		AccessKeys: []accessKey{{ID: "KF" + rand.Text(), SecretFile: d.file(devSecret)}},
		Token: tokenConfig{
			Label: devLabel, UserPINFile: d.file(devUserPIN), AllowPKCS1v15: true,
		},
		Store: storeConfig{SQLite: d.file(devDatabase)},
		// Pairs take a core a while, and few are asked for here.
		Pairs: pairsConfig{Ready: 2},
	}
	if err := d.useModule(&cfg, module); err != nil {
		return config{}, err
	}
	if _, err := hsm.InitToken(ctx, cfg.Token.Module, cfg.Token.Label, d.pin(devSOPIN), d.pin(devUserPIN)); err != nil {
		return config{}, fmt.Errorf("cannot make a SoftHSM2 token: %w", err)
	}
	if err := d.initKeys(ctx, &cfg); err != nil {
		return config{}, err
	}
	err := d.save(&cfg)
	return cfg, err
}

// comeBack loads what an earlier start made. The directory may have been
// moved, and SoftHSM2 may have been replaced by another build.
func (d *devDir) comeBack(ctx context.Context, module string) (config, error) {
	cfg, err := loadConfig(d.file(devConfigFile))
	if err != nil {
		return config{}, err
	}
	if len(cfg.AccessKeys) == 0 {
		return config{}, fmt.Errorf("%s has no access key: restore it", d.file(devConfigFile))
	}
	// Without the mark it was there once, with every key.
	if !cfg.hasDatabase() && !d.has(devUnfinished) {
		return config{}, fmt.Errorf("the database %s is gone, and every key with it: restore it, or start over with another --data", cfg.Store.SQLite)
	}
	before := cfg
	if err := d.useModule(&cfg, module); err != nil {
		return config{}, err
	}
	if before.Token.Module != cfg.Token.Module {
		if err := d.initKeys(ctx, &cfg); err != nil { // another build may need more keys
			return config{}, err
		}
	}
	if !reflect.DeepEqual(before, cfg) { //nolint:forbidigo // no secrets are in it
		err = d.save(&cfg)
	}
	return cfg, err
}

// useModule decides which module serves, and tells SoftHSM2 where this
// directory is. It keeps the module it had while that is there.
func (d *devDir) useModule(cfg *config, module string) (err error) {
	if module == "" && checkModule(cfg.Token.Module) == nil {
		module = cfg.Token.Module
	}
	if module == "" {
		if module, err = softhsm.FindModule(); err != nil {
			return fmt.Errorf("%w, or with --module", err)
		}
	}
	if cfg.Token.Module, err = filepath.Abs(module); err != nil {
		return err
	}
	if err := checkModule(cfg.Token.Module); err != nil {
		return fmt.Errorf("there is no SoftHSM2 at %s: name its libsofthsm2.so with --module", module)
	}
	conf, err := softhsm.WriteConf(d.path)
	if err != nil {
		return err
	}
	cfg.Token.Environment = map[string]string{softhsm.ConfEnv: conf}
	return cfg.applyEnvironment()
}

// initKeys makes the keys that the token lacks.
func (d *devDir) initKeys(ctx context.Context, cfg *config) error {
	pins, err := hsm.Init(ctx, hsm.InitConfig{
		Module: cfg.Token.Module, Label: cfg.Token.Label, Pins: cfg.Token.Pins.pins(),
		SOPIN: d.pin(devSOPIN), UserPIN: d.pin(devUserPIN),
	})
	if err != nil {
		return tokenAdvice(err, cfg)
	}
	cfg.Token.Pins = pinsOf(pins)
	return nil
}

func (d *devDir) pin(name string) func() ([]byte, error) {
	return func() ([]byte, error) {
		pin, err := os.ReadFile(d.file(name))
		return trimLineEnd(pin), err
	}
}

// save writes the configuration, with paths that survive a move of the
// directory.
func (d *devDir) save(cfg *config) error {
	saved := *cfg
	saved.Token.UserPINFile = devUserPIN
	saved.Store.SQLite = devDatabase
	saved.AccessKeys = []accessKey{{ID: cfg.AccessKeys[0].ID, SecretFile: devSecret}}
	text, err := yaml.Marshal(saved)
	if err != nil {
		return err
	}
	const head = "# Made by \"keyferryd dev\"; \"keyferryd serve\" takes it too.\n"
	return writeFile(d.file(devConfigFile), append([]byte(head), text...), 0o600)
}
