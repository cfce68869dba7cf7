package kmsapi_test

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	sdkerrors "github.com/aliyun/alibaba-cloud-sdk-go/sdk/errors"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/kmsapi"
)

// The table of the published API, apart from the one that is tested.
func TestEveryKindOnTheWire(t *testing.T) {
	for kind, want := range map[engine.Kind]struct {
		status        int
		code, message string
	}{
		engine.MissingParameter:   {400, "MissingParameter", `The parameter "KeyId" is needed but not provided.`},
		engine.InvalidParameter:   {400, "InvalidParameter", "The specified parameter KeyId is not valid."},
		engine.InvalidCiphertext:  {400, "InvalidParameter", "The specified parameter CiphertextBlob is not valid."},
		engine.KeyNotFound:        {404, "Forbidden.KeyNotFound", "The specified Key is not found."},
		engine.AliasNotFound:      {404, "Forbidden.AliasNotFound", "The specified Alias is not found."},
		engine.ReceiptNotFound:    {404, "Forbidden.ReceiptNotFound", "The specified Receipt is not found."},
		engine.UnsupportedOrigin:  {400, "Unsupported.Origin", "This key origin is not valid for this api."},
		engine.UnsupportedAlias:   {400, "Unsupported.Alias", "Alias is not valid for this api."},
		engine.UnsupportedOp:      {400, "Rejected.UnsupportedOperation", "Unsupported operation."},
		engine.InvalidKeyMaterial: {400, "InvalidKeyMaterial", "key material is invalid."},
		engine.InvalidImportToken: {400, "InvalidImportToken", "import token is invalid."},
		engine.ExpiredImportToken: {400, "ExpiredImportToken", "import token is expired."},
		engine.StateModified:      {409, "Rejected.StateModifiedFailed", "Keystate modified failed."},
		engine.KeyDisabled:        {409, "Rejected.Disabled", "The request was rejected because the key state is Disabled."},
		engine.KeyPendingDeletion: {409, "Rejected.PendingDeletion", "The request was rejected because the key state is PendingDeletion."},
		engine.KeyPendingImport:   {409, "Rejected.PendingImport", "The request was rejected because the key state is PendingImport."},
		engine.LimitExceeded:      {400, "Rejected.LimitExceeded", "The request was rejected because user create resource limit was exceeded."},
		engine.Unavailable:        {503, "ServiceUnavailableTemporary", "Service Unavailable Temporary."},
		engine.Internal:           {500, "InternalFailure", "Internal Failure."},
		"a kind of tomorrow":      {500, "InternalFailure", "Internal Failure."},
	} {
		t.Run(string(kind), func(t *testing.T) {
			s := newService(t)
			s.engine.err = fmt.Errorf("wrapped: %w", &engine.Error{Kind: kind, Parameter: "KeyId"})
			status, fields := s.do(t, "DescribeKey", params("KeyId", keyID))
			require.Equal(t, want.status, status)
			require.Equal(t, want.code, fields["Code"])
			require.Equal(t, want.message, fields["Message"])
			require.EqualValues(t, want.status, fields["HttpStatus"])
			require.Equal(t, "kms.cn-test", fields["HostId"])
			require.IsType(t, "", fields["Recommend"], "the v1 SDK panics at anything but a string")
			require.Empty(t, fields["Recommend"])
		})
	}
}

func TestHintIsRecommended(t *testing.T) {
	s := newService(t)
	s.engine.err = &engine.Error{Kind: engine.UnsupportedOp, Hint: "this token has no SM4"}
	fields := s.refused(t, "Rejected.UnsupportedOperation", "Encrypt", params("KeyId", keyID, "Plaintext", "YQ=="))
	require.Equal(t, "this token has no SM4", fields["Recommend"])
}

func TestUnknownErrorSaysNothing(t *testing.T) {
	s := newService(t)
	for name, err := range map[string]error{
		"foreign":  errors.New("the database is at /var/lib/keyferry"),
		"internal": &engine.Error{Kind: engine.Internal, Hint: "the database is at /var/lib/keyferry"},
	} {
		t.Run(name, func(t *testing.T) {
			s.engine.err = err
			s.log.Reset()
			fields := s.refused(t, "InternalFailure", "DescribeKey", params("KeyId", keyID))
			require.NotContains(t, fmt.Sprint(fields), "/var/lib")
			require.Contains(t, s.log.String(), "/var/lib", "the operator must see it")
			require.Contains(t, s.log.String(), fields["RequestId"], "and find it by its request id")
			require.Contains(t, s.log.String(), "level=ERROR")
		})
	}
}

func TestPanicIsOneInternalFailure(t *testing.T) {
	s := newService(t)
	fields := s.refused(t, "InternalFailure", "Encrypt", params("KeyId", keyID, "Plaintext", "cGFuaWM="))
	require.Contains(t, s.log.String(), fields["RequestId"])
	require.Contains(t, s.log.String(), "stack=")
	require.NotContains(t, s.log.String(), "quotes the plaintext")
	status, _ := s.do(t, "DescribeKey", params("KeyId", keyID))
	require.Equal(t, http.StatusOK, status)
}

// Whatever the engine knew of a bad blob, and whatever the blob, the client
// gets the same bytes: header by header, over a real connection.
func TestBadKeyMaterialIsOneAnswer(t *testing.T) {
	s := newService(t)
	srv := httptest.NewServer(s)
	defer srv.Close()

	variable := regexp.MustCompile(`(?m)^(Date|X-Acs-Request-Id): .*$|[0-9A-F]{8}-[0-9A-F-]{27}`)
	answer := func(blob, format string, err error) string {
		s.engine.err = err
		req := s.request(t, "ImportKeyMaterial", params("KeyId", keyID, "EncryptedKeyMaterial", blob, "ImportToken", "dG9rZW4=", "Format", format))
		out, reqErr := http.NewRequest(http.MethodPost, srv.URL+"/?"+req.URL.RawQuery, nil)
		require.NoError(t, reqErr)
		res, reqErr := srv.Client().Do(out)
		require.NoError(t, reqErr)
		defer func() { require.NoError(t, res.Body.Close()) }()
		var raw bytes.Buffer
		require.NoError(t, res.Write(&raw))
		return variable.ReplaceAllString(raw.String(), "")
	}
	for _, format := range []string{"JSON", "XML"} {
		want := answer("YQ==", format, &engine.Error{Kind: engine.InvalidKeyMaterial})
		require.Contains(t, want, "400 Bad Request")
		require.Contains(t, want, "key material is invalid.")
		for _, err := range []error{
			&engine.Error{Kind: engine.InvalidKeyMaterial, Hint: "wrong length"},
			&engine.Error{Kind: engine.InvalidKeyMaterial, Parameter: "EncryptedKeyMaterial"},
			fmt.Errorf("did not decrypt: %w", &engine.Error{Kind: engine.InvalidKeyMaterial}),
		} {
			require.Equal(t, want, answer("AAAA", format, err))
			require.Equal(t, want, answer("c29tZXRoaW5nIGxvbmdlcg==", format, err))
		}
	}
}

// The v1 SDK panics on bodies it does not expect.
func TestErrorBodyIsReadByTheV1SDK(t *testing.T) {
	s := newService(t)
	s.engine.err = &engine.Error{Kind: engine.KeyPendingImport, Hint: "import key material first"}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, s.request(t, "Encrypt", params("KeyId", keyID, "Plaintext", "YQ==")))
	err := sdkerrors.NewServerError(w.Code, w.Body.String(), "")
	var server *sdkerrors.ServerError
	require.ErrorAs(t, err, &server)
	require.Equal(t, "Rejected.PendingImport", server.ErrorCode())
	require.Equal(t, "The request was rejected because the key state is PendingImport.", server.Message())
	require.Equal(t, w.Header().Get("x-acs-request-id"), server.RequestId())
	require.Equal(t, "import key material first", server.Recommend())
}

func TestXML(t *testing.T) {
	s := newService(t)
	s.engine.listed = 2
	root := func(t *testing.T, w *httptest.ResponseRecorder) string {
		require.Equal(t, []string{"text/xml;charset=utf-8"}, w.Header()["Content-Type"])
		require.True(t, bytes.HasPrefix(w.Body.Bytes(), []byte(xml.Header)))
		var answer struct {
			XMLName   xml.Name
			RequestID string `xml:"RequestId"`
		}
		require.NoError(t, xml.Unmarshal(w.Body.Bytes(), &answer))
		require.Equal(t, w.Header().Get("x-acs-request-id"), answer.RequestID)
		return answer.XMLName.Local
	}
	t.Run("success", func(t *testing.T) {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, s.request(t, "ListKeys", params("Format", "xml")))
		require.Equal(t, "KMS", root(t, w))
		require.Regexp(t, `<Keys><Key><KeyId>.*</Key><Key>.*</Key></Keys><TotalCount>2</TotalCount>`, w.Body.String())
	})
	t.Run("error", func(t *testing.T) {
		w := httptest.NewRecorder()
		s.ServeHTTP(w, s.request(t, "NoSuchAction", params("Format", "XML")))
		require.Equal(t, "Error", root(t, w))
		require.Contains(t, w.Body.String(), "<HttpStatus>404</HttpStatus><Code>InvalidAction.NotFound</Code>")
	})
	t.Run("before the body is read", func(t *testing.T) {
		req := s.request(t, "ListKeys", params("Format", "XML"))
		req.Method = http.MethodPut
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		require.Equal(t, "Error", root(t, w))
	})
	t.Run("before the signature is known to be good", func(t *testing.T) {
		req := s.request(t, "ListKeys", params("Format", "XML"))
		s.cred.AccessKeyID = "somebody else"
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		require.Equal(t, "Error", root(t, w))
		require.Contains(t, w.Body.String(), "<Code>InvalidAccessKeyId.NotFound</Code>")
	})
}

func TestNothingButTheAPI(t *testing.T) {
	s := newService(t)
	good := s.request(t, "DescribeKey", params("KeyId", keyID))
	for name, c := range map[string]struct {
		change func(*http.Request)
		status int
		code   string
	}{
		"method":     {func(r *http.Request) { r.Method = http.MethodPut }, 403, "UnsupportedHTTPMethod"},
		"head":       {func(r *http.Request) { r.Method = http.MethodHead }, 403, "UnsupportedHTTPMethod"},
		"path":       {func(r *http.Request) { r.URL.Path = "/kms" }, 404, "InvalidAction.NotFound"},
		"unsigned":   {func(r *http.Request) { r.URL.RawQuery = "Action=ListKeys&Version=2016-01-20" }, 400, "IncompleteSignature"},
		"nothing":    {func(r *http.Request) { r.URL.RawQuery = "" }, 400, "IncompleteSignature"},
		"unreadable": {func(r *http.Request) { r.URL.RawQuery = "%zz" }, 400, "ParseRequestParameterException"},
		"twice":      {func(r *http.Request) { r.URL.RawQuery += "&KeyId=other" }, 400, "ParseRequestParameterException"},
		"large body": {func(r *http.Request) {
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(make([]byte, kmsapi.MaxBody+1))), -1
		}, 400, "ParseRequestParameterException"},
		"announced body": {func(r *http.Request) {
			r.Body, r.ContentLength = unreadable{t}, kmsapi.MaxBody+1
		}, 400, "ParseRequestParameterException"},
		"body of a stranger": {func(r *http.Request) {
			r.Body, r.ContentLength = unreadable{t}, -1
			r.URL.RawQuery = strings.Replace(r.URL.RawQuery, "AccessKeyId=testid", "AccessKeyId=stranger", 1)
		}, 404, "InvalidAccessKeyId.NotFound"},
		"body of a method": {func(r *http.Request) { r.Method, r.Body = http.MethodPut, unreadable{t} }, 403, "UnsupportedHTTPMethod"},
		"body of a path":   {func(r *http.Request) { r.URL.Path, r.Body = "//", unreadable{t} }, 404, "InvalidAction.NotFound"},
		"broken body":      {func(r *http.Request) { r.Body = io.NopCloser(brokenReader{}) }, 400, "ParseRequestParameterException"},
	} {
		t.Run(name, func(t *testing.T) {
			req := good.Clone(t.Context())
			c.change(req)
			status, fields := s.send(t, req)
			require.Equal(t, c.status, status)
			require.Equal(t, c.code, fields["Code"])
		})
	}
	require.Empty(t, s.engine.calls)
	require.Empty(t, s.nonces.seen, "what is refused unverified must not fill the store")
}

// unreadable is a body that must not be read.
type unreadable struct{ t *testing.T }

func (u unreadable) Read([]byte) (int, error) {
	u.t.Error("the body was read")
	return 0, io.EOF
}

func (unreadable) Close() error { return nil }

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errors.New("connection reset") }

func TestUnknownActionAndVersion(t *testing.T) {
	s := newService(t)
	s.refused(t, "InvalidAction.NotFound", "DropTables", nil)
	s.refused(t, "InvalidAction.NotFound", "", nil)
	s.refused(t, "InvalidVersion", "ListKeys", params("Version", "2014-05-26"))
	require.NotContains(t, s.log.String(), "DropTables")
}
