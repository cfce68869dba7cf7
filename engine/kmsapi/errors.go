package kmsapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/acs"
)

// failure is an answer that is an error. Codes and messages are those of the
// published API, verbatim, since clients match on both.
type failure struct {
	status  int
	code    string
	message string
	hint    string // for people, in the field Recommend
	cause   error  // for the log of this server only
}

// Error is for the log.
func (f *failure) Error() string {
	if f.cause != nil {
		return fmt.Sprintf("%s: %v", f.code, f.cause)
	}
	return f.code
}

func (f *failure) Unwrap() error { return f.cause }

// because returns a copy of f with a cause.
func (f failure) because(cause error) *failure {
	f.cause = cause
	return &f
}

// recommending returns a copy of f with a hint.
func (f failure) recommending(format string, args ...any) *failure {
	f.hint = fmt.Sprintf(format, args...)
	return &f
}

// errorBody is the union of what KMS and the gateway in front of it answer, so
// that every client finds what it reads. The v1 SDK panics if Code, Message,
// RequestId, HostId or Recommend is anything but a string.
type errorBody struct {
	HTTPStatus int `json:"HttpStatus" xml:"HttpStatus"`
	Code       string
	Message    string
	envelope
	HostID    string `json:"HostId" xml:"HostId"`
	Recommend string
}

func (f *failure) body(hostID string) *errorBody {
	return &errorBody{HTTPStatus: f.status, Code: f.code, Message: f.message, HostID: hostID, Recommend: f.hint}
}

// kinds is what each kind of the engine's errors is on the wire. A %s of the
// message takes the name of the parameter. The documentation puts that name of
// InvalidParameter in quotation marks, the service does not; this follows the
// service.
var kinds = map[engine.Kind]failure{
	engine.MissingParameter:   {status: 400, code: "MissingParameter", message: `The parameter "%s" is needed but not provided.`},
	engine.InvalidParameter:   {status: 400, code: "InvalidParameter", message: "The specified parameter %s is not valid."},
	engine.InvalidCiphertext:  {status: 400, code: "InvalidParameter", message: "The specified parameter CiphertextBlob is not valid."},
	engine.KeyNotFound:        {status: 404, code: "Forbidden.KeyNotFound", message: "The specified Key is not found."},
	engine.AliasNotFound:      {status: 404, code: "Forbidden.AliasNotFound", message: "The specified Alias is not found."},
	engine.ReceiptNotFound:    {status: 404, code: "Forbidden.ReceiptNotFound", message: "The specified Receipt is not found."},
	engine.UnsupportedOrigin:  {status: 400, code: "Unsupported.Origin", message: "This key origin is not valid for this api."},
	engine.UnsupportedAlias:   {status: 400, code: "Unsupported.Alias", message: "Alias is not valid for this api."},
	engine.UnsupportedOp:      {status: 400, code: "Rejected.UnsupportedOperation", message: "Unsupported operation."},
	engine.InvalidKeyMaterial: {status: 400, code: "InvalidKeyMaterial", message: "key material is invalid."},
	engine.InvalidImportToken: {status: 400, code: "InvalidImportToken", message: "import token is invalid."},
	engine.ExpiredImportToken: {status: 400, code: "ExpiredImportToken", message: "import token is expired."},
	engine.LimitExceeded:      {status: 400, code: "Rejected.LimitExceeded", message: "The request was rejected because user create resource limit was exceeded."},
	engine.StateModified:      {status: 409, code: "Rejected.StateModifiedFailed", message: "Keystate modified failed."},
	engine.KeyDisabled:        {status: 409, code: "Rejected.Disabled", message: "The request was rejected because the key state is Disabled."},
	engine.KeyPendingDeletion: {status: 409, code: "Rejected.PendingDeletion", message: "The request was rejected because the key state is PendingDeletion."},
	engine.KeyPendingImport:   {status: 409, code: "Rejected.PendingImport", message: "The request was rejected because the key state is PendingImport."},
	engine.MaterialLost:       {status: 409, code: "Rejected.PendingImport", message: "The request was rejected because the key state is PendingImport."},
	engine.Unavailable:        {status: 503, code: "ServiceUnavailableTemporary", message: "Service Unavailable Temporary."},
	engine.Internal:           {status: 500, code: "InternalFailure", message: "Internal Failure."},
}

// Failures that the protocol knows and the engine does not.
var (
	errMethod          = &failure{status: 403, code: "UnsupportedHTTPMethod", message: "This http method is not supported."}
	errNoSuchAction    = &failure{status: 404, code: "InvalidAction.NotFound", message: "Specified api is not found, please check your url and method."}
	errVersion         = &failure{status: 400, code: "InvalidVersion", message: "Specified parameter Version is not valid.", hint: "the version is " + Version}
	errBody            = &failure{status: 400, code: "ParseRequestParameterException", message: unreadableParams}
	errProtectionLevel = &failure{status: 400, code: "Unsupported.ProtectionLevel", message: "This protection level is not valid for this region"}
	errDryRun          = &failure{status: 400, code: "DryRunOperationError", message: "The request would have succeeded, but the DryRun parameter is set."}

	errNonceUsed = &failure{status: 400, code: "SignatureNonceUsed", message: "Specified signature nonce was used already."}
)

// signatures is what each kind of a refused signature is on the wire. The
// gateway of Alibaba Cloud ends the message of SignatureDoesNotMatch with the
// string that it signed, from which the v1 and Java SDKs tell a wrong secret
// from a wrong signature. This server does not: that string holds every
// parameter, wrapped material and plaintexts among them, and what is in an
// error body ends in logs.
var signatures = map[acs.Kind]failure{
	acs.ErrMissingSignature:  {status: 400, code: "IncompleteSignature", message: incompleteSignature},
	acs.ErrUnsupportedScheme: {status: 400, code: "IncompleteSignature", message: incompleteSignature},
	acs.ErrMalformed:         {status: 400, code: "IncompleteSignature", message: incompleteSignature},
	acs.ErrMissingNonce:      {status: 400, code: "IncompleteSignature", message: incompleteSignature},
	acs.ErrMissingKeyID:      {status: 400, code: "IncompleteSignature", message: incompleteSignature},
	acs.ErrUnknownKey:        {status: 404, code: "InvalidAccessKeyId.NotFound", message: "Specified access key is not found."},
	acs.ErrMissingTimestamp:  {status: 400, code: "IllegalTimestamp", message: `The input parameter "Timestamp" that is mandatory for processing this request is not supplied.`},
	acs.ErrTimestampFormat:   {status: 400, code: "InvalidTimeStamp.Format", message: "Specified time stamp or date value is not well formatted."},
	acs.ErrExpired:           {status: 400, code: "InvalidTimeStamp.Expired", message: "Specified time stamp or date value is expired."},
	acs.ErrMismatch:          {status: 400, code: "SignatureDoesNotMatch", message: "Specified signature is not matched with our calculation."},
	acs.ErrDuplicate:         {status: 400, code: "ParseRequestParameterException", message: unreadableParams},
	acs.ErrParameters:        {status: 400, code: "ParseRequestParameterException", message: unreadableParams},
	acs.ErrPath:              *errNoSuchAction,
}

const (
	incompleteSignature = "The request signature does not conform to Alibaba Cloud standards."
	unreadableParams    = "Server parse parameters exception. Please check your input params."
)

// failureOf decides what an error is on the wire. What it does not know is an
// InternalFailure, and says nothing.
func failureOf(err error) *failure {
	var f *failure
	if errors.As(err, &f) {
		return f
	}
	var e *engine.Error
	if errors.As(err, &e) {
		return kindFailure(e, err)
	}
	var s *acs.Error
	if errors.As(err, &s) {
		return signatureFailure(s)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return kinds[engine.Unavailable].because(err)
	}
	return kinds[engine.Internal].because(err)
}

func signatureFailure(e *acs.Error) *failure {
	f, known := signatures[e.Kind]
	if !known {
		return kinds[engine.Internal].because(e)
	}
	f.cause = e
	f.hint = strings.TrimPrefix(e.Kind.Error(), "acs: ")
	switch {
	case e.Kind == acs.ErrDuplicate:
		// Detail is a name that whoever sent this made up.
	case e.Detail != "":
		f.hint = e.Detail
	case e.Kind == acs.ErrMismatch:
		f.hint = "check the access key secret"
	}
	return &f
}

func kindFailure(e *engine.Error, err error) *failure {
	f, known := kinds[e.Kind]
	if !known {
		f = kinds[engine.Internal]
	}
	switch e.Kind {
	case engine.MissingParameter, engine.InvalidParameter:
		f.message = fmt.Sprintf(f.message, e.Parameter)
	}
	f.cause = err
	switch {
	case e.Kind == engine.InvalidKeyMaterial:
		// One answer, whatever the engine might add: a difference between two
		// blobs is a padding oracle.
	case f.status == http.StatusInternalServerError:
	default:
		f.hint = e.Hint
	}
	return &f
}

func missing(parameter string) error {
	return &engine.Error{Kind: engine.MissingParameter, Parameter: parameter}
}

func invalid(parameter, hint string, args ...any) error {
	return &engine.Error{Kind: engine.InvalidParameter, Parameter: parameter, Hint: fmt.Sprintf(hint, args...)}
}
