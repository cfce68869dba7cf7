package main

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/keyferry/keyferry/engine/byok"
)

// What one import and each of a manifest's have in common.

// parametersForImport are the answer to GetParametersForImport.
type parametersForImport struct{ PublicKey, ImportToken string }

// wrap wraps material and adds what ImportKeyMaterial needs of it.
func (p *parametersForImport) wrap(algorithm string, material []byte, params url.Values) error {
	spki, err := base64.StdEncoding.DecodeString(strings.TrimSpace(p.PublicKey))
	if err != nil {
		return errors.New("GetParametersForImport: the public key is not Base64")
	}
	wrapped, err := byok.Wrap(algorithm, spki, material)
	if err != nil {
		return explainWrap(err)
	}
	params.Set("EncryptedKeyMaterial", base64.StdEncoding.EncodeToString(wrapped))
	params.Set("ImportToken", p.ImportToken)
	return nil
}

// importParams are the parameters of ImportKeyMaterial that do not depend on the
// material. A zero time is never.
func importParams(keyID string, expireAt time.Time) url.Values {
	expire := "0"
	if !expireAt.IsZero() {
		expire = strconv.FormatInt(expireAt.Unix(), 10)
	}
	return url.Values{"KeyId": {keyID}, "KeyMaterialExpireUnix": {expire}}
}

// measure computes the key check value and the material id of material within
// a key, in hexadecimal digits.
func (k *keyMetadata) measure(material []byte) (kcv, materialID string, err error) {
	value, err := byok.KCV(k.KeySpec, material)
	if err != nil {
		return "", "", err
	}
	id, err := byok.MaterialID(k.KeyID, material)
	if err != nil {
		return "", "", err
	}
	return hex.EncodeToString(value[:]), hex.EncodeToString(id[:]), nil
}

// kcvAlgorithm is that of the key check values which this program computes. A
// token without SM4 shows the one of AES-ECB.
func (k *keyMetadata) kcvAlgorithm() string {
	if k.KeySpec == byok.SM4 {
		return "SM4-ECB"
	}
	return "AES-ECB"
}

// hasOther reports whether the KMS has measured another material id than this
// one, where both are known.
func (k *keyMetadata) hasOther(materialID string) bool {
	return k.KeyMaterialID != "" && materialID != "" && k.KeyMaterialID != materialID
}

// errHasOther refuses a key that was first given other material.
func (k *keyMetadata) errHasOther() error {
	return withHint(fmt.Errorf("key %s was first given other material, with key check value %s", k.KeyID, k.KeyCheckValue), "%s", hints["InvalidKeyMaterial"])
}

// errMeasured is of a key that was imported into, and of which the KMS says what
// this program does not.
func (k *keyMetadata) errMeasured(what, got, want string) error {
	return withHint(fmt.Errorf("the KMS measured another %s: %s instead of %s", what, got, want),
		"do not use key %s: what the KMS holds is not your material", k.KeyID)
}
