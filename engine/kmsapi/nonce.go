package kmsapi

import (
	"context"
	"time"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/store"
)

// nonceMargin is how much longer than its signature is good a nonce is kept,
// for a clock that is set back a little.
const nonceMargin = time.Minute

// useNonce makes a verified signature good for this one request. It returns
// nil only when that is durable: a recorded ImportKeyMaterial that is replayed
// after a restart must not bring back material that was deleted since.
func (h *Handler) useNonce(ctx context.Context, id acs.Identity, now time.Time) error {
	fresh, err := h.cfg.Nonces.AddNonce(ctx, store.Nonce{
		AccessKeyID: id.AccessKeyID,
		Value:       id.Nonce,
		// A request from a clock that is ahead is good for longer than Window
		// from now.
		ExpiresAt: id.Timestamp.Add(acs.Window + nonceMargin),
	}, now)
	if err != nil {
		return kinds[engine.Unavailable].because(err)
	}
	if !fresh {
		return errNonceUsed
	}
	return nil
}
