// Package kmsapi speaks the Alibaba Cloud KMS API, version 2016-01-20, over an
// engine: an http.Handler that Alibaba's SDKs, command line and Terraform
// transport use unchanged.
//
// Start with New. The handler answers GET and POST on "/", takes parameters
// from the query and from a form body, and answers JSON or, with Format=XML,
// XML. Every request is signed (see package acs) and every signature nonce is
// good once, also after a restart: the nonce is durable in the store before
// the request is acted upon. That is one group-committed write for each
// request, reads and the data plane included; without it a recorded Decrypt
// could be replayed by whoever saw it.
//
// All answers to a refused key material are the same bytes, but for the
// RequestId and the Date.
//
// Beyond the published API, ImportKeyMaterial takes ExpectKeyCheckValue and
// ExpectKeyMaterialId (hexadecimal), and DescribeKey answers KeyMaterialId,
// KeyCheckValue and KeyCheckValueAlgorithm. GetImportReceipt,
// ListImportReceipts, GetReceiptLogHead and GetReceiptLog are Keyferry's own.
package kmsapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// Version is the only version of the API there is.
const Version = "2016-01-20"

// Engine is what the handler needs of engine.Engine.
type Engine interface {
	CreateKey(ctx context.Context, in engine.CreateKeyInput) (engine.KeyMetadata, error)
	DescribeKey(ctx context.Context, keyID string) (engine.KeyMetadata, error)
	ListKeys(ctx context.Context, in engine.ListKeysInput) (keys []engine.KeyMetadata, total int, err error)
	EnableKey(ctx context.Context, keyID string) error
	DisableKey(ctx context.Context, keyID string) error
	ScheduleKeyDeletion(ctx context.Context, keyID string, days int) error
	CancelKeyDeletion(ctx context.Context, keyID string) error

	GetParametersForImport(ctx context.Context, keyID string, spec hsm.PairSpec, alg hsm.Algorithm) (engine.ImportParameters, error)
	ImportKeyMaterial(ctx context.Context, in engine.ImportInput) (engine.KeyMetadata, error)
	DeleteKeyMaterial(ctx context.Context, keyID string) error

	Receipt(ctx context.Context, in engine.ReceiptInput) (*receipt.Receipt, error)
	KeyReceipts(ctx context.Context, keyID string, offset, limit int) (list []engine.KeyReceipt, total int, err error)
	LogHead(ctx context.Context) (engine.LogHead, error)
	LogEntries(ctx context.Context, from int64, limit int) ([]receipt.LogEntry, error)

	Encrypt(ctx context.Context, keyID string, plaintext []byte, encctx map[string]string) (engine.Ciphertext, error)
	Decrypt(ctx context.Context, blob []byte, encctx map[string]string) (engine.Plaintext, error)
	ReEncrypt(ctx context.Context, in engine.ReEncryptInput) (engine.Ciphertext, error)
	GenerateDataKey(ctx context.Context, in engine.DataKeyInput) (engine.Ciphertext, engine.Plaintext, error)
	GenerateDataKeyWithoutPlaintext(ctx context.Context, in engine.DataKeyInput) (engine.Ciphertext, error)
}

// Nonces remembers signature nonces; see store.Store, whose method it is.
type Nonces interface {
	AddNonce(ctx context.Context, nonce store.Nonce, now time.Time) (fresh bool, err error)
}

// Config says what the handler serves. Engine, Nonces and Secret are required.
type Config struct {
	Engine Engine
	Nonces Nonces
	// Secret returns the secret of an access key. It is called once or twice
	// for each request and must be safe for concurrent use. The slice is only
	// read.
	Secret func(accessKeyID string) (secret []byte, ok bool)

	Region  string           // in ARNs; "": "local"
	Account string           // in ARNs and as the keys' creator; "": "0"
	Logger  *slog.Logger     // nil: discards
	Now     func() time.Time // nil: time.Now
	// Observe is told of each answer, for metrics; nil: nobody is. action is ""
	// for what is none of ours; code is "OK" or one of the API's. Both are of
	// bounded sets.
	Observe func(action, code string, took time.Duration)
}

// Handler serves the API. Make one with New; it is safe for concurrent use.
type Handler struct {
	cfg     Config
	reading reading
}

// New returns a Handler.
func New(cfg Config) (*Handler, error) {
	if cfg.Engine == nil || cfg.Nonces == nil || cfg.Secret == nil {
		return nil, errors.New("kmsapi: Config needs Engine, Nonces and Secret")
	}
	if cfg.Region == "" {
		cfg.Region = "local"
	}
	if cfg.Account == "" {
		cfg.Account = "0"
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Observe == nil {
		cfg.Observe = func(string, string, time.Duration) {}
	}
	return &Handler{cfg: cfg, reading: newReading()}, nil
}

// call is one request on its way through the handler. What the access log says
// of it is gathered here, and holds no parameter but the key id.
type call struct {
	requestID string
	accessKey string // once its signature was good
	action    string // once it is known to be one of ours
	keyID     string // once it is known to be one by its form
	format    format
}

// ServeHTTP answers one request and writes one line to the access log.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	c := &call{requestID: strings.ToUpper(uuid.NewString())}
	body, err := h.serve(w, r, c)
	status, code := http.StatusOK, "OK"
	if err != nil {
		f := failureOf(err)
		status, code = f.status, f.code
		body = f.body(h.hostID())
	}
	body.stamp(c.requestID)
	write(w, c, status, body)
	took := time.Since(start)
	h.cfg.Observe(c.action, code, took)

	level := slog.LevelInfo
	attrs := []slog.Attr{
		slog.String("action", c.action), slog.String("key_id", c.keyID), slog.String("access_key_id", c.accessKey),
		slog.String("code", code), slog.Int("status", status), slog.String("request_id", c.requestID),
		slog.Duration("duration", took),
	}
	if status >= http.StatusInternalServerError {
		level = slog.LevelError
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	h.cfg.Logger.LogAttrs(r.Context(), level, "request", attrs...)
}

// hostID names this server in error bodies, where clients expect a host.
func (h *Handler) hostID() string { return "kms." + h.cfg.Region }

// serve does everything but writing the answer. A panic is an internal failure
// of this request and of no other.
func (h *Handler) serve(w http.ResponseWriter, r *http.Request, c *call) (b body, err error) {
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		if v == http.ErrAbortHandler { //nolint:errorlint // net/http compares it so
			panic(v)
		}
		// The value of a panic may hold anything; its type and where it came
		// from hold no parameter.
		h.cfg.Logger.LogAttrs(r.Context(), slog.LevelError, "panic", slog.String("request_id", c.requestID),
			slog.String("type", fmt.Sprintf("%T", v)), slog.String("stack", string(debug.Stack())))
		b, err = nil, fmt.Errorf("panic of type %T", v)
	}()

	raw, err := h.readBody(w, r)
	if err != nil {
		c.format = formatOf(r.URL.Query().Get("Format"))
		return nil, err
	}
	now := h.cfg.Now()
	req, identity, err := acs.Verify(r, raw, h.cfg.Secret, now)
	c.format = formatOf(req.Format) // there even with an error
	if err != nil {
		return nil, err
	}
	c.accessKey = identity.AccessKeyID
	act, ok := actions[req.Action]
	if !ok {
		return nil, errNoSuchAction
	}
	if req.Version != Version {
		return nil, errVersion
	}
	c.action = req.Action
	if err := h.useNonce(r.Context(), identity, now); err != nil {
		return nil, err
	}
	in := &input{values: req.Params, call: c, region: h.cfg.Region, account: h.cfg.Account}
	in.refuseUnsupported()
	return act(h, r.Context(), in)
}

// body is an answer before it is encoded.
type body interface{ stamp(requestID string) }

// envelope is what every answer holds.
type envelope struct {
	RequestID string `json:"RequestId" xml:"RequestId"`
}

func (e *envelope) stamp(requestID string) { e.RequestID = requestID }

// write encodes and sends an answer. A client that is gone is no concern of
// the server's.
func write(w http.ResponseWriter, c *call, status int, b body) {
	var buf bytes.Buffer
	contentType, err := c.format.encode(&buf, b)
	if err != nil {
		// Every answer is a struct of strings and numbers.
		panic("kmsapi: an answer that cannot be encoded: " + err.Error())
	}
	header := w.Header()
	header.Set("Content-Type", contentType)
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("X-Acs-Request-Id", c.requestID)
	w.WriteHeader(status)
	_, _ = w.Write(buf.Bytes())
}
