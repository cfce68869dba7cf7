package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// ImportTokenLife is how long import parameters are good for.
const ImportTokenLife = 24 * time.Hour

// shareWindow is how old the newest pair may be, beyond the bound on
// outstanding pairs, and still be shared by a new import token.
const shareWindow = 30 * time.Minute

// WrappingOffer is a pair spec and an algorithm that GetParametersForImport
// answers.
type WrappingOffer struct {
	Spec      hsm.PairSpec
	Algorithm hsm.Algorithm
}

// algorithms are those that exist. Which ones are offered the token decides.
var algorithms = []hsm.Algorithm{hsm.OAEPSHA1, hsm.OAEPSHA256, hsm.PKCS1v15, hsm.SM2PKE}

// offersOf lists what the token proved at open, in the order of specs.
func offersOf(token *hsm.Token, specs []hsm.PairSpec) []WrappingOffer {
	var offers []WrappingOffer
	for _, spec := range specs {
		for _, alg := range algorithms {
			if token.Offers(spec, alg) == nil {
				offers = append(offers, WrappingOffer{spec, alg})
			}
		}
	}
	return offers
}

// Algorithms lists what GetParametersForImport answers on this token.
func (e *Engine) Algorithms() []WrappingOffer { return slices.Clone(e.offers) }

// checkOffer says by name what is missing where an offer is not made.
func (e *Engine) checkOffer(offer WrappingOffer) error {
	switch {
	case offer.Spec == "":
		return &Error{Kind: MissingParameter, Parameter: "WrappingKeySpec"}
	case offer.Algorithm == "":
		return &Error{Kind: MissingParameter, Parameter: "WrappingAlgorithm"}
	case slices.Contains(e.offers, offer):
		return nil
	}
	// Only pairs help: not every algorithm goes with every spec. Why the token
	// lacks one is in its operator's log.
	offered := make([]string, len(e.offers))
	for i, o := range e.offers {
		offered[i] = o.String()
	}
	list := strings.Join(offered, ", ")
	switch { // what is unknown is not repeated: it may be anything
	case !slices.Contains(e.specs, offer.Spec):
		return invalid("WrappingKeySpec", "this server offers "+list)
	case !slices.Contains(algorithms, offer.Algorithm):
		return invalid("WrappingAlgorithm", "this server offers "+list)
	}
	return invalid("WrappingAlgorithm", fmt.Sprintf("this server does not offer %s; it offers %s", offer, list))
}

// String is how an offer is written in hints.
func (o WrappingOffer) String() string { return string(o.Algorithm) + " with " + string(o.Spec) }

// GetParametersForImport answers a public key to wrap material under, and an
// import token for that key, this CMK and this algorithm. It generates nothing
// itself: ctx bounds the waiting for a pair when the pool is dry.
//
// While fewer than Config.PairBound pairs are outstanding each call answers a
// fresh one. LimitExceeded: all PKCS#1 v1.5 pairs are taken, which are never
// shared.
func (e *Engine) GetParametersForImport(
	ctx context.Context, keyID string, spec hsm.PairSpec, alg hsm.Algorithm,
) (ImportParameters, error) {
	if err := checkKeyID(keyID); err != nil {
		return ImportParameters{}, err
	}
	if err := e.checkOffer(WrappingOffer{spec, alg}); err != nil {
		return ImportParameters{}, err
	}
	row, err := e.currentRow(ctx, keyRef{id: keyID})
	if err != nil {
		return ImportParameters{}, err
	}
	custody := custodyOf(&row)
	if !slices.Contains(e.custodies, custody) {
		return ImportParameters{}, &Error{Kind: UnsupportedOp, Hint: fmt.Sprintf("the key's material is to be %s, and is not kept so here", custody)}
	}
	if custody != e.custodies[0] {
		e.bothPools.Store(true)
	}
	kind := kindOf(spec, custody)
	bound, pair, err := e.bindPair(ctx, keyID, WrappingOffer{kind, alg})
	if err != nil {
		return ImportParameters{}, err
	}
	token := importToken{
		id:          bound.ID,
		keyID:       keyID,
		pair:        pair.ID,
		fingerprint: pair.Fingerprint,
		algorithm:   alg,
		spec:        kind,
		issuedAt:    bound.IssuedAt,
		expiresAt:   bound.ExpiresAt,
	}
	encoded, err := e.issue(ctx, &token)
	if err != nil {
		return ImportParameters{}, err
	}
	return ImportParameters{
		KeyID:       keyID,
		PublicKey:   pair.SPKI,
		ImportToken: encoded,
		ExpiresAt:   bound.ExpiresAt,
	}, nil
}

// maxBadPairs is how many pairs that turn out not to be in the token one
// request puts up with.
const maxBadPairs = 4

// bindPair takes a pair for a new import token and makes sure that the token
// has exactly that pair.
func (e *Engine) bindPair(
	ctx context.Context, keyID string, offer WrappingOffer,
) (store.ImportToken, hsm.PairInfo, error) {
	for range maxBadPairs {
		bound, err := e.takePair(ctx, keyID, offer)
		if err != nil {
			return store.ImportToken{}, hsm.PairInfo{}, err
		}
		info, err := e.pairOf(ctx, &bound.Pair)
		if err == nil {
			return bound, info, nil
		}
		if !errors.Is(err, hsm.ErrPairNotFound) && !errors.Is(err, hsm.ErrUntrusted) {
			return store.ImportToken{}, hsm.PairInfo{}, tokenError(err)
		}
		// Without its private half the pair is of no use to any token bound to
		// it. The row goes; what is in the token under that name stays, for a
		// person to look at.
		e.log.LogAttrs(ctx, slog.LevelError, "a wrapping pair is not what the store says; its row is removed",
			slog.String("pair", pairName(bound.Pair.ID)), slog.Any("error", err))
		if err := e.store.DeletePair(ctx, bound.Pair.ID); err != nil {
			return store.ImportToken{}, hsm.PairInfo{}, storeError(err)
		}
	}
	return store.ImportToken{}, hsm.PairInfo{}, &Error{Kind: Unavailable, Hint: "the token has lost its wrapping pairs"}
}

// pairOf returns the pair in the token that a row names, or hsm.ErrUntrusted
// if it is another than the row says.
func (e *Engine) pairOf(ctx context.Context, row *store.Pair) (hsm.PairInfo, error) {
	info, err := e.token.Pair(ctx, row.ID)
	if err != nil {
		return hsm.PairInfo{}, err
	}
	if info.Fingerprint != row.Fingerprint || string(kindOf(info.Spec, info.Custody)) != row.Spec || string(info.Algorithm) != row.Algorithm {
		return hsm.PairInfo{}, fmt.Errorf("%w: the pair's fingerprint, spec or algorithm is not the stored one", hsm.ErrUntrusted)
	}
	return info, nil
}

// takePair binds a pair to a new import token, as the sharing rules say.
//
// Beyond the bound a token shares the newest pair if that was bound within the
// share window. If it was not, one fresh pair goes beyond the bound, so that no
// pair is shared over a longer time; for that the bound is raised for this
// request to what is outstanding now and one more. Of two requests that do so
// at once the second finds the pair of the first and shares it. So at most one
// pair each half hour exceeds the bound, and as pairs live for 24 hours and
// half an hour at most, 49 do at any time. PKCS#1 v1.5 pairs are never shared
// and never exceed the bound: while one lives, whoever has the PIN reads what
// was wrapped under it.
func (e *Engine) takePair(ctx context.Context, keyID string, offer WrappingOffer) (store.ImportToken, error) {
	for bound := e.pairBound; ; {
		now := e.second()
		req := store.BindRequest{
			KeyID:     keyID,
			Spec:      string(offer.Spec),
			Algorithm: string(offer.Algorithm),
			Now:       now,
			ExpiresAt: now.Add(ImportTokenLife),
			Bound:     bound,
		}
		if offer.Algorithm != hsm.PKCS1v15 {
			req.ShareSince = now.Add(-shareWindow)
		}
		rand.Read(req.TokenID[:]) // never fails: crypto/rand
		added := e.pool.added()   // asked for first: no pair added from here on is missed
		token, err := e.store.BindPair(ctx, req)
		switch {
		case err == nil:
			e.pool.wake()
			return token, nil
		case errors.Is(err, store.ErrBound) && offer.Algorithm == hsm.PKCS1v15:
			return store.ImportToken{}, &Error{
				Kind: LimitExceeded,
				Hint: "RSAES_PKCS1_V1_5 pairs are never shared and all are taken until their tokens expire; use RSAES_OAEP",
			}
		case errors.Is(err, store.ErrBound):
			if bound, err = e.outstanding(ctx, offer, now); err != nil {
				return store.ImportToken{}, err
			}
			bound++
		case errors.Is(err, store.ErrNoPair):
			if err := e.pool.wait(ctx, added); err != nil {
				return store.ImportToken{}, err
			}
		default:
			return store.ImportToken{}, keyError(err)
		}
	}
}

// outstanding counts the pairs of an offer that are bound and not expired.
func (e *Engine) outstanding(ctx context.Context, offer WrappingOffer, now time.Time) (int, error) {
	counts, err := e.store.PairCounts(ctx, now)
	if err != nil {
		return 0, storeError(err)
	}
	for _, c := range counts {
		if c.Spec == string(offer.Spec) && c.Algorithm == string(offer.Algorithm) {
			return c.Bound, nil
		}
	}
	return 0, nil
}
