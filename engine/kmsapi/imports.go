package kmsapi

import (
	"context"
	"encoding/base64"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
)

type importParametersAnswer struct {
	KeyID           string `json:"KeyId" xml:"KeyId"`
	ImportToken     string // Base64, opaque
	PublicKey       string // Base64 of a SubjectPublicKeyInfo in DER
	TokenExpireTime string
	envelope
}

func (h *Handler) getParametersForImport(ctx context.Context, in *input) (body, error) {
	keyID := in.keyID("KeyId", engine.UnsupportedAlias)
	algorithm := hsm.Algorithm(in.required("WrappingAlgorithm"))
	spec := hsm.PairSpec(in.required("WrappingKeySpec"))
	if in.err != nil {
		return nil, in.err
	}
	p, err := h.cfg.Engine.GetParametersForImport(ctx, keyID, spec, algorithm)
	if err != nil {
		return nil, err
	}
	return &importParametersAnswer{
		KeyID:           p.KeyID,
		ImportToken:     base64.StdEncoding.EncodeToString(p.ImportToken),
		PublicKey:       base64.StdEncoding.EncodeToString(p.PublicKey),
		TokenExpireTime: formatTime(p.ExpiresAt),
	}, nil
}

func (h *Handler) importKeyMaterial(ctx context.Context, in *input) (body, error) {
	imported := engine.ImportInput{
		KeyID:                in.keyID("KeyId", engine.UnsupportedAlias),
		EncryptedKeyMaterial: in.base64("EncryptedKeyMaterial"),
		ImportToken:          in.base64("ImportToken"),
		ExpireAt:             in.unixTime("KeyMaterialExpireUnix"),
		ExpectCheckValue:     in.hex(expectKeyCheckValue, hsm.KCVLen),
		ExpectMaterialID:     in.hex(expectMaterialID, hsm.MaterialIDLen),
		RequestID:            in.call.requestID,
	}
	if in.err != nil {
		return nil, in.err
	}
	if _, err := h.cfg.Engine.ImportKeyMaterial(ctx, imported); err != nil {
		return nil, err
	}
	return &envelope{}, nil
}
