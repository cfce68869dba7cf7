package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/softhsm"
)

// site is a directory with everything that an operator sets up for "serve".
type site struct {
	dir    string
	config string // path
}

func (s *site) file(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(t testing.TB, name, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(s.file(name), []byte(text), 0o600))
}

// newSite makes everything but the token. extra is more of the configuration.
func newSite(t testing.TB, extra string) *site {
	t.Helper()
	dir := t.TempDir()
	s := &site{dir: dir, config: filepath.Join(dir, "keyferryd.yaml")}
	module, err := softhsm.FindModule()
	require.NoError(t, err)
	conf, err := softhsm.WriteConf(dir)
	require.NoError(t, err)
	s.write(t, "so-pin", rand.Text())
	s.write(t, "user-pin", rand.Text()+"\n")
	s.write(t, "secret", "a secret of the tests\n")
	s.write(t, "keyferryd.yaml", fmt.Sprintf(`# Of the tests.
listen: 127.0.0.1:0

access_keys:
  - id: tester
    secret_file: secret
token:   # the token
  module: %s
  label: site
  user_pin_file: user-pin
  environment:
    SOFTHSM2_CONF: %s

store:
  sqlite: keyferry.db # beside this file
%s`, module, conf, extra))
	return s
}

// keyferryd runs a command of the site to its end.
func (s *site) keyferryd(t testing.TB, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs strings.Builder
	cmd := keyferryd(t, append(args, "--config", s.config)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

func (s *site) init(t testing.TB, args ...string) string {
	t.Helper()
	stdout, stderr, err := s.keyferryd(t, append([]string{"init"}, args...)...)
	require.NoError(t, err, stderr)
	return stdout
}

// client of a site's server.
func (s *site) client(server *server, transport http.RoundTripper) *client {
	scheme, _, _ := strings.Cut(strings.TrimPrefix(server.ready, "keyferryd listening on "), "://")
	return &client{
		url:  scheme + "://" + server.endpoint + "/",
		cred: acs.Credential{AccessKeyID: "tester", Secret: acs.NewSecret([]byte("a secret of the tests"))},
		http: &http.Client{Transport: transport},
	}
}

func TestInitAndServe(t *testing.T) {
	t.Parallel()
	s := newSite(t, "")
	before, err := os.ReadFile(s.config)
	require.NoError(t, err)

	_, stderr, err := s.keyferryd(t, "serve")
	require.Error(t, err)
	require.Regexp(t, `\Akeyferryd: [^\n]*token\.pins[^\n]*run "keyferryd init"[^\n]*\n\z`, stderr)

	said := s.init(t, "--init-token", "--so-pin-file", s.file("so-pin"))
	require.Contains(t, said, `Initialised the token "site", serial `)
	require.Contains(t, said, "Back up the token now")
	require.Contains(t, said, "Made the database "+s.file("keyferry.db"))
	after, err := os.ReadFile(s.config)
	require.NoError(t, err)
	require.Equal(t, string(before), withoutPins(t, string(after)), "nothing else of the file has changed")

	// Again: nothing happens, with or without the officer.
	for _, args := range [][]string{{"--init-token", "--so-pin-file", s.file("so-pin")}, nil} {
		require.Contains(t, s.init(t, args...), "Nothing was changed")
		unchanged, err := os.ReadFile(s.config)
		require.NoError(t, err)
		require.Equal(t, string(after), string(unchanged))
	}
	// The pins can be had again from the token, and then need no officer.
	require.NoError(t, os.WriteFile(s.config, before, 0o600))
	require.Contains(t, s.init(t, "--print"), "pins:\n    serial: ")
	s.init(t)
	restored, err := os.ReadFile(s.config)
	require.NoError(t, err)
	require.Equal(t, string(after), string(restored))

	// The officer's PIN is not needed any more.
	require.NoError(t, os.Remove(s.file("so-pin")))
	server := startTestServer(t, s.dir, "serve", "--config", s.config)
	c := s.client(server, nil)
	customer := newCustomer(t, c)
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", customer.params(wrapped(t, byok.OAEPSHA1, customer.publicKey, customer.material)), nil))
	require.Equal(t, "Enabled", customer.state(t).KeyState)

	// What is not switched on is not offered.
	err = c.call(t.Context(), "GetParametersForImport", map[string]string{
		"KeyId": customer.keyID, "WrappingAlgorithm": byok.PKCS1v15, "WrappingKeySpec": "RSA_2048",
	}, nil)
	var refused *apiError
	require.ErrorAs(t, err, &refused)
	require.Equal(t, "InvalidParameter", refused.Code)

	// A second server on the database.
	_, stderr, err = s.keyferryd(t, "serve")
	require.Error(t, err)
	require.Regexp(t, `\Akeyferryd: [^\n]*in use already[^\n]*\n\z`, stderr)
	require.NoError(t, server.stop())

	// A database that is gone is not replaced by an empty one, unless init is
	// told to.
	require.NoError(t, os.Remove(s.file("keyferry.db")))
	_, stderr, err = s.keyferryd(t, "serve")
	require.Error(t, err)
	require.Regexp(t, `\Akeyferryd: there is no database at .*/keyferry\.db: restore it, or on a new server make it with "keyferryd init"\n\z`, stderr)
	require.NotContains(t, s.init(t, "--print"), "Made the database")
	require.NoFileExists(t, s.file("keyferry.db"))
	require.Contains(t, s.init(t), "It is empty: if there was one before, put that in its place.")
	require.FileExists(t, s.file("keyferry.db"))
}

// withoutPins takes the lines of token.pins out.
func withoutPins(t *testing.T, text string) string {
	var kept strings.Builder
	inside := false
	for line := range strings.Lines(text) {
		if inside = line == "  pins:\n" || inside && strings.HasPrefix(line, "    "); !inside {
			kept.WriteString(line)
		}
	}
	require.NotEqual(t, text, kept.String())
	return kept.String()
}

// What is wrong with a token is said in one line, with what to do.
func TestServeRefusesTheWrongToken(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	s := newSite(t, "")
	s.init(t, "--init-token", "--so-pin-file", s.file("so-pin"))
	s.write(t, "short", "fifteen letters\n")
	good, err := os.ReadFile(s.config)
	require.NoError(t, err)
	cfg, err := loadConfig(s.config)
	require.NoError(t, err)
	pins := cfg.Token.Pins
	for name, c := range map[string]struct{ old, new, says string }{
		"missing module": {cfg.Token.Module, "/nowhere/libsofthsm2.so", `no PKCS#11 module at /nowhere/libsofthsm2\.so: install it, or name the right file in token\.module`},
		"not a module":   {cfg.Token.Module, s.file("user-pin"), `check token\.module`},
		"other label":    {"label: site", "label: another", `no initialised token labelled "another".*restore its backup.*remove token\.pins$`},
		"other serial":   {pins.Serial, strings.Repeat("0", len(pins.Serial)), `serial.*not the pinned.*check that token\.module, token\.label and token\.pins`},
		"other vault":    {pins.VaultAES.String(), strings.Repeat("11", 32), `(?i)vault.*token\.pins`},
		"other MAC key":  {pins.MACKey.String(), strings.Repeat("11", 32), `\(MAC key\) is not on the token: restore the token's backup.*remove token\.pins and run "keyferryd init"$`},
		"short secret":   {"secret_file: secret", "secret_file: short", `the secret of access key tester can be guessed: put at least 16 random characters into .*/short`},
		"no PIN file":    {"user_pin_file: user-pin", "user_pin_file: gone", `gone: no such file`},
		"wrong PIN":      {"user_pin_file: user-pin", "user_pin_file: so-pin", `put the right PIN into .*so-pin \(it was tried once`},
	} {
		t.Run(name, func(t *testing.T) {
			require.Contains(t, string(good), c.old)
			s.write(t, "keyferryd.yaml", strings.Replace(string(good), c.old, c.new, 1))
			if name == "other label" { // nor does init say to run itself
				_, stderr, err := s.keyferryd(t, "init", "--init-token", "--so-pin-file", s.file("so-pin"))
				require.Error(t, err)
				require.Regexp(t, c.says, strings.TrimSuffix(stderr, "\n"))
			}
			_, stderr, err := s.keyferryd(t, "serve")
			require.Error(t, err)
			lines := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n")
			last := lines[len(lines)-1]
			require.Regexp(t, `^keyferryd: .*`+c.says, last)
			for _, line := range lines[:len(lines)-1] {
				require.Contains(t, line, "level=", "only the log stands above it")
			}
			for _, file := range []string{"so-pin", "user-pin", "short"} {
				pin, err := os.ReadFile(s.file(file))
				require.NoError(t, err)
				require.NotContains(t, stderr, strings.TrimSpace(string(pin)))
			}
		})
	}
}

// The ceremony refuses what can be guessed, and needs the officer for a vault.
func TestInitRefuses(t *testing.T) {
	t.Parallel()
	s := newSite(t, "")
	_, stderr, err := s.keyferryd(t, "init", "--init-token")
	require.Error(t, err)
	require.Contains(t, stderr, "name it with --so-pin-file")
	s.write(t, "short", "12345678")
	_, stderr, err = s.keyferryd(t, "init", "--init-token", "--so-pin-file", s.file("short"))
	require.Error(t, err)
	require.Contains(t, stderr, "can be guessed")
	require.NotContains(t, stderr, "12345678")
	_, stderr, err = s.keyferryd(t, "init")
	require.Error(t, err)
	require.Contains(t, stderr, "keyferryd init --init-token")

	// The officer's PIN by standard input, so that it never is on the disk.
	pin, err := os.ReadFile(s.file("so-pin"))
	require.NoError(t, err)
	cmd := keyferryd(t, "init", "--config", s.config, "--init-token", "--so-pin-file", "-")
	cmd.Stdin = strings.NewReader(string(pin) + "\n")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

func TestServeTLS(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	s := newSite(t, "tls:\n  cert_file: cert.pem\n  key_file: key.pem\n")
	cert := s.certificate(t)
	s.init(t, "--init-token", "--so-pin-file", s.file("so-pin"))
	text, err := os.ReadFile(s.config)
	require.NoError(t, err)
	port := freePort(t)
	s.write(t, "keyferryd.yaml", strings.Replace(string(text), "127.0.0.1:0", port, 1))
	server := startTestServer(t, s.dir, "serve", "--config", s.config)
	require.Equal(t, "keyferryd listening on https://"+port, server.ready)

	roots := x509.NewCertPool()
	roots.AddCert(cert)
	dial := func(config *tls.Config) error {
		config.RootCAs = roots
		conn, err := tls.Dial("tcp", port, config)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	require.NoError(t, dial(&tls.Config{MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12}))
	require.NoError(t, dial(&tls.Config{MinVersion: tls.VersionTLS13}))
	require.Error(t, dial(&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}))

	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	defer transport.CloseIdleConnections()
	newCustomer(t, s.client(server, transport))

	_, stderr, err := s.keyferryd(t, "health")
	require.NoError(t, err, stderr)
	s.certificate(t) // another one: whoever answers there is not us
	_, stderr, err = s.keyferryd(t, "health")
	require.Error(t, err)
	require.Contains(t, stderr, "another server's certificate")
	require.NoError(t, server.stop())
	_, stderr, err = s.keyferryd(t, "health")
	require.Error(t, err)
	require.Contains(t, stderr, "the server does not answer")
}

// certificate makes a certificate for loopback that signs itself.
func (s *site) certificate(t *testing.T) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	s.write(t, "cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	s.write(t, "key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})))
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return cert
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { require.NoError(t, l.Close()) }()
	return l.Addr().String()
}

type patient struct {
	err    error
	advice []string
}

func (p patient) Health(context.Context) error { return p.err }

func (p patient) Advice() []string { return p.advice }

func TestHealthSaysNoMoreThanItShould(t *testing.T) {
	sick := errors.New("the database at /var/lib/keyferry is locked")
	for name, c := range map[string]struct {
		patient
		status int
		body   string
	}{
		"well":             {patient{}, http.StatusOK, "ok\n"},
		"well, for now":    {patient{nil, []string{"Exercise."}}, http.StatusOK, "ok\nExercise.\n"},
		"sick":             {patient{sick, nil}, http.StatusServiceUnavailable, "unavailable\n"},
		"sick, until then": {patient{sick, []string{"Rest."}}, http.StatusServiceUnavailable, "unavailable\nRest.\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			healthHandler(c.patient, slog.New(slog.DiscardHandler)).ServeHTTP(w, httptest.NewRequest(http.MethodGet, healthPath, http.NoBody))
			require.Equal(t, c.status, w.Code)
			require.Equal(t, c.body, w.Body.String())
		})
	}
}

// A request that is under way when the server is told to stop gets its answer.
func TestShutdownWaitsForRequests(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		deadline, bounded := r.Context().Deadline()
		if !bounded || time.Until(deadline) > requestTimeout {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		stop()
		// The listener is closed once the shutdown has begun.
		for {
			conn, err := net.Dial("tcp", listener.Addr().String())
			if err != nil {
				break
			}
			_ = conn.Close()
		}
		_, _ = io.WriteString(w, "answered")
	})
	ended := make(chan error, 1)
	go func() { ended <- serveHTTP(ctx, listener, handler, slog.New(slog.DiscardHandler)) }()
	res, err := http.Get("http://" + listener.Addr().String())
	require.NoError(t, err)
	body, err := io.ReadAll(res.Body)
	require.NoError(t, errors.Join(err, res.Body.Close()))
	require.Equal(t, "answered", string(body))
	require.NoError(t, <-ended)
}

// Whatever is asked for, the answer is one that clients of the API read, and
// it sends nobody anywhere else.
func TestEveryAnswerIsTheAPIs(t *testing.T) {
	t.Parallel()
	s := sharedServer(t)
	for request, code := range map[string]string{
		"GET / HTTP/1.1":                        "IncompleteSignature",
		"POST //?KeyId=secret HTTP/1.1":         "InvalidAction.NotFound",
		"POST /./?KeyId=secret HTTP/1.1":        "InvalidAction.NotFound",
		"GET /healthz/ HTTP/1.1":                "InvalidAction.NotFound",
		"POST /healthz HTTP/1.1":                "InvalidAction.NotFound",
		"CONNECT kms.example:80 HTTP/1.1":       "UnsupportedHTTPMethod",
		"OPTIONS * HTTP/1.1":                    "UnsupportedHTTPMethod",
		"DELETE /?Format=XML HTTP/1.1":          "UnsupportedHTTPMethod",
		"GET http://elsewhere.example HTTP/1.1": "IncompleteSignature",
	} {
		t.Run(request, func(t *testing.T) {
			res, body := exchange(t, s.endpoint, request)
			require.Contains(t, string(body), code)
			require.GreaterOrEqual(t, res.StatusCode, 400)
			require.Regexp(t, `^(application/json|text/xml);charset=utf-8$`, res.Header.Get("Content-Type"))
			require.Empty(t, res.Header.Get("Location"))
			require.NotContains(t, string(body), "secret")
		})
	}
	res, body := exchange(t, s.endpoint, "GET /healthz HTTP/1.1")
	require.Equal(t, http.StatusOK, res.StatusCode)
	require.Equal(t, "ok\n", string(body))
}

// exchange sends a request line as it is, on a connection of its own.
func exchange(t *testing.T, endpoint, line string) (*http.Response, []byte) {
	t.Helper()
	conn, err := net.Dial("tcp", endpoint)
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close()) }()
	return ask(t, conn, line)
}

// ask sends a request line on a connection that is kept.
func ask(t *testing.T, conn net.Conn, line string) (*http.Response, []byte) {
	t.Helper()
	_, err := io.WriteString(conn, line+"\r\nHost: kms.example\r\nContent-Length: 0\r\n\r\n")
	require.NoError(t, err)
	return answerOn(t, conn)
}

func answerOn(t *testing.T, conn net.Conn) (*http.Response, []byte) {
	t.Helper()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	body, err := io.ReadAll(res.Body)
	require.NoError(t, errors.Join(err, res.Body.Close()))
	return res, body
}

// A connection beyond the bound waits until another one is closed.
func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	port, err := bind("127.0.0.1:0")
	require.NoError(t, err)
	listener, err := port.listen()
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serveHTTP(ctx, listener, http.NotFoundHandler(), slog.New(slog.DiscardHandler)) }()

	const request = "GET / HTTP/1.1"
	var open []net.Conn
	for range maxConnections {
		conn, err := net.Dial("tcp", listener.Addr().String())
		require.NoError(t, err)
		ask(t, conn, request) // now it is known to be one of those that are served
		open = append(open, conn)
	}
	more, err := net.Dial("tcp", listener.Addr().String())
	require.NoError(t, err)
	_, err = io.WriteString(more, request+"\r\nHost: kms.example\r\n\r\n")
	require.NoError(t, err)
	require.NoError(t, more.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
	_, err = more.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, more.SetReadDeadline(time.Time{}))
	require.NoError(t, open[0].Close())
	answerOn(t, more)
	for _, conn := range append(open[1:], more) {
		require.NoError(t, conn.Close())
	}
	stop()
	require.NoError(t, <-ended)
}
