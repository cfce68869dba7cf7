package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	openapi "github.com/alibabacloud-go/darabonba-openapi/v2/client"
	tea "github.com/alibabacloud-go/kms-20160120/v3/client"
	teacore "github.com/alibabacloud-go/tea/tea"
	sdkerrors "github.com/aliyun/alibaba-cloud-sdk-go/sdk/errors"
	"github.com/aliyun/alibaba-cloud-sdk-go/sdk/requests"
	v1 "github.com/aliyun/alibaba-cloud-sdk-go/services/kms"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/kmsapi"
)

// sdk is what the tests do with a client of Alibaba Cloud's, whichever it is.
// Bytes are in Base64, as the clients take them.
type sdk interface {
	createKey(spec string) (keyID, state string, err error)
	describeKey(keyID string) (state, expires string, err error)
	parameters(keyID, pairSpec, algorithm string) (publicKey, token string, err error)
	importMaterial(keyID, wrapped, token string, expireUnix int64) error
	deleteMaterial(keyID string) error
	encrypt(keyID, plaintext string, encctx map[string]string) (blob string, err error)
	decrypt(blob string, encctx map[string]string) (plaintext, keyID string, err error)
	reEncrypt(blob string, encctx map[string]string, keyID string, to map[string]string) (again string, err error)
	dataKey(keyID string, n int) (blob, plaintext string, err error)
	dataKeyOnly(keyID string) (blob string, err error)
	setEnabled(keyID string, enabled bool) error
	scheduleDeletion(keyID string, days int) error
	cancelDeletion(keyID string) error
	listKeys(page, size int) (keyIDs []string, total int, err error)
	// code is the Code of an error that the service answered.
	code(t *testing.T, err error) string
}

// sdks are the clients, in the ways in which they sign and send.
func sdks(t *testing.T, endpoint string, c credentials) map[string]sdk {
	t.Helper()
	old, err := v1.NewClientWithAccessKey(c.Region, c.AccessKeyID, c.AccessKeySecret)
	require.NoError(t, err)
	newTea := func(config openapi.Config) sdk {
		config.AccessKeyId, config.AccessKeySecret = &c.AccessKeyID, &c.AccessKeySecret
		config.Endpoint, config.RegionId, config.Protocol = &endpoint, &c.Region, ptr("http")
		client, err := tea.NewClient(&config)
		require.NoError(t, err)
		return teaSDK{client}
	}
	return map[string]sdk{
		"v1":             v1SDK{old, endpoint, requests.POST, "JSON"},
		"v1, GET":        v1SDK{old, endpoint, requests.GET, "JSON"},
		"v1, XML":        v1SDK{old, endpoint, requests.POST, "XML"},
		"tea":            newTea(openapi.Config{}),
		"tea, RPC":       newTea(openapi.Config{SignatureAlgorithm: ptr("v2")}),
		"tea, ACS4":      newTea(openapi.Config{SignatureVersion: ptr("v4")}),
		"tea-rpc (form)": formSDK{endpoint, acs.Credential{AccessKeyID: c.AccessKeyID, Secret: acs.NewSecret([]byte(c.AccessKeySecret))}},
	}
}

func ptr[T any](v T) *T { return &v }

// v1SDK is alibaba-cloud-sdk-go.
type v1SDK struct {
	*v1.Client
	endpoint, method, format string
}

func (s v1SDK) to(r *requests.RpcRequest) {
	r.Domain, r.Scheme, r.Method, r.AcceptFormat = s.endpoint, "http", s.method, s.format
}

func (s v1SDK) createKey(spec string) (keyID, state string, err error) {
	r := v1.CreateCreateKeyRequest()
	s.to(r.RpcRequest)
	r.Origin, r.KeySpec, r.ProtectionLevel = "EXTERNAL", spec, "HSM"
	res, err := s.CreateKey(r)
	return res.KeyMetadata.KeyId, res.KeyMetadata.KeyState, err
}

func (s v1SDK) describeKey(keyID string) (state, expires string, err error) {
	r := v1.CreateDescribeKeyRequest()
	s.to(r.RpcRequest)
	r.KeyId = keyID
	res, err := s.DescribeKey(r)
	return res.KeyMetadata.KeyState, res.KeyMetadata.MaterialExpireTime, err
}

func (s v1SDK) parameters(keyID, pairSpec, algorithm string) (publicKey, token string, err error) {
	r := v1.CreateGetParametersForImportRequest()
	s.to(r.RpcRequest)
	r.KeyId, r.WrappingAlgorithm, r.WrappingKeySpec = keyID, algorithm, pairSpec
	res, err := s.GetParametersForImport(r)
	return res.PublicKey, res.ImportToken, err
}

func (s v1SDK) importMaterial(keyID, wrapped, token string, expireUnix int64) error {
	r := v1.CreateImportKeyMaterialRequest()
	s.to(r.RpcRequest)
	r.KeyId, r.EncryptedKeyMaterial, r.ImportToken = keyID, wrapped, token
	if expireUnix != 0 {
		r.KeyMaterialExpireUnix = requests.NewInteger64(expireUnix)
	}
	_, err := s.ImportKeyMaterial(r)
	return err
}

func (s v1SDK) deleteMaterial(keyID string) error {
	r := v1.CreateDeleteKeyMaterialRequest()
	s.to(r.RpcRequest)
	r.KeyId = keyID
	_, err := s.DeleteKeyMaterial(r)
	return err
}

func (s v1SDK) encrypt(keyID, plaintext string, encctx map[string]string) (string, error) {
	r := v1.CreateEncryptRequest()
	s.to(r.RpcRequest)
	r.KeyId, r.Plaintext, r.EncryptionContext = keyID, plaintext, jsonOf(encctx)
	res, err := s.Encrypt(r)
	return res.CiphertextBlob, err
}

func (s v1SDK) decrypt(blob string, encctx map[string]string) (plaintext, keyID string, err error) {
	r := v1.CreateDecryptRequest()
	s.to(r.RpcRequest)
	r.CiphertextBlob, r.EncryptionContext = blob, jsonOf(encctx)
	res, err := s.Decrypt(r)
	return res.Plaintext, res.KeyId, err
}

func (s v1SDK) reEncrypt(blob string, encctx map[string]string, keyID string, to map[string]string) (string, error) {
	r := v1.CreateReEncryptRequest()
	s.to(r.RpcRequest)
	r.CiphertextBlob, r.SourceEncryptionContext, r.DestinationKeyId, r.DestinationEncryptionContext = blob, jsonOf(encctx), keyID, jsonOf(to)
	res, err := s.ReEncrypt(r)
	return res.CiphertextBlob, err
}

func (s v1SDK) dataKey(keyID string, n int) (blob, plaintext string, err error) {
	r := v1.CreateGenerateDataKeyRequest()
	s.to(r.RpcRequest)
	r.KeyId, r.NumberOfBytes = keyID, requests.NewInteger(n)
	res, err := s.GenerateDataKey(r)
	return res.CiphertextBlob, res.Plaintext, err
}

func (s v1SDK) dataKeyOnly(keyID string) (string, error) {
	r := v1.CreateGenerateDataKeyWithoutPlaintextRequest()
	s.to(r.RpcRequest)
	r.KeyId, r.KeySpec = keyID, "AES_128"
	res, err := s.GenerateDataKeyWithoutPlaintext(r)
	return res.CiphertextBlob, err
}

func (s v1SDK) setEnabled(keyID string, enabled bool) (err error) {
	if enabled {
		r := v1.CreateEnableKeyRequest()
		s.to(r.RpcRequest)
		r.KeyId = keyID
		_, err = s.EnableKey(r)
	} else {
		r := v1.CreateDisableKeyRequest()
		s.to(r.RpcRequest)
		r.KeyId = keyID
		_, err = s.DisableKey(r)
	}
	return err
}

func (s v1SDK) scheduleDeletion(keyID string, days int) error {
	r := v1.CreateScheduleKeyDeletionRequest()
	s.to(r.RpcRequest)
	r.KeyId, r.PendingWindowInDays = keyID, requests.NewInteger(days)
	_, err := s.ScheduleKeyDeletion(r)
	return err
}

func (s v1SDK) cancelDeletion(keyID string) error {
	r := v1.CreateCancelKeyDeletionRequest()
	s.to(r.RpcRequest)
	r.KeyId = keyID
	_, err := s.CancelKeyDeletion(r)
	return err
}

func (s v1SDK) listKeys(page, size int) (keyIDs []string, total int, err error) {
	r := v1.CreateListKeysRequest()
	s.to(r.RpcRequest)
	r.PageNumber, r.PageSize = requests.NewInteger(page), requests.NewInteger(size)
	res, err := s.ListKeys(r)
	for _, key := range res.Keys.Key {
		keyIDs = append(keyIDs, key.KeyId)
	}
	return keyIDs, res.TotalCount, err
}

// code reads XML by hand, which this SDK cannot do: it has the whole body in
// the message.
func (s v1SDK) code(t *testing.T, err error) string {
	t.Helper()
	var e *sdkerrors.ServerError
	require.ErrorAs(t, err, &e)
	if s.format != "XML" {
		require.Len(t, e.RequestId(), 36)
		return e.ErrorCode()
	}
	_, rest, _ := strings.Cut(e.Message(), "<Code>")
	code, _, found := strings.Cut(rest, "</Code>")
	require.True(t, found, e.Message())
	return code
}

func jsonOf(m map[string]string) string {
	if m == nil {
		return ""
	}
	text, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// teaSDK is the present SDK.
type teaSDK struct{ *tea.Client }

func (s teaSDK) createKey(spec string) (keyID, state string, err error) {
	res, err := s.CreateKey(&tea.CreateKeyRequest{Origin: ptr("EXTERNAL"), KeySpec: &spec, KeyUsage: ptr("ENCRYPT/DECRYPT")})
	if err != nil {
		return "", "", err
	}
	return *res.Body.KeyMetadata.KeyId, *res.Body.KeyMetadata.KeyState, nil
}

func (s teaSDK) describeKey(keyID string) (state, expires string, err error) {
	res, err := s.DescribeKey(&tea.DescribeKeyRequest{KeyId: &keyID})
	if err != nil {
		return "", "", err
	}
	return *res.Body.KeyMetadata.KeyState, *res.Body.KeyMetadata.MaterialExpireTime, nil
}

func (s teaSDK) parameters(keyID, pairSpec, algorithm string) (publicKey, token string, err error) {
	res, err := s.GetParametersForImport(&tea.GetParametersForImportRequest{KeyId: &keyID, WrappingAlgorithm: &algorithm, WrappingKeySpec: &pairSpec})
	if err != nil {
		return "", "", err
	}
	return *res.Body.PublicKey, *res.Body.ImportToken, nil
}

func (s teaSDK) importMaterial(keyID, wrapped, token string, expireUnix int64) error {
	r := &tea.ImportKeyMaterialRequest{KeyId: &keyID, EncryptedKeyMaterial: &wrapped, ImportToken: &token}
	if expireUnix != 0 {
		r.KeyMaterialExpireUnix = &expireUnix
	}
	_, err := s.ImportKeyMaterial(r)
	return err
}

func (s teaSDK) deleteMaterial(keyID string) error {
	_, err := s.DeleteKeyMaterial(&tea.DeleteKeyMaterialRequest{KeyId: &keyID})
	return err
}

func (s teaSDK) encrypt(keyID, plaintext string, encctx map[string]string) (string, error) {
	res, err := s.Encrypt(&tea.EncryptRequest{KeyId: &keyID, Plaintext: &plaintext, EncryptionContext: anyOf(encctx)})
	if err != nil {
		return "", err
	}
	return *res.Body.CiphertextBlob, nil
}

func (s teaSDK) decrypt(blob string, encctx map[string]string) (plaintext, keyID string, err error) {
	res, err := s.Decrypt(&tea.DecryptRequest{CiphertextBlob: &blob, EncryptionContext: anyOf(encctx)})
	if err != nil {
		return "", "", err
	}
	return *res.Body.Plaintext, *res.Body.KeyId, nil
}

func (s teaSDK) reEncrypt(blob string, encctx map[string]string, keyID string, to map[string]string) (string, error) {
	res, err := s.ReEncrypt(&tea.ReEncryptRequest{
		CiphertextBlob: &blob, SourceEncryptionContext: anyOf(encctx), DestinationKeyId: &keyID, DestinationEncryptionContext: anyOf(to),
	})
	if err != nil {
		return "", err
	}
	return *res.Body.CiphertextBlob, nil
}

func (s teaSDK) dataKey(keyID string, n int) (blob, plaintext string, err error) {
	res, err := s.GenerateDataKey(&tea.GenerateDataKeyRequest{KeyId: &keyID, NumberOfBytes: ptr(int32(n))})
	if err != nil {
		return "", "", err
	}
	return *res.Body.CiphertextBlob, *res.Body.Plaintext, nil
}

func (s teaSDK) dataKeyOnly(keyID string) (string, error) {
	res, err := s.GenerateDataKeyWithoutPlaintext(&tea.GenerateDataKeyWithoutPlaintextRequest{KeyId: &keyID, KeySpec: ptr("AES_128")})
	if err != nil {
		return "", err
	}
	return *res.Body.CiphertextBlob, nil
}

func (s teaSDK) setEnabled(keyID string, enabled bool) (err error) {
	if enabled {
		_, err = s.EnableKey(&tea.EnableKeyRequest{KeyId: &keyID})
	} else {
		_, err = s.DisableKey(&tea.DisableKeyRequest{KeyId: &keyID})
	}
	return err
}

func (s teaSDK) scheduleDeletion(keyID string, days int) error {
	_, err := s.ScheduleKeyDeletion(&tea.ScheduleKeyDeletionRequest{KeyId: &keyID, PendingWindowInDays: ptr(int32(days))})
	return err
}

func (s teaSDK) cancelDeletion(keyID string) error {
	_, err := s.CancelKeyDeletion(&tea.CancelKeyDeletionRequest{KeyId: &keyID})
	return err
}

func (s teaSDK) listKeys(page, size int) (keyIDs []string, total int, err error) {
	res, err := s.ListKeys(&tea.ListKeysRequest{PageNumber: ptr(int32(page)), PageSize: ptr(int32(size))})
	if err != nil {
		return nil, 0, err
	}
	for _, key := range res.Body.Keys.Key {
		keyIDs = append(keyIDs, *key.KeyId)
	}
	return keyIDs, int(*res.Body.TotalCount), nil
}

func (teaSDK) code(t *testing.T, err error) string {
	t.Helper()
	var e *teacore.SDKError
	require.ErrorAs(t, err, &e)
	return *e.Code
}

func anyOf(m map[string]string) map[string]any {
	if m == nil {
		return nil
	}
	out := map[string]any{}
	for k, v := range m {
		out[k] = v
	}
	return out
}

// formSDK sends as tea-rpc does, which Terraform uses: what belongs to the
// protocol in the query, the parameters of the action in a form body.
type formSDK struct {
	endpoint string
	cred     acs.Credential
}

func (s formSDK) call(action string, answer any, params ...string) error {
	form := url.Values{}
	for i := 0; i < len(params); i += 2 {
		form.Set(params[i], params[i+1])
	}
	query := url.Values{"Action": {action}, "Version": {kmsapi.Version}, "Format": {"json"}}
	body := form.Encode()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://"+s.endpoint+"/?"+query.Encode(), strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("X-Acs-Action", action)
	req.Header.Set("X-Acs-Version", kmsapi.Version)
	if err := acs.SignRPC(req, []byte(body), s.cred, time.Now(), rand.Text()); err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		refusal := &apiError{}
		return errors.Join(json.Unmarshal(text, refusal), refusal)
	}
	return json.Unmarshal(text, answer)
}

// formAnswer is every field that formSDK reads of any answer.
type formAnswer struct {
	KeyMetadata struct {
		KeyID              string `json:"KeyId"`
		KeyState           string
		MaterialExpireTime string
	}
	PublicKey, ImportToken    string
	CiphertextBlob, Plaintext string
	KeyID                     string `json:"KeyId"`
	TotalCount                int
	Keys                      struct {
		Key []struct {
			KeyID string `json:"KeyId"`
		}
	}
}

func (s formSDK) createKey(spec string) (keyID, state string, err error) {
	var a formAnswer
	err = s.call("CreateKey", &a, "Origin", "EXTERNAL", "KeySpec", spec)
	return a.KeyMetadata.KeyID, a.KeyMetadata.KeyState, err
}

func (s formSDK) describeKey(keyID string) (state, expires string, err error) {
	var a formAnswer
	err = s.call("DescribeKey", &a, "KeyId", keyID)
	return a.KeyMetadata.KeyState, a.KeyMetadata.MaterialExpireTime, err
}

func (s formSDK) parameters(keyID, pairSpec, algorithm string) (publicKey, token string, err error) {
	var a formAnswer
	err = s.call("GetParametersForImport", &a, "KeyId", keyID, "WrappingAlgorithm", algorithm, "WrappingKeySpec", pairSpec)
	return a.PublicKey, a.ImportToken, err
}

func (s formSDK) importMaterial(keyID, wrapped, token string, expireUnix int64) error {
	return s.call("ImportKeyMaterial", &formAnswer{}, "KeyId", keyID, "EncryptedKeyMaterial", wrapped, "ImportToken", token,
		"KeyMaterialExpireUnix", strconv.FormatInt(expireUnix, 10))
}

func (s formSDK) deleteMaterial(keyID string) error {
	return s.call("DeleteKeyMaterial", &formAnswer{}, "KeyId", keyID)
}

func (s formSDK) encrypt(keyID, plaintext string, encctx map[string]string) (string, error) {
	var a formAnswer
	err := s.call("Encrypt", &a, "KeyId", keyID, "Plaintext", plaintext, "EncryptionContext", jsonOf(encctx))
	return a.CiphertextBlob, err
}

func (s formSDK) decrypt(blob string, encctx map[string]string) (plaintext, keyID string, err error) {
	var a formAnswer
	err = s.call("Decrypt", &a, "CiphertextBlob", blob, "EncryptionContext", jsonOf(encctx))
	return a.Plaintext, a.KeyID, err
}

func (s formSDK) reEncrypt(blob string, encctx map[string]string, keyID string, to map[string]string) (string, error) {
	var a formAnswer
	err := s.call("ReEncrypt", &a, "CiphertextBlob", blob, "SourceEncryptionContext", jsonOf(encctx),
		"DestinationKeyId", keyID, "DestinationEncryptionContext", jsonOf(to))
	return a.CiphertextBlob, err
}

func (s formSDK) dataKey(keyID string, n int) (blob, plaintext string, err error) {
	var a formAnswer
	err = s.call("GenerateDataKey", &a, "KeyId", keyID, "NumberOfBytes", strconv.Itoa(n))
	return a.CiphertextBlob, a.Plaintext, err
}

func (s formSDK) dataKeyOnly(keyID string) (string, error) {
	var a formAnswer
	err := s.call("GenerateDataKeyWithoutPlaintext", &a, "KeyId", keyID, "KeySpec", "AES_128")
	return a.CiphertextBlob, err
}

func (s formSDK) setEnabled(keyID string, enabled bool) error {
	action := "DisableKey"
	if enabled {
		action = "EnableKey"
	}
	return s.call(action, &formAnswer{}, "KeyId", keyID)
}

func (s formSDK) scheduleDeletion(keyID string, days int) error {
	return s.call("ScheduleKeyDeletion", &formAnswer{}, "KeyId", keyID, "PendingWindowInDays", strconv.Itoa(days))
}

func (s formSDK) cancelDeletion(keyID string) error {
	return s.call("CancelKeyDeletion", &formAnswer{}, "KeyId", keyID)
}

func (s formSDK) listKeys(page, size int) (keyIDs []string, total int, err error) {
	var a formAnswer
	err = s.call("ListKeys", &a, "PageNumber", strconv.Itoa(page), "PageSize", strconv.Itoa(size))
	for _, key := range a.Keys.Key {
		keyIDs = append(keyIDs, key.KeyID)
	}
	return keyIDs, a.TotalCount, err
}

func (formSDK) code(t *testing.T, err error) string {
	t.Helper()
	var e *apiError
	require.ErrorAs(t, err, &e)
	return e.Code
}
