package main

import (
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/softhsm"
)

// tappedServer is a keyferryd all of whose output is kept, and can be read
// while it runs.
type tappedServer struct {
	cmd      *exec.Cmd
	endpoint string
	out      output
}

// output is a buffer that others read while a process writes to it.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// startTapped starts "serve" and waits until it is ready. It is killed at the
// end of the test unless it has ended by then.
func startTapped(t testing.TB, config string, env ...string) *tappedServer {
	t.Helper()
	s := &tappedServer{cmd: keyferryd(t, "serve", "--config", config)}
	s.cmd.Env = append(os.Environ(), env...)
	s.cmd.Stdout, s.cmd.Stderr = &s.out, &s.out
	require.NoError(t, s.cmd.Start())
	t.Cleanup(func() {
		if s.cmd.ProcessState == nil {
			_ = s.cmd.Process.Kill()
			_ = s.cmd.Wait()
		}
		if t.Failed() {
			t.Logf("the output of the server:\n%s", s.out.String())
		}
	})
	s.endpoint = s.says(t, `keyferryd listening on \w+://(\S+)\n`)
	return s
}

// says waits until the server has written something, and returns a part of it.
func (s *tappedServer) says(t testing.TB, pattern string) (part string) {
	t.Helper()
	require.Eventually(t, func() bool {
		if found := regexp.MustCompile(pattern).FindStringSubmatch(s.out.String()); found != nil {
			part = found[1]
		}
		return part != ""
	}, time.Minute, 5*time.Millisecond, pattern)
	return part
}

// metricsOn is configuration.
const metricsOn = "metrics: {listen: \"127.0.0.1:0\"}\n"

// scrape reads the metrics.
func (s *tappedServer) scrape(t testing.TB) string {
	t.Helper()
	status, text := get(t, s.says(t, `msg="serving metrics" url=(\S+)`))
	require.Equal(t, http.StatusOK, status, text)
	return text
}

func get(t testing.TB, url string) (status int, text string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	require.NoError(t, err)
	res, err := http.DefaultTransport.RoundTrip(req)
	require.NoError(t, err)
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	return res.StatusCode, string(body)
}

// value reads one metric; 0 if it is not there.
func value(t testing.TB, text, name string) float64 {
	t.Helper()
	found := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindStringSubmatch(text)
	if found == nil {
		return 0
	}
	v, err := strconv.ParseFloat(found[1], 64)
	require.NoError(t, err)
	return v
}

// What a server does can be counted, on a port of its own, and what is counted
// names nobody.
func TestMetrics(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	s := newSite(t, metricsOn+"wrapping_pairs: {ready: 1, outstanding: 1}\n")
	s.init(t, "--init-token", "--so-pin-file", s.file("so-pin"))
	server := startTapped(t, s.config)
	c := newCustomer(t, &client{
		url:  "http://" + server.endpoint + "/",
		cred: acs.Credential{AccessKeyID: "tester", Secret: acs.NewSecret([]byte("a secret of the tests"))},
		http: &http.Client{},
	})
	good := wrapped(t, byok.OAEPSHA1, c.publicKey, c.material)
	expectCode(t, "InvalidKeyMaterial", c.call(t.Context(), "ImportKeyMaterial", c.params("AAAA"), nil))
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", c.params(good), nil))
	for range 3 {
		require.NoError(t, c.call(t.Context(), "Encrypt", map[string]string{"KeyId": c.keyID, "Plaintext": "YQ=="}, nil))
	}
	expectCode(t, "InvalidAction.NotFound", c.call(t.Context(), "MadeUp"+c.keyID, nil, nil))

	var text string
	require.Eventually(t, func() bool {
		text = server.scrape(t)
		return value(t, text, `keyferry_last_good_sweep_timestamp_seconds`) > 0 &&
			value(t, text, `keyferry_sweeps_total{result="done"}`) > 0 &&
			value(t, text, `keyferry_pairs{algorithm="RSAES_OAEP_SHA_1",spec="RSA_2048",state="ready"}`) == 1
	}, time.Minute, 100*time.Millisecond)
	for name, want := range map[string]float64{
		`keyferry_imports_total{algorithm="RSAES_OAEP_SHA_1",result="imported"}`:               1,
		`keyferry_imports_total{algorithm="RSAES_OAEP_SHA_1",result="refused"}`:                1,
		`keyferry_request_seconds_count{action="ImportKeyMaterial",code="OK"}`:                 1,
		`keyferry_request_seconds_count{action="ImportKeyMaterial",code="InvalidKeyMaterial"}`: 1,
		`keyferry_request_seconds_count{action="",code="InvalidAction.NotFound"}`:              1,
		`keyferry_key_uses_total{cache="miss"}`:                                                1,
		`keyferry_key_uses_total{cache="hit"}`:                                                 2,
		`keyferry_open_keys`:                                                                   1,
		`keyferry_due_keys`:                                                                    0,
		`keyferry_pairs{algorithm="RSAES_OAEP_SHA_1",spec="RSA_2048",state="outstanding"}`:     1,
		`keyferry_token_up`:                                 1,
		`keyferry_token_sessions{state="most"}`:             32,
		`keyferry_token_lost_total`:                         0,
		`keyferry_store_seconds_count{call="CountFailure"}`: 1,
		`keyferry_store_failures_total{call="AddNonce"}`:    0,
	} {
		require.InDelta(t, want, value(t, text, name), 0, name)
	}
	require.Less(t, value(t, text, `keyferry_request_seconds_bucket{action="ImportKeyMaterial",code="InvalidKeyMaterial",le="0.05"}`), 1.0, "refusals take a tenth of a second")
	for _, name := range []string{c.keyID, "tester", "MadeUp", s.dir} {
		require.NotContains(t, text, name)
	}

	expire := strconv.FormatInt(time.Now().Unix()+2, 10)
	params := c.params(good)
	params["KeyMaterialExpireUnix"] = expire
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", params, nil))
	require.InDelta(t, 1, value(t, server.scrape(t), `keyferry_due_keys`), 1)
	require.Eventually(t, func() bool {
		return value(t, server.scrape(t), `keyferry_swept_total{what="key"}`) == 1
	}, time.Minute, 100*time.Millisecond)

	// Not where customers are.
	status, text := get(t, "http://"+server.endpoint+metricsPath)
	require.NotEqual(t, http.StatusOK, status)
	require.NotContains(t, text, "keyferry_")
	require.NoError(t, server.cmd.Process.Signal(os.Interrupt))
	require.NoError(t, server.cmd.Wait())
	require.NotContains(t, server.out.String(), "did not end well")
}
