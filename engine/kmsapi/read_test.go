package kmsapi_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/kmsapi"
)

// slowBody is a body that says when somebody begins to read it, and ends only
// when it is told to.
type slowBody struct{ begun, end chan struct{} }

func (b slowBody) Read([]byte) (int, error) {
	b.begun <- struct{}{}
	<-b.end
	return 0, io.EOF
}

func (slowBody) Close() error { return nil }

// Whoever sends bodies slowly, with no access key to show, uses up neither the
// memory of the server nor the turn of who has one.
func TestBodiesReadAtATimeAreBounded(t *testing.T) {
	const bound = 64
	s := newService(t)
	slow := slowBody{begun: make(chan struct{}), end: make(chan struct{})}
	send := func(ctx context.Context) *httptest.ResponseRecorder {
		req := httptest.NewRequest(http.MethodPost, "/", slow).WithContext(ctx)
		req.ContentLength = -1
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		return w
	}
	var wg sync.WaitGroup
	for range bound {
		wg.Go(func() { send(t.Context()) })
	}
	for range bound {
		<-slow.begun
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.Equal(t, http.StatusServiceUnavailable, send(ctx).Code, "one more waits until it is tired of it")

	// With an access key, in the query and in the header.
	form := url.Values{"KeyId": {keyID}}.Encode()
	for _, sign := range []func(*http.Request, []byte) error{
		func(r *http.Request, body []byte) error {
			r.URL.RawQuery = "Action=DescribeKey&Version=" + kmsapi.Version
			return acs.SignRPC(r, body, s.cred, s.now, uuid.NewString())
		},
		func(r *http.Request, body []byte) error {
			r.Header.Set("X-Acs-Action", "DescribeKey")
			r.Header.Set("X-Acs-Version", kmsapi.Version)
			return acs.SignV3(r, body, s.cred, s.now, uuid.NewString())
		},
	} {
		req := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(form))
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		require.NoError(t, sign(req, []byte(form)))
		status, fields := s.send(t, req)
		require.Equal(t, http.StatusOK, status, fields)
	}
	close(slow.end)
	wg.Wait()
	wg.Go(func() { <-slow.begun })
	require.Equal(t, http.StatusBadRequest, send(t.Context()).Code, "all turns were given back")
	wg.Wait()
}

// The largest honest body fits.
func TestLargestBody(t *testing.T) {
	s := newService(t)
	for length, status := range map[int]int{engine.MaxDescription: http.StatusOK, 2 * engine.MaxDescription: http.StatusBadRequest} {
		form := url.Values{"Origin": {"EXTERNAL"}, "Description": {strings.Repeat("\U0001f511", length)}}.Encode()
		req := httptest.NewRequest(http.MethodPost, "/?Action=CreateKey&Version="+kmsapi.Version, strings.NewReader(form))
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		require.NoError(t, acs.SignRPC(req, []byte(form), s.cred, s.now, uuid.NewString()))
		answered, fields := s.send(t, req)
		require.Equal(t, status, answered, fields)
	}
}

// Who sends a name twice has not shown to be anybody: it is not sent back.
func TestNamesOfStrangersAreNotSentBack(t *testing.T) {
	const name = "Injected"
	for what, change := range map[string]func(*http.Request){
		"parameter": func(r *http.Request) { r.URL.RawQuery = name + "=1&" + name + "=2" },
		"header": func(r *http.Request) {
			r.Header.Set("Authorization", "ACS3-HMAC-SHA256 Credential=testid,SignedHeaders=host,Signature=00")
			r.Header.Set("X-Acs-"+name, "1")
		},
		"header, twice": func(r *http.Request) {
			r.Header.Set("Authorization", "ACS3-HMAC-SHA256 Credential=testid,SignedHeaders="+strings.ToLower(name)+",Signature=00")
			r.Header[name] = []string{"1", "2"}
		},
	} {
		t.Run(what, func(t *testing.T) {
			req := httptest.NewRequest(http.MethodPost, "/", http.NoBody)
			change(req)
			w := httptest.NewRecorder()
			newService(t).ServeHTTP(w, req)
			require.Equal(t, http.StatusBadRequest, w.Code)
			require.NotContains(t, strings.ToLower(w.Body.String()), strings.ToLower(name))
		})
	}
}
