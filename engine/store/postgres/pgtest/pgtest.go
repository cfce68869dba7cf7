// Package pgtest starts real PostgreSQL servers for tests, kills them and
// starts them again.
//
// A test binary has one server of its own, see Start; each test takes a new
// database of it.
package pgtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/keyferry/keyferry/engine/store/postgres"
)

// BinEnv names the environment variable that overrides where the programs of
// PostgreSQL are looked for.
const BinEnv = "KEYFERRY_POSTGRES_BIN"

// ErrNoPostgres is the answer where PostgreSQL is not installed.
var ErrNoPostgres = errors.New("pgtest: PostgreSQL's initdb and postgres not found: run \"make deps\", or name their directory in " + BinEnv)

// TB is what this package needs of a testing.TB.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
}

// Server is a PostgreSQL server, reached by a socket file alone. Its methods
// are not safe for concurrent use, save Database.
type Server struct {
	bin, dir  string
	as        *syscall.Credential // nil: this process's own
	settings  []string
	cmd       *exec.Cmd
	log       *log
	databases atomic.Int64
	mu        sync.Mutex
	free      []string     // databases
	template  func() error // makes a database to copy, once
}

// FastSettings are for tests that do not kill the server: nothing reaches the
// disk before it has to.
var FastSettings = []string{"fsync=off", "full_page_writes=off"}

// Start makes a cluster in a temporary directory and starts its server.
// PostgreSQL refuses to run as root, so it runs as nobody there.
func Start(settings ...string) (*Server, error) { return StartIn("", settings...) }

// StartIn is Start below a directory.
func StartIn(dir string, settings ...string) (_ *Server, err error) {
	s := &Server{settings: settings, log: &log{}}
	s.template = sync.OnceValue(func() error { return s.makeTemplate(context.Background()) })
	if s.bin, err = findPrograms(); err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 {
		if s.as, err = nobody(); err != nil {
			return nil, err
		}
	}
	if s.dir, err = os.MkdirTemp(dir, "keyferry-pg-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(s.dir))
		}
	}()
	if err := s.Own(s.dir); err != nil {
		return nil, err
	}
	if out, err := s.command("initdb", "-D", s.data(), "-U", "keyferry", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8",
		"--no-sync", "--no-instructions").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("pgtest: initdb: %w: %s", err, out)
	}
	if err := s.Restart(); err != nil {
		return nil, err
	}
	return s, nil
}

// Own gives a directory to the user that the server runs as.
func (s *Server) Own(dir string) error {
	if s.as == nil {
		return nil
	}
	return os.Chown(dir, int(s.as.Uid), int(s.as.Gid))
}

// nobody is an ordinary user of every machine.
func nobody() (*syscall.Credential, error) {
	u, err := user.Lookup("nobody")
	if err != nil {
		return nil, fmt.Errorf("pgtest: PostgreSQL does not run as root: %w", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, err
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

// command is one of PostgreSQL's, which ends with this process.
func (s *Server) command(name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(context.Background(), filepath.Join(s.bin, name), args...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "LD_LIBRARY_PATH="+libraries(s.bin))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.as}
	endWithParent(cmd.SysProcAttr)
	return cmd
}

// ready is what the server logs when it takes connections.
const ready = "database system is ready to accept connections"

// startTimeout bounds one start, with the recovery after a crash.
const startTimeout = time.Minute

// Restart starts the server, which must not be running, and waits until it
// takes connections. After Kill it recovers first.
func (s *Server) Restart() error {
	deadline := time.Now().Add(startTimeout)
	for {
		err := s.start()
		// What a killed server has left is noticed only a moment later.
		if err == nil || time.Now().After(deadline) || !bytes.Contains(s.log.tail(), []byte("pre-existing shared memory block")) {
			return err
		}
		<-time.After(20 * time.Millisecond)
	}
}

func (s *Server) start() error {
	args := []string{"-D", s.data(), "-k", s.dir}
	for _, setting := range append([]string{"listen_addresses=", "max_connections=200", "shared_buffers=32MB"}, s.settings...) {
		args = append(args, "-c", setting)
	}
	s.cmd = s.command("postgres", args...)
	stderr, err := s.cmd.StderrPipe()
	if err != nil {
		return err
	}
	s.log.clear()
	if err := s.cmd.Start(); err != nil {
		return err
	}
	up := make(chan bool, 1)
	go s.log.follow(stderr, up)
	select {
	case ok := <-up:
		if ok {
			return nil
		}
	case <-time.After(startTimeout):
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
	return fmt.Errorf("pgtest: the server did not start: %s", s.log.tail())
}

// Kill ends the server as a crash of its machine would, as far as it can tell:
// with all of its processes, and with nothing written that was not.
func (s *Server) Kill() error {
	children, err := childrenOf(s.cmd.Process.Pid)
	if err := errors.Join(err, s.cmd.Process.Kill()); err != nil {
		return err
	}
	_ = s.cmd.Wait() // killed
	for _, pid := range children {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended by itself
	}
	return nil
}

// Shutdown ends the server in good order, connections and all.
func (s *Server) Shutdown() error {
	if err := s.cmd.Process.Signal(syscall.SIGINT); err != nil {
		return err
	}
	return s.cmd.Wait()
}

// Processes are those of the server, its own first.
func (s *Server) Processes() ([]int, error) {
	children, err := childrenOf(s.cmd.Process.Pid)
	return append([]int{s.cmd.Process.Pid}, children...), err
}

// Stop ends the server for good.
func (s *Server) Stop() error {
	_ = s.cmd.Process.Signal(syscall.SIGQUIT)
	_ = s.cmd.Wait()
	return os.RemoveAll(s.dir)
}

// Log is what the server has said since its last start.
func (s *Server) Log() string { return string(s.log.tail()) }

// Socket is the socket file of the server.
func (s *Server) Socket() string { return filepath.Join(s.dir, ".s.PGSQL.5432") }

// DSN names a database of the server.
func (s *Server) DSN(database string) string {
	return "host=" + s.dir + " user=keyferry dbname=" + database
}

// template is the database that Database copies: to migrate each of them would
// take twice as long.
const template = "keyferry_template"

func (s *Server) makeTemplate(ctx context.Context) error {
	if err := s.Exec(ctx, "postgres", `CREATE DATABASE `+template+` TEMPLATE template0`); err != nil {
		return err
	}
	_, _, err := postgres.Migrate(ctx, postgres.Config{DSN: s.DSN(template)})
	return err
}

// Database answers the name of a database with Keyferry's tables and nothing in
// them: a new one, or one that was released.
func (s *Server) Database(ctx context.Context) (string, error) {
	if err := s.template(); err != nil {
		return "", err
	}
	s.mu.Lock()
	var name string
	if n := len(s.free); n > 0 {
		name, s.free = s.free[n-1], s.free[:n-1]
	}
	s.mu.Unlock()
	if name == "" {
		var err error
		if name, err = s.create(ctx, template); err != nil {
			return "", err
		}
	}
	return name, s.empty(ctx, name)
}

// Release gives a database back, to which nobody is connected any more, for
// another test: to make a new one takes ten times as long.
func (s *Server) Release(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.free = append(s.free, name)
}

// empty removes every row but those of tables that have just one, and makes the
// database another instance.
func (s *Server) empty(ctx context.Context, name string) error {
	c, err := pgx.Connect(ctx, s.DSN(name))
	if err != nil {
		return err
	}
	rows, err := c.Query(ctx, `SELECT tablename FROM pg_tables WHERE schemaname = 'public'
		AND tablename NOT IN ('instance', 'receipt_log') AND tablename NOT LIKE 'keyferry%'`)
	if err == nil {
		var tables []string
		if tables, err = pgx.CollectRows(rows, pgx.RowTo[string]); err == nil {
			_, err = c.Exec(ctx, fmt.Sprintf(`TRUNCATE %s; UPDATE instance SET boot = 0, name = '%016x';
				UPDATE receipt_log SET size = 0, head = NULL, log_id = decode('%032x', 'hex')`,
				strings.Join(tables, ", "), randomNumber(), randomNumber()))
		}
	}
	return errors.Join(err, c.Close(ctx))
}

func randomNumber() uint64 {
	var b [8]byte
	rand.Read(b[:]) // never fails: crypto/rand
	return binary.BigEndian.Uint64(b[:])
}

// EmptyDatabase makes a new database with nothing in it, and returns its name.
func (s *Server) EmptyDatabase(ctx context.Context) (string, error) {
	return s.create(ctx, "template0")
}

func (s *Server) create(ctx context.Context, from string) (string, error) {
	name := fmt.Sprintf("test_%d", s.databases.Add(1))
	return name, s.Exec(ctx, "postgres", `CREATE DATABASE `+name+` TEMPLATE `+from)
}

// Exec has the server execute SQL in a database.
func (s *Server) Exec(ctx context.Context, database, statement string) error {
	c, err := pgx.Connect(ctx, s.DSN(database))
	if err != nil {
		return err
	}
	_, err = c.Exec(ctx, statement)
	return errors.Join(err, c.Close(ctx))
}

// Need ends a test without a server: in CI it fails, elsewhere it is skipped,
// and either way it says what is missing.
func Need(tb TB, err error) {
	tb.Helper()
	switch {
	case err == nil:
	case errors.Is(err, ErrNoPostgres) && os.Getenv("CI") == "":
		tb.Skipf("%v", err)
	default:
		tb.Fatalf("%v", err)
	}
}

// findPrograms answers the directory of initdb and postgres.
func findPrograms() (string, error) {
	var patterns []string
	if dir := os.Getenv(BinEnv); dir != "" {
		patterns = []string{dir}
	} else {
		if _, file, _, ok := runtime.Caller(0); ok && filepath.IsAbs(file) {
			root := filepath.Join(filepath.Dir(file), "..", "..", "..", "..")
			patterns = append(patterns, root+"/build/deps/usr/lib/postgresql/*/bin")
		}
		patterns = append(patterns, "/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/bin", "/usr/bin")
	}
	for _, pattern := range patterns {
		matches, err := filepath.Glob(filepath.Join(pattern, "initdb"))
		if err != nil {
			return "", err
		}
		for _, path := range matches {
			dir := filepath.Dir(path)
			if _, err := os.Stat(filepath.Join(dir, "postgres")); err == nil {
				return dir, nil
			}
		}
	}
	return "", ErrNoPostgres
}

// libraries is where the libraries of an unpacked PostgreSQL are, by the place
// of its programs.
func libraries(bin string) string {
	dirs, err := filepath.Glob(bin + "/../../../*-linux-gnu*")
	if err != nil {
		return ""
	}
	return strings.Join(dirs, ":")
}

// childrenOf are the processes that one has started.
func childrenOf(parent int) ([]int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	var children []int
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// pid (name) state ppid …
		_, rest, _ := strings.Cut(string(text), ") ")
		fields := strings.Fields(rest)
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err == nil && len(fields) > 1 && fields[1] == strconv.Itoa(parent) {
			children = append(children, pid)
		}
	}
	return children, nil
}

// log keeps what a server says.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *log) clear() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Reset()
}

func (l *log) tail() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.text.Bytes())
}

// follow reads until the server has ended, and says once whether it came up.
func (l *log) follow(r io.Reader, up chan<- bool) {
	lines := bufio.NewScanner(r)
	said := false
	for lines.Scan() {
		l.mu.Lock()
		l.text.Write(append(lines.Bytes(), '\n'))
		l.mu.Unlock()
		if !said && strings.Contains(lines.Text(), ready) {
			said = true
			up <- true
		}
	}
	if !said {
		up <- false
	}
}
