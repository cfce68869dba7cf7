package acs_test

import (
	"bufio"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
)

// The access key of the tests. It opens nothing.
const (
	testID     = "testAK"
	testSecret = "testSK"
)

func lookup(id string) ([]byte, bool) { return []byte(testSecret), id == testID }

func credential() acs.Credential {
	return acs.Credential{AccessKeyID: testID, Secret: acs.NewSecret([]byte(testSecret))}
}

// at is when the recorded requests were made.
var at = time.Date(2026, 11, 23, 7, 19, 4, 0, time.UTC)

// receive parses a request as a server would, and takes its body.
func receive(t testing.TB, raw string) (*http.Request, []byte) {
	t.Helper()
	r, body, err := tryReceive(raw)
	require.NoError(t, err)
	return r, body
}

// tryReceive is receive for what may be no HTTP request at all.
func tryReceive(raw string) (*http.Request, []byte, error) {
	head, body, _ := strings.Cut(raw, "\n\n")
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head + "\n\n")))
	return r, []byte(body), err
}

// The example of RPC signatures that KMS's API documentation gives. It has no
// nonce, so Verify would refuse it; its canonical form is signed by hand here.
func TestRPCGoldenVector(t *testing.T) {
	params := map[string]string{
		"AccessKeyId":      "testid",
		"Action":           "CreateKey",
		"SignatureVersion": "1.0",
		"Format":           "json",
		"Version":          "2016-01-20",
		"SignatureMethod":  "HMAC-SHA1",
		"Timestamp":        "2016-03-28T03:13:08Z",
	}
	require.Equal(t, "41wk2SSX1GJh7fwnc5eqOfiJPFg=", acs.RPCSignature(http.MethodGet, params, []byte("testsecret")))
}

// The worked example of Alibaba Cloud's documentation of signature method V3.
func TestACS3GoldenVector(t *testing.T) {
	r, body := receive(t, `POST /?ImageId=win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd&RegionId=cn-shanghai HTTP/1.1
Host: ecs.cn-shanghai.aliyuncs.com
Authorization: ACS3-HMAC-SHA256 Credential=YourAccessKeyId,SignedHeaders=host;x-acs-action;x-acs-content-sha256;x-acs-date;x-acs-signature-nonce;x-acs-version,Signature=06563a9e1b43f5dfe96b81484da74bceab24a1d853912eee15083a6f0f3283c0
x-acs-action: RunInstances
x-acs-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
x-acs-date: 2023-10-26T10:22:32Z
x-acs-signature-nonce: 3156853299f313e23d1673dc12e1703d
x-acs-version: 2014-05-26

`)
	when := time.Date(2023, 10, 26, 10, 22, 32, 0, time.UTC)
	req, id, err := acs.Verify(r, body, func(id string) ([]byte, bool) { return []byte("YourAccessKeySecret"), id == "YourAccessKeyId" }, when)
	require.NoError(t, err)
	require.Equal(t, acs.Identity{
		AccessKeyID: "YourAccessKeyId", Scheme: acs.ACS3, Timestamp: when, Nonce: "3156853299f313e23d1673dc12e1703d",
	}, id)
	require.Equal(t, acs.Request{
		Scheme: acs.ACS3, Action: "RunInstances", Version: "2014-05-26",
		Params: url.Values{"ImageId": {"win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd"}, "RegionId": {"cn-shanghai"}},
	}, req)

	signed, err := http.NewRequest(http.MethodPost, "https://ecs.cn-shanghai.aliyuncs.com/?"+r.URL.RawQuery, nil)
	require.NoError(t, err)
	signed.Header.Set("x-acs-action", "RunInstances")
	signed.Header.Set("x-acs-version", "2014-05-26")
	cred := acs.Credential{AccessKeyID: "YourAccessKeyId", Secret: acs.NewSecret([]byte("YourAccessKeySecret"))}
	require.NoError(t, acs.SignV3(signed, nil, cred, when, id.Nonce))
	require.Equal(t, r.Header.Get("Authorization"), signed.Header.Get("Authorization"))
}
