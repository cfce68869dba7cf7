package kmsapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/kmsapi"
	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

const (
	keyID     = "5f0e6a3c-2b1d-4c8f-9a7e-0d1c2b3a4f5e"
	versionID = "9d8c7b6a-5f4e-4d3c-8b2a-190817263544"
	blobText  = "Y2lwaGVydGV4dA==" // of "ciphertext"
)

// stubEngine answers what a test tells it to, and remembers what it was asked.
// It stands in for the engine where only the mapping to the wire is tested.
type stubEngine struct {
	err      error
	metadata engine.KeyMetadata
	listed   int

	mu    sync.Mutex
	calls []string
	last  any // the argument of the last call, beside the key id
}

func (s *stubEngine) called(name, keyID string, arg any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, strings.TrimSpace(name+" "+keyID))
	s.last = arg
	return s.err
}

func (s *stubEngine) CreateKey(_ context.Context, in engine.CreateKeyInput) (engine.KeyMetadata, error) {
	return s.metadata, s.called("CreateKey", "", in)
}

func (s *stubEngine) DescribeKey(_ context.Context, id string) (engine.KeyMetadata, error) {
	return s.metadata, s.called("DescribeKey", id, nil)
}

func (s *stubEngine) ListKeys(_ context.Context, in engine.ListKeysInput) ([]engine.KeyMetadata, int, error) {
	return make([]engine.KeyMetadata, s.listed), s.listed, s.called("ListKeys", "", in)
}

func (s *stubEngine) EnableKey(_ context.Context, id string) error {
	return s.called("EnableKey", id, nil)
}

func (s *stubEngine) DisableKey(_ context.Context, id string) error {
	return s.called("DisableKey", id, nil)
}

func (s *stubEngine) ScheduleKeyDeletion(_ context.Context, id string, days int) error {
	return s.called("ScheduleKeyDeletion", id, days)
}

func (s *stubEngine) CancelKeyDeletion(_ context.Context, id string) error {
	return s.called("CancelKeyDeletion", id, nil)
}

func (s *stubEngine) GetParametersForImport(_ context.Context, id string, spec hsm.PairSpec, alg hsm.Algorithm) (engine.ImportParameters, error) {
	err := s.called("GetParametersForImport", id, string(spec)+" "+string(alg))
	return engine.ImportParameters{KeyID: id, PublicKey: []byte("spki"), ImportToken: []byte("token"), ExpiresAt: time.Unix(1516838462, 0)}, err
}

func (s *stubEngine) ImportKeyMaterial(_ context.Context, in engine.ImportInput) (engine.KeyMetadata, error) {
	return s.metadata, s.called("ImportKeyMaterial", in.KeyID, in)
}

func (s *stubEngine) DeleteKeyMaterial(_ context.Context, id string) error {
	return s.called("DeleteKeyMaterial", id, nil)
}

func (s *stubEngine) Receipt(_ context.Context, in engine.ReceiptInput) (*receipt.Receipt, error) {
	r := &receipt.Receipt{
		Index: 3, Entry: []byte("entry\nof two lines\n"), EntryHash: receipt.Hash{1}, Proof: []receipt.Hash{{2}, {3}},
		Head: []byte("head\n"), PublicKey: []byte("spki"),
	}
	if in.Since > 0 {
		r.Since = &receipt.Consistency{Size: in.Since, Proof: []receipt.Hash{{4}}}
	}
	return r, s.called("GetImportReceipt", in.KeyID, in)
}

func (s *stubEngine) KeyReceipts(_ context.Context, id string, offset, limit int) ([]engine.KeyReceipt, int, error) {
	return []engine.KeyReceipt{{Index: -1, Entry: []byte("entry\n")}}, 7, s.called("ListImportReceipts", id, [2]int{offset, limit})
}

func (s *stubEngine) LogHead(context.Context) (engine.LogHead, error) {
	return engine.LogHead{Head: []byte("head\n"), Size: 4, PublicKey: []byte("spki")}, s.called("GetReceiptLogHead", "", nil)
}

func (s *stubEngine) LogEntries(_ context.Context, from int64, limit int) ([]receipt.LogEntry, error) {
	return []receipt.LogEntry{{Index: from, Hash: receipt.Hash{1}, Entry: []byte("entry\n")}, {Index: from + 1, Hash: receipt.Hash{2}}},
		s.called("GetReceiptLog", "", [2]int64{from, int64(limit)})
}

func (s *stubEngine) Encrypt(_ context.Context, id string, plaintext []byte, encctx map[string]string) (engine.Ciphertext, error) {
	err := s.called("Encrypt", id, encctx)
	if bytes.Equal(plaintext, []byte("panic")) {
		panic("a panic that quotes the plaintext: " + string(plaintext))
	}
	return engine.Ciphertext{KeyID: id, KeyVersionID: versionID, Blob: []byte("ciphertext")}, err
}

func (s *stubEngine) Decrypt(_ context.Context, _ []byte, encctx map[string]string) (engine.Plaintext, error) {
	return engine.Plaintext{KeyID: keyID, KeyVersionID: versionID, Plaintext: []byte("plaintext")}, s.called("Decrypt", "", encctx)
}

func (s *stubEngine) ReEncrypt(_ context.Context, in engine.ReEncryptInput) (engine.Ciphertext, error) {
	return engine.Ciphertext{KeyID: in.KeyID, KeyVersionID: versionID, Blob: []byte("ciphertext")}, s.called("ReEncrypt", in.KeyID, in)
}

func (s *stubEngine) GenerateDataKey(_ context.Context, in engine.DataKeyInput) (engine.Ciphertext, engine.Plaintext, error) {
	c := engine.Ciphertext{KeyID: in.KeyID, KeyVersionID: versionID, Blob: []byte("ciphertext")}
	return c, engine.Plaintext{KeyID: in.KeyID, KeyVersionID: versionID, Plaintext: []byte("data key")}, s.called("GenerateDataKey", in.KeyID, in)
}

func (s *stubEngine) GenerateDataKeyWithoutPlaintext(_ context.Context, in engine.DataKeyInput) (engine.Ciphertext, error) {
	c := engine.Ciphertext{KeyID: in.KeyID, KeyVersionID: versionID, Blob: []byte("ciphertext")}
	return c, s.called("GenerateDataKeyWithoutPlaintext", in.KeyID, in)
}

// nonces is store.Store's part that the handler needs.
type nonces struct {
	mu   sync.Mutex
	err  error
	seen map[string]time.Time // access key id and nonce, until when
}

func (n *nonces) AddNonce(_ context.Context, nonce store.Nonce, now time.Time) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err != nil {
		return false, n.err
	}
	id := nonce.AccessKeyID + " " + nonce.Value
	if until, ok := n.seen[id]; ok && until.After(now) {
		return false, nil
	}
	if n.seen == nil {
		n.seen = map[string]time.Time{}
	}
	n.seen[id] = nonce.ExpiresAt
	return true, nil
}

// service is a handler over a stub, and a client of it.
type service struct {
	*kmsapi.Handler
	engine *stubEngine
	nonces *nonces
	log    *bytes.Buffer
	now    time.Time
	cred   acs.Credential
}

func newService(t testing.TB) *service {
	t.Helper()
	s := &service{
		engine: &stubEngine{},
		nonces: &nonces{},
		log:    &bytes.Buffer{},
		now:    time.Date(2026, 11, 23, 7, 15, 45, 0, time.UTC),
		cred:   acs.Credential{AccessKeyID: "testid", Secret: acs.NewSecret([]byte("testsecret"))},
	}
	h, err := kmsapi.New(kmsapi.Config{
		Engine: s.engine,
		Nonces: s.nonces,
		Secret: func(id string) ([]byte, bool) { return s.cred.Secret.Bytes(), id == s.cred.AccessKeyID },
		Region: "cn-test", Account: "1234567890",
		Logger: slog.New(slog.NewTextHandler(s.log, nil)),
		Now:    func() time.Time { return s.now },
	})
	require.NoError(t, err)
	s.Handler = h
	return s
}

// request is a request as the v1 SDK makes it: everything in the query.
func (s *service) request(t testing.TB, action string, params map[string]string) *http.Request {
	t.Helper()
	query := url.Values{"Action": {action}, "Version": {kmsapi.Version}}
	for name, value := range params {
		query.Set(name, value)
	}
	req := httptest.NewRequest(http.MethodPost, "/?"+query.Encode(), nil)
	require.NoError(t, acs.SignRPC(req, nil, s.cred, s.now, uuid.NewString()))
	return req
}

// do calls an action and returns the status and the fields of the answer.
func (s *service) do(t testing.TB, action string, params map[string]string) (int, map[string]any) {
	t.Helper()
	return s.send(t, s.request(t, action, params))
}

func (s *service) send(t testing.TB, req *http.Request) (int, map[string]any) {
	t.Helper()
	w := httptest.NewRecorder()
	s.ServeHTTP(w, req)
	require.Equal(t, "application/json;charset=utf-8", w.Header().Get("Content-Type"))
	var fields map[string]any
	require.NoError(t, json.Unmarshal(w.Body.Bytes(), &fields), w.Body.String())
	require.Equal(t, w.Header().Get("x-acs-request-id"), fields["RequestId"])
	require.Regexp(t, "^[0-9A-F]{8}-([0-9A-F]{4}-){3}[0-9A-F]{12}$", fields["RequestId"])
	return w.Code, fields
}

// refused calls an action and requires an error with that code.
func (s *service) refused(t testing.TB, code, action string, params map[string]string) map[string]any {
	t.Helper()
	status, fields := s.do(t, action, params)
	require.GreaterOrEqual(t, status, 400, fmt.Sprint(fields))
	require.Equal(t, code, fields["Code"], fmt.Sprint(fields))
	return fields
}

// params makes a map of names and values in turn.
func params(pairs ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = pairs[i+1]
	}
	return m
}
