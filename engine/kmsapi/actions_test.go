package kmsapi_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/kmsapi"
	"github.com/keyferry/keyferry/hsm"
)

func TestNewNeedsItsParts(t *testing.T) {
	_, err := kmsapi.New(kmsapi.Config{})
	require.Error(t, err)
}

func TestCreateKey(t *testing.T) {
	s := newService(t)
	s.engine.metadata = engine.KeyMetadata{
		KeyID: keyID, KeyVersionID: versionID, Spec: engine.AliyunSM4, State: engine.PendingImport,
		Description: `a "key" & <more>`, CreatedAt: time.Date(2026, 11, 23, 7, 15, 45, 0, time.UTC),
	}
	status, fields := s.do(t, "CreateKey", params("Origin", "EXTERNAL", "KeySpec", "Aliyun_SM4", "KeyUsage", "ENCRYPT/DECRYPT",
		"ProtectionLevel", "HSM", "Description", "of the tests", "EnableAutomaticRotation", "false", "RegionId", "cn-hangzhou"))
	require.Equal(t, http.StatusOK, status, fields)
	require.Equal(t, engine.CreateKeyInput{Spec: engine.AliyunSM4, Description: "of the tests"}, s.engine.last)
	require.Equal(t, map[string]any{
		"KeyId": keyID, "Arn": "acs:kms:cn-test:1234567890:key/" + keyID, "KeySpec": "Aliyun_SM4", "KeyUsage": "ENCRYPT/DECRYPT",
		"KeyState": "PendingImport", "Origin": "EXTERNAL", "ProtectionLevel": "HSM", "CreationDate": "2026-11-23T07:15:45Z",
		"Creator": "1234567890", "Description": `a "key" & <more>`, "DeleteDate": "", "MaterialExpireTime": "",
		"PrimaryKeyVersion": versionID, "LastRotationDate": "", "AutomaticRotation": "Disabled", "RotationInterval": "",
		"NextRotationDate": "", "DKMSInstanceId": "", "DeletionProtection": "Disabled", "DeletionProtectionDescription": "",
		"KeyMaterialId": "", "KeyCheckValue": "", "KeyCheckValueAlgorithm": "",
	}, fields["KeyMetadata"], "every field a string, absent ones empty")
	require.Contains(t, s.log.String(), keyID)
}

func TestCreateKeyRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		code   string
		params map[string]string
		says   string
	}{
		"no origin":          {"Unsupported.Origin", params(), "EXTERNAL"},
		"origin of the KMS":  {"Unsupported.Origin", params("Origin", "Aliyun_KMS"), "EXTERNAL"},
		"origin in lower":    {"InvalidParameter", params("Origin", "external"), "Origin"},
		"signing":            {"InvalidParameter", params("Origin", "EXTERNAL", "KeyUsage", "SIGN/VERIFY"), "KeyUsage"},
		"software":           {"Unsupported.ProtectionLevel", params("Origin", "EXTERNAL", "ProtectionLevel", "SOFTWARE"), "HSM"},
		"some level":         {"InvalidParameter", params("Origin", "EXTERNAL", "ProtectionLevel", "hsm"), "ProtectionLevel"},
		"automatic rotation": {"InvalidParameter", params("Origin", "EXTERNAL", "EnableAutomaticRotation", "true"), "EnableAutomaticRotation"},
		"rotation interval":  {"InvalidParameter", params("Origin", "EXTERNAL", "RotationInterval", "7d"), "RotationInterval"},
		"tags":               {"InvalidParameter", params("Origin", "EXTERNAL", "Tags", `[{"TagKey":"a","TagValue":"b"}]`), "Tags"},
		"policy":             {"InvalidParameter", params("Origin", "EXTERNAL", "Policy", `{}`), "Policy"},
		"instance":           {"InvalidParameter", params("Origin", "EXTERNAL", "DKMSInstanceId", "kst-1"), "DKMSInstanceId"},
		"storage":            {"InvalidParameter", params("Origin", "EXTERNAL", "KeyStorageMechanism", "hsm"), "KeyStorageMechanism"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t)
			fields := s.refused(t, c.code, "CreateKey", c.params)
			require.Contains(t, fmt.Sprint(fields["Recommend"]), c.says)
			require.Empty(t, s.engine.calls)
		})
	}
}

func TestCreateKeyStorage(t *testing.T) {
	for mechanism, custody := range map[string]hsm.Custody{"": 0, "HsmInternal": hsm.Resident, "HsmEncryptedDatabase": hsm.Sealed} {
		s := newService(t)
		s.engine.metadata = engine.KeyMetadata{KeyID: keyID}
		status, _ := s.do(t, "CreateKey", params("Origin", "EXTERNAL", "KeyStorageMechanism", mechanism))
		require.Equal(t, 200, status)
		require.Equal(t, engine.CreateKeyInput{Custody: custody}, s.engine.last)
	}
}

func TestDescribeKeyAfterImport(t *testing.T) {
	s := newService(t)
	s.engine.metadata = engine.KeyMetadata{
		KeyID: keyID, State: engine.PendingDeletion,
		DeleteAt:   time.Date(2026, 12, 1, 0, 0, 0, 0, time.FixedZone("", 8*3600)),
		ExpireAt:   time.Date(2027, 1, 2, 3, 4, 5, 0, time.UTC),
		MaterialID: [hsm.MaterialIDLen]byte{0xab, 31: 0xcd},
		CheckValue: hsm.CheckValue{Algorithm: hsm.CheckValueAES, Value: [hsm.KCVLen]byte{1, 2, 0xf}},
	}
	_, fields := s.do(t, "DescribeKey", params("KeyId", keyID))
	m := fields["KeyMetadata"].(map[string]any)
	require.Equal(t, "2026-11-30T16:00:00Z", m["DeleteDate"])
	require.Equal(t, "2027-01-02T03:04:05Z", m["MaterialExpireTime"])
	require.Equal(t, "ab"+strings.Repeat("00", 30)+"cd", m["KeyMaterialId"])
	require.Equal(t, "01020f", m["KeyCheckValue"])
	require.Equal(t, "AES-ECB", m["KeyCheckValueAlgorithm"])
}

// managing are the actions that take a key by its id only; using take aliases
// in the published API.
var (
	managing = map[string]map[string]string{
		"EnableKey": nil, "DisableKey": nil, "CancelKeyDeletion": nil, "DeleteKeyMaterial": nil,
		"GetImportReceipt": nil, "ListImportReceipts": nil,
		"ScheduleKeyDeletion":    params("PendingWindowInDays", "7"),
		"GetParametersForImport": params("WrappingAlgorithm", "RSAES_OAEP_SHA_1", "WrappingKeySpec", "RSA_2048"),
		"ImportKeyMaterial":      params("EncryptedKeyMaterial", "YQ==", "ImportToken", "YQ=="),
	}
	using = map[string]map[string]string{
		"DescribeKey": nil, "GenerateDataKey": nil, "GenerateDataKeyWithoutPlaintext": nil,
		"Encrypt": params("Plaintext", "YQ=="),
	}
)

func withKeyID(p map[string]string, id string) map[string]string {
	out := params("KeyId", id)
	for k, v := range p {
		out[k] = v
	}
	return out
}

func TestKeyID(t *testing.T) {
	arn := "acs:kms:cn-test:1234567890:"
	for action, p := range managing {
		t.Run(action, func(t *testing.T) { testKeyID(t, action, p, arn, "Unsupported.Alias") })
	}
	for action, p := range using {
		t.Run(action, func(t *testing.T) { testKeyID(t, action, p, arn, "Forbidden.AliasNotFound") })
	}
}

func testKeyID(t *testing.T, action string, p map[string]string, arn, aliasCode string) {
	s := newService(t)
	for _, name := range []string{keyID, arn + "key/" + keyID} {
		status, fields := s.do(t, action, withKeyID(p, name))
		require.Equal(t, http.StatusOK, status, fields)
		require.Equal(t, action+" "+keyID, s.engine.calls[len(s.engine.calls)-1])
	}
	s.engine.calls = nil
	s.refused(t, aliasCode, action, withKeyID(p, "alias/mine"))
	s.refused(t, aliasCode, action, withKeyID(p, arn+"alias/mine"))
	s.refused(t, "Forbidden.KeyNotFound", action, withKeyID(p, "acs:kms:cn-test:999:key/"+keyID))
	s.refused(t, "Forbidden.KeyNotFound", action, withKeyID(p, "acs:kms:elsewhere:1234567890:key/"+keyID))
	for _, bad := range []string{" " + keyID, keyID + "\n", "key_1", "schlüssel", strings.Repeat("a", 65), arn + "key/", arn + "secret/x", "acs:"} {
		status, _ := s.do(t, action, withKeyID(p, bad))
		require.GreaterOrEqual(t, status, 400, "%q", bad)
	}
	fields := s.refused(t, "MissingParameter", action, p)
	require.Equal(t, `The parameter "KeyId" is needed but not provided.`, fields["Message"])
	require.Empty(t, s.engine.calls)
}

func TestRequiredParameters(t *testing.T) {
	for action, required := range map[string]map[string]string{
		"GetParametersForImport": withKeyID(managing["GetParametersForImport"], keyID),
		"ImportKeyMaterial":      withKeyID(managing["ImportKeyMaterial"], keyID),
		"ScheduleKeyDeletion":    withKeyID(managing["ScheduleKeyDeletion"], keyID),
		"Encrypt":                withKeyID(using["Encrypt"], keyID),
		"Decrypt":                params("CiphertextBlob", "YQ=="),
		"ReEncrypt":              params("CiphertextBlob", "YQ==", "DestinationKeyId", keyID),
	} {
		for name := range required {
			t.Run(action+"/"+name, func(t *testing.T) {
				s := newService(t)
				status, fields := s.do(t, action, required)
				require.Equal(t, http.StatusOK, status, fields)
				s.engine.calls = nil
				for _, empty := range []bool{false, true} {
					less := params()
					for k, v := range required {
						less[k] = v
					}
					delete(less, name)
					if empty {
						less[name] = ""
					}
					fields := s.refused(t, "MissingParameter", action, less)
					require.Contains(t, fields["Message"], `"`+name+`"`)
				}
				require.Empty(t, s.engine.calls)
			})
		}
	}
}

func TestGetParametersForImport(t *testing.T) {
	s := newService(t)
	_, fields := s.do(t, "GetParametersForImport", withKeyID(managing["GetParametersForImport"], keyID))
	require.Equal(t, "RSA_2048 RSAES_OAEP_SHA_1", s.engine.last)
	delete(fields, "RequestId")
	require.Equal(t, map[string]any{
		"KeyId": keyID, "ImportToken": "dG9rZW4=", "PublicKey": "c3BraQ==", "TokenExpireTime": "2018-01-25T00:01:02Z",
	}, fields)
}

func TestImportKeyMaterial(t *testing.T) {
	s := newService(t)
	id := strings.Repeat("0a", 32)
	status, fields := s.do(t, "ImportKeyMaterial", params("KeyId", keyID, "EncryptedKeyMaterial", "c29tZQ==", "ImportToken", "dG9rZW4=",
		"KeyMaterialExpireUnix", "1893456000", "ExpectKeyCheckValue", "0A0b0c", "ExpectKeyMaterialId", id))
	require.Equal(t, http.StatusOK, status, fields)
	require.Len(t, fields, 1, "RequestId only")
	in := s.engine.last.(engine.ImportInput)
	require.Equal(t, fields["RequestId"], in.RequestID)
	require.Equal(t, "some", string(in.EncryptedKeyMaterial))
	require.Equal(t, "token", string(in.ImportToken))
	require.Equal(t, time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), in.ExpireAt)
	require.Equal(t, []byte{10, 11, 12}, in.ExpectCheckValue)
	require.Len(t, in.ExpectMaterialID, 32)

	t.Run("without what is optional", func(t *testing.T) {
		for _, never := range []string{"", "0"} {
			s.do(t, "ImportKeyMaterial", params("KeyId", keyID, "EncryptedKeyMaterial", "YQ==", "ImportToken", "YQ==", "KeyMaterialExpireUnix", never))
			in := s.engine.last.(engine.ImportInput)
			require.Zero(t, in.ExpireAt)
			require.Nil(t, in.ExpectCheckValue)
			require.Nil(t, in.ExpectMaterialID)
		}
	})
	t.Run("refused", func(t *testing.T) {
		s.engine.calls = nil
		for name, value := range map[string]string{
			"KeyMaterialExpireUnix": "tomorrow", "ExpectKeyCheckValue": "0a0b0", "ExpectKeyMaterialId": "0a0b0c",
			"ExpectKeyCheckvalue": "0a0b0c", "expectKeyMaterialId": id, "ExpectKCV": "0a0b0c", "EncryptedKeyMaterial": "****",
		} {
			p := params("KeyId", keyID, "EncryptedKeyMaterial", "YQ==", "ImportToken", "YQ==")
			p[name] = value
			fields := s.refused(t, "InvalidParameter", "ImportKeyMaterial", p)
			require.Equal(t, "The specified parameter "+name+" is not valid.", fields["Message"])
		}
		for _, name := range []string{"ExpectKeyCheckValue", "ExpectKeyMaterialId"} {
			for _, blank := range []string{" ", "\r\n", "\u00a0"} {
				s.refused(t, "InvalidParameter", "ImportKeyMaterial", params("KeyId", keyID, "EncryptedKeyMaterial", "YQ==", "ImportToken", "YQ==", name, blank))
			}
		}
		for _, expire := range []string{"-1", "1.5", "1893456000000", "99999999999999999999", "+", "0x10"} {
			s.refused(t, "InvalidParameter", "ImportKeyMaterial", params("KeyId", keyID, "EncryptedKeyMaterial", "YQ==", "ImportToken", "YQ==", "KeyMaterialExpireUnix", expire))
		}
		require.Empty(t, s.engine.calls)
	})
}

func TestBase64(t *testing.T) {
	s := newService(t)
	for text, good := range map[string]bool{
		"c29tZSBibG9i":            true,
		"c29tZSBibG9i\n":          true,
		"\r\n c29tZSBibG9i\t\r\n": true,
		"c29tZSBi\nbG9i":          true,
		"c29tZSBi\r\nbG9i\r\n":    true,
		"  c29tZSBi\n  bG9i":      true, // pasted from an indented file
		"c29tZSBi bG9i":           false,
		"c29tZSBi\tbG9i":          false,
		"c29tZSBibG9":             false, // padding is missing
		"c29tZQ":                  false,
		"c29tZR==":                false, // bits beyond the end
		"c29tZQ==c29tZQ==":        false,
		"-_-_":                    false,
	} {
		status, fields := s.do(t, "Decrypt", params("CiphertextBlob", text))
		if good {
			require.Equal(t, http.StatusOK, status, "%q", text)
		} else {
			require.Equal(t, "The specified parameter CiphertextBlob is not valid.", fields["Message"], "%q", text)
		}
	}
	s.refused(t, "MissingParameter", "Decrypt", params("CiphertextBlob", " \n"))
}

func TestEncryptionContext(t *testing.T) {
	s := newService(t)
	for text, want := range map[string]map[string]string{
		``:                                 nil,
		`{}`:                               {},
		"\t{\"a\":\"1\", \"b\" : \"\" }\n": {"a": "1", "b": ""},
		`{"b":"","a":"1"}`:                 {"a": "1", "b": ""},
		`{"\u00e9":"\n"}`:                  {"é": "\n"},
	} {
		status, fields := s.do(t, "Decrypt", params("CiphertextBlob", "YQ==", "EncryptionContext", text))
		require.Equal(t, http.StatusOK, status, fields)
		require.Equal(t, want, s.engine.last)
	}
	for _, text := range []string{
		`null`, `"a"`, `[]`, `[{"a":"1"}]`, `{"a":1}`, `{"a":true}`, `{"a":null}`, `{"a":["1"]}`, `{"a":{"b":"c"}}`,
		`{"a":"1","a":"1"}`, `{"a":"1"}{}`, `{"a":"1"} x`, `{"a":"1"`, `{"a"}`, `{a:"1"}`, `{1:"1"}`, `a=1`, "{\"a\":\"\x01\"}",
	} {
		fields := s.refused(t, "InvalidParameter", "Decrypt", params("CiphertextBlob", "YQ==", "EncryptionContext", text))
		require.Equal(t, "The specified parameter EncryptionContext is not valid.", fields["Message"], text)
	}
}

func TestDataPlane(t *testing.T) {
	s := newService(t)
	for action, c := range map[string]struct {
		params map[string]string
		want   map[string]any
	}{
		"Encrypt":                         {withKeyID(using["Encrypt"], keyID), map[string]any{"CiphertextBlob": blobText}},
		"Decrypt":                         {params("CiphertextBlob", "YQ=="), map[string]any{"Plaintext": "cGxhaW50ZXh0"}},
		"GenerateDataKey":                 {params("KeyId", keyID, "KeySpec", "AES_128"), map[string]any{"CiphertextBlob": blobText, "Plaintext": "ZGF0YSBrZXk="}},
		"GenerateDataKeyWithoutPlaintext": {params("KeyId", keyID, "NumberOfBytes", "64"), map[string]any{"CiphertextBlob": blobText}},
	} {
		t.Run(action, func(t *testing.T) {
			status, fields := s.do(t, action, c.params)
			require.Equal(t, http.StatusOK, status, fields)
			delete(fields, "RequestId")
			c.want["KeyId"], c.want["KeyVersionId"] = keyID, versionID
			require.Equal(t, c.want, fields)
		})
		t.Run(action+"/dry", func(t *testing.T) {
			p := params("DryRun", "true")
			for k, v := range c.params {
				p[k] = v
			}
			s.refused(t, "DryRunOperationError", action, p)

			p["EncryptionContext"] = "[]"
			fields := s.refused(t, "ValidationError", action, p)
			require.Equal(t, "The specified parameter EncryptionContext is not valid.", fields["Message"])

			delete(p, "EncryptionContext")
			s.engine.err = &engine.Error{Kind: engine.KeyDisabled}
			s.refused(t, "Rejected.Disabled", action, p)
			s.engine.err = nil

			p["DryRun"] = "perhaps"
			s.refused(t, "InvalidParameter", action, p)
			p["DryRun"] = "false"
			status, _ := s.do(t, action, p)
			require.Equal(t, http.StatusOK, status)
		})
	}
	s.refused(t, "InvalidParameter", "Decrypt", params("CiphertextBlob", "YQ==", "Recipient", "{}"))
	testReEncrypt(t, s)
	for _, n := range []string{"0", "-1", "1025", "x"} {
		s.refused(t, "InvalidParameter", "GenerateDataKey", params("KeyId", keyID, "NumberOfBytes", n))
	}
}

func testReEncrypt(t *testing.T, s *service) {
	p := func(name, value string) map[string]string {
		all := params("CiphertextBlob", "Ymxv", "DestinationKeyId", "acs:kms:cn-test:1234567890:key/"+keyID,
			"SourceEncryptionContext", `{"a":"b"}`, "DestinationEncryptionContext", `{"c":"d"}`)
		all[name] = value
		return all
	}
	status, fields := s.do(t, "ReEncrypt", p("DryRun", ""))
	require.Equal(t, http.StatusOK, status, fields)
	delete(fields, "RequestId")
	require.Equal(t, map[string]any{"CiphertextBlob": blobText, "KeyId": keyID, "KeyVersionId": versionID}, fields)
	require.Equal(t, engine.ReEncryptInput{
		Blob: []byte("blo"), SourceContext: map[string]string{"a": "b"}, KeyID: keyID, Context: map[string]string{"c": "d"},
	}, s.engine.last)
	s.refused(t, "DryRunOperationError", "ReEncrypt", p("DryRun", "true"))

	s.engine.calls = nil
	s.refused(t, "Forbidden.AliasNotFound", "ReEncrypt", p("DestinationKeyId", "alias/mine"))
	for name, value := range map[string]string{
		"CiphertextBlob": "*", "DestinationKeyId": "key_1", "SourceEncryptionContext": "[]", "DestinationEncryptionContext": "[]",
		"SourceKeyId": keyID, "SourceKeyVersionId": versionID, "SourceEncryptionAlgorithm": "SM2PKE",
	} {
		fields := s.refused(t, "InvalidParameter", "ReEncrypt", p(name, value))
		require.Equal(t, "The specified parameter "+name+" is not valid.", fields["Message"])
	}
	require.Empty(t, s.engine.calls)
}

func TestScheduleKeyDeletion(t *testing.T) {
	s := newService(t)
	s.do(t, "ScheduleKeyDeletion", params("KeyId", keyID, "PendingWindowInDays", "366"))
	require.Equal(t, 366, s.engine.last)
	for _, days := range []string{"6", "367", "-7", "7.5", "week"} {
		s.refused(t, "InvalidParameter", "ScheduleKeyDeletion", params("KeyId", keyID, "PendingWindowInDays", days))
	}
}

func TestListKeys(t *testing.T) {
	s := newService(t)
	t.Run("nothing there", func(t *testing.T) {
		_, fields := s.do(t, "ListKeys", nil)
		require.Equal(t, map[string]any{"Key": []any{}}, fields["Keys"], "an empty list, not null")
		require.EqualValues(t, 0, fields["TotalCount"])
		require.EqualValues(t, 1, fields["PageNumber"])
		require.EqualValues(t, 10, fields["PageSize"])
		require.Equal(t, engine.ListKeysInput{Limit: 10}, s.engine.last)
	})
	t.Run("a page", func(t *testing.T) {
		s.engine.listed = 1
		_, fields := s.do(t, "ListKeys", params("PageNumber", "3", "PageSize", "100"))
		require.Equal(t, engine.ListKeysInput{Offset: 200, Limit: 100}, s.engine.last)
		require.EqualValues(t, 1, fields["TotalCount"])
	})
	for _, p := range []map[string]string{
		params("PageNumber", "0"), params("PageNumber", "x"), params("PageSize", "0"), params("PageSize", "101"), params("PageNumber", "99999999999999999999"),
	} {
		s.refused(t, "InvalidParameter", "ListKeys", p)
	}
}

func TestListKeysFilters(t *testing.T) {
	s := newService(t)
	all := engine.ListKeysInput{Limit: 10}
	for filters, want := range map[string]*engine.ListKeysInput{ // nil: no key can pass
		`[]`:                          &all,
		`[{"Key":"KeyState"}]`:        &all,
		`[{"Key":"Tag","Values":[]}]`: nil,
		`[{"Key":"KeyState","Values":["Enabled","Disabled"]},{"Key":"KeySpec","Values":["Aliyun_SM4"]}]`: {States: []engine.KeyState{"Enabled", "Disabled"}, Specs: []engine.KeySpec{"Aliyun_SM4"}, Limit: 10},
		`[{"Key":"KeyState","Values":["Enabled"]},{"Key":"KeyState","Values":["PendingImport"]}]`:        {States: []engine.KeyState{"Enabled", "PendingImport"}, Limit: 10},
		`[{"Key":"keyId","Values":["a"]},{"Key":"KeyId","Values":["b"]}]`:                                {KeyIDs: []string{"a", "b"}, Limit: 10},
		`[{"Key":"Creator","Values":["1234567890"]},{"Key":"CreatorType","Values":["User","Service"]}]`:  &all,
		`[{"Key":"ProtectionLevel","Values":["HSM"]},{"Key":"KeyUsage","Values":["ENCRYPT/DECRYPT"]}]`:   &all,
		`[{"Key":"ProtectionLevel","Values":["SOFTWARE"]}]`:                                              nil,
		`[{"Key":"KeyState","Values":["Enabled"]},{"Key":"AliasName","Values":["alias/x"]}]`:             nil,
		`[{"Key":"TagKey","Values":["x"]}]`:                                                              nil,
		`[{"Key":"DKMSInstanceId","Values":["kst-1"]}]`:                                                  nil,
	} {
		t.Run(filters, func(t *testing.T) {
			if strings.Contains(filters, `"Tag"`) {
				s.refused(t, "InvalidParameter", "ListKeys", params("Filters", filters))
				return
			}
			s.engine.calls, s.engine.listed = nil, 1
			status, fields := s.do(t, "ListKeys", params("Filters", filters))
			require.Equal(t, http.StatusOK, status, fields)
			if want == nil {
				require.Empty(t, s.engine.calls)
				require.EqualValues(t, 0, fields["TotalCount"])
				return
			}
			got := s.engine.last.(engine.ListKeysInput)
			require.ElementsMatch(t, want.KeyIDs, got.KeyIDs)
			got.KeyIDs, want.KeyIDs = nil, nil
			require.Equal(t, *want, got)
		})
	}
	eleven, err := json.Marshal(make([]struct{ Key string }, 11))
	require.NoError(t, err)
	for _, bad := range []string{
		`{}`, `x`, `[{"Key":"KeyState","Values":"Enabled"}]`, `[{"Key":"KeyState","Values":["enabled"]}]`, `[{"Key":"Colour","Values":["red"]}]`,
		`[{"Key":"KeyId","Values":["1","2","3","4","5","6","7","8","9","10","11"]}]`, string(eleven),
	} {
		s.refused(t, "InvalidParameter", "ListKeys", params("Filters", bad))
	}
}

func TestAccessLogHoldsNoParameter(t *testing.T) {
	s := newService(t)
	s.engine.err = &engine.Error{Kind: engine.InvalidKeyMaterial}
	s.do(t, "ImportKeyMaterial", params("KeyId", keyID, "EncryptedKeyMaterial", "bWF0ZXJpYWw=", "ImportToken", "dG9rZW4="))
	s.do(t, "Encrypt", params("KeyId", "bad key id", "Plaintext", "cGxhaW50ZXh0"))
	log := s.log.String()
	require.Regexp(t, `level=INFO msg=request action=ImportKeyMaterial key_id=`+keyID+` access_key_id=testid code=InvalidKeyMaterial status=400 request_id=[0-9A-F-]{36} duration=\d`, log)
	for _, secret := range []string{"bWF0ZXJpYWw", "dG9rZW4", "cGxhaW50ZXh0", "bad key id", "testsecret", "Signature"} {
		require.NotContains(t, log, secret)
	}
}
