package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/sethvargo/go-retry"
)

// outcome is what an attempt at a call came to.
type outcome int

const (
	answered    outcome = iota // done, or refused for good
	throttled                  // not done, as the KMS is busy
	unavailable                // the KMS answered that it cannot now; it may have
	lost                       // no answer; the request may have arrived
	replayed                   // a request with that nonce arrived before
	hopeless                   // no call of this run will do better
)

// outcomeOf sorts errors by what they mean for the next attempt.
func outcomeOf(err error) outcome {
	var e *apiError
	var foreign *foreignError
	switch {
	case err == nil:
		return answered
	case errors.As(err, &e):
		switch {
		case e.Code == "SignatureNonceUsed":
			return replayed
		case e.Status == http.StatusTooManyRequests || strings.Contains(e.Code, "Throttling"):
			return throttled
		case e.Status == http.StatusServiceUnavailable || strings.HasPrefix(e.Code, "ServiceUnavailable"):
			return unavailable
		case ofAccessKey[e.Code]:
			return hopeless
		}
		return answered
	case errors.As(err, &foreign):
		if foreign.status == http.StatusTooManyRequests || foreign.status >= http.StatusInternalServerError {
			return lost // a gateway's: what is behind it may have done it
		}
		return hopeless
	case isCertificateError(err), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return hopeless
	}
	return lost
}

// ofAccessKey are the codes of errors that every call with this access key, or
// of this program, would get.
var ofAccessKey = map[string]bool{
	"IllegalTimestamp":            true,
	"IncompleteSignature":         true,
	"InvalidAccessKeyId.Inactive": true,
	"InvalidAccessKeyId.NotFound": true,
	"InvalidAccessKeySecret":      true,
	"InvalidAction.NotFound":      true,
	"InvalidTimeStamp.Expired":    true,
	"InvalidVersion":              true,
	"SignatureDoesNotMatch":       true,
	"UnsupportedHTTPMethod":       true,
}

// abort ends a whole run: what failed would fail for every other item too.
type abort struct{ err error }

func (e *abort) Error() string { return e.err.Error() }
func (e *abort) Unwrap() error { return e.err }

// Pauses between attempts double from the first to the longest, each a fifth
// shorter or longer so that many do not come at once. After patience the run
// ends: the KMS is not there.
const (
	firstPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
	patience     = 2 * time.Minute
	replayPause  = 500 * time.Millisecond // until what happened is looked at again
)

// attempts waits between the attempts at one call.
type attempts struct {
	b        *caller
	pauses   retry.Backoff
	deadline time.Time
}

func (b *caller) attempts() *attempts {
	pauses := retry.WithJitterPercent(20, retry.WithCappedDuration(longestPause, retry.NewExponential(firstPause)))
	return &attempts{b: b, pauses: pauses, deadline: time.Now().Add(patience)}
}

// wait waits before the next attempt, or gives up.
func (a *attempts) wait(ctx context.Context, err error) error {
	result, pause := outcomeOf(err), replayPause
	if result != replayed {
		pause, _ = a.pauses.Next()
	}
	if result == lost && !a.b.reached.Load() || time.Now().Add(pause).After(a.deadline) {
		return &abort{err}
	}
	if result != replayed {
		a.b.waiting(err)
	}
	select {
	case <-time.After(pause):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// caller calls a KMS again where that may help.
type caller struct {
	*client
	journal *journal
	// reached: the KMS has answered in this run. Before, that nothing answers
	// is a mistake of the command line and not an outage.
	reached atomic.Bool
	waiting func(err error) // told of each attempt that is to be made again
	// now is the time, also of a machine that slept, as KMSs know it; nil: time.Now.
	now func() time.Time
}

// clock is the time without the reading that stands still while a machine
// sleeps.
func (b *caller) clock() time.Time {
	if b.now != nil {
		return b.now()
	}
	return time.Now().Round(0)
}

// attempted takes note of what an attempt came to.
func (b *caller) attempted(err error) error {
	if o := outcomeOf(err); o != lost && o != hopeless {
		b.reached.Store(true)
	}
	return err
}

// repeat calls an action that changes nothing, or that may happen twice.
func (b *caller) repeat(ctx context.Context, action string, params url.Values, answer any) error {
	tries := b.attempts()
	for {
		err := b.attempted(b.call(ctx, action, params, answer))
		switch outcomeOf(err) {
		case answered:
			return err
		case hopeless:
			return &abort{err}
		}
		if err := tries.wait(ctx, err); err != nil {
			return err
		}
	}
}

// one is an action that must not happen twice, over all attempts of all runs.
//
// The KMS accepts the nonce of a signature once. So an attempt whose answer was
// lost is repeated with its nonce: either it never arrived, and this one takes
// its place, or it did, and is refused as a replay; then happened says, or will
// say, what came of it. The nonces follow from the run and from the numbers
// here, so that they are the same after a crash.
type one struct {
	action string
	key    []string // what it is done for
	number int      // of the attempt that may be under way
	// happened reports whether the action took effect.
	happened func(ctx context.Context) (bool, error)
	// settle is how long an attempt that arrived may be under way unseen.
	settle time.Duration
	// harmless: to happen twice is merely not needed.
	harmless bool
}

// nonceLife is how long a KMS surely remembers a nonce: less than the quarter of
// an hour that it does, by clocks that differ.
const nonceLife = 5 * time.Minute

// settleAnswered is settle where the KMS has answered that it gave the attempt
// up: no more is under way than what it had asked of its disk.
const settleAnswered = 3 * time.Second

// once does o with params.
func (b *caller) once(ctx context.Context, o *one, params url.Values, answer any) error {
	tries := b.attempts()
	// Of the number: since when it may come to nothing, when it was first sent,
	// and whether the answer to an attempt is missing, be it of a run that crashed
	// just now.
	var settlingAt, sentAt time.Time
	noAnswer := b.journal.resumed && time.Since(b.journal.opened) < o.settle
	next := func() {
		o.number++
		settlingAt, sentAt, noAnswer = time.Time{}, time.Time{}, false
	}
	for {
		// This machine may have slept, and the KMS forgotten the nonce.
		if !sentAt.IsZero() && b.clock().Sub(sentAt) > nonceLife {
			if there, err := o.happened(ctx); there || err != nil {
				o.number++
				return err
			}
			next()
		}
		if sentAt.IsZero() {
			sentAt = b.clock()
		}
		nonce := b.journal.token(append([]string{o.action, strconv.Itoa(o.number)}, o.key...)...)
		err := b.attempted(b.callAs(ctx, o.action, params, nonce, answer))
		result := outcomeOf(err)
		switch result {
		case answered:
			o.number++
			return err
		case hopeless:
			return &abort{err}
		case replayed:
			if there, err := o.happened(ctx); there || err != nil {
				o.number++
				return err
			}
			settle := o.settle
			if !noAnswer && !settlingAt.IsZero() {
				settle = min(settle, settleAnswered)
			}
			switch now := time.Now(); {
			case settlingAt.IsZero():
				settlingAt, noAnswer = now, true // perhaps of an earlier run
			case now.Sub(settlingAt) > settle: // it came to nothing
				next()
			}
		case throttled: // not done; nor is an earlier attempt, unless it is under way
			if o.harmless || !noAnswer && settlingAt.IsZero() {
				next()
			}
		case unavailable: // it may be done yet, though it was answered
			if o.harmless {
				next()
			} else if !noAnswer {
				settlingAt = time.Now()
			}
		case lost:
			noAnswer, settlingAt = true, time.Time{}
		}
		if err := tries.wait(ctx, err); err != nil {
			return err
		}
		if result == unavailable { // a write that the KMS gave up may yet have been made
			if there, err := o.happened(ctx); there || err != nil {
				return err
			}
		}
	}
}

// codeOf is what the results say of an error.
func codeOf(err error) string {
	var e *apiError
	if errors.As(err, &e) {
		return e.Code
	}
	return clientCode
}

// textOf is an error with its hint, on one line.
func textOf(err error) string {
	text := err.Error()
	var hinted *hintedError
	if errors.As(err, &hinted) {
		text = fmt.Sprintf("%s (%s)", text, hinted.hint)
	}
	return strings.Join(strings.Fields(text), " ")
}
