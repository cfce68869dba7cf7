package softhsm_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/softhsm"
)

func TestFindModule(t *testing.T) {
	module, err := softhsm.FindModule()
	require.NoError(t, err)
	require.True(t, filepath.IsAbs(module))
	require.FileExists(t, module)
}

func TestModules(t *testing.T) {
	first, err := softhsm.FindModule()
	require.NoError(t, err)
	all, err := softhsm.Modules()
	require.NoError(t, err)
	require.Equal(t, first, all[0])
	seen := map[string]bool{}
	for _, module := range all {
		require.FileExists(t, module)
		module, err = filepath.EvalSymlinks(module)
		require.NoError(t, err)
		require.False(t, seen[module], "%s is there twice", module)
		seen[module] = true
	}

	// What is asked for by name comes first, and once.
	last := all[len(all)-1]
	t.Setenv(softhsm.ModuleEnv, last)
	again, err := softhsm.Modules()
	require.NoError(t, err)
	require.Equal(t, last, again[0])
	require.Len(t, again, len(all))
}

func TestFindModuleByEnvironment(t *testing.T) {
	named := filepath.Join(t.TempDir(), "some.so")
	require.NoError(t, os.WriteFile(named, nil, 0o600))
	t.Setenv(softhsm.ModuleEnv, named)

	module, err := softhsm.FindModule()
	require.NoError(t, err)
	require.Equal(t, named, module)
}

// A module that was asked for by name and is not there must not be replaced by
// another one: a test would then prove something about the wrong token.
func TestFindModuleNeverReplacesANamedOne(t *testing.T) {
	for name, path := range map[string]string{
		"missing":   filepath.Join(t.TempDir(), "gone.so"),
		"directory": t.TempDir(),
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(softhsm.ModuleEnv, path)
			_, err := softhsm.FindModule()
			require.ErrorContains(t, err, path)
		})
	}
}

func TestErrNoModuleSaysWhatToDo(t *testing.T) {
	require.ErrorContains(t, softhsm.ErrNoModule, "make deps")
	require.ErrorContains(t, softhsm.ErrNoModule, softhsm.ModuleEnv)
}
