package main

import (
	"crypto/rand"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// ward is a service in this process, where faults can be injected into its
// token.
type ward struct {
	*service
	cfg      config
	tap      *hsmtest.Tap
	endpoint string
}

// newWard starts a service whose requests have so much time.
func newWard(t *testing.T, requests time.Duration, settings ...func(*config)) *ward {
	t.Helper()
	on := softhsm.New(t, softhsm.WithKeys())
	secret := filepath.Join(on.Dir, "secret")
	require.NoError(t, os.WriteFile(secret, []byte("a secret of the tests"), 0o600))
	w := &ward{tap: hsmtest.On(t, on.Module), cfg: config{
		AccessKeys: []accessKey{{ID: "tester", SecretFile: secret}},
		Token:      tokenConfig{Module: on.Module, Label: on.Label, UserPINFile: on.UserPINFile, Pins: pinsOf(on.Pins)},
		Store:      storeConfig{SQLite: filepath.Join(on.Dir, "keyferry.db")},
		Pairs:      pairsConfig{Specs: []hsm.PairSpec{hsm.RSA2048}, Ready: 1, Outstanding: 1},
	}}
	for _, set := range settings {
		set(&w.cfg)
	}
	var err error
	w.service, err = openService(t.Context(), &w.cfg, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, w.close()) })
	require.Eventually(t, func() bool { // pairs, whose making takes longer than requests may
		stats, err := w.engine.Stats(t.Context())
		require.NoError(t, err)
		return len(stats.Pairs) == len(stats.Offers)
	}, time.Minute, time.Millisecond)
	server := httptest.NewServer(withTimeout(w.handler, requests))
	t.Cleanup(server.Close)
	w.endpoint = server.Listener.Addr().String()
	return w
}

func (w *ward) client() *client {
	return clientOf(credentials{Endpoint: w.endpoint, AccessKeyID: "tester", AccessKeySecret: "a secret of the tests"})
}

// While every session of the token is busy a caller gets an answer at the
// deadline, and it says to come back.
func TestFullSessionPool(t *testing.T) {
	softhsm.Once(t)
	const deadline = 300 * time.Millisecond
	w := newWard(t, deadline, func(c *config) { c.Token.Sessions = 2 })
	c := newCustomer(t, w.client())
	imports := func() error {
		return c.call(t.Context(), "ImportKeyMaterial", c.params(wrapped(t, byok.OAEPSHA1, c.publicKey, c.material)), nil)
	}
	require.NoError(t, imports())
	encrypts := func() error {
		return c.call(t.Context(), "Encrypt", map[string]string{"KeyId": c.keyID, "Plaintext": "aGVsbG8="}, nil)
	}
	require.NoError(t, encrypts())

	busy, free := make(chan struct{}, 100), make(chan struct{})
	w.tap.Hold("C_EncryptInit", func() { busy <- struct{}{}; <-free })
	release := sync.OnceFunc(func() { w.tap.Hold("C_EncryptInit", func() {}); close(free) })
	defer release()
	for range w.cfg.Token.Sessions {
		go func() { _ = encrypts() }()
	}
	for range w.cfg.Token.Sessions {
		<-busy
	}
	for name, call := range map[string]func() error{"encrypt": encrypts, "import": imports} {
		start := time.Now()
		var answer *apiError
		require.ErrorAs(t, call(), &answer, name)
		require.Equal(t, "ServiceUnavailableTemporary", answer.Code, name)
		took := time.Since(start)
		require.GreaterOrEqual(t, took, deadline, name)
		require.Less(t, took, 20*deadline, name)
	}
	head, _ := post(t, w.endpoint, c.rpcQuery(t, "Encrypt", map[string]string{"KeyId": c.keyID, "Plaintext": "aGVsbG8="}))
	require.Contains(t, head, "503 Service Unavailable")
	release()
	require.Eventually(t, func() bool { return encrypts() == nil && imports() == nil }, time.Minute, 10*time.Millisecond)
}

// A token that came back and refused the PIN is not tried again, and whoever
// asks for the server's health reads that a person must act.
func TestHealthOfARefusedPIN(t *testing.T) {
	softhsm.Once(t)
	const deviceRemoved = 0x32
	w := newWard(t, time.Second, func(c *config) { c.Metrics.Listen = "127.0.0.1:0" })
	status, body := get(t, "http://"+w.endpoint+healthPath)
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "ok\n", body)

	require.NoError(t, os.WriteFile(w.cfg.Token.UserPINFile, []byte(rand.Text()), 0o600))
	for _, call := range []string{"C_GenerateRandom", "C_SignInit"} { // sessions still end, and with them the login
		w.tap.Inject(hsmtest.Fault{Call: call, RV: deviceRemoved, Times: -1})
	}
	status, _ = get(t, "http://"+w.endpoint+healthPath)
	require.Equal(t, http.StatusServiceUnavailable, status)
	w.tap.Heal()
	require.Eventually(t, func() bool { return w.token.Stats().Refused != nil }, time.Minute, time.Millisecond)
	require.ErrorIs(t, w.token.Stats().Refused, hsm.ErrPIN)
	logins := w.tap.Calls()["C_Login"]
	status, body = get(t, "http://"+w.endpoint+healthPath)
	require.Equal(t, http.StatusServiceUnavailable, status)
	require.Contains(t, body, "The token refused the user PIN. It is not tried again")

	asked := w.cfg
	asked.Listen = w.endpoint
	var said strings.Builder
	require.ErrorContains(t, askHealth(t.Context(), &asked, &said), "status 503")
	require.Contains(t, said.String(), "put the PIN right, then restart the server")
	var metric float64
	families, err := w.metrics.registry.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == "keyferry_token_refused" {
			metric = f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	require.InDelta(t, 1, metric, 0)
	require.Equal(t, logins, w.tap.Calls()["C_Login"], "the PIN is not tried again")

	// One that init would not have taken costs no try.
	require.NoError(t, os.WriteFile(w.cfg.Token.UserPINFile, []byte("1234"), 0o600))
	_, err = openToken(t.Context(), &w.cfg, slog.New(slog.DiscardHandler))
	require.ErrorIs(t, err, hsm.ErrShortPIN)
	require.ErrorContains(t, err, "(the token was not shown what is there)")
	require.Equal(t, logins, w.tap.Calls()["C_Login"])
}
