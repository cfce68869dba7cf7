package kmsapi

import (
	"context"

	"github.com/keyferry/keyferry/engine"
)

// action does what a request asks for, once that is known to be allowed. It
// reads all parameters before it acts, so that a request is refused whole.
type action func(h *Handler, ctx context.Context, in *input) (body, error)

var actions = map[string]action{
	"CreateKey":           (*Handler).createKey,
	"DescribeKey":         (*Handler).describeKey,
	"ListKeys":            (*Handler).listKeys,
	"EnableKey":           onKey(Engine.EnableKey),
	"DisableKey":          onKey(Engine.DisableKey),
	"ScheduleKeyDeletion": (*Handler).scheduleKeyDeletion,
	"CancelKeyDeletion":   onKey(Engine.CancelKeyDeletion),

	"GetParametersForImport": (*Handler).getParametersForImport,
	"ImportKeyMaterial":      (*Handler).importKeyMaterial,
	"DeleteKeyMaterial":      onKey(Engine.DeleteKeyMaterial),

	"GetImportReceipt":   (*Handler).getImportReceipt,
	"ListImportReceipts": (*Handler).listImportReceipts,
	"GetReceiptLogHead":  (*Handler).getReceiptLogHead,
	"GetReceiptLog":      (*Handler).getReceiptLog,

	"Encrypt":                         dry((*Handler).encrypt),
	"Decrypt":                         dry((*Handler).decrypt),
	"ReEncrypt":                       dry((*Handler).reEncrypt),
	"GenerateDataKey":                 dry((*Handler).generateDataKey),
	"GenerateDataKeyWithoutPlaintext": dry((*Handler).generateDataKeyWithoutPlaintext),
}

// onKey is an action that takes a KeyId, by its id only, and answers nothing.
func onKey(do func(e Engine, ctx context.Context, keyID string) error) action {
	return func(h *Handler, ctx context.Context, in *input) (body, error) {
		keyID := in.keyID("KeyId", engine.UnsupportedAlias)
		if in.err != nil {
			return nil, in.err
		}
		if err := do(h.cfg.Engine, ctx, keyID); err != nil {
			return nil, err
		}
		return &envelope{}, nil
	}
}

// dry gives an action the parameter DryRun. A dry run always fails: with
// DryRunOperationError if the action would have succeeded, which is known
// because it is done and its answer dropped (no action that takes DryRun
// changes anything but the count of a key's uses); with ValidationError where
// a parameter is at fault; else as the action itself.
func dry(act action) action {
	return func(h *Handler, ctx context.Context, in *input) (body, error) {
		isDry := in.boolean("DryRun")
		answer, err := act(h, ctx, in)
		if !isDry {
			return answer, err
		}
		if err == nil {
			return nil, errDryRun
		}
		if f := failureOf(err); f.code == kinds[engine.MissingParameter].code || f.code == kinds[engine.InvalidParameter].code {
			validation := *f
			validation.code = "ValidationError"
			return nil, &validation
		}
		return nil, err
	}
}
