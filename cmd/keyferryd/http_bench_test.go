package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/aliyun/alibaba-cloud-sdk-go/sdk/requests"
	v1 "github.com/aliyun/alibaba-cloud-sdk-go/services/kms"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/enginebench"
	"github.com/keyferry/keyferry/engine/kmsapi"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// The benchmarks of the server are of a process of its own, "keyferryd dev" as
// users run it, on the same processors as its clients. What a machine does
// besides hits the clock but not the processor time, so that is what the ratios
// are made of:
//
//   - all-cpu-µs: processor time of server and clients for one request.
//   - server-cpu-µs: of the server alone.
//   - at-most/s: what both processors could do in that time, were they free.

// benchServer is a keyferryd whose log goes to a file, as it would in service.
type benchServer struct {
	cmd         *exec.Cmd
	credentials credentials
	client      *client
}

// startBenchServer starts a server on a directory with so many pairs.
func startBenchServer(b testing.TB, dir string, pairs pairsConfig, metrics string) *benchServer {
	b.Helper()
	if _, err := os.Stat(filepath.Join(dir, devConfigFile)); err != nil {
		require.NoError(b, startDevServer(b, dir).stop())
	}
	usePairs(b, dir, pairs)
	configure(b, dir, func(cfg *config) { cfg.Metrics.Listen = metrics })
	return reopenBenchServer(b, dir)
}

func reopenBenchServer(b testing.TB, dir string) *benchServer {
	b.Helper()
	s := &benchServer{cmd: keyferryd(b, "dev", "--data", dir)}
	log, err := os.Create(filepath.Join(dir, "log"))
	require.NoError(b, err)
	defer func() { require.NoError(b, log.Close()) }() // the server has its own
	s.cmd.Stderr = log
	stdout, err := s.cmd.StdoutPipe()
	require.NoError(b, err)
	require.NoError(b, s.cmd.Start())
	b.Cleanup(func() {
		if s.cmd.ProcessState == nil {
			s.stop(b)
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		said, _ := os.ReadFile(log.Name())
		require.NoError(b, err, "%s (%v)", said, s.cmd.Wait())
	}
	require.Contains(b, line, "listening on")
	s.credentials = readCredentials(b, dir)
	s.client = clientOf(s.credentials)
	return s
}

func (s *benchServer) stop(b testing.TB) {
	b.Helper()
	require.NoError(b, s.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(b, s.cmd.Wait())
}

// processorTime is what the server has used. The kernel counts it in
// hundredths of a second.
func (s *benchServer) processorTime() time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * (time.Second / 100)
}

// use is what a number of requests took.
type use struct {
	n                    int
	wall, client, server time.Duration
	latencies            []time.Duration
}

// run has callers make steps for a while, one at least, and adds up what that
// took.
func (u *use) run(b testing.TB, s *benchServer, callers int, d time.Duration, step func(caller int) error) {
	b.Helper()
	var wg sync.WaitGroup
	errs, latencies := make([]error, callers), make([][]time.Duration, callers)
	client, server, start := enginebench.ProcessorTime(), s.processorTime(), time.Now()
	end := start.Add(d)
	for i := range callers {
		wg.Go(func() {
			for now := time.Now(); errs[i] == nil; {
				errs[i] = step(i)
				done := time.Now()
				latencies[i] = append(latencies[i], done.Sub(now))
				if now = done; !now.Before(end) {
					return
				}
			}
		})
	}
	wg.Wait()
	require.NoError(b, errors.Join(errs...))
	u.wall += time.Since(start)
	u.client += enginebench.ProcessorTime() - client
	u.server += s.processorTime() - server
	for _, l := range latencies {
		u.n += len(l)
		u.latencies = append(u.latencies, l...)
	}
}

func (u *use) perSecond() float64 { return float64(u.n) / u.wall.Seconds() }
func (u *use) serverCPU() float64 {
	return float64(u.server) / float64(time.Microsecond) / float64(u.n)
}

func (u *use) allCPU() float64 {
	return float64(u.server+u.client) / float64(time.Microsecond) / float64(u.n)
}

// percentile is in milliseconds.
func (u *use) percentile(p float64) float64 {
	slices.Sort(u.latencies)
	i := min(int(math.Ceil(float64(len(u.latencies))*p/100)), len(u.latencies)) - 1
	return float64(u.latencies[max(i, 0)]) / float64(time.Millisecond)
}

// processors are those that client and server have together.
const processors = 2

func (u *use) metrics() []enginebench.Metric {
	return []enginebench.Metric{
		{Name: "requests/s", Value: u.perSecond()},
		{Name: "at-most/s", Value: processors * 1e6 / u.allCPU()},
		{Name: "all-cpu-µs", Value: u.allCPU()},
		{Name: "server-cpu-µs", Value: u.serverCPU()},
		{Name: "p50-ms", Value: u.percentile(50)},
		{Name: "p99-ms", Value: u.percentile(99)},
	}
}

// leanConn is the least client that there can be: one connection, kept, and
// requests of which all but date, nonce and signature was made before.
type leanConn struct {
	conn  net.Conn
	in    *bufio.Reader
	cred  credentials
	nonce [16]byte
	count uint64
	out   []byte
}

func dialLean(b testing.TB, c credentials) (*leanConn, error) {
	b.Helper()
	conn, err := net.Dial("tcp", c.Endpoint)
	if err != nil {
		return nil, err
	}
	b.Cleanup(func() { _ = conn.Close() })
	l := &leanConn{conn: conn, in: bufio.NewReader(conn), cred: c}
	rand.Read(l.nonce[:8]) // never fails
	return l, nil
}

// leanRequest is an action and its parameters, as they are signed and sent.
type leanRequest struct{ action, query string }

func newLeanRequest(action string, params map[string]string) leanRequest {
	values := url.Values{}
	for name, value := range params {
		values.Set(name, value)
	}
	return leanRequest{action, strings.ReplaceAll(values.Encode(), "+", "%20")}
}

const (
	emptyHash   = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	leanHeaders = "host;x-acs-action;x-acs-content-sha256;x-acs-date;x-acs-signature-nonce;x-acs-version"
)

// do makes a request and drops the answer, unless that is an error.
func (l *leanConn) do(r leanRequest) error {
	l.count++
	for i := range 8 {
		l.nonce[8+i] = byte(l.count >> (8 * i))
	}
	nonce := hex.EncodeToString(l.nonce[:])
	date := time.Now().UTC().Format("2006-01-02T15:04:05Z")
	canonical := sha256.Sum256([]byte("POST\n/\n" + r.query + "\nhost:" + l.cred.Endpoint + "\nx-acs-action:" + r.action +
		"\nx-acs-content-sha256:" + emptyHash + "\nx-acs-date:" + date + "\nx-acs-signature-nonce:" + nonce +
		"\nx-acs-version:" + kmsapi.Version + "\n\n" + leanHeaders + "\n" + emptyHash))
	mac := hmac.New(sha256.New, []byte(l.cred.AccessKeySecret))
	mac.Write([]byte("ACS3-HMAC-SHA256\n" + hex.EncodeToString(canonical[:])))
	l.out = fmt.Appendf(l.out[:0], "POST /?%s HTTP/1.1\r\nHost: %s\r\nx-acs-action: %s\r\nx-acs-content-sha256: %s\r\nx-acs-date: %s\r\n"+
		"x-acs-signature-nonce: %s\r\nx-acs-version: %s\r\nAuthorization: ACS3-HMAC-SHA256 Credential=%s,SignedHeaders=%s,Signature=%x\r\n"+
		"Content-Length: 0\r\n\r\n",
		r.query, l.cred.Endpoint, r.action, emptyHash, date, nonce, kmsapi.Version, l.cred.AccessKeyID, leanHeaders, mac.Sum(nil))
	if _, err := l.conn.Write(l.out); err != nil {
		return err
	}
	return l.answer()
}

func (l *leanConn) answer() error {
	status, length := "", 0
	for {
		line, err := l.in.ReadSlice('\n')
		if err != nil {
			return err
		}
		switch text := bytes.TrimSpace(line); {
		case status == "":
			status = string(text)
		case len(text) == 0:
			if strings.HasPrefix(status, "HTTP/1.1 200 ") {
				_, err := l.in.Discard(length)
				return err
			}
			body := make([]byte, length)
			_, err := io.ReadFull(l.in, body)
			return errors.Join(err, fmt.Errorf("%s: %s", status, body))
		default:
			if value, ok := bytes.CutPrefix(bytes.ToLower(text), []byte("content-length: ")); ok {
				if length, err = strconv.Atoi(string(value)); err != nil {
					return err
				}
			}
		}
	}
}

// wireKeys are CMKs of a server, with material, and requests for each.
type wireKeys struct {
	ids              []string
	imports, encrypt []leanRequest
}

// benchKeys is how many CMKs the benchmarks go over.
const benchKeys = 1000

// plaintextOf is 64 bytes, as the API takes them.
var plaintextOf = base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("keyferry"), 8))

// newWireKeys makes CMKs and imports material into each, as customers do.
func newWireKeys(b testing.TB, s *benchServer, n int) *wireKeys {
	b.Helper()
	ctx := context.Background()
	k := &wireKeys{ids: make([]string, n), imports: make([]leanRequest, n), encrypt: make([]leanRequest, n)}
	material := randomMaterial(32)
	var wrappings sync.Map // by public key
	work := make(chan int)
	errs := make([]error, 16)
	var wg sync.WaitGroup
	for w := range errs {
		wg.Go(func() {
			for i := range work {
				if errs[w] != nil {
					continue
				}
				var params map[string]string
				if params, errs[w] = importKey(ctx, s.client, material, &wrappings); errs[w] == nil {
					k.ids[i] = params["KeyId"]
					k.imports[i] = newLeanRequest("ImportKeyMaterial", params)
					k.encrypt[i] = newLeanRequest("Encrypt", map[string]string{"KeyId": k.ids[i], "Plaintext": plaintextOf})
				}
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
	require.NoError(b, errors.Join(errs...))
	return k
}

// importKey makes a CMK, imports material into it and returns the parameters of
// that. Wrapped material is kept by its public key, for the next CMK.
func importKey(ctx context.Context, c *client, material []byte, wrappings *sync.Map) (params map[string]string, err error) {
	var key struct{ KeyMetadata keyState }
	if err := c.call(ctx, "CreateKey", map[string]string{"Origin": "EXTERNAL", "KeySpec": byok.AES256}, &key); err != nil {
		return nil, err
	}
	id := key.KeyMetadata.KeyID
	var p struct{ PublicKey, ImportToken string }
	if err := c.call(ctx, "GetParametersForImport", map[string]string{
		"KeyId": id, "WrappingAlgorithm": byok.OAEPSHA1, "WrappingKeySpec": "RSA_2048",
	}, &p); err != nil {
		return nil, err
	}
	wrapped, ok := wrappings.Load(p.PublicKey)
	if !ok {
		spki, err := base64.StdEncoding.DecodeString(p.PublicKey)
		if err != nil {
			return nil, err
		}
		blob, err := byok.Wrap(byok.OAEPSHA1, spki, material)
		if err != nil {
			return nil, err
		}
		wrapped, _ = wrappings.LoadOrStore(p.PublicKey, base64.StdEncoding.EncodeToString(blob))
	}
	params = map[string]string{"KeyId": id, "EncryptedKeyMaterial": wrapped.(string), "ImportToken": p.ImportToken}
	return params, c.call(ctx, "ImportKeyMaterial", params, nil)
}

// over is a step for each caller, who goes over requests of his own.
func over(b testing.TB, s *benchServer, callers int, requests []leanRequest) func(caller int) error {
	b.Helper()
	conns, next := make([]*leanConn, callers), make([]int, callers)
	for i := range next {
		next[i] = i
	}
	return func(caller int) (err error) {
		if conns[caller] == nil { // not before: the server closes a connection that asks for nothing
			if conns[caller], err = dialLean(b, s.credentials); err != nil {
				return err
			}
		}
		i := next[caller]
		if next[caller] += callers; next[caller] >= len(requests) {
			next[caller] = caller
		}
		return conns[caller].do(requests[i])
	}
}

// fewPairs are enough to share.
var fewPairs = pairsConfig{Specs: []hsm.PairSpec{hsm.RSA2048}, Ready: 1, Outstanding: 4}

// benchSlice is one turn of one load.
const benchSlice = 500 * time.Millisecond

// BenchmarkServer compares imports through signed HTTP with the bare loop of
// C_UnwrapKey and with the engine in process, in turns, and shows what the other
// requests take.
func BenchmarkServer(b *testing.B) {
	const callers = 32
	ctx := b.Context()
	s := startBenchServer(b, b.TempDir(), fewPairs, "")
	keys := newWireKeys(b, s, benchKeys)
	encrypting := over(b, s, callers, keys.encrypt)
	var tables []*enginebench.Table
	b.Cleanup(func() {
		for _, t := range tables {
			require.NoError(b, t.Write(os.Stdout))
		}
	})

	b.Run("import/32", func(b *testing.B) {
		db, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(b.TempDir(), "keyferry.db")})
		require.NoError(b, err)
		defer func() { require.NoError(b, db.Close()) }()
		bench, err := enginebench.New(ctx, enginebench.Config{Token: softhsm.New(b, softhsm.WithKeys()).Open(b), Store: db})
		require.NoError(b, err)
		defer func() { require.NoError(b, bench.Close()) }()
		inProcess, err := bench.Import(ctx, bench.Offers()[0], callers)
		require.NoError(b, err)
		importing := over(b, s, callers, keys.imports)
		u := &use{}
		for b.Loop() {
			require.NoError(b, inProcess.Round(ctx))
			u.run(b, s, callers, benchSlice, importing)
		}
		row := inProcess.Row()
		bare, ours := row.Value("bare-cpu-µs"), row.Value("ours-cpu-µs")
		r := enginebench.Row{Name: "signed HTTP, lean client", Callers: callers, Metrics: append([]enginebench.Metric{
			{Name: "bare/s", Value: row.Value("bare/s")},
			{Name: "in-process/s", Value: row.Value("ours/s")},
			{Name: "bare-cpu-µs", Value: bare},
			{Name: "in-process-cpu-µs", Value: ours},
			{Name: "http/bare", Value: u.perSecond() / row.Value("bare/s")},
			{Name: "http/bare-by-cpu", Value: bare / u.allCPU()},
			{Name: "server/in-process-by-cpu", Value: ours / u.serverCPU()},
		}, u.metrics()...)}
		require.NoError(b, inProcess.Close())
		r.Report(b)
		tables = append(tables, &enginebench.Table{Title: "Import, durable", Rows: []enginebench.Row{r}})
	})

	table := &enginebench.Table{Title: "Requests over 1,000 CMKs"}
	tables = append(tables, table)
	measure := func(name string, callers int, step func(caller int) error) {
		b.Run(strings.ReplaceAll(name, " ", "-")+"/"+strconv.Itoa(callers), func(b *testing.B) {
			u := &use{}
			for u.n < 4*benchKeys { // until all are open, and their uses are reserved
				u.run(b, s, callers, benchSlice, step)
			}
			u = &use{}
			for b.Loop() {
				u.run(b, s, callers, benchSlice, step)
			}
			r := enginebench.Row{Name: name, Callers: callers, Metrics: u.metrics()}
			r.Report(b)
			table.Rows = append(table.Rows, r)
		})
	}
	measure("encrypt 64 bytes, lean client", callers, encrypting)
	measure("encrypt 64 bytes, v1 SDK", callers, encryptByV1(b, s, callers, keys.ids))
	describe := make([]leanRequest, len(keys.ids))
	for i, id := range keys.ids {
		describe[i] = newLeanRequest("DescribeKey", map[string]string{"KeyId": id})
	}
	measure("describe, lean client", callers, over(b, s, callers, describe))
	measure("parameters, shared pair, lean client", parameterCallers, over(b, s, parameterCallers, keys.parameters()))
	s.stop(b)

	b.Run("parameters,-fresh-pairs/1", func(b *testing.B) {
		const fresh = 24
		metrics := freePort(b)
		s := startBenchServer(b, b.TempDir(), pairsConfig{Specs: fewPairs.Specs, Ready: fresh, Outstanding: 2 * fresh}, metrics)
		asking := over(b, s, 1, newWireKeys(b, s, 1).parameters()) // which takes one pair
		require.Eventually(b, func() bool {
			status, text := get(b, "http://"+metrics+metricsPath)
			return status == http.StatusOK && strings.Contains(text, `state="ready"} `+strconv.Itoa(fresh))
		}, time.Minute, 100*time.Millisecond)
		u := &use{}
		for range fresh {
			u.run(b, s, 1, 0, asking) // once
		}
		for b.Loop() { // more would wait for pairs
		}
		r := enginebench.Row{Name: "parameters, fresh pairs, lean client", Callers: 1, Metrics: u.metrics()}
		r.Report(b)
		table.Rows = append(table.Rows, r)
	})
}

// parameterCallers are fewer, as it is the time of an answer that counts.
const parameterCallers = 8

// parameters are requests of parameters for import.
func (k *wireKeys) parameters() (requests []leanRequest) {
	for _, id := range k.ids {
		requests = append(requests, newLeanRequest("GetParametersForImport", map[string]string{
			"KeyId": id, "WrappingAlgorithm": byok.OAEPSHA1, "WrappingKeySpec": "RSA_2048",
		}))
	}
	return requests
}

// encryptByV1 is a step of Alibaba's v1 SDK, one client for each caller.
func encryptByV1(b testing.TB, s *benchServer, callers int, ids []string) func(caller int) error {
	b.Helper()
	clients, next := make([]*v1.Client, callers), make([]int, callers)
	for i := range clients {
		c, err := v1.NewClientWithAccessKey(s.credentials.Region, s.credentials.AccessKeyID, s.credentials.AccessKeySecret)
		require.NoError(b, err)
		clients[i], next[i] = c, i
	}
	return func(caller int) error {
		r := v1.CreateEncryptRequest()
		v1SDK{endpoint: s.credentials.Endpoint, method: requests.POST, format: "JSON"}.to(r.RpcRequest)
		r.KeyId, r.Plaintext = ids[next[caller]], plaintextOf
		next[caller] = (next[caller] + callers) % len(ids)
		_, err := clients[caller].Encrypt(r)
		return err
	}
}
