package sqlite_test

import (
	"bytes"
	"context"
	"database/sql"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

func init() { children["open"] = openChild }

// openChild opens the database and does nothing.
func openChild(path string) error {
	s, err := sqlite.Open(context.Background(), sqlite.Config{Path: path})
	if err != nil {
		return err
	}
	return s.Close()
}

func TestConfig(t *testing.T) {
	_, err := sqlite.Open(t.Context(), sqlite.Config{BusyTimeout: -1, Readers: -1, MaxSize: -1})
	for _, field := range []string{"Path", "BusyTimeout", "Readers", "MaxSize"} {
		require.ErrorContains(t, err, field, "every problem is told at once")
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(t *testing.T, path string)
		want    string
	}{
		{"no directory", func(t *testing.T, path string) {
			t.Helper()
			require.NoError(t, os.Remove(filepath.Dir(path)))
		}, "directory of database"},
		{"a directory", func(t *testing.T, path string) {
			t.Helper()
			require.NoError(t, os.Mkdir(path, 0o700))
		}, "is a directory"},
		{"text", func(t *testing.T, path string) {
			t.Helper()
			require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte("no database\n"), 500), 0o600))
		}, "is not a database"},
		{"another program's", func(t *testing.T, path string) {
			t.Helper()
			execute(t, path, `CREATE TABLE bookmarks (url TEXT)`)
		}, "belongs to another program"},
		{"newer", func(t *testing.T, path string) {
			t.Helper()
			require.NoError(t, open(t, path).Close())
			execute(t, path, `INSERT INTO goose_db_version (version_id, is_applied) VALUES (4711, 1)`)
		}, "has schema version 4711"},
		{"cut short", func(t *testing.T, path string) {
			t.Helper()
			require.NoError(t, open(t, path).Close())
			require.NoError(t, os.Truncate(path, 8192))
		}, "malformed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := newPath(t)
			tt.prepare(t, path)
			before, _ := os.ReadFile(path)
			for range 2 { // the first failure gives everything back
				_, err := sqlite.Open(t.Context(), sqlite.Config{Path: path})
				require.ErrorContains(t, err, tt.want)
				require.ErrorContains(t, err, path)
				require.NotContains(t, err.Error(), "\n", "one line")
			}
			after, _ := os.ReadFile(path)
			require.True(t, bytes.Equal(before, after), "a file that is refused is left alone")
		})
	}
}

// execute runs SQL on a database that is not open.
func execute(t *testing.T, path, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	require.NoError(t, err)
	_, err = db.ExecContext(t.Context(), statement)
	require.NoError(t, err)
	require.NoError(t, db.Close())
}

func TestOpenForbidden(t *testing.T) {
	for _, tt := range []struct {
		name          string
		dir, database os.FileMode
		want          string
	}{
		{"directory", 0o555, 0o600, "lock file"},
		{"read-only file", 0o777, 0o444, "for writing"},
		{"unreadable file", 0o777, 0o000, "for writing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := newPath(t)
			require.NoError(t, open(t, path).Close())
			require.NoError(t, os.Remove(path+".lock"))
			require.NoError(t, os.Chmod(path, tt.database))
			require.NoError(t, os.Chmod(filepath.Dir(path), tt.dir))
			require.NoError(t, os.Chmod(filepath.Dir(filepath.Dir(path)), 0o755))
			t.Cleanup(func() { require.NoError(t, os.Chmod(filepath.Dir(path), 0o777)) })
			cmd := storetest.Child(t, "open", path)
			cmd.Dir = "/"
			if os.Geteuid() == 0 { // nothing is forbidden to root
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			}
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			require.ErrorContains(t, cmd.Run(), "exit status 1")
			require.Contains(t, stderr.String(), tt.want)
			require.Contains(t, stderr.String(), "permission denied")
			require.Contains(t, stderr.String(), path)
		})
	}
}

func TestOneStorePerFile(t *testing.T) {
	path := newPath(t)
	s := open(t, path)
	link := filepath.Join(t.TempDir(), "link.db")
	require.NoError(t, os.Symlink(path, link))
	for _, name := range []string{path, link, filepath.Join(filepath.Dir(path), ".", "x", "..", filepath.Base(path))} {
		_, err := sqlite.Open(t.Context(), sqlite.Config{Path: name})
		require.ErrorContains(t, err, path+" is in use")
		require.ErrorContains(t, err, path+".lock is locked")
		require.ErrorContains(t, err, "stop the other one first")
	}
	var stderr bytes.Buffer
	cmd := storetest.Child(t, "open", path)
	cmd.Stderr = &stderr
	require.ErrorContains(t, cmd.Run(), "exit status 1", "another process")
	require.Contains(t, stderr.String(), path+" is in use")

	require.NoError(t, s.CreateKey(t.Context(), storetest.BenchKey(1)), "the first is not disturbed")
	require.NoError(t, s.Close())
	require.NoError(t, storetest.Child(t, "open", link).Run())
	require.NoError(t, open(t, path).Close())
}

func TestOddPaths(t *testing.T) {
	for _, name := range []string{"a b.db", "q?mode=memory", "per%cent%20.db", "ha#sh", "钥匙.db", ":memory:", "file:x", "&_pragma=x"} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), name)
			s := open(t, path)
			require.NoError(t, s.CreateKey(t.Context(), storetest.BenchKey(1)))
			require.NoError(t, s.Close())
			info, err := os.Stat(path)
			require.NoError(t, err)
			require.Positive(t, info.Size())
		})
	}
	t.Run("relative", func(t *testing.T) {
		t.Chdir(t.TempDir())
		require.NoError(t, open(t, "keyferry.db").Close())
		require.FileExists(t, "keyferry.db")
	})
}

func TestFilesArePrivate(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	for _, before := range []os.FileMode{0, 0o644} {
		path := newPath(t)
		if before != 0 {
			require.NoError(t, os.WriteFile(path, nil, before))
		}
		s := open(t, path)
		require.NoError(t, s.CreateKey(t.Context(), storetest.BenchKey(1)))
		files, err := filepath.Glob(path + "*")
		require.NoError(t, err)
		require.Len(t, files, 4, "database, log, shared memory, lock: %s", strings.Join(files, " "))
		for _, file := range files {
			info, err := os.Stat(file)
			require.NoError(t, err)
			require.Equal(t, os.FileMode(0o600), info.Mode(), file)
		}
		require.NoError(t, s.Close())
	}
}

func TestOpenCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	path := newPath(t)
	_, err := sqlite.Open(ctx, sqlite.Config{Path: path})
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, open(t, path).Close())
}

// TestFirstOpenCutShort has the disk fill up at every page of the first
// migration. Open says so, and with room a later one goes on from there.
func TestFirstOpenCutShort(t *testing.T) {
	failed, step := 0, int64(7)
	if os.Getenv("KEYFERRY_SLOW") != "" {
		step = 1
	}
	for pages := int64(1); ; pages += step {
		path := newPath(t)
		s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path, MaxSize: pages * 4096})
		if err == nil {
			require.NoError(t, s.Close())
			break
		}
		failed++
		require.ErrorIs(t, err, store.ErrUnavailable)
		require.ErrorContains(t, err, "full")
		require.ErrorContains(t, err, path)
		s = open(t, path)
		require.NoError(t, s.CreateKey(t.Context(), storetest.BenchKey(1)))
		require.NoError(t, s.Close())
		requireSound(t, path)
	}
	require.Greater(t, failed, 3)
}

// TestPragmas reads back what durability and erasure rest on.
func TestPragmas(t *testing.T) {
	path := newPath(t)
	s := open(t, path)
	defer func() { require.NoError(t, s.Close()) }()
	for pragma, want := range map[string]int64{"synchronous": 2, "foreign_keys": 1, "secure_delete": 1} {
		require.Equal(t, want, s.Pragma(t, pragma), pragma)
	}
}
