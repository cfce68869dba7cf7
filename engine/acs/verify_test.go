package acs_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
)

const form = "application/x-www-form-urlencoded"

// request is a client's request with everything that SignRPC or SignV3 needs.
func request(t testing.TB, method, query, contentType string) *http.Request {
	t.Helper()
	r, err := http.NewRequest(method, "http://kms.example:8443/?"+query, nil)
	require.NoError(t, err)
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	return r
}

// signRPC and signV3 sign by the test's access key at the test's time.
func signRPC(t testing.TB, r *http.Request, body string) *http.Request {
	t.Helper()
	require.NoError(t, acs.SignRPC(r, []byte(body), credential(), at, "nonce-1"))
	return r
}

func signV3(t testing.TB, r *http.Request, body string) *http.Request {
	t.Helper()
	r.Header.Set("x-acs-action", "Encrypt")
	r.Header.Set("x-acs-version", "2016-01-20")
	require.NoError(t, acs.SignV3(r, []byte(body), credential(), at, "nonce-1"))
	return r
}

// set changes one parameter of the query, or removes it.
func set(r *http.Request, name, value string) {
	q := r.URL.Query()
	if value == "" {
		q.Del(name)
	} else {
		q.Set(name, value)
	}
	r.URL.RawQuery = q.Encode()
}

func TestRefused(t *testing.T) {
	const rpcQuery = "Action=Encrypt&Version=2016-01-20&KeyId=k"
	rpc := func(change func(r *http.Request)) func(t *testing.T) (*http.Request, string) {
		return func(t *testing.T) (*http.Request, string) {
			r := signRPC(t, request(t, http.MethodPost, rpcQuery, ""), "")
			change(r)
			return r, ""
		}
	}
	v3 := func(change func(r *http.Request)) func(t *testing.T) (*http.Request, string) {
		return func(t *testing.T) (*http.Request, string) {
			r := signV3(t, request(t, http.MethodPost, "KeyId=k", ""), "")
			change(r)
			return r, ""
		}
	}
	replaceAuth := func(from, to string) func(r *http.Request) {
		return func(r *http.Request) {
			r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), from, to, 1))
		}
	}
	v4 := "ACS4-HMAC-SHA256 Credential=testAK"
	for _, tc := range []struct {
		name  string
		make  func(t *testing.T) (*http.Request, string)
		after time.Duration // the server's clock against the client's
		want  acs.Kind
	}{
		{name: "rpc: not signed", make: rpc(func(r *http.Request) { set(r, "Signature", "") }), want: acs.ErrMissingSignature},
		{name: "rpc: empty signature", make: rpc(func(r *http.Request) { set(r, "Signature", ""); r.URL.RawQuery += "&Signature=" }), want: acs.ErrMismatch},
		{name: "rpc: other signature", make: rpc(func(r *http.Request) { set(r, "Signature", "z+h1/vrXWWC9dGs/IIJyR5E+sug=") }), want: acs.ErrMismatch},
		{name: "rpc: unknown key", make: rpc(func(r *http.Request) { set(r, "AccessKeyId", "other") }), want: acs.ErrUnknownKey},
		{name: "rpc: no key", make: rpc(func(r *http.Request) { set(r, "AccessKeyId", "") }), want: acs.ErrMissingKeyID},
		{name: "rpc: no timestamp", make: rpc(func(r *http.Request) { set(r, "Timestamp", "") }), want: acs.ErrMissingTimestamp},
		{name: "rpc: timestamp with a fraction", make: rpc(func(r *http.Request) { set(r, "Timestamp", "2026-11-23T07:19:04.5Z") }), want: acs.ErrTimestampFormat},
		{name: "rpc: timestamp with a zone", make: rpc(func(r *http.Request) { set(r, "Timestamp", "2026-11-23T07:19:04+08:00") }), want: acs.ErrTimestampFormat},
		{name: "rpc: no nonce", make: rpc(func(r *http.Request) { set(r, "SignatureNonce", "") }), want: acs.ErrMissingNonce},
		{name: "rpc: long nonce", make: rpc(func(r *http.Request) { set(r, "SignatureNonce", strings.Repeat("n", acs.MaxNonceLen+1)) }), want: acs.ErrMalformed},
		{name: "rpc: HMAC-SHA256", make: rpc(func(r *http.Request) { set(r, "SignatureMethod", "HMAC-SHA256") }), want: acs.ErrUnsupportedScheme},
		{name: "rpc: no method", make: rpc(func(r *http.Request) { set(r, "SignatureMethod", "") }), want: acs.ErrUnsupportedScheme},
		{name: "rpc: version 2.0", make: rpc(func(r *http.Request) { set(r, "SignatureVersion", "2.0") }), want: acs.ErrUnsupportedScheme},
		{name: "rpc: bearer token", make: rpc(func(r *http.Request) { set(r, "SignatureType", "BEARERTOKEN") }), want: acs.ErrUnsupportedScheme},
		{name: "rpc: parameter added", make: rpc(func(r *http.Request) { set(r, "Plaintext", "AA==") }), want: acs.ErrMismatch},
		{name: "rpc: parameter changed", make: rpc(func(r *http.Request) { set(r, "KeyId", "l") }), want: acs.ErrMismatch},
		{name: "rpc: other verb", make: rpc(func(r *http.Request) { r.Method = http.MethodGet }), want: acs.ErrMismatch},
		{name: "rpc: path", make: rpc(func(r *http.Request) { r.URL.Path = "/admin" }), want: acs.ErrPath},
		{name: "rpc: escaped path", make: rpc(func(r *http.Request) { r.URL.Path, r.URL.RawPath = "//", "/%2F" }), want: acs.ErrPath},
		{name: "rpc: parameter twice", make: rpc(func(r *http.Request) { r.URL.RawQuery += "&KeyId=k" }), want: acs.ErrDuplicate},
		{name: "rpc: parameter of no name twice", make: func(t *testing.T) (*http.Request, string) {
			r := signRPC(t, request(t, http.MethodPost, rpcQuery+"&=k", ""), "")
			r.URL.RawQuery = "=l&" + r.URL.RawQuery
			return r, ""
		}, want: acs.ErrDuplicate},
		{name: "rpc: signature twice", make: rpc(func(r *http.Request) { r.URL.RawQuery += "&Signature=" }), want: acs.ErrDuplicate},
		{name: "rpc: bad escape", make: rpc(func(r *http.Request) { r.URL.RawQuery += "&x=%zz" }), want: acs.ErrParameters},
		{name: "rpc: semicolon", make: rpc(func(r *http.Request) { r.URL.RawQuery += ";x=1" }), want: acs.ErrParameters},
		{name: "rpc: too many", make: rpc(func(r *http.Request) { r.URL.RawQuery += strings.Repeat("&", 256) }), want: acs.ErrParameters},
		{name: "rpc: not UTF-8", make: rpc(func(r *http.Request) { r.URL.RawQuery += "&x=%ff" }), want: acs.ErrParameters},
		{name: "rpc: stale", make: rpc(func(*http.Request) {}), after: acs.Window + time.Second, want: acs.ErrExpired},
		{name: "rpc: of the future", make: rpc(func(*http.Request) {}), after: -acs.Window - time.Second, want: acs.ErrExpired},
		{name: "rpc: in query and body", want: acs.ErrDuplicate, make: func(t *testing.T) (*http.Request, string) {
			r := signRPC(t, request(t, http.MethodPost, rpcQuery, form), "")
			return r, "KeyId=k"
		}},
		{name: "rpc: body changed", want: acs.ErrMismatch, make: func(t *testing.T) (*http.Request, string) {
			r := signRPC(t, request(t, http.MethodPost, rpcQuery, form), "Plaintext=AA==")
			return r, "Plaintext=AB=="
		}},
		{name: "rpc: body added", want: acs.ErrMismatch, make: func(t *testing.T) (*http.Request, string) {
			r := signRPC(t, request(t, http.MethodPost, rpcQuery, form), "")
			return r, "Plaintext=AB=="
		}},
		{name: "rpc: JSON body, which would not be signed", want: acs.ErrParameters, make: func(t *testing.T) (*http.Request, string) {
			r := signRPC(t, request(t, http.MethodPost, rpcQuery, "application/json"), "")
			return r, `{"Plaintext":"AB=="}`
		}},
		{name: "rpc: body of no type", want: acs.ErrParameters, make: func(t *testing.T) (*http.Request, string) {
			r := signRPC(t, request(t, http.MethodPost, rpcQuery, ""), "")
			return r, "Plaintext=AB=="
		}},

		{name: "v3: other signature", make: v3(replaceAuth("Signature=", "Signature=0")), want: acs.ErrMismatch},
		{name: "v3: unknown key", make: v3(replaceAuth("Credential=testAK", "Credential=other")), want: acs.ErrUnknownKey},
		{name: "v3: RSA", make: v3(replaceAuth("ACS3-HMAC-SHA256", "ACS3-RSA-SHA256")), want: acs.ErrUnsupportedScheme},
		{name: "v3: bearer token", make: v3(func(r *http.Request) { r.Header.Set("Authorization", "Bearer x") }), want: acs.ErrUnsupportedScheme},
		{name: "v3: no authorization", make: v3(func(r *http.Request) { r.Header.Del("Authorization") }), want: acs.ErrMissingSignature},
		{name: "v3: authorization twice", make: v3(func(r *http.Request) { r.Header.Add("Authorization", "x") }), want: acs.ErrDuplicate},
		{name: "v3: no fields", make: v3(func(r *http.Request) { r.Header.Set("Authorization", "ACS3-HMAC-SHA256") }), want: acs.ErrMalformed},
		{name: "v3: no credential", make: v3(replaceAuth("Credential=testAK,", "")), want: acs.ErrMalformed},
		{name: "v3: empty credential", make: v3(replaceAuth("Credential=testAK,", "Credential=,")), want: acs.ErrMalformed},
		{name: "v3: unknown field", make: v3(replaceAuth("Credential=testAK,", "Credential=testAK,Extra=1,")), want: acs.ErrMalformed},
		{name: "v3: field twice", make: v3(replaceAuth("Credential=testAK,", "Credential=testAK,Credential=testAK,")), want: acs.ErrDuplicate},
		{name: "v3: signed header twice", make: v3(replaceAuth("host;", "host;host;")), want: acs.ErrMalformed},
		{name: "v3: signed header in upper case", make: v3(replaceAuth("host;", "Host;")), want: acs.ErrMalformed},
		{name: "v3: signed header missing", make: v3(replaceAuth("host;", "accept;host;")), want: acs.ErrMalformed},
		{name: "v3: host not signed", make: v3(replaceAuth("host;", "")), want: acs.ErrMalformed},
		{name: "v3: action not signed", make: v3(replaceAuth("x-acs-action;", "")), want: acs.ErrMalformed},
		{name: "v3: version not signed", make: v3(replaceAuth(";x-acs-version", "")), want: acs.ErrMalformed},
		{name: "v3: header added", make: v3(func(r *http.Request) { r.Header.Set("x-acs-region-id", "x") }), want: acs.ErrMalformed},
		{name: "v3: action twice", make: v3(func(r *http.Request) { r.Header.Add("x-acs-action", "Encrypt") }), want: acs.ErrDuplicate},
		{name: "v3: other action", make: v3(func(r *http.Request) { r.Header.Set("x-acs-action", "Decrypt") }), want: acs.ErrMismatch},
		{name: "v3: other host", make: v3(func(r *http.Request) { r.Host = "other.example" }), want: acs.ErrMismatch},
		{name: "v3: other verb", make: v3(func(r *http.Request) { r.Method = http.MethodPut }), want: acs.ErrMismatch},
		{name: "v3: path", make: v3(func(r *http.Request) { r.URL.Path = "/x" }), want: acs.ErrPath},
		{name: "v3: parameter changed", make: v3(func(r *http.Request) { set(r, "KeyId", "l") }), want: acs.ErrMismatch},
		{name: "v3: parameter twice", make: v3(func(r *http.Request) { r.URL.RawQuery += "&KeyId=l" }), want: acs.ErrDuplicate},
		{name: "v3: signature in the query as well", make: v3(func(r *http.Request) { set(r, "Signature", "x") }), want: acs.ErrMalformed},
		{name: "v3: other access key beside the token", make: v3(func(r *http.Request) {
			r.Header.Set("x-acs-accesskey-id", "other")
			replaceAuth("host;", "host;x-acs-accesskey-id;")(r)
		}), want: acs.ErrMalformed},
		{name: "v3: no date", make: v3(func(r *http.Request) { r.Header.Del("x-acs-date"); replaceAuth("x-acs-date;", "")(r) }), want: acs.ErrMissingTimestamp},
		{name: "v3: other date", make: v3(func(r *http.Request) { r.Header.Set("x-acs-date", "2026-11-23T07:19:05Z") }), want: acs.ErrMismatch},
		{name: "v3: bad date", make: v3(func(r *http.Request) { r.Header.Set("x-acs-date", "yesterday") }), want: acs.ErrTimestampFormat},
		{name: "v3: no nonce", make: v3(func(r *http.Request) {
			r.Header.Del("x-acs-signature-nonce")
			replaceAuth("x-acs-signature-nonce;", "")(r)
		}), want: acs.ErrMissingNonce},
		{name: "v3: other nonce", make: v3(func(r *http.Request) { r.Header.Set("x-acs-signature-nonce", "nonce-2") }), want: acs.ErrMismatch},
		{name: "v3: stale", make: v3(func(*http.Request) {}), after: acs.Window + time.Second, want: acs.ErrExpired},
		{name: "v3: of the future", make: v3(func(*http.Request) {}), after: -acs.Window - time.Second, want: acs.ErrExpired},
		{name: "v3: no hash", make: v3(func(r *http.Request) {
			r.Header.Del("x-acs-content-sha256")
			replaceAuth("x-acs-content-sha256;", "")(r)
		}), want: acs.ErrMismatch},
		{name: "v3: hash of another body", make: v3(func(r *http.Request) { r.Header.Set("x-acs-content-sha256", strings.Repeat("0", 64)) }), want: acs.ErrMismatch},
		{name: "v3: unsigned payload", make: v3(func(r *http.Request) { r.Header.Set("x-acs-content-sha256", "UNSIGNED-PAYLOAD") }), want: acs.ErrMismatch},
		{name: "v3: body changed", want: acs.ErrMismatch, make: func(t *testing.T) (*http.Request, string) {
			return signV3(t, request(t, http.MethodPost, "", form), "KeyId=k"), "KeyId=l"
		}},
		{name: "v3: body added", want: acs.ErrMismatch, make: func(t *testing.T) (*http.Request, string) {
			return signV3(t, request(t, http.MethodPost, "", form), ""), "KeyId=k"
		}},
		{name: "v3: content type not signed", want: acs.ErrMalformed, make: func(t *testing.T) (*http.Request, string) {
			r := signV3(t, request(t, http.MethodPost, "", form), "KeyId=k")
			replaceAuth("content-type;", "")(r)
			return r, "KeyId=k"
		}},
		{name: "v3: content type twice", want: acs.ErrDuplicate, make: func(t *testing.T) (*http.Request, string) {
			r := signV3(t, request(t, http.MethodPost, "", form), "KeyId=k")
			r.Header.Add("Content-Type", "application/json")
			return r, "KeyId=k"
		}},
		{name: "v3: form read as JSON", want: acs.ErrMismatch, make: func(t *testing.T) (*http.Request, string) {
			r := signV3(t, request(t, http.MethodPost, "", form), `{"KeyId":"k"}`)
			r.Header.Set("Content-Type", "application/json")
			return r, `{"KeyId":"k"}`
		}},
		{name: "v3: binary body", want: acs.ErrParameters, make: func(t *testing.T) (*http.Request, string) {
			r := signV3(t, request(t, http.MethodPost, "", form), "KeyId=k")
			r.Header.Set("Content-Type", "application/octet-stream")
			return r, "KeyId=k"
		}},
		{name: "v3: parameter in query and body", want: acs.ErrDuplicate, make: func(t *testing.T) (*http.Request, string) {
			return signV3(t, request(t, http.MethodPost, "KeyId=k", form), ""), "KeyId=k"
		}},

		{name: "v4: bare credential", make: v3(replaceAuth("ACS3-HMAC-SHA256 Credential=testAK", v4)), want: acs.ErrMalformed},
		{name: "v4: other terminator", make: v3(replaceAuth("ACS3-HMAC-SHA256 Credential=testAK", v4+"/20261123/r/Kms/aws4_request")), want: acs.ErrMalformed},
		{name: "v4: other day", make: v3(replaceAuth("ACS3-HMAC-SHA256 Credential=testAK", v4+"/20261122/r/Kms/aliyun_v4_request")), want: acs.ErrMismatch},
		{name: "v4: no day", make: v3(replaceAuth("ACS3-HMAC-SHA256 Credential=testAK", v4+"//r/Kms/aliyun_v4_request")), want: acs.ErrMismatch},
		{name: "v4: other product", make: v3(replaceAuth("ACS3-HMAC-SHA256 Credential=testAK", v4+"/20261123/r/Ecs/aliyun_v4_request")), want: acs.ErrMismatch},
		{name: "v4: signed by V3", make: v3(replaceAuth("ACS3-HMAC-SHA256 Credential=testAK", v4+"/20261123/r/Kms/aliyun_v4_request")), want: acs.ErrMismatch},
		{name: "v4: no key", make: v3(replaceAuth("ACS3-HMAC-SHA256 Credential=testAK", "ACS4-HMAC-SHA256 Credential=/20261123/r/Kms/aliyun_v4_request")), want: acs.ErrMissingKeyID},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, body := tc.make(t)
			got, id, err := acs.Verify(r, []byte(body), lookup, at.Add(tc.after))
			require.ErrorIs(t, err, tc.want)
			require.Zero(t, id)
			got.Format = ""
			require.Zero(t, got)
			var e *acs.Error
			require.ErrorAs(t, err, &e)
			require.NotContains(t, err.Error(), testSecret)
		})
	}
}

func TestWindowIsInclusive(t *testing.T) {
	r := signV3(t, request(t, http.MethodGet, "", ""), "")
	for _, now := range []time.Time{at.Add(-acs.Window), at, at.Add(acs.Window)} {
		_, _, err := acs.Verify(r, nil, lookup, now)
		require.NoError(t, err)
	}
}

func TestEmptySecretIsNoSecret(t *testing.T) {
	r := request(t, http.MethodGet, "", "")
	require.NoError(t, acs.SignV3(r, nil, acs.Credential{AccessKeyID: testID}, at, "n"))
	_, _, err := acs.Verify(r, nil, func(string) ([]byte, bool) { return nil, true }, at)
	require.ErrorIs(t, err, acs.ErrUnknownKey)
}

// A JSON body carries what a query would, so the server need not care.
func TestJSONBody(t *testing.T) {
	const contentType = "application/json; charset=utf-8"
	for _, tc := range []struct {
		body string
		want url.Values // nil: refused
	}{
		{`{}`, url.Values{}},
		{` { "KeyId" : "k\u00e9\n" } `, url.Values{"KeyId": {"ké\n"}}},
		{`{"N":10000000000000000001,"F":1.50,"B":true,"Z":null}`, url.Values{"N": {"10000000000000000001"}, "F": {"1.50"}, "B": {"true"}}},
		{`{"EncryptionContext":{ "a" : "b" },"L":[ 1 ]}`, url.Values{"EncryptionContext": {`{"a":"b"}`}, "L": {"[1]"}}},
		{`{"KeyId":"k","KeyId":"l"}`, nil},
		{`{"KeyId":"k"} {}`, nil},
		{`{"KeyId":"k"`, nil},
		{`{"KeyId"}`, nil},
		{`["KeyId","k"]`, nil},
		{`"KeyId"`, nil},
		{"{\"KeyId\":\"\xff\"}", nil},
		{` `, nil},
	} {
		t.Run(tc.body, func(t *testing.T) {
			r := request(t, http.MethodPost, "Format=xml", contentType)
			if tc.want == nil {
				err := acs.SignV3(r, []byte(tc.body), credential(), at, "n")
				var e *acs.Error
				require.ErrorAs(t, err, &e)
				require.Contains(t, []acs.Kind{acs.ErrDuplicate, acs.ErrParameters}, e.Kind)
				return
			}
			signV3(t, r, tc.body)
			got, _, err := acs.Verify(r, []byte(tc.body), lookup, at)
			require.NoError(t, err)
			require.Equal(t, acs.Request{
				Scheme: acs.ACS3, Action: "Encrypt", Version: "2016-01-20", Format: "xml", Params: tc.want,
			}, got)
		})
	}
}

// The headers of the same names mean nothing in the RPC scheme, which does
// not sign them.
func TestRPCIgnoresHeaders(t *testing.T) {
	r := signRPC(t, request(t, http.MethodPost, "Action=Encrypt&Version=2016-01-20&KeyId=k", ""), "")
	r.Header.Set("x-acs-action", "DeleteKeyMaterial")
	r.Header.Set("x-acs-version", "2099-01-01")
	r.Header.Set("Authorization", "Basic eDp5")
	got, _, err := acs.Verify(r, nil, lookup, at)
	require.NoError(t, err)
	require.Equal(t, "Encrypt", got.Action)
	require.Equal(t, "2016-01-20", got.Version)
}

// A server must answer in the client's format even what it cannot read.
func TestVerifyAnswersFormatWithAnError(t *testing.T) {
	r := request(t, http.MethodGet, "Format=XML&KeyId=k", "")
	got, _, err := acs.Verify(r, nil, lookup, at)
	require.ErrorIs(t, err, acs.ErrMissingSignature)
	require.Equal(t, acs.Request{Format: "XML"}, got)

	const body = "Action=Encrypt&Format=XML"
	r = signRPC(t, request(t, http.MethodPost, "", form), body)
	got, _, err = acs.Verify(r, []byte(body), lookup, at.Add(time.Hour))
	require.ErrorIs(t, err, acs.ErrExpired)
	require.Equal(t, acs.Request{Format: "XML"}, got)
}

// What is outside the body says whose request it is, or that only the body can
// say.
func TestAccessKeyIDBeforeTheBody(t *testing.T) {
	for _, rec := range recordings() {
		t.Run(rec.name, func(t *testing.T) {
			r, body := receive(t, rec.raw)
			id, err := acs.AccessKeyID(r)
			require.NoError(t, err)
			if bytes.Contains(body, []byte("AccessKeyId=")) {
				require.Empty(t, id)
				return
			}
			require.Equal(t, testID, id)
		})
	}
	for name, tc := range map[string]struct {
		query, authorization, path string
		want                       error
	}{
		"in the body, if anywhere": {},
		"for a proxy":              {authorization: "Basic eDp5"},
		"another path":             {path: "//", want: acs.ErrPath},
		"malformed header":         {authorization: "ACS3-HMAC-SHA256 Credential=testAK", want: acs.ErrMalformed},
		"no key in the header":     {authorization: "ACS4-HMAC-SHA256 Credential=/20261123/r/Kms/aliyun_v4_request,SignedHeaders=host,Signature=00", want: acs.ErrMissingKeyID},
		"no scope in the header":   {authorization: "ACS4-HMAC-SHA256 Credential=testAK,SignedHeaders=host,Signature=00", want: acs.ErrMalformed},
		"two keys":                 {query: "AccessKeyId=a&AccessKeyId=b", want: acs.ErrDuplicate},
		"no query":                 {query: "%zz", want: acs.ErrParameters},
	} {
		t.Run(name, func(t *testing.T) {
			r := request(t, http.MethodPost, tc.query, form)
			if tc.authorization != "" {
				r.Header.Set("Authorization", tc.authorization)
			}
			if tc.path != "" {
				r.URL.Path = tc.path
			}
			id, err := acs.AccessKeyID(r)
			require.Empty(t, id)
			if tc.want == nil {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, tc.want)
			_, _, err = acs.Verify(r, nil, lookup, at)
			require.ErrorIs(t, err, tc.want, "and so says Verify")
		})
	}
}

func TestSigningTwiceIsRefused(t *testing.T) {
	r := signRPC(t, request(t, http.MethodGet, "Action=ListKeys", ""), "")
	query := r.URL.RawQuery
	require.ErrorIs(t, acs.SignRPC(r, nil, credential(), at, "n"), acs.ErrDuplicate)
	require.Equal(t, query, r.URL.RawQuery)

	// A client that tries again signs anew; only the last signature stays.
	r = signV3(t, request(t, http.MethodGet, "", ""), "")
	require.NoError(t, acs.SignV3(r, nil, credential(), at, "nonce-2"))
	_, id, err := acs.Verify(r, nil, lookup, at)
	require.NoError(t, err)
	require.Equal(t, "nonce-2", id.Nonce)
}

func TestSecretIsNeverPrinted(t *testing.T) {
	secret := "a-secret-of-the-test"
	cred := acs.Credential{AccessKeyID: "id", Secret: acs.NewSecret([]byte(secret))}
	hidden := struct{ c acs.Credential }{cred}
	var b bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		fmt.Fprintf(&b, verb+verb+verb, cred, &cred, hidden)
		fmt.Fprintf(&b, verb, cred.Secret)
	}
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "c", cred, "s", cred.Secret)
	slog.New(slog.NewTextHandler(&b, nil)).Info("x", "c", cred, "s", cred.Secret)
	text, err := json.Marshal(cred)
	require.NoError(t, err)
	b.Write(text)
	fmt.Fprint(&b, errors.Join(fmt.Errorf("%v", cred)))
	for _, leak := range []string{secret, fmt.Sprintf("%x", secret), fmt.Sprintf("%X", secret), fmt.Sprint([]byte(secret))} {
		require.NotContains(t, b.String(), leak)
	}
	require.Equal(t, secret, string(cred.Secret.Bytes()))
	require.Empty(t, acs.Secret{}.Bytes())
}
