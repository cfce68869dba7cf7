package main

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/byok"
)

// The access key of the fake.
const (
	fakeKeyID  = "fake-access-key"
	fakeSecret = "fake-secret-that-no-message-may-hold"
)

// fakeKMS is a KMS without an HSM: it unwraps in software, which is for tests
// alone. What a client sees of it is what keyferryd shows, or, with plain, what
// Alibaba Cloud shows.
type fakeKMS struct {
	pair   *rsa.PrivateKey
	quirks []string // see has

	mu     sync.Mutex
	keys   map[string]*fakeKey
	nonces map[string]bool
	chance *mathrand.Rand
}

type fakeKey struct {
	spec, state, origin, kcv, materialID, expires, algorithm, description string
}

// fakeError is an answer that is an error.
type fakeError struct {
	status                   int
	code, message, recommend string
}

func newFakeKMS(pair *rsa.PrivateKey, quirks []string) *fakeKMS {
	return &fakeKMS{
		pair:   pair,
		quirks: quirks,
		keys: map[string]*fakeKey{
			"key-of-kms":  {spec: byok.AES256, state: "Enabled", origin: "Aliyun_KMS"},
			"key-rsa":     {spec: "RSA_2048", state: "PendingImport", origin: origin},
			"key-sm4":     {spec: byok.SM4, state: "PendingImport", origin: origin},
			"key-deleted": {spec: byok.AES256, state: "PendingDeletion", origin: origin},
		},
		nonces: make(map[string]bool),
		chance: mathrand.New(mathrand.NewPCG(1, 2)),
	}
}

// has reports whether the fake was started with a quirk:
//
//	plain         no material id, no check value, links instead of hints
//	sha1-only     no RSAES_OAEP_SHA_256
//	expect        imports only with an expectation
//	mismeasures   answers the material id of other material
//	garbage       answers what is no JSON
//	redirects     sends clients elsewhere
//	other-spec    makes keys of another spec than was asked for
//	busy          refuses a third of all requests, as it is busy
//	lossy         cuts the connection instead of a third of its answers
func (f *fakeKMS) has(quirk string) bool { return slices.Contains(f.quirks, quirk) }

func (f *fakeKMS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.has("garbage"):
		fmt.Fprint(w, "<html>")
		return
	case f.has("redirects"):
		http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusTemporaryRedirect)
		return
	}
	if f.has("lossy") {
		if f.chance.IntN(3) == 0 {
			_, _ = f.answer(r)
			panic(http.ErrAbortHandler)
		}
	}
	answer, failed := f.answer(r)
	if failed != nil {
		w.WriteHeader(failed.status)
		if f.has("plain") {
			failed.recommend = "https://api.aliyun.com/troubleshoot?q=" + failed.code
		}
		answer = map[string]any{"Code": failed.code, "Message": failed.message, "Recommend": failed.recommend}
	}
	answer["RequestId"] = "request-1"
	_ = json.NewEncoder(w).Encode(answer)
}

func (f *fakeKMS) answer(r *http.Request) (map[string]any, *fakeError) {
	lookup := func(id string) ([]byte, bool) { return []byte(fakeSecret), id == fakeKeyID }
	req, id, err := acs.Verify(r, nil, lookup, time.Now())
	switch {
	case err == nil && f.nonces[id.Nonce]:
		return nil, &fakeError{status: 400, code: "SignatureNonceUsed"}
	case err != nil && errors.Is(err, acs.ErrUnknownKey):
		return nil, &fakeError{status: 404, code: "InvalidAccessKeyId.NotFound", message: "Specified access key is not found."}
	case err != nil:
		return nil, &fakeError{status: 400, code: "SignatureDoesNotMatch", message: "Specified signature is not matched with our calculation."}
	}
	if f.has("busy") {
		switch f.chance.IntN(6) {
		case 0:
			return nil, &fakeError{status: 503, code: "ServiceUnavailableTemporary", message: "Service Unavailable Temporary."}
		case 1:
			return nil, &fakeError{status: 400, code: "Throttling.User", message: "Request was denied due to user flow control."}
		}
	}
	f.nonces[id.Nonce] = true
	if req.Version != apiVersion {
		return nil, &fakeError{status: 400, code: "InvalidVersion"}
	}
	switch req.Action {
	case "CreateKey":
		return f.createKey(req.Params)
	case "ListKeys":
		return f.list(), nil
	}
	key := f.keys[req.Params.Get("KeyId")]
	if key == nil {
		return nil, &fakeError{status: 404, code: "Forbidden.KeyNotFound", message: "The specified Key is not found."}
	}
	switch req.Action {
	case "DescribeKey":
		return f.describe(req.Params.Get("KeyId"), key), nil
	case "GetParametersForImport":
		return f.parameters(key, req.Params)
	case "ImportKeyMaterial":
		return f.importMaterial(key, req.Params)
	}
	return nil, &fakeError{status: 404, code: "InvalidAction.NotFound"}
}

func (f *fakeKMS) createKey(params url.Values) (map[string]any, *fakeError) {
	id := fmt.Sprintf("key-%d", len(f.keys))
	f.keys[id] = &fakeKey{spec: params.Get("KeySpec"), state: "PendingImport", origin: params.Get("Origin"), description: params.Get("Description")}
	if f.has("other-spec") {
		f.keys[id].spec = "Aliyun_AES_128"
	}
	return f.describe(id, f.keys[id]), nil
}

// list has all keys on one page.
func (f *fakeKMS) list() map[string]any {
	var keys []map[string]string
	for id := range f.keys {
		keys = append(keys, map[string]string{"KeyId": id})
	}
	return map[string]any{"Keys": map[string]any{"Key": keys}, "TotalCount": len(keys)}
}

func (f *fakeKMS) describe(id string, k *fakeKey) map[string]any {
	m := map[string]any{
		"KeyId": id, "KeySpec": k.spec, "Description": k.description, "KeyState": k.state, "Origin": k.origin,
		"CreationDate": "2026-11-23T07:19:04Z", "DeleteDate": "", "MaterialExpireTime": k.expires,
	}
	if k.kcv != "" && !f.has("plain") {
		m["KeyMaterialId"], m["KeyCheckValue"], m["KeyCheckValueAlgorithm"] = k.materialID, k.kcv, "AES-ECB"
	}
	if f.has("mismeasures") && k.materialID != "" {
		m["KeyMaterialId"] = strings.Repeat("00", byok.MaterialIDLen)
	}
	return map[string]any{"KeyMetadata": m}
}

func (f *fakeKMS) parameters(k *fakeKey, params url.Values) (map[string]any, *fakeError) {
	k.algorithm = params.Get("WrappingAlgorithm")
	if params.Get("WrappingKeySpec") != "RSA_2048" || k.algorithm == byok.OAEPSHA256 && f.has("sha1-only") {
		return nil, &fakeError{
			status: 400, code: "InvalidParameter", message: "The specified parameter WrappingAlgorithm is not valid.",
			recommend: "the token has no OAEP with SHA-256",
		}
	}
	spki, err := x509.MarshalPKIXPublicKey(f.pair.Public())
	if err != nil {
		return nil, &fakeError{status: 500, code: "InternalFailure"}
	}
	return map[string]any{
		"PublicKey":       base64.StdEncoding.EncodeToString(spki),
		"ImportToken":     base64.StdEncoding.EncodeToString([]byte("token+/=" + k.algorithm)),
		"TokenExpireTime": "2099-01-01T00:00:00Z",
	}, nil
}

func (f *fakeKMS) importMaterial(k *fakeKey, params url.Values) (map[string]any, *fakeError) {
	refused := &fakeError{status: 400, code: "InvalidKeyMaterial", message: "key material is invalid."}
	token, err := base64.StdEncoding.DecodeString(params.Get("ImportToken"))
	if err != nil || string(token) != "token+/="+k.algorithm {
		return nil, &fakeError{status: 400, code: "InvalidImportToken", message: "import token is invalid."}
	}
	if k.state == "PendingDeletion" {
		return nil, &fakeError{status: 409, code: "Rejected.StateModifiedFailed", message: "Keystate modified failed."}
	}
	material, err := f.unwrap(k.algorithm, params.Get("EncryptedKeyMaterial"))
	if err != nil {
		return nil, refused
	}
	kcv, err := byok.KCV(k.spec, material)
	if err != nil {
		return nil, refused
	}
	id, err := byok.MaterialID(params.Get("KeyId"), material)
	if err != nil {
		return nil, refused
	}
	expected := params.Get("ExpectKeyMaterialId")
	if f.has("expect") && expected == "" {
		return nil, &fakeError{status: 400, code: "InvalidParameter", message: "The specified parameter ExpectKeyMaterialId is not valid."}
	}
	if expected != "" && expected != hex.EncodeToString(id[:]) || k.materialID != "" && k.materialID != hex.EncodeToString(id[:]) {
		return nil, refused
	}
	if v := params.Get("ExpectKeyCheckValue"); v != "" && v != hex.EncodeToString(kcv[:]) {
		return nil, refused
	}
	k.expires = ""
	if at, err := strconv.ParseInt(params.Get("KeyMaterialExpireUnix"), 10, 64); err != nil {
		return nil, &fakeError{status: 400, code: "InvalidParameter", message: "The specified parameter KeyMaterialExpireUnix is not valid."}
	} else if at != 0 {
		k.expires = time.Unix(at, 0).UTC().Format(time.RFC3339)
	}
	k.state, k.kcv, k.materialID = "Enabled", hex.EncodeToString(kcv[:]), hex.EncodeToString(id[:])
	return map[string]any{}, nil
}

func (f *fakeKMS) unwrap(algorithm, wrapped string) ([]byte, error) {
	blob, err := base64.StdEncoding.DecodeString(wrapped)
	if err != nil {
		return nil, err
	}
	switch algorithm {
	case byok.OAEPSHA1:
		return rsa.DecryptOAEP(sha1.New(), nil, f.pair, blob, nil)
	case byok.OAEPSHA256:
		return rsa.DecryptOAEP(sha256.New(), nil, f.pair, blob, nil)
	}
	return rsa.DecryptPKCS1v15(nil, f.pair, blob)
}

var fakePair = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })
