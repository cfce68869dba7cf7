package kmsapi

import (
	"context"
	"encoding/hex"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
)

// What is the same for every key of this server.
const (
	originExternal   = "EXTERNAL"
	keyUsage         = "ENCRYPT/DECRYPT"
	protectionLevel  = "HSM"
	creatorType      = "User"
	rotationDisabled = "Disabled"
)

// storageMechanisms are the values of KeyStorageMechanism.
var storageMechanisms = map[string]hsm.Custody{
	"HsmInternal":          hsm.Resident,
	"HsmEncryptedDatabase": hsm.Sealed,
}

// keyMetadata is KeyMetadata of the API, every field a string. The last three
// are Keyferry's own: what a customer compares with what was wrapped.
type keyMetadata struct {
	CreationDate                  string
	Description                   string
	KeyID                         string `json:"KeyId" xml:"KeyId"`
	KeySpec                       string
	KeyState                      string
	KeyUsage                      string
	PrimaryKeyVersion             string
	DeleteDate                    string
	Creator                       string
	ARN                           string `json:"Arn" xml:"Arn"`
	Origin                        string
	MaterialExpireTime            string
	ProtectionLevel               string
	LastRotationDate              string
	AutomaticRotation             string
	RotationInterval              string
	NextRotationDate              string
	DKMSInstanceID                string `json:"DKMSInstanceId" xml:"DKMSInstanceId"`
	DeletionProtection            string
	DeletionProtectionDescription string

	KeyMaterialID          string `json:"KeyMaterialId" xml:"KeyMaterialId"` // hexadecimal, "" before the first import
	KeyCheckValue          string // likewise
	KeyCheckValueAlgorithm string
}

type keyMetadataAnswer struct {
	KeyMetadata keyMetadata
	envelope
}

func (h *Handler) metadata(m engine.KeyMetadata) body {
	answer := &keyMetadataAnswer{KeyMetadata: keyMetadata{
		CreationDate:       formatTime(m.CreatedAt),
		Description:        m.Description,
		KeyID:              m.KeyID,
		KeySpec:            string(m.Spec),
		KeyState:           string(m.State),
		KeyUsage:           keyUsage,
		PrimaryKeyVersion:  m.KeyVersionID,
		DeleteDate:         formatTime(m.DeleteAt),
		Creator:            h.cfg.Account,
		ARN:                h.keyARN(m.KeyID),
		Origin:             originExternal,
		MaterialExpireTime: formatTime(m.ExpireAt),
		ProtectionLevel:    protectionLevel,
		AutomaticRotation:  rotationDisabled,
		DeletionProtection: "Disabled",
	}}
	if m.CheckValue.Algorithm != "" {
		answer.KeyMetadata.KeyMaterialID = hex.EncodeToString(m.MaterialID[:])
		answer.KeyMetadata.KeyCheckValue = hex.EncodeToString(m.CheckValue.Value[:])
		answer.KeyMetadata.KeyCheckValueAlgorithm = m.CheckValue.Algorithm
	}
	return answer
}

// createKey makes keys of origin EXTERNAL only. The API's default is another
// one, and so is its default protection level; a client that leaves the origin
// out expects a key that works at once, and is refused rather than surprised.
// The protection level may be left out, but SOFTWARE is refused: Terraform
// would see HSM in the answer and replace the key for ever.
func (h *Handler) createKey(ctx context.Context, in *input) (body, error) {
	switch origin := in.optional("Origin"); origin {
	case originExternal:
	case "", "Aliyun_KMS":
		in.fail(&engine.Error{Kind: engine.UnsupportedOrigin, Hint: "Keyferry makes no key material of its own: ask for Origin EXTERNAL and import some"})
	default:
		in.fail(invalid("Origin", "Origin must be EXTERNAL, in this case"))
	}
	if usage := in.optional("KeyUsage"); usage != "" && usage != keyUsage {
		in.fail(invalid("KeyUsage", "KeyUsage must be %s", keyUsage))
	}
	switch level := in.optional("ProtectionLevel"); level {
	case "", protectionLevel:
	case "SOFTWARE":
		in.fail(errProtectionLevel.recommending("Keyferry keeps every key in its token: ask for ProtectionLevel %s", protectionLevel))
	default:
		in.fail(invalid("ProtectionLevel", "ProtectionLevel must be %s", protectionLevel))
	}
	create := engine.CreateKeyInput{Spec: engine.KeySpec(in.optional("KeySpec")), Description: in.optional("Description")}
	if mechanism := in.optional("KeyStorageMechanism"); mechanism != "" {
		custody, known := storageMechanisms[mechanism]
		if !known {
			in.fail(invalid("KeyStorageMechanism", "KeyStorageMechanism is HsmInternal or HsmEncryptedDatabase"))
		}
		create.Custody = custody
	}
	if in.err != nil {
		return nil, in.err
	}
	m, err := h.cfg.Engine.CreateKey(ctx, create)
	if err != nil {
		return nil, err
	}
	in.call.keyID = m.KeyID
	return h.metadata(m), nil
}

func (h *Handler) describeKey(ctx context.Context, in *input) (body, error) {
	keyID := in.keyID("KeyId", engine.AliasNotFound)
	if in.err != nil {
		return nil, in.err
	}
	m, err := h.cfg.Engine.DescribeKey(ctx, keyID)
	if err != nil {
		return nil, err
	}
	return h.metadata(m), nil
}

func (h *Handler) scheduleKeyDeletion(ctx context.Context, in *input) (body, error) {
	keyID := in.keyID("KeyId", engine.UnsupportedAlias)
	in.required("PendingWindowInDays")
	days := in.integer("PendingWindowInDays", 0, 7, 366)
	if in.err != nil {
		return nil, in.err
	}
	if err := h.cfg.Engine.ScheduleKeyDeletion(ctx, keyID, days); err != nil {
		return nil, err
	}
	return &envelope{}, nil
}
