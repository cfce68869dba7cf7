// Package cmd_test holds the architecture of the module as tests: what may
// import what, and what may stand where. Whoever needs a new edge adds it here
// and so shows it to the reviewer.
package cmd_test

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/keyferry/keyferry/"

// house lists every package with what it may import of this module outside
// tests. Imports point one way: cryptoki, hsm, engine, kmsapi, cmd; acs,
// byok and receipt, which a customer uses without an HSM, import none of them.
var house = map[string][]string{
	"hsm/internal/cryptoki":        {},
	"hsm":                          {"hsm/internal/cryptoki"},
	"hsm/hsmtest":                  {"hsm/internal/cryptoki"}, // for tests alone
	"hsm/contract":                 {},                        // tests alone
	"hsm/adversary":                {},                        // tests alone
	"hsm/adversary/thief":          {},                        // for those tests
	"engine/store":                 {"hsm"},
	"engine/store/storetest":       {"engine/store", "hsm"},
	"engine/store/sqlite":          {"engine/store", "hsm"},
	"engine/store/postgres":        {"engine/store"},
	"engine/store/postgres/pgtest": {"engine/store/postgres"}, // for tests alone
	"engine":                       {"engine/receipt", "engine/store", "hsm"},
	"engine/acs":                   {},
	"engine/byok":                  {},
	"engine/receipt":               {},
	"engine/enginebench":           {"engine", "engine/byok", "engine/store", "hsm"},
	"engine/kmsapi":                {"engine", "engine/acs", "engine/receipt", "engine/store", "hsm"},
	"softhsm":                      {"hsm"},
	"cmd":                          {}, // this test
	"cmd/keyferry":                 {"engine/acs", "engine/byok", "engine/receipt"},
	"cmd/keyferryd":                {"engine", "engine/acs", "engine/byok", "engine/enginebench", "engine/kmsapi", "engine/receipt", "engine/store", "engine/store/postgres", "engine/store/sqlite", "hsm", "softhsm"},
}

// foreign lists imports from outside this module that a package keeps to
// itself. Tests are held to it as well, save where they are a second,
// independent client of the token.
var foreign = map[string][]string{
	"C":                       {"hsm/internal/cryptoki", "hsm/adversary/thief"}, // the thief has a PKCS#11 client of his own
	"github.com/miekg/pkcs11": {"hsm/internal/cryptoki"},
	"database/sql":            {"engine/store/sqlite", "engine/store/postgres"},
	"github.com/jackc/pgx/v5": {"engine/store/postgres", "engine/store/postgres/pgtest"},
	"modernc.org/sqlite":      {"engine/store/sqlite"},
	"net/http":                {"engine/acs", "engine/kmsapi", "cmd/keyferry", "cmd/keyferryd"},
	"github.com/prometheus/client_golang/prometheus": {"cmd/keyferryd"},
}

type goPackage struct {
	ImportPath string
	Imports    []string
}

func TestImportsPointOneWay(t *testing.T) {
	for _, pkg := range list(t, "./...") {
		name := strings.TrimPrefix(pkg.ImportPath, module)
		allowed, ok := house[name]
		require.True(t, ok, "package %s is not in the house", name)
		for _, path := range pkg.Imports {
			if own, ok := strings.CutPrefix(path, module); ok {
				require.Contains(t, allowed, own, "%s imports %s", name, own)
			}
			if keepers, ok := foreign[path]; ok {
				require.Contains(t, keepers, name, "%s imports %s", name, path)
			}
		}
	}
}

// The customer's program runs where there is no HSM and no C library. The go
// command lists it only if every package has files that need no cgo.
func TestKeyferryIsPureGo(t *testing.T) {
	for _, pkg := range list(t, "-deps", "./cmd/keyferry") {
		require.NotContains(t, []string{"runtime/cgo", "C", "github.com/miekg/pkcs11"}, pkg.ImportPath)
		require.NotContains(t, pkg.Imports, "C", "%s", pkg.ImportPath)
	}
}

// Package softhsm serves tests and "keyferryd dev" alike; what serves only
// tests must not come into the programs with it.
func TestProgramsCarryNoTestCode(t *testing.T) {
	for _, program := range []string{"./cmd/keyferry", "./cmd/keyferryd"} {
		for _, pkg := range list(t, "-deps", program) {
			if strings.HasPrefix(pkg.ImportPath, module) {
				require.NotContains(t, pkg.Imports, "testing", pkg.ImportPath)
			}
			require.NotContains(t, pkg.ImportPath, "github.com/stretchr/testify", program)
		}
	}
}

func TestNothingElseStandsAtTheTop(t *testing.T) {
	top := []string{
		"hsm", "engine", "cmd", "softhsm", "testdata",
		"go.mod", "go.sum", "Makefile", "README.md", "LICENSE",
		"bin", "build", // made by make, ignored by git
	}
	entries, err := os.ReadDir("..")
	require.NoError(t, err)
	for _, entry := range entries {
		if name := entry.Name(); !strings.HasPrefix(name, ".") {
			require.True(t, slices.Contains(top, name), "%s stands at the top", name)
		}
	}
}

// list asks the go command about packages, outside tests. cmd/keyferry is
// looked at as it is built, without cgo, and everything else with it.
func list(t *testing.T, args ...string) []goPackage {
	t.Helper()
	cgo := "CGO_ENABLED=1"
	if slices.Contains(args, "./cmd/keyferry") {
		cgo = "CGO_ENABLED=0"
	}
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports"}, args...)...)
	cmd.Dir, cmd.Env = "..", append(os.Environ(), cgo, "GOFLAGS=") // -race would want cgo
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, "%s", stderr.String())

	var packages []goPackage
	decoder := json.NewDecoder(bytes.NewReader(out))
	for {
		var pkg goPackage
		err := decoder.Decode(&pkg)
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		packages = append(packages, pkg)
	}
	require.NotEmpty(t, packages)
	return packages
}
