package acs_test

import (
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
)

// recording is a request as a client was seen to send it, with the signature
// made anew for the access key of the tests by a few lines of Python (hmac,
// hashlib, urllib.parse) that share nothing with this package.
type recording struct {
	name string
	raw  string
	want acs.Request
}

// importParams are the parameters that most recordings carry.
func importParams(token string, more ...string) url.Values {
	v := url.Values{
		"EncryptedKeyMaterial":  {"AB+/cd=="},
		"ImportToken":           {token},
		"KeyId":                 {"key-1"},
		"KeyMaterialExpireUnix": {"0"},
	}
	for i := 0; i < len(more); i += 2 {
		v.Set(more[i], more[i+1])
	}
	return v
}

func recordings() []recording {
	const awkward = "to+k/en== ~*!'()" // every character that encodings disagree about
	v1 := recording{
		name: "v1 SDK, and aliyun-cli",
		raw: `POST /?AccessKeyId=testAK&Action=ImportKeyMaterial&EncryptedKeyMaterial=AB%2B%2Fcd%3D%3D&Format=JSON&ImportToken=to%2Bk%2Fen%3D%3D&KeyId=key-1&KeyMaterialExpireUnix=0&RegionId=cn-hangzhou&Signature=SLWjo8FMVoEfxqot3kP6jTpaGKI%3D&SignatureMethod=HMAC-SHA1&SignatureNonce=7155a0b9&SignatureType=&SignatureVersion=1.0&Timestamp=2026-11-23T07%3A15%3A45Z&Version=2016-01-20 HTTP/1.1
Host: 127.0.0.1:18080
Content-Length: 0
Accept-Encoding: identity
Content-Type: application/x-www-form-urlencoded
x-acs-action: ImportKeyMaterial
x-acs-credentials-provider: static_ak
x-acs-version: 2016-01-20
x-sdk-client: golang/1.0.0

`,
		want: acs.Request{
			Scheme: acs.RPC, Action: "ImportKeyMaterial", Version: "2016-01-20", Format: "JSON",
			Params: importParams("to+k/en==", "RegionId", "cn-hangzhou"),
		},
	}
	v1get := v1
	v1get.name = "v1 SDK, GET"
	v1get.raw = strings.NewReplacer("POST /", "GET /", "SLWjo8FMVoEfxqot3kP6jTpaGKI%3D", "gbLFsHlVFwqjsIHc86NJozQP4Qk%3D").Replace(v1.raw)
	return []recording{
		v1,
		v1get,
		{
			name: "Terraform: tea-rpc, parameters in a form body",
			raw: `POST /?AccessKeyId=testAK&Action=ImportKeyMaterial&Format=json&Signature=z%2Bh1%2FvrXWWC9dGs%2FIIJyR5E%2Bsug%3D&SignatureMethod=HMAC-SHA1&SignatureNonce=7155a0b9&SignatureVersion=1.0&Timestamp=2026-11-23T07%3A15%3A45Z&Version=2016-01-20 HTTP/1.1
Host: 127.0.0.1:18080
content-type: application/x-www-form-urlencoded
x-acs-action: ImportKeyMaterial
x-acs-version: 2016-01-20

EncryptedKeyMaterial=AB%2B%2Fcd%3D%3D&ImportToken=a+b~%2A&KeyId=key-1&KeyMaterialExpireUnix=0`,
			want: acs.Request{
				Scheme: acs.RPC, Action: "ImportKeyMaterial", Version: "2016-01-20", Format: "json",
				Params: importParams("a b~*"),
			},
		},
		{
			name: "the same with everything in the body, the signature too",
			raw: `POST / HTTP/1.1
Host: 127.0.0.1:18080
content-type: application/x-www-form-urlencoded; charset=UTF-8

AccessKeyId=testAK&Action=ImportKeyMaterial&Format=json&Signature=z%2Bh1%2FvrXWWC9dGs%2FIIJyR5E%2Bsug%3D&SignatureMethod=HMAC-SHA1&SignatureNonce=7155a0b9&SignatureVersion=1.0&Timestamp=2026-11-23T07%3A15%3A45Z&Version=2016-01-20&EncryptedKeyMaterial=AB%2B%2Fcd%3D%3D&ImportToken=a+b~%2A&KeyId=key-1&KeyMaterialExpireUnix=0`,
			want: acs.Request{
				Scheme: acs.RPC, Action: "ImportKeyMaterial", Version: "2016-01-20", Format: "json",
				Params: importParams("a b~*"),
			},
		},
		{
			name: "tea SDK with SignatureAlgorithm v2",
			raw: `POST /?AccessKeyId=testAK&Action=ImportKeyMaterial&EncryptedKeyMaterial=AB%2B%2Fcd%3D%3D&Format=json&ImportToken=to%2Bk%2Fen%3D%3D+~%2A%21%27%28%29&KeyId=key-1&KeyMaterialExpireUnix=0&Signature=P8ybG6yvFNeBcx04IaaZFibbroM%3D&SignatureMethod=HMAC-SHA1&SignatureNonce=7155a0b9&SignatureVersion=1.0&Timestamp=2026-11-23T07%3A15%3A45Z&Version=2016-01-20 HTTP/1.1
Host: 127.0.0.1:18080

`,
			want: acs.Request{
				Scheme: acs.RPC, Action: "ImportKeyMaterial", Version: "2016-01-20", Format: "json",
				Params: importParams(awkward),
			},
		},
		{
			name: "tea SDK",
			raw: `POST /?EncryptedKeyMaterial=AB%2B%2Fcd%3D%3D&ImportToken=to%2Bk%2Fen%3D%3D+~%2A%21%27%28%29&KeyId=key-1&KeyMaterialExpireUnix=0 HTTP/1.1
Host: 127.0.0.1:18080
Content-Length: 0
Authorization: ACS3-HMAC-SHA256 Credential=testAK,SignedHeaders=host;x-acs-action;x-acs-content-sha256;x-acs-credentials-provider;x-acs-date;x-acs-signature-nonce;x-acs-version,Signature=bcbf2da6b122885a62ab6158c792246af073bfa5c7c2aa0b386007798d5862f4
accept: application/json
x-acs-action: ImportKeyMaterial
x-acs-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
x-acs-credentials-provider: static_ak
x-acs-date: 2026-11-23T07:19:04Z
x-acs-signature-nonce: a5a0c3d4
x-acs-version: 2016-01-20
Accept-Encoding: gzip

`,
			want: acs.Request{
				Scheme: acs.ACS3, Action: "ImportKeyMaterial", Version: "2016-01-20", Params: importParams(awkward),
			},
		},
		{
			name: "tea SDK with a security token and an empty parameter",
			raw: `POST /?EncryptedKeyMaterial=AB%2B%2Fcd%3D%3D&ImportToken=to%2Bk%2Fen%3D%3D+~%2A%21%27%28%29&KeyId=key-1&KeyMaterialExpireUnix=0&Description= HTTP/1.1
Host: 127.0.0.1:18080
Authorization: ACS3-HMAC-SHA256 Credential=testAK,SignedHeaders=host;x-acs-accesskey-id;x-acs-action;x-acs-content-sha256;x-acs-credentials-provider;x-acs-date;x-acs-security-token;x-acs-signature-nonce;x-acs-version,Signature=4dbb61bd4cd3acdfd7b47330e5604b803d64cf0d2aca834087befd89666cfba9
x-acs-accesskey-id:   testAK
x-acs-action: ImportKeyMaterial
x-acs-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
x-acs-credentials-provider: static_ak
x-acs-date: 2026-11-23T07:19:04Z
x-acs-security-token: CAES+token/==
x-acs-signature-nonce: a5a0c3d4
X-ACS-Version: 2016-01-20

`,
			want: acs.Request{
				Scheme: acs.ACS3, Action: "ImportKeyMaterial", Version: "2016-01-20",
				Params: importParams(awkward, "Description", ""),
			},
		},
		{
			name: "tea SDK with SignatureVersion v4 and an empty parameter",
			raw: `POST /?EncryptedKeyMaterial=AB%2B%2Fcd%3D%3D&ImportToken=to%2Bk%2Fen%3D%3D+~%2A%21%27%28%29&KeyId=key-1&KeyMaterialExpireUnix=0&Description= HTTP/1.1
Host: 127.0.0.1:18080
Authorization: ACS4-HMAC-SHA256 Credential=testAK/20261123/cn-hangzhou/Kms/aliyun_v4_request,SignedHeaders=host;x-acs-action;x-acs-content-sha256;x-acs-credentials-provider;x-acs-date;x-acs-signature-nonce;x-acs-version,Signature=d6c7ae2d9027544bfa5afc1ec61cdb46e9edbb0832bcbb3adb015c82cedda466
x-acs-action: ImportKeyMaterial
x-acs-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
x-acs-credentials-provider: static_ak
x-acs-date: 2026-11-23T07:19:04Z
x-acs-signature-nonce: a5a0c3d4
x-acs-version: 2016-01-20

`,
			want: acs.Request{
				Scheme: acs.ACS4, Action: "ImportKeyMaterial", Version: "2016-01-20",
				Params: importParams(awkward, "Description", ""),
			},
		},
	}
}

func TestRecordedRequestsVerify(t *testing.T) {
	for _, rec := range recordings() {
		t.Run(rec.name, func(t *testing.T) {
			r, body := receive(t, rec.raw)
			got, id, err := acs.Verify(r, body, lookup, at)
			require.NoError(t, err)
			require.Equal(t, testID, id.AccessKeyID)
			require.Equal(t, rec.want.Scheme, id.Scheme)
			require.NotEmpty(t, id.Nonce)
			require.WithinDuration(t, at, id.Timestamp, 4*time.Minute)
			require.Equal(t, rec.want, got)
		})
	}
}

// Whatever one bit of a request is turned, either it no longer verifies or
// nothing that counts has changed: the case of a header's name, the spelling
// of an escape, or something that no one reads.
func TestEveryBitThatCountsIsSigned(t *testing.T) {
	for _, rec := range recordings() {
		t.Run(rec.name, func(t *testing.T) {
			r, body := receive(t, rec.raw)
			_, original, err := acs.Verify(r, body, lookup, at)
			require.NoError(t, err)
			refused := 0
			for i := range len(rec.raw) * 8 {
				raw := []byte(rec.raw)
				raw[i/8] ^= 1 << (i % 8)
				r, body, err := tryReceive(string(raw))
				if err != nil {
					continue
				}
				got, id, err := acs.Verify(r, body, lookup, at)
				if err != nil {
					refused++
					continue
				}
				require.Equal(t, rec.want, got, "bit %d", i)
				require.Equal(t, original, id, "bit %d", i)
			}
			require.Greater(t, refused, 1000)
		})
	}
}
