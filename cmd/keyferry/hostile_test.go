package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// site is a directory with a manifest, and the fake KMS that it is for, behind
// a handler of the test's.
type site struct {
	dir, credentials string
	kms              *fakeKMS
}

// newSite has wrap, if it is not nil, between client and fake.
func newSite(t *testing.T, wrap func(kms *fakeKMS, w http.ResponseWriter, r *http.Request), quirks ...string) *site {
	t.Helper()
	pair, err := fakePair()
	require.NoError(t, err)
	s := &site{dir: t.TempDir(), kms: newFakeKMS(pair, quirks)}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if wrap == nil {
			s.kms.ServeHTTP(w, r)
			return
		}
		wrap(s.kms, w, r)
	}))
	t.Cleanup(server.Close)
	credentials, err := json.Marshal(credentialsFile{
		Endpoint: strings.TrimPrefix(server.URL, "http://"), Region: "cn-hangzhou", AccessKeyID: fakeKeyID, AccessKeySecret: fakeSecret,
	})
	require.NoError(t, err)
	s.credentials = s.write(t, "credentials.json", credentials)
	return s
}

func (s *site) write(t *testing.T, name string, data []byte) string {
	t.Helper()
	name = filepath.Join(s.dir, name)
	require.NoError(t, os.WriteFile(name, data, 0o600))
	return name
}

// keyferry runs the program.
func (s *site) keyferry(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	out, err := os.Create(filepath.Join(s.dir, "stdout"))
	require.NoError(t, err)
	defer out.Close() //nolint:errcheck // it is read below
	var told bytes.Buffer
	status = run(t.Context(), append(args, "--credentials", s.credentials), &streams{in: os.Stdin, out: out, err: &told})
	text, err := os.ReadFile(out.Name())
	require.NoError(t, err)
	return status, string(text), told.String()
}

// caller calls the site's KMS.
func (s *site) caller(t *testing.T) *caller {
	t.Helper()
	conn := connection{credentials: s.credentials}
	c, err := conn.client(&streams{err: &bytes.Buffer{}})
	require.NoError(t, err)
	j, err := openJournal(filepath.Join(s.dir, "results"), os.O_CREATE, target{endpoint: c.url, accessKeyID: c.cred.AccessKeyID})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, j.close()) })
	b := &caller{client: c, journal: j, waiting: func(error) {}}
	b.reached.Store(true)
	return b
}

// What a KMS answers, or who is on the way to it, does not get at the terminal,
// nor can it feign lines of this program.
func TestAnswersDoNotReachTheTerminal(t *testing.T) {
	const evil = "\x1b]0;owned\x07\x1b[2J\u009b1A\u202e\nkeyferry: all is well\r"
	s := newSite(t, func(kms *fakeKMS, w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Acs-Action") == "DescribeKey" && r.URL.Query().Get("KeyId") == "key-sm4" {
			_ = json.NewEncoder(w).Encode(map[string]any{"KeyMetadata": map[string]string{"KeyId": "key-sm4", "KeySpec": evil, "Origin": origin}})
			return
		}
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{"Code": "Evil" + evil, "Message": evil, "RequestId": evil, "Recommend": evil})
	})
	harmless := func(text string) {
		t.Helper()
		for _, c := range "\x1b\x07\r\u009b\u202e" {
			require.NotContains(t, text, string(c))
		}
		require.NotContains(t, text, "\nkeyferry: all is well")
	}
	status, _, stderr := s.keyferry(t, "status", "--key-id", "a-key")
	require.Equal(t, exitFailure, status)
	harmless(stderr)
	require.Contains(t, stderr, "Evil")
	status, stdout, _ := s.keyferry(t, "status", "--key-id", "key-sm4")
	require.Zero(t, status)
	harmless(stdout)

	s.write(t, "key.bin", bytes.Repeat([]byte{1, 200}, 16))
	manifest := s.write(t, "keys.jsonl", []byte(`{"key_id":"a-key","material_file":"key.bin"}`+"\n"+`{"key_id":"key-sm4","material_file":"key.bin"}`))
	status, _, stderr = s.keyferry(t, "import", "--manifest", manifest)
	require.Equal(t, exitItems+2, status)
	harmless(stderr)
}

// A KMS that answers for another key than it was asked for does not get material
// into that.
func TestAnswerForAnotherKey(t *testing.T) {
	var imports atomic.Int32
	s := newSite(t, func(kms *fakeKMS, w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("X-Acs-Action") {
		case "DescribeKey":
			_ = json.NewEncoder(w).Encode(kms.describe("key-other", &fakeKey{spec: "Aliyun_AES_256", state: "PendingImport", origin: origin}))
			return
		case "GetParametersForImport", "ImportKeyMaterial":
			if r.URL.Query().Get("KeyId") == "key-other" {
				imports.Add(1)
			}
		}
		kms.ServeHTTP(w, r)
	})
	s.write(t, "key.bin", bytes.Repeat([]byte{1, 200}, 16))
	manifest := s.write(t, "keys.jsonl", []byte(`{"key_id":"key-mine","material_file":"key.bin"}`+"\n"+`{"name":"new","material_file":"key.bin"}`))
	status, _, stderr := s.keyferry(t, "import", "--manifest", manifest)
	require.Equal(t, exitItems+2, status, stderr)
	require.Contains(t, stderr, "was asked for key key-mine, and answered for key-other")
	require.Zero(t, imports.Load())

	for other, want := range map[string]bool{
		"alias/mine": true, "acs:kms:cn-hangzhou:1:alias/mine": true, "acs:kms:cn-hangzhou:1:key/k": true,
		"key": false, "acs:kms:cn-hangzhou:1:key/l": false,
	} {
		require.Equal(t, want, names(other, "k"), other)
	}
}

// A search that cannot have looked at all keys is none: what it did not find
// would be made again.
func TestListsThatCannotBe(t *testing.T) {
	for name, answer := range map[string]string{
		"more than any has":    `{"TotalCount":9223372036854775807,"Keys":{"Key":[{"KeyId":"k"}]}}`,
		"fewer than are there": `{"TotalCount":0,"Keys":{"Key":[{"KeyId":"k"}]}}`,
		"less than none":       `{"TotalCount":-1}`,
		"pages without keys":   `{"TotalCount":100000000}`,
	} {
		t.Run(name, func(t *testing.T) {
			var calls atomic.Int32
			s := newSite(t, func(_ *fakeKMS, w http.ResponseWriter, _ *http.Request) {
				if calls.Add(1) > 2 {
					w.WriteHeader(http.StatusBadRequest)
					fmt.Fprint(w, `{"Code":"Enough"}`)
					return
				}
				fmt.Fprint(w, answer)
			})
			b := &bulk{caller: s.caller(t)}
			_, err := b.search(t.Context(), map[string]bool{"mark": true})
			require.ErrorContains(t, err, "ListKeys: the KMS says that it has ")
		})
	}
}

// create is how an item has a key made.
func create(t *testing.T, kms *fakeKMS, settle time.Duration) *one {
	t.Helper()
	return &one{action: "CreateKey", key: []string{"item"}, settle: settle, happened: func(context.Context) (bool, error) {
		return madeKeys(kms) > 0, nil
	}}
}

func madeKeys(kms *fakeKMS) (n int) {
	kms.mu.Lock()
	defer kms.mu.Unlock()
	for _, k := range kms.keys {
		if k.description == "made" {
			n++
		}
	}
	return n
}

var createParams = url.Values{"Origin": {origin}, "KeySpec": {"Aliyun_AES_256"}, "Description": {"made"}}

// The answer to a CreateKey is lost, and the machine sleeps for longer than the
// KMS remembers nonces.
func TestSleepBetweenAttemptsMakesNoSecondKey(t *testing.T) {
	began, slept := time.Now(), atomic.Bool{}
	s := newSite(t, func(kms *fakeKMS, w http.ResponseWriter, r *http.Request) {
		if slept.Load() {
			kms.ServeHTTP(w, r)
			return
		}
		kms.ServeHTTP(httptest.NewRecorder(), r)
		slept.Store(true)
		kms.mu.Lock()
		clear(kms.nonces)
		kms.mu.Unlock()
		panic(http.ErrAbortHandler)
	})
	b := s.caller(t)
	b.now = func() time.Time {
		if slept.Load() {
			return began.Add(20 * time.Minute)
		}
		return began
	}
	require.NoError(t, b.once(t.Context(), create(t, s.kms, settleCreate), createParams, nil))
	require.Equal(t, 1, madeKeys(s.kms))
}

// A KMS answers that it gave a CreateKey up, and makes the key all the same, a
// while after the program looked for it.
func TestUnavailableKMSMakesNoSecondKey(t *testing.T) {
	var late atomic.Pointer[http.Request]
	s := newSite(t, func(kms *fakeKMS, w http.ResponseWriter, r *http.Request) {
		if !late.CompareAndSwap(nil, r.Clone(context.Background())) {
			kms.ServeHTTP(w, r)
			return
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, `{"Code":"ServiceUnavailableTemporary"}`)
	})
	o := create(t, s.kms, time.Minute)
	happened, looks := o.happened, 0
	o.happened = func(ctx context.Context) (bool, error) {
		there, err := happened(ctx)
		if looks++; looks == 1 {
			s.kms.ServeHTTP(httptest.NewRecorder(), late.Load())
		}
		return there, err
	}
	require.NoError(t, s.caller(t).once(t.Context(), o, createParams, nil))
	require.Equal(t, 1, madeKeys(s.kms))
}

// The answer to a CreateKey is lost while the KMS has yet to make the key, and it
// is too busy for the next attempt.
func TestBusyKMSMakesNoSecondKey(t *testing.T) {
	var late atomic.Pointer[http.Request]
	var calls atomic.Int32
	s := newSite(t, func(kms *fakeKMS, w http.ResponseWriter, r *http.Request) {
		switch calls.Add(1) {
		case 1:
			late.Store(r.Clone(context.Background()))
			panic(http.ErrAbortHandler)
		case 2:
			w.WriteHeader(http.StatusTooManyRequests)
			fmt.Fprint(w, `{"Code":"Throttling.User"}`)
			return
		case 3:
			kms.ServeHTTP(httptest.NewRecorder(), late.Load())
		}
		kms.ServeHTTP(w, r)
	})
	require.NoError(t, s.caller(t).once(t.Context(), create(t, s.kms, settleCreate), createParams, nil))
	require.Equal(t, 1, madeKeys(s.kms))
}

// A KMS that measures nothing cannot tell that a file holds other material than
// what it was given before a crash; so it is asked to import it, and refuses.
func TestMaterialChangedAfterACrash(t *testing.T) {
	s := newSite(t, nil, "plain")
	s.write(t, "key.bin", bytes.Repeat([]byte{1, 200}, 16))
	manifest := s.write(t, "keys.jsonl", []byte(`{"name":"new","material_file":"key.bin"}`))
	status, _, stderr := s.keyferry(t, "import", "--manifest", manifest)
	require.Zero(t, status, stderr)

	results := manifest + ".results"
	text, err := os.ReadFile(results)
	require.NoError(t, err)
	lines := bytes.SplitAfter(text, []byte("\n"))
	require.Len(t, lines, 4) // head, created, imported
	require.NoError(t, os.WriteFile(results, bytes.Join(lines[:2], nil), 0o600))
	s.write(t, "key.bin", bytes.Repeat([]byte{2, 201}, 16))

	status, _, stderr = s.keyferry(t, "import", "--manifest", manifest)
	require.Equal(t, exitItems+1, status, stderr)
	require.Contains(t, stderr, "InvalidKeyMaterial")
}

// Half a line, which a full disk leaves, stays the end of the results.
func TestResultsAfterAFailedWrite(t *testing.T) {
	s := newSite(t, nil)
	name := filepath.Join(s.dir, "results")
	j, err := openJournal(name, os.O_CREATE, target{endpoint: "https://kms.example/", accessKeyID: "a"})
	require.NoError(t, err)
	require.NoError(t, j.add(result{Name: "first", Status: statusCreated, KeyID: "k"}))
	require.NoError(t, j.close())

	whole, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	_, err = whole.WriteString(`{"name":"sec`)
	require.NoError(t, err)
	full, err := os.Open(name) // no write to it succeeds
	require.NoError(t, err)
	j = &journal{file: full, dirty: make(chan struct{}, 1)}
	require.Error(t, j.add(result{Name: "second", Status: statusCreated}))
	require.NoError(t, full.Close())
	j.file = whole // there is room again
	require.Error(t, j.add(result{Name: "third", Status: statusCreated}))
	require.NoError(t, whole.Close())

	j, err = openJournal(name, 0, target{endpoint: "https://kms.example/", accessKeyID: "a"})
	require.NoError(t, err)
	require.Equal(t, "k", j.past["first"].keyID)
	require.NoError(t, j.close())
}
