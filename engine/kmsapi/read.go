package kmsapi

import (
	"fmt"
	"io"
	"net/http"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/acs"
)

// MaxBody bounds the body of a request in bytes. The largest honest one is a
// form with a Description of 8,192 characters that take four bytes each, every
// byte of them escaped: 96 KiB, and some for the rest.
const MaxBody = 128 << 10

// maxReading is how many bodies are read at a time; the others wait. What a
// server holds for bodies that arrive slowly is bounded by it: twice
// maxReading times MaxBody, 16 MiB, and as much again for garbage.
const maxReading = 64

// reading bounds the bodies that are read at a time. Requests that name an
// access key outside their body, as all of Alibaba's clients do, do not wait
// for those that anybody could send.
type reading struct {
	named, nameless chan struct{}
}

func newReading() reading {
	return reading{named: make(chan struct{}, maxReading), nameless: make(chan struct{}, maxReading)}
}

// readBody reads the body of a request, but not of one that it can refuse
// without: unless the body itself names the access key, that one exists.
func (h *Handler) readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		return nil, errMethod
	}
	if r.Body == http.NoBody {
		return nil, nil
	}
	id, err := acs.AccessKeyID(r)
	if err != nil {
		return nil, err
	}
	slots := h.reading.nameless
	if id != "" {
		if _, ok := h.cfg.Secret(id); !ok {
			return nil, &acs.Error{Kind: acs.ErrUnknownKey}
		}
		slots = h.reading.named
	}
	if r.ContentLength > MaxBody {
		return nil, errBody.because(fmt.Errorf("body of %d bytes", r.ContentLength))
	}
	select {
	case slots <- struct{}{}:
		defer func() { <-slots }()
	case <-r.Context().Done():
		return nil, kinds[engine.Unavailable].because(fmt.Errorf("%d bodies are being read: %w", maxReading, r.Context().Err()))
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	if err != nil {
		return nil, errBody.because(err)
	}
	return body, nil
}
