package kmsapi_test

import (
	"encoding/json"
	"encoding/xml"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
)

// answered requires an answer that a client can read.
func answered(t *testing.T, w *httptest.ResponseRecorder) {
	var answer struct {
		RequestID string `json:"RequestId" xml:"RequestId"`
		Code      string
	}
	if strings.HasPrefix(w.Header().Get("Content-Type"), "text/xml") {
		require.NoError(t, xml.Unmarshal(w.Body.Bytes(), &answer))
	} else {
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &answer))
	}
	require.Len(t, answer.RequestID, 36)
	require.Equal(t, w.Code >= 400, answer.Code != "")
	require.NotEqual(t, http.StatusInternalServerError, w.Code, w.Body.String())
}

// Nobody who does not know the secret gets as far as the engine or the store.
func FuzzUnsigned(f *testing.F) {
	f.Add("POST", "Action=ListKeys&Version=2016-01-20", "", "", "")
	f.Add("GET", "AccessKeyId=testid&Action=CreateKey&Format=XML&Version=2016-01-20&Signature=x&SignatureMethod=HMAC-SHA1&SignatureNonce=n&SignatureVersion=1.0&Timestamp=2026-11-23T07:15:45Z", "", "", "")
	f.Add("POST", "", "KeyId=a&KeyId=b", "application/x-www-form-urlencoded", "ACS3-HMAC-SHA256 Credential=testid,SignedHeaders=host,Signature=00")
	f.Add("POST", "Format=xml", `{"KeyId":"a"}`, "application/json", "Basic x")
	f.Fuzz(func(t *testing.T, method, query, body, contentType, authorization string) {
		s := newService(t)
		req := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
		req.Method, req.URL.RawQuery = method, query
		req.Header["Content-Type"] = []string{contentType}
		if authorization != "" {
			req.Header["Authorization"] = []string{authorization}
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		answered(t, w)
		require.GreaterOrEqual(t, w.Code, 400)
		require.Empty(t, s.engine.calls)
		require.Empty(t, s.nonces.seen)
	})
}

// Whoever does know it gets a readable answer, whatever is asked.
func FuzzSigned(f *testing.F) {
	f.Add("Encrypt", "KeyId="+keyID+"&Plaintext=YQ%3D%3D&EncryptionContext=%7B%22a%22%3A%22b%22%7D")
	f.Add("ImportKeyMaterial", "KeyId=alias/x&EncryptedKeyMaterial=YQ%3D%3D&ImportToken=%0AYQ%3D%3D&KeyMaterialExpireUnix=99999999999&ExpectKeyCheckValue=00")
	f.Add("ListKeys", "Format=XML&Filters=%5B%7B%22Key%22%3A%22KeyState%22%2C%22Values%22%3A%5B%22Enabled%22%5D%7D%5D")
	f.Add("CreateKey", "Origin=EXTERNAL&Description=%01%ef%bf%be&Tags=%5B%5D")
	f.Fuzz(func(t *testing.T, action, query string) {
		s := newService(t)
		req := httptest.NewRequest(http.MethodPost, "/", nil)
		req.URL.RawQuery = query
		req.Header["X-Acs-Action"] = []string{action}
		req.Header["X-Acs-Version"] = []string{"2016-01-20"}
		if acs.SignV3(req, nil, s.cred, s.now, uuid.NewString()) != nil {
			return // no client could send it
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		answered(t, w)
	})
}
