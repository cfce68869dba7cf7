package acs_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	openapi "github.com/alibabacloud-go/darabonba-openapi/v2/client"
	tea "github.com/alibabacloud-go/kms-20160120/v3/client"
	"github.com/aliyun/alibaba-cloud-sdk-go/sdk/requests"
	v1 "github.com/aliyun/alibaba-cloud-sdk-go/services/kms"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
)

// verifier is a server that answers requests it can verify, and remembers the
// last of them.
type verifier struct {
	mu     sync.Mutex
	last   acs.Request
	nonces map[string]bool
}

func (v *verifier) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = v.accept(r, body)
	}
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"Code":"Refused","Message":"`+err.Error()+`","RequestId":"r"}`)
		return
	}
	_, _ = io.WriteString(w, `{"RequestId":"r"}`)
}

func (v *verifier) accept(r *http.Request, body []byte) error {
	req, id, err := acs.Verify(r, body, lookup, time.Now())
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.nonces[id.Nonce] {
		return acs.ErrMismatch
	}
	v.nonces[id.Nonce] = true
	v.last = req
	return nil
}

// serve starts a verifier and answers it with its host and port.
func serve(t *testing.T) (*verifier, string) {
	t.Helper()
	// The v1 SDK sends even loopback through a proxy.
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"} {
		t.Setenv(name, "")
	}
	v := &verifier{nonces: make(map[string]bool)}
	s := httptest.NewServer(v)
	t.Cleanup(s.Close)
	return v, strings.TrimPrefix(s.URL, "http://")
}

const (
	clientToken   = "to+k/en== ~*!'()é"
	clientContext = `{"a b":"c&d=é"}`
)

func TestV1SDK(t *testing.T) {
	v, endpoint := serve(t)
	client, err := v1.NewClientWithAccessKey("cn-hangzhou", testID, testSecret)
	require.NoError(t, err)
	for _, method := range []string{requests.GET, requests.POST} {
		t.Run(method, func(t *testing.T) {
			r := v1.CreateImportKeyMaterialRequest()
			r.Method, r.Domain, r.Scheme = method, endpoint, "http"
			r.KeyId, r.ImportToken, r.EncryptedKeyMaterial = "key-1", clientToken, "AB+/cd=="
			r.KeyMaterialExpireUnix = requests.NewInteger(0)
			_, err := client.ImportKeyMaterial(r)
			require.NoError(t, err)
			require.Equal(t, acs.Request{
				Scheme: acs.RPC, Action: "ImportKeyMaterial", Version: "2016-01-20", Format: "JSON",
				Params: importParams(clientToken, "RegionId", "cn-hangzhou"),
			}, v.last)
		})
	}
	t.Run("form body", func(t *testing.T) {
		r := requests.NewCommonRequest()
		r.Method, r.Domain, r.Scheme = requests.POST, endpoint, "http"
		r.Version, r.ApiName = "2016-01-20", "ImportKeyMaterial"
		for name, values := range importParams(clientToken) {
			r.FormParams[name] = values[0]
		}
		_, err := client.ProcessCommonRequest(r)
		require.NoError(t, err)
		require.Equal(t, importParams(clientToken, "RegionId", "cn-hangzhou"), v.last.Params)
	})
	t.Run("wrong secret", func(t *testing.T) {
		client, err := v1.NewClientWithAccessKey("cn-hangzhou", testID, testSecret+"x")
		require.NoError(t, err)
		r := v1.CreateListKeysRequest()
		r.Domain, r.Scheme = endpoint, "http"
		_, err = client.ListKeys(r)
		require.ErrorContains(t, err, acs.ErrMismatch.Error())
	})
}

func TestTeaSDK(t *testing.T) {
	v, endpoint := serve(t)
	for _, tc := range []struct {
		name   string
		config openapi.Config
		want   acs.Scheme
		format string
	}{
		{name: "default", want: acs.ACS3},
		{name: "security token", config: openapi.Config{SecurityToken: ptr("CAES+/=")}, want: acs.ACS3},
		{name: "v2", config: openapi.Config{SignatureAlgorithm: ptr("v2")}, want: acs.RPC, format: "json"},
		{name: "v4", config: openapi.Config{SignatureVersion: ptr("v4")}, want: acs.ACS4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.config.AccessKeyId, tc.config.AccessKeySecret = ptr(testID), ptr(testSecret)
			tc.config.Endpoint, tc.config.Protocol, tc.config.RegionId = ptr(endpoint), ptr("http"), ptr("cn-hangzhou")
			client, err := tea.NewClient(&tc.config)
			require.NoError(t, err)
			_, err = client.ImportKeyMaterial(&tea.ImportKeyMaterialRequest{
				KeyId: ptr("key-1"), ImportToken: ptr(clientToken), EncryptedKeyMaterial: ptr("AB+/cd=="),
				KeyMaterialExpireUnix: ptr(int64(0)),
			})
			require.NoError(t, err)
			require.Equal(t, acs.Request{
				Scheme: tc.want, Action: "ImportKeyMaterial", Version: "2016-01-20", Format: tc.format,
				Params: importParams(clientToken),
			}, v.last)

			_, err = client.Encrypt(&tea.EncryptRequest{
				KeyId: ptr("key-1"), Plaintext: ptr(""), EncryptionContext: map[string]any{"a b": "c&d=é"},
			})
			require.NoError(t, err)
			require.JSONEq(t, clientContext, v.last.Params.Get("EncryptionContext"))
			require.Equal(t, []string{""}, v.last.Params["Plaintext"])
		})
	}
}

func ptr[T any](v T) *T { return &v }

// Our own client over a real connection, where the Go HTTP stack may add what
// was not signed.
func TestOwnClientOverHTTP(t *testing.T) {
	v, endpoint := serve(t)
	for _, tc := range []struct {
		name, query, contentType, body string
	}{
		{name: "query", query: importParams(clientToken).Encode()},
		{name: "form body", contentType: form, body: importParams(clientToken).Encode()},
	} {
		for _, scheme := range []acs.Scheme{acs.RPC, acs.ACS3} {
			t.Run(tc.name+" "+string(scheme), func(t *testing.T) {
				query, err := url.ParseQuery(tc.query)
				require.NoError(t, err)
				if scheme == acs.RPC {
					query.Set("Action", "ImportKeyMaterial")
				}
				r, err := http.NewRequest(http.MethodPost, "http://"+endpoint+"/?"+query.Encode(), strings.NewReader(tc.body))
				require.NoError(t, err)
				if tc.contentType != "" {
					r.Header.Set("Content-Type", tc.contentType)
				}
				if scheme == acs.RPC {
					require.NoError(t, acs.SignRPC(r, []byte(tc.body), credential(), time.Now(), t.Name()))
				} else {
					r.Header.Set("x-acs-action", "ImportKeyMaterial")
					require.NoError(t, acs.SignV3(r, []byte(tc.body), credential(), time.Now(), t.Name()))
				}
				answer, err := http.DefaultClient.Do(r)
				require.NoError(t, err)
				defer func() { require.NoError(t, answer.Body.Close()) }()
				require.Equal(t, http.StatusOK, answer.StatusCode)
				require.Equal(t, "ImportKeyMaterial", v.last.Action)
				require.Equal(t, importParams(clientToken), v.last.Params)
			})
		}
	}
}
