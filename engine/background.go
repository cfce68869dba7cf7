package engine

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// bounds are how long the Engine waits for token and store of its own accord. A
// call of PKCS#11 cannot be interrupted and may never return: whoever waits for
// it gives up and leaves it, and its session, behind.
type bounds struct {
	pass   time.Duration // one pass of the sweep or of the generator, and New
	notice time.Duration // after this a pass is said to wait
	grace  time.Duration // for a pair that is being made when Close is called
	close  time.Duration // Close as a whole
}

// A pass ends long before youngPair: a pair whose maker was left behind gets no
// row, and is destroyed when it is older than that.
var defaultBounds = bounds{pass: 5 * time.Minute, notice: 30 * time.Second, grace: 6 * time.Second, close: closeTimeout}

// worker is one kind of work in the background.
type worker struct {
	name string
	said atomic.Bool // that it waits
}

// pass does one pass of background work within its bound. That it waits is said
// once, until a pass is quick again.
func (e *Engine) pass(ctx context.Context, w *worker, work func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, e.bounds.pass)
	defer cancel()
	notice := time.AfterFunc(e.bounds.notice, func() {
		if !w.said.Swap(true) {
			e.log.LogAttrs(ctx, slog.LevelWarn, "work in the background waits for the token or the store",
				slog.String("work", w.name), slog.Duration("waited", e.bounds.notice), slog.Duration("given_up_after", e.bounds.pass))
		}
	})
	err := work(ctx)
	if notice.Stop() && err == nil && w.said.Swap(false) {
		e.log.LogAttrs(ctx, slog.LevelInfo, "work in the background goes on", slog.String("work", w.name))
	}
	return err
}

// graced returns a context that ends at the deadline of ctx, or after the bound
// of a pass where there is none, or a while after ctx is cancelled.
func (e *Engine) graced(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, bounded := ctx.Deadline()
	if !bounded {
		deadline = time.Now().Add(e.bounds.pass)
	}
	late, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(e.bounds.grace, cancel) })
	return late, func() { stop(); cancel() }
}

// finished reports whether work came to its end before ctx did. Otherwise it is
// left behind.
func finished(ctx context.Context, work func()) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		work()
	}()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}
