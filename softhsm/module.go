// Package softhsm finds and sets up SoftHSM2, the software token on which
// Keyferry is developed and tested.
//
// A test calls [New] and has a throw-away token. A program that brings its own
// token up, as "keyferryd dev" does, calls [FindModule] and [WriteConf].
//
// SoftHSM2 keeps its tokens in files that whoever holds them and a PIN can
// read and edit. It is for development and tests; nothing here makes it more.
package softhsm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
)

// ModuleEnv names the environment variable that overrides the search of
// FindModule.
const ModuleEnv = "KEYFERRY_SOFTHSM_MODULE"

// ErrNoModule is the answer of FindModule where SoftHSM2 is not installed.
var ErrNoModule = errors.New("softhsm: libsofthsm2.so not found: run \"make deps\", or name it in " + ModuleEnv)

// FindModule answers the path of the PKCS#11 library of SoftHSM2: the one that
// ModuleEnv names, else the private copy of "make deps" in the source tree,
// else where distributions put it. What ModuleEnv names is never replaced by
// anything else: if it is not there, that is an error.
//
// The working directory is not looked at, so that nobody can have a library
// loaded by leaving it where a program is started.
func FindModule() (string, error) {
	if path := os.Getenv(ModuleEnv); path != "" {
		if !isFile(path) {
			return "", fmt.Errorf("softhsm: %s names %s, which is no file", ModuleEnv, path)
		}
		return filepath.Abs(path)
	}
	found, err := modules(slices.Concat(below("build/deps/usr/lib/*-linux-gnu*/softhsm"), distributionModules))
	if err != nil || len(found) == 0 {
		return "", errors.Join(err, ErrNoModule)
	}
	return found[0], nil
}

// Modules answers every SoftHSM2 of this machine, each once: first the one that
// FindModule answers, then what "make softhsm" built. It is for tests that go
// through all of them, each in a process of its own.
func Modules() ([]string, error) {
	first, err := FindModule()
	if err != nil {
		return nil, err
	}
	others, err := modules(slices.Concat(
		below("build/softhsm/lib/softhsm"), below("build/deps/usr/lib/*-linux-gnu*/softhsm"), distributionModules))
	if err != nil {
		return nil, err
	}
	seen := make(map[string]bool)
	return slices.DeleteFunc(append([]string{first}, others...), func(path string) bool {
		target, err := filepath.EvalSymlinks(path)
		again := err != nil || seen[target]
		seen[target] = true
		return again
	}), nil
}

// modules answers what is there of the patterns, in their order.
func modules(patterns []string) (found []string, err error) {
	for _, pattern := range patterns {
		matches, err := filepath.Glob(pattern)
		if err != nil {
			return nil, fmt.Errorf("softhsm: looking for %s: %w", pattern, err)
		}
		for _, path := range matches {
			if isFile(path) {
				found = append(found, path)
			}
		}
	}
	return found, nil
}

// distributionModules is where packages put the module; softhsm/deps.sh has
// the same list.
var distributionModules = []string{
	"/usr/lib/softhsm/libsofthsm2.so",                   // Debian, Ubuntu, Arch, Alpine
	"/usr/lib/*-linux-gnu*/softhsm/libsofthsm2.so",      // Debian, multiarch
	"/usr/lib64/softhsm/libsofthsm2.so",                 // openSUSE
	"/usr/lib64/pkcs11/libsofthsm2.so",                  // Fedora, RHEL
	"/usr/local/lib/softhsm/libsofthsm2.so",             // from source
	"/opt/homebrew/lib/softhsm/libsofthsm2.so",          // Homebrew
	"/run/current-system/sw/lib/softhsm/libsofthsm2.so", // NixOS
}

// below is where the module is in a directory of the source tree: in build/deps
// where "make deps" unpacks the distribution's package for a user who is not
// root. The tree is found from where this file was compiled (tests) and from
// where the program lies (bin/, which is built without source paths).
func below(dir string) []string {
	var patterns []string
	if _, file, _, ok := runtime.Caller(0); ok && filepath.IsAbs(file) {
		patterns = append(patterns, filepath.Join(filepath.Dir(filepath.Dir(file)), dir, moduleName))
	}
	if exe, err := os.Executable(); err == nil {
		if exe, err = filepath.EvalSymlinks(exe); err == nil {
			patterns = append(patterns, filepath.Join(filepath.Dir(filepath.Dir(exe)), dir, moduleName))
		}
	}
	return patterns
}

const moduleName = "libsofthsm2.so"

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}
