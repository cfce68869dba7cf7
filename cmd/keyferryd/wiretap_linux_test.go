package main

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm4"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/softhsm"
)

// The kinds of secrets, and where each belongs. Anywhere else it must not be.
const (
	material     kind = "key material"
	hashKey      kind = "hash key of GCM" // of which the check value is a part
	tokenKey     kind = "key of the token"
	pin          kind = "PIN"
	accessSecret kind = "secret of an access key"
	plaintext    kind = "plaintext" // of customers, and data keys
)

// The places that are searched.
const (
	inTrace    = "trace of PKCS#11"
	inLog      = "output of the server"
	inDatabase = "database"
	inToken    = "files of the token"
	inFiles    = "other files"
	inAnswers  = "answers over HTTP"
	inMetrics  = "metrics"
	inHelp     = "help of the commands"
	inMemory   = "memory of Go"

	// inC is where the library of a software token has its keys, in the clear
	// while it uses them. What is there is told, and belongs there.
	inC = "memory of C"
)

var places = []string{inTrace, inLog, inDatabase, inToken, inFiles, inAnswers, inMetrics, inHelp, inMemory}

var belongs = map[kind][]string{
	hashKey:      {inTrace}, // the block behind the check value, as the token answers it
	accessSecret: {inMemory},
	plaintext:    {inTrace, inAnswers, inMemory}, // the token encrypts and decrypts them
}

// wiretap is a site whose server reaches its token through pkcs11-spy, and all
// that can be seen of it.
type wiretap struct {
	*site
	module string // behind the spy
	server *tappedServer

	mu      sync.Mutex
	seen    map[string]*bytes.Buffer
	secrets []*secret
}

func (w *wiretap) see(place string, content []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen[place].Write(content)
	w.seen[place].WriteByte('\n')
}

func (w *wiretap) keep(k kind, name string, value []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.secrets = append(w.secrets, &secret{k, name, value})
}

// findSpy finds pkcs11-spy of OpenSC; softhsm/deps.sh has the same list.
func findSpy(t testing.TB) string {
	t.Helper()
	for _, pattern := range []string{
		"../../build/deps/usr/lib/*-linux-gnu*/pkcs11-spy.so",
		"/usr/lib/*-linux-gnu*/pkcs11-spy.so",
		"/usr/lib64/pkcs11-spy.so",
		"/usr/lib64/pkcs11/pkcs11-spy.so",
		"/usr/lib/pkcs11-spy.so",
		"/usr/lib/pkcs11/pkcs11-spy.so",
	} {
		if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
			path, err := filepath.Abs(found[0])
			require.NoError(t, err)
			return path
		}
	}
	t.Fatal(`pkcs11-spy.so is missing: run "make deps"`)
	return ""
}

func newWiretap(t testing.TB, module string) *wiretap {
	t.Helper()
	w := &wiretap{module: module, seen: map[string]*bytes.Buffer{}}
	w.site = newSite(t, metricsOn+"log: {level: debug}\nwrapping_pairs: {ready: 1}\n")
	for _, place := range append(places, inC) {
		w.seen[place] = &bytes.Buffer{}
	}
	text, err := os.ReadFile(w.config)
	require.NoError(t, err)
	found, err := softhsm.FindModule()
	require.NoError(t, err)
	text = bytes.Replace(text, []byte("module: "+found), []byte("module: "+findSpy(t)+"\n  allow_pkcs1_v15: true"), 1)
	text = bytes.Replace(text, []byte("  environment:\n"),
		fmt.Appendf(nil, "  environment:\n    PKCS11SPY: %s\n    PKCS11SPY_OUTPUT: %s\n", module, w.file("trace")), 1)
	w.write(t, "keyferryd.yaml", string(text))
	w.write(t, "secret", rand.Text()+"\n")
	for file, k := range map[string]kind{"so-pin": pin, "user-pin": pin, "secret": accessSecret} {
		w.keep(k, file, w.read(t, file))
	}
	return w
}

func (w *wiretap) read(t testing.TB, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(w.file(file))
	require.NoError(t, err)
	return trimLineEnd(text)
}

// start starts the server. Its garbage collector is off, so that nothing that
// Go ever had in memory is overwritten by anything but the server's own wiping.
// Its scheduler sends no signals: where one interrupts a software token at work,
// the kernel saves the registers, with what is in them, on a stack of Go.
func (w *wiretap) start(t testing.TB) {
	t.Helper()
	w.server = startTapped(t, w.config, "GOGC=off", "GODEBUG=asyncpreemptoff=1")
}

// end ends the server by a signal and keeps what was seen of it.
func (w *wiretap) end(t testing.TB, signal syscall.Signal) {
	t.Helper()
	w.see(inMetrics, []byte(w.server.scrape(t)))
	w.snapshot(t)
	require.NoError(t, w.server.cmd.Process.Signal(signal))
	err := w.server.cmd.Wait()
	require.Equal(t, signal == syscall.SIGTERM, err == nil, "%v", err)
	w.see(inLog, []byte(w.server.out.String()))
}

// snapshot takes what the server holds at this moment, in memory and on disk.
func (w *wiretap) snapshot(t testing.TB) {
	t.Helper()
	m := memoryOf(t, w.server.cmd.Process.Pid)
	for _, s := range m.golang {
		w.see(inMemory, s.content)
	}
	for _, s := range m.c {
		w.see(inC, s.content)
	}
	w.snapshotFiles(t)
}

func (w *wiretap) snapshotFiles(t testing.TB) {
	t.Helper()
	own := []string{"so-pin", "user-pin", "secret", "trace"}
	require.NoError(t, filepath.WalkDir(w.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name, _ := filepath.Rel(w.dir, path)
		if slices.Contains(own, name) {
			return nil
		}
		content, err := os.ReadFile(path)
		switch {
		case strings.HasPrefix(name, "keyferry.db"):
			w.see(inDatabase, content)
		case strings.HasPrefix(name, "tokens"):
			w.see(inToken, content)
		default:
			w.see(inFiles, content)
		}
		return err
	}))
}

// RoundTrip sends a request and keeps the whole answer.
func (w *wiretap) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(res.Body)
	if err = errors.Join(err, res.Body.Close()); err != nil {
		return nil, err
	}
	var all bytes.Buffer
	res.Body = io.NopCloser(bytes.NewReader(body))
	if err := res.Write(&all); err != nil {
		return nil, err
	}
	w.see(inAnswers, all.Bytes())
	// What clients decode of an answer is in it as well.
	for _, text := range regexp.MustCompile(`"(?:Plaintext|CiphertextBlob)":"([^"]*)"`).FindAllSubmatch(body, -1) {
		decoded, err := base64.StdEncoding.DecodeString(string(text[1]))
		if err != nil {
			return nil, err
		}
		w.see(inAnswers, decoded)
	}
	res.Body = io.NopCloser(bytes.NewReader(body))
	return res, nil
}

func (w *wiretap) client(t testing.TB) *client {
	t.Helper()
	return &client{
		url:  "http://" + w.server.endpoint + "/",
		cred: acs.Credential{AccessKeyID: "tester", Secret: acs.NewSecret(w.read(t, "secret"))},
		http: &http.Client{Transport: w},
	}
}

// owner is a customer in the wiretap, and what they have encrypted.
type owner struct {
	*customer
	voyage
	id         string // what the material is, in hexadecimal
	plaintext  string
	ciphertext string
}

// newOwner makes a customer of a voyage, or answers nil where the token does
// not go there.
func (w *wiretap) newOwner(t *testing.T, v voyage) *owner {
	t.Helper()
	c := w.client(t)
	var key struct{ KeyMetadata keyState }
	require.NoError(t, c.call(t.Context(), "CreateKey", map[string]string{"Origin": "EXTERNAL", "KeySpec": v.keySpec, "Description": "by " + v.algorithm}, &key))
	o := &owner{customer: &customer{client: c, keyID: key.KeyMetadata.KeyID, material: randomMaterial(byok.MaterialLen(v.keySpec))}, voyage: v}
	if !o.ask(t, v.algorithm) {
		return nil
	}
	name := v.keySpec + " by " + v.algorithm
	w.keep(material, "material of "+name, o.material)
	w.keep(hashKey, "hash key of "+name, zeroBlockOf(t, v.keySpec, o.material))
	id, err := byok.MaterialID(o.keyID, o.material)
	require.NoError(t, err)
	o.id = hex.EncodeToString(id[:])
	return o
}

// zeroBlockOf is a zero block under a key, whose first three bytes are the
// check value.
func zeroBlockOf(t *testing.T, spec string, key []byte) []byte {
	t.Helper()
	newCipher := aes.NewCipher
	if spec == byok.SM4 {
		newCipher = sm4.NewCipher
	}
	var block cipher.Block
	block, err := newCipher(key)
	require.NoError(t, err)
	out := make([]byte, block.BlockSize())
	block.Encrypt(out, out)
	return out
}

// importMaterial imports some material, which everybody may expect to be the
// owner's.
func (o *owner) importMaterial(t *testing.T, wrapped string, more ...string) error {
	t.Helper()
	params := o.params(wrapped)
	params["ExpectKeyMaterialId"] = o.id
	for i := 0; i < len(more); i += 2 {
		params[more[i]] = more[i+1]
	}
	return o.call(t.Context(), "ImportKeyMaterial", params, nil)
}

// live is the life of a key until it is in use, with everything that may go
// wrong on the way. It is done by whoever has a voyage on this token.
func (w *wiretap) live(t *testing.T, o *owner) {
	ctx := t.Context()
	good := wrapped(t, o.algorithm, o.publicKey, o.material)
	other := randomMaterial(len(o.material))
	w.keep(material, "other material of "+o.keySpec+" by "+o.algorithm, other)
	tampered, err := base64.StdEncoding.DecodeString(good)
	require.NoError(t, err)
	tampered[len(tampered)-1] ^= 1
	bad := map[string]string{
		"tampered": base64.StdEncoding.EncodeToString(tampered),
		"short":    wrapped(t, o.algorithm, o.publicKey, o.material[1:]),
		"long":     wrapped(t, o.algorithm, o.publicKey, slices.Concat(o.material, []byte{1})),
		"other":    wrapped(t, o.algorithm, o.publicKey, other),
	}
	for _, blob := range bad {
		expectCode(t, "InvalidKeyMaterial", o.importMaterial(t, blob))
	}
	expectCode(t, "InvalidImportToken", o.importMaterial(t, good, "ImportToken", base64.StdEncoding.EncodeToString([]byte(o.token))))
	require.NoError(t, o.importMaterial(t, good))
	for _, blob := range bad {
		expectCode(t, "InvalidKeyMaterial", o.importMaterial(t, blob))
	}
	o.plaintext = base64.StdEncoding.EncodeToString(randomMaterial(40))
	use := map[string]string{"KeyId": o.keyID, "Plaintext": o.plaintext}
	var out struct{ CiphertextBlob, Plaintext string }
	err = o.call(ctx, "Encrypt", use, &out)
	if o.keySpec == byok.SM4 && err != nil {
		expectCode(t, "Rejected.UnsupportedOperation", err)
		o.plaintext = ""
		return // a token without SM4
	}
	require.NoError(t, err)
	o.ciphertext = out.CiphertextBlob
	w.keepText(t, "plaintext", o.plaintext)
	o.opens(t)
	expectCode(t, "InvalidParameter", o.call(ctx, "Decrypt", map[string]string{"CiphertextBlob": o.ciphertext, "EncryptionContext": `{"a":"b"}`}, nil))
	require.NoError(t, o.call(ctx, "GenerateDataKey", map[string]string{"KeyId": o.keyID, "NumberOfBytes": "48"}, &out))
	w.keepText(t, "data key", out.Plaintext)
	require.NoError(t, o.call(ctx, "GenerateDataKeyWithoutPlaintext", use, &out))
	require.NoError(t, o.call(ctx, "ReEncrypt", map[string]string{"CiphertextBlob": o.ciphertext, "DestinationKeyId": o.keyID}, &out))

	// Without material and with it again, by the same token of import.
	require.NoError(t, o.call(ctx, "DeleteKeyMaterial", map[string]string{"KeyId": o.keyID}, nil))
	expectCode(t, "Rejected.PendingImport", o.call(ctx, "Encrypt", use, nil))
	expectCode(t, "InvalidKeyMaterial", o.importMaterial(t, bad["other"]))
	require.NoError(t, o.importMaterial(t, good, "KeyMaterialExpireUnix", strconv.FormatInt(time.Now().Unix()+3600, 10)))
	o.opens(t)
	require.NoError(t, o.call(ctx, "DisableKey", map[string]string{"KeyId": o.keyID}, nil))
	expectCode(t, "Rejected.Disabled", o.call(ctx, "Encrypt", use, nil))
	require.NoError(t, o.call(ctx, "EnableKey", map[string]string{"KeyId": o.keyID}, nil))
	o.opens(t)
}

func (w *wiretap) keepText(t *testing.T, name, text string) {
	t.Helper()
	value, err := base64.StdEncoding.DecodeString(text)
	require.NoError(t, err)
	w.keep(plaintext, name, value)
}

// opens has the server decrypt what it encrypted before.
func (o *owner) opens(t *testing.T) {
	t.Helper()
	var out struct{ Plaintext string }
	require.NoError(t, o.call(t.Context(), "Decrypt", map[string]string{"CiphertextBlob": o.ciphertext}, &out))
	require.Equal(t, o.plaintext, out.Plaintext)
}

// expires gives material two seconds to live, and sees it gone.
func (o *owner) expires(t *testing.T) {
	t.Helper()
	at := strconv.FormatInt(time.Now().Unix()+2, 10)
	require.NoError(t, o.importMaterial(t, wrapped(t, o.algorithm, o.publicKey, o.material), "KeyMaterialExpireUnix", at))
	require.Eventually(t, func() bool { return o.state(t).KeyState == "PendingImport" }, time.Minute, 100*time.Millisecond)
	expectCode(t, "Rejected.PendingImport", o.call(t.Context(), "Decrypt", map[string]string{"CiphertextBlob": o.ciphertext}, nil))
}

// strangers send what no client sends, for the answers.
func (w *wiretap) strangers(t *testing.T) {
	c := w.client(t)
	for _, params := range []map[string]string{{"KeyId": "alias/some"}, {"KeyId": "{}"}, {"KeyId": rand.Text()}, nil} {
		require.Error(t, c.call(t.Context(), "ImportKeyMaterial", params, nil))
	}
	require.Error(t, c.call(t.Context(), "NoSuchAction", nil, nil))
	forger := *c
	forger.cred.Secret = acs.NewSecret([]byte("another secret of somebody"))
	expectCode(t, "SignatureDoesNotMatch", forger.call(t.Context(), "ListKeys", nil, nil))
	for _, path := range []string{"?Format=XML", "?Action=Encrypt&Plaintext=YQ==", "healthz", "debug/pprof/", "metrics"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.url+path, http.NoBody)
		require.NoError(t, err)
		res, err := w.RoundTrip(req)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
	}
}

// helps asks every command for its help, in the directory of the site.
func (w *wiretap) helps(t *testing.T) {
	t.Helper()
	ask := func(args ...string) []byte {
		cmd := keyferryd(t, append(args, "--help")...)
		cmd.Dir = w.dir
		text, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", text)
		w.see(inHelp, text)
		return text
	}
	_, list, _ := bytes.Cut(ask(), []byte("Available Commands:\n"))
	list, _, _ = bytes.Cut(list, []byte("\n\n"))
	for line := range strings.Lines(string(list)) {
		ask(strings.Fields(line)[0])
	}
	require.Contains(t, w.seen[inHelp].String(), "--so-pin-file")
}

// From its making to its end, the server reaches its token through OpenSC's
// pkcs11-spy, which writes down every call. Neither key material nor a key of
// the token nor a PIN is anywhere that it does not belong.
//
// The spy writes down the PINs that it is given. They are taken out of its
// trace where C_Login, C_InitToken and C_InitPIN are called, and nowhere else.
func TestWiretap(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	modules, err := softhsm.Modules()
	require.NoError(t, err)
	for _, module := range modules {
		t.Run(filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(module)))), func(t *testing.T) {
			t.Parallel()
			t.Logf("the module is %s", module)
			newWiretap(t, module).run(t)
		})
	}
}

func (w *wiretap) run(t *testing.T) {
	stdout, stderr, err := w.keyferryd(t, "init", "--init-token", "--so-pin-file", w.file("so-pin"))
	require.NoError(t, err, stderr)
	w.see(inLog, []byte(stdout+stderr))
	w.helps(t)

	w.start(t)
	var owners []*owner
	for _, keySpec := range []string{byok.AES256, byok.SM4} {
		for _, algorithm := range algorithms {
			if o := w.newOwner(t, voyage{keySpec, pairSpecOf(algorithm), algorithm}); o != nil {
				owners = append(owners, o)
			}
		}
	}
	require.GreaterOrEqual(t, len(owners), 4, "OAEP with SHA-1 and PKCS#1 v1.5 at least, for two specs")
	t.Run("life", func(t *testing.T) {
		for _, o := range owners {
			t.Run(o.keySpec+"/"+o.algorithm, func(t *testing.T) {
				t.Parallel()
				w.live(t, o)
			})
		}
	})
	w.strangers(t)
	w.snapshotFiles(t)
	owners[0].expires(t)
	w.secrets = append(w.secrets, lootOf(t, w.module, w.dir, w.file("user-pin"))...)

	// Once more after a good end, and after a bad one.
	for i, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		w.end(t, signal)
		w.snapshotFiles(t)
		w.start(t)
		for _, o := range owners {
			o.client = w.client(t)
			if o.plaintext != "" && (o != owners[0] || i > 0) { // whose material has expired
				o.opens(t)
			}
		}
		require.NoError(t, owners[0].importMaterial(t, wrapped(t, owners[0].algorithm, owners[0].publicKey, owners[0].material)))
		owners[0].opens(t)
	}
	for _, o := range owners {
		require.NoError(t, o.call(t.Context(), "DeleteKeyMaterial", map[string]string{"KeyId": o.keyID}, nil))
		require.NoError(t, o.call(t.Context(), "ScheduleKeyDeletion", map[string]string{"KeyId": o.keyID, "PendingWindowInDays": "7"}, nil))
	}
	w.end(t, syscall.SIGTERM)
	w.snapshotFiles(t)
	w.secrets = append(w.secrets, lootOf(t, w.module, w.dir, w.file("user-pin"))...)
	w.search(t)
}

// search looks for every secret in every place.
func (w *wiretap) search(t *testing.T) {
	for _, calls := range []string{"C_InitToken", "C_Login", "C_UnwrapKey", "C_WrapKey", "C_Encrypt", "C_Decrypt", "C_DestroyObject"} {
		require.Regexp(t, `(?m)^\d+: `+calls+`$`, string(w.read(t, "trace")), "this trace is not one of the whole life")
	}
	trace, pins := withoutPINs(w.read(t, "trace"))
	require.GreaterOrEqual(t, pins, 5, "init logs in as SO and as user, each server as user")
	w.see(inTrace, trace)
	w.see(inTrace, dumpedIn(trace))

	scan := newScanner(w.secrets)
	kinds := map[kind]int{}
	for _, s := range w.secrets {
		kinds[s.kind]++
	}
	for _, k := range []kind{material, hashKey, tokenKey, pin, accessSecret, plaintext} {
		require.NotZero(t, kinds[k], k)
	}
	there := map[string]map[kind]bool{}
	for _, place := range places {
		content := w.seen[place].Bytes()
		require.NotEmpty(t, content, place)
		there[place] = map[kind]bool{}
		for _, f := range scan.scan(content) {
			there[place][f.secret.kind] = true
			if !slices.Contains(belongs[f.secret.kind], place) {
				t.Errorf("in the %s: %v", place, f)
			}
		}
		t.Logf("%-20s %9d bytes searched for %d secrets", place, len(content), len(w.secrets))
	}
	inside := map[*secret]bool{}
	for _, f := range scan.scan(w.seen[inC].Bytes()) {
		inside[f.secret] = true
	}
	t.Logf("%-20s %9d bytes, with %d of the secrets, as a software token has it", inC, w.seen[inC].Len(), len(inside))
	w.requireSeen(t, there)
	w.requireFound(t, scan)
}

// requireSeen makes sure that what was searched is what there was to see: that
// everything which belongs into a place is there, and was found by the scan.
func (w *wiretap) requireSeen(t *testing.T, there map[string]map[kind]bool) {
	t.Helper()
	for k, list := range belongs {
		for _, place := range list {
			require.True(t, there[place][k], "no %s was found in the %s, where it belongs", k, place)
		}
	}
	require.Contains(t, w.seen[inLog].String(), "access_key_id=tester")
	require.Contains(t, w.seen[inLog].String(), "refused key material")
	require.Contains(t, w.seen[inMetrics].String(), `keyferry_imports_total{algorithm="RSAES_OAEP_SHA_1",result="refused"}`)
	require.Contains(t, w.seen[inDatabase].String(), "by "+byok.OAEPSHA1, "a description of a key")
	require.Contains(t, w.seen[inMemory].String(), "by "+byok.OAEPSHA1)
	require.Contains(t, w.seen[inToken].String(), "site") // the label of the token
	require.Contains(t, w.seen[inFiles].String(), "vault_aes")
}

// requireFound plants a secret of each kind in each place, written down in each
// way, and makes sure that it is found.
func (w *wiretap) requireFound(t *testing.T, scan *scanner) {
	t.Helper()
	canaries := map[kind]*secret{}
	for _, s := range w.secrets {
		if len(s.value) >= 2*fragment {
			canaries[s.kind] = s
		}
	}
	for _, place := range places {
		content := w.seen[place].Bytes()
		at, err := rand.Int(rand.Reader, big.NewInt(int64(len(content))))
		require.NoError(t, err)
		// Around it is what is there; the rest was searched above.
		head, tail := content[max(0, int(at.Int64())-100):at.Int64()], content[at.Int64():min(len(content), int(at.Int64())+100)]
		for k, canary := range canaries {
			for name, write := range writings {
				found := scan.scan(slices.Concat(head, []byte(write(canary.value)), tail))
				require.True(t, slices.ContainsFunc(found, func(f finding) bool { return f.secret.kind == k }),
					"a %s in the %s would not be found: %s", k, place, name)
			}
		}
	}
}

var (
	spyCall = regexp.MustCompile(`^\d+: (C_\w+)$`)
	spyPIN  = regexp.MustCompile(`^\[in\] p(Old|New)?Pin\[`)
	spyDump = regexp.MustCompile(`^    [0-9A-F]{8}  ((?:[0-9A-F]{2} ){1,16})`)
)

// withoutPINs takes the PINs out of a trace of pkcs11-spy, where the calls are
// that have one, and counts them.
func withoutPINs(trace []byte) (rest []byte, pins int) {
	takes := false // the present call takes a PIN
	inside := false
	for line := range bytes.Lines(trace) {
		text := bytes.TrimRight(line, "\n")
		if call := spyCall.FindSubmatch(text); call != nil {
			takes = slices.Contains([]string{"C_Login", "C_InitToken", "C_InitPIN", "C_SetPIN"}, string(call[1]))
		}
		if inside = inside && spyDump.Match(text); inside {
			continue
		}
		if inside = takes && spyPIN.Match(text); inside {
			pins++
		}
		rest = append(rest, line...)
	}
	return rest, pins
}

// dumpedIn is what a trace of pkcs11-spy shows as hexadecimal digits.
func dumpedIn(trace []byte) (all []byte) {
	for line := range bytes.Lines(trace) {
		dump := spyDump.FindSubmatch(line)
		if dump == nil {
			continue
		}
		part, err := hex.DecodeString(strings.ReplaceAll(string(dump[1]), " ", ""))
		if err == nil {
			all = append(all, part...)
		}
	}
	return all
}
