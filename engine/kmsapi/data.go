package kmsapi

import (
	"context"
	"encoding/base64"

	"github.com/keyferry/keyferry/engine"
)

type encryptAnswer struct {
	CiphertextBlob string
	KeyID          string `json:"KeyId" xml:"KeyId"`
	KeyVersionID   string `json:"KeyVersionId" xml:"KeyVersionId"`
	envelope
}

type plaintextAnswer struct {
	Plaintext    string
	KeyID        string `json:"KeyId" xml:"KeyId"`
	KeyVersionID string `json:"KeyVersionId" xml:"KeyVersionId"`
	envelope
}

type dataKeyAnswer struct {
	CiphertextBlob string
	KeyID          string `json:"KeyId" xml:"KeyId"`
	KeyVersionID   string `json:"KeyVersionId" xml:"KeyVersionId"`
	Plaintext      string
	envelope
}

func encrypted(c engine.Ciphertext) *encryptAnswer {
	return &encryptAnswer{CiphertextBlob: base64.StdEncoding.EncodeToString(c.Blob), KeyID: c.KeyID, KeyVersionID: c.KeyVersionID}
}

func (h *Handler) encrypt(ctx context.Context, in *input) (body, error) {
	keyID := in.keyID("KeyId", engine.AliasNotFound)
	plaintext := in.base64("Plaintext")
	encctx := in.encryptionContext("EncryptionContext")
	if in.err != nil {
		return nil, in.err
	}
	c, err := h.cfg.Engine.Encrypt(ctx, keyID, plaintext, encctx)
	if err != nil {
		return nil, err
	}
	return encrypted(c), nil
}

func (h *Handler) decrypt(ctx context.Context, in *input) (body, error) {
	blob := in.base64("CiphertextBlob")
	encctx := in.encryptionContext("EncryptionContext")
	if in.err != nil {
		return nil, in.err
	}
	p, err := h.cfg.Engine.Decrypt(ctx, blob, encctx)
	if err != nil {
		return nil, err
	}
	in.call.keyID = p.KeyID
	return &plaintextAnswer{Plaintext: base64.StdEncoding.EncodeToString(p.Plaintext), KeyID: p.KeyID, KeyVersionID: p.KeyVersionID}, nil
}

// reEncrypt takes CMKs of either spec for the two sides. Its parameters for an
// asymmetric source, which none of them is, are refused.
func (h *Handler) reEncrypt(ctx context.Context, in *input) (body, error) {
	asked := engine.ReEncryptInput{
		Blob:          in.base64("CiphertextBlob"),
		SourceContext: in.encryptionContext("SourceEncryptionContext"),
		KeyID:         in.keyID("DestinationKeyId", engine.AliasNotFound),
		Context:       in.encryptionContext("DestinationEncryptionContext"),
	}
	if in.err != nil {
		return nil, in.err
	}
	c, err := h.cfg.Engine.ReEncrypt(ctx, asked)
	if err != nil {
		return nil, err
	}
	return encrypted(c), nil
}

// dataKey reads what both actions that make data keys take.
func (in *input) dataKey() engine.DataKeyInput {
	return engine.DataKeyInput{
		KeyID:         in.keyID("KeyId", engine.AliasNotFound),
		Spec:          in.optional("KeySpec"),
		NumberOfBytes: in.integer("NumberOfBytes", 0, 1, engine.MaxDataKey),
		Context:       in.encryptionContext("EncryptionContext"),
	}
}

func (h *Handler) generateDataKey(ctx context.Context, in *input) (body, error) {
	asked := in.dataKey()
	if in.err != nil {
		return nil, in.err
	}
	c, p, err := h.cfg.Engine.GenerateDataKey(ctx, asked)
	if err != nil {
		return nil, err
	}
	return &dataKeyAnswer{
		CiphertextBlob: base64.StdEncoding.EncodeToString(c.Blob),
		KeyID:          c.KeyID,
		KeyVersionID:   c.KeyVersionID,
		Plaintext:      base64.StdEncoding.EncodeToString(p.Plaintext),
	}, nil
}

func (h *Handler) generateDataKeyWithoutPlaintext(ctx context.Context, in *input) (body, error) {
	asked := in.dataKey()
	if in.err != nil {
		return nil, in.err
	}
	c, err := h.cfg.Engine.GenerateDataKeyWithoutPlaintext(ctx, asked)
	if err != nil {
		return nil, err
	}
	return encrypted(c), nil
}
