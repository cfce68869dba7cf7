package kmsapi_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/kmsapi"
)

func TestSignedRequestsOfEveryKind(t *testing.T) {
	s := newService(t)
	form := url.Values{"KeyId": {keyID}, "Plaintext": {"YQ=="}}
	common := url.Values{"Action": {"Encrypt"}, "Version": {kmsapi.Version}}
	all := url.Values{"Action": {"Encrypt"}, "Version": {kmsapi.Version}, "KeyId": {keyID}, "Plaintext": {"YQ=="}}

	for name, c := range map[string]struct {
		method, query, body string
		v3                  bool
	}{
		"RPC, POST, query":         {http.MethodPost, all.Encode(), "", false},
		"RPC, GET":                 {http.MethodGet, all.Encode(), "", false},
		"RPC, POST, form (Tea)":    {http.MethodPost, common.Encode(), form.Encode(), false},
		"ACS3, POST, query (SDK)":  {http.MethodPost, form.Encode(), "", true},
		"ACS3, GET":                {http.MethodGet, form.Encode(), "", true},
		"ACS3, POST, form":         {http.MethodPost, "", form.Encode(), true},
		"RPC, with ACS3's headers": {http.MethodPost, all.Encode(), "", false},
	} {
		t.Run(name, func(t *testing.T) {
			req := httptest.NewRequest(c.method, "/?"+c.query, strings.NewReader(c.body))
			if c.body != "" {
				req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			}
			if c.v3 || strings.Contains(name, "headers") {
				req.Header.Set("x-acs-action", "Encrypt")
				req.Header.Set("x-acs-version", kmsapi.Version)
			}
			if c.v3 {
				require.NoError(t, acs.SignV3(req, []byte(c.body), s.cred, s.now, uuid.NewString()))
			} else {
				require.NoError(t, acs.SignRPC(req, []byte(c.body), s.cred, s.now, uuid.NewString()))
			}
			status, fields := s.send(t, req)
			require.Equal(t, http.StatusOK, status, fields)
			require.Equal(t, blobText, fields["CiphertextBlob"])
		})
	}
}

func TestForgedAndStale(t *testing.T) {
	s := newService(t)
	describe := params("KeyId", keyID)
	for name, c := range map[string]struct {
		request func() *http.Request
		status  int
		code    string
	}{
		"wrong secret": {func() *http.Request {
			other := *s
			other.cred.Secret = acs.NewSecret([]byte("guess"))
			return other.request(t, "DescribeKey", describe)
		}, 400, "SignatureDoesNotMatch"},
		"unknown access key": {func() *http.Request {
			other := *s
			other.cred.AccessKeyID = "nobody"
			return other.request(t, "DescribeKey", describe)
		}, 404, "InvalidAccessKeyId.NotFound"},
		"tampered": {func() *http.Request {
			req := s.request(t, "DescribeKey", describe)
			req.URL.RawQuery = strings.Replace(req.URL.RawQuery, "DescribeKey", "DisableKey", 1)
			return req
		}, 400, "SignatureDoesNotMatch"},
		"other method": {func() *http.Request {
			req := s.request(t, "DescribeKey", describe)
			req.Method = http.MethodGet
			return req
		}, 400, "SignatureDoesNotMatch"},
		"too old": {func() *http.Request {
			other := *s
			other.now = s.now.Add(-15*time.Minute - time.Second)
			return other.request(t, "DescribeKey", describe)
		}, 400, "InvalidTimeStamp.Expired"},
		"too early": {func() *http.Request {
			other := *s
			other.now = s.now.Add(15*time.Minute + time.Second)
			return other.request(t, "DescribeKey", describe)
		}, 400, "InvalidTimeStamp.Expired"},
		"no timestamp": {func() *http.Request {
			req := s.request(t, "DescribeKey", describe)
			q := req.URL.Query()
			q.Del("Timestamp")
			req.URL.RawQuery = q.Encode()
			return req
		}, 400, "IllegalTimestamp"},
		"no time": {func() *http.Request {
			req := s.request(t, "DescribeKey", describe)
			q := req.URL.Query()
			q.Set("Timestamp", "yesterday")
			req.URL.RawQuery = q.Encode()
			return req
		}, 400, "InvalidTimeStamp.Format"},
		"no nonce": {func() *http.Request {
			req := s.request(t, "DescribeKey", describe)
			q := req.URL.Query()
			q.Del("SignatureNonce")
			req.URL.RawQuery = q.Encode()
			return req
		}, 400, "IncompleteSignature"},
	} {
		t.Run(name, func(t *testing.T) {
			status, fields := s.send(t, c.request())
			require.Equal(t, c.status, status)
			require.Equal(t, c.code, fields["Code"])
		})
	}
	require.Empty(t, s.engine.calls)
	require.Empty(t, s.nonces.seen)
}

// The string that was signed holds every parameter; it must not come back.
func TestMismatchEchoesNoParameter(t *testing.T) {
	s := newService(t)
	req := s.request(t, "Encrypt", params("KeyId", keyID, "Plaintext", "c2VjcmV0"))
	s.cred.Secret = acs.NewSecret([]byte("another"))
	_, fields := s.send(t, req)
	require.Equal(t, "SignatureDoesNotMatch", fields["Code"])
	require.Equal(t, "Specified signature is not matched with our calculation.", fields["Message"])
	require.NotContains(t, fields["Recommend"], "c2VjcmV0")
}

func TestNonceIsGoodOnce(t *testing.T) {
	s := newService(t)
	req := s.request(t, "DescribeKey", params("KeyId", keyID))
	status, _ := s.send(t, req.Clone(t.Context()))
	require.Equal(t, http.StatusOK, status)

	status, fields := s.send(t, req.Clone(t.Context()))
	require.Equal(t, http.StatusBadRequest, status)
	require.Equal(t, "SignatureNonceUsed", fields["Code"])
	require.Equal(t, "Specified signature nonce was used already.", fields["Message"])
	require.Len(t, s.engine.calls, 1)

	for id, until := range s.nonces.seen {
		require.True(t, strings.HasPrefix(id, "testid "))
		require.True(t, until.After(s.now.Add(acs.Window)), "remembered for as long as the signature is good")
	}
	s.now = s.now.Add(acs.Window + time.Second)
	_, fields = s.send(t, req.Clone(t.Context()))
	require.Equal(t, "InvalidTimeStamp.Expired", fields["Code"], "afterwards the timestamp refuses it")
}

// A clock that is ahead makes a signature that is good for longer from now.
func TestNonceOfAClockAheadIsKeptLonger(t *testing.T) {
	s := newService(t)
	client := *s
	client.now = s.now.Add(acs.Window)
	req := client.request(t, "DescribeKey", params("KeyId", keyID))
	status, _ := s.send(t, req.Clone(t.Context()))
	require.Equal(t, http.StatusOK, status)
	s.now = client.now.Add(acs.Window) // the last moment at which it is good
	_, fields := s.send(t, req.Clone(t.Context()))
	require.Equal(t, "SignatureNonceUsed", fields["Code"])
}

func TestReplayInParallel(t *testing.T) {
	s := newService(t)
	req := s.request(t, "DescribeKey", params("KeyId", keyID))
	var good atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			w := httptest.NewRecorder()
			s.ServeHTTP(w, req.Clone(context.Background()))
			if w.Code == http.StatusOK {
				good.Add(1)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, good.Load())
	require.Len(t, s.engine.calls, 1)
}

// What cannot be remembered is not done: it could be done again.
func TestNonceThatIsNotDurable(t *testing.T) {
	s := newService(t)
	s.nonces.err = errors.New("disk full")
	status, fields := s.do(t, "DescribeKey", params("KeyId", keyID))
	require.Equal(t, http.StatusServiceUnavailable, status)
	require.Equal(t, "ServiceUnavailableTemporary", fields["Code"])
	require.Empty(t, s.engine.calls)
}

// A request that its parameters refuse was heard all the same.
func TestRefusedRequestUsesItsNonce(t *testing.T) {
	s := newService(t)
	req := s.request(t, "DescribeKey", nil)
	_, fields := s.send(t, req.Clone(t.Context()))
	require.Equal(t, "MissingParameter", fields["Code"])
	_, fields = s.send(t, req.Clone(t.Context()))
	require.Equal(t, "SignatureNonceUsed", fields["Code"])
}
