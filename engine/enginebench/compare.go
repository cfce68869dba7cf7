package enginebench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"syscall"
	"time"

	"github.com/keyferry/keyferry/hsm"
)

// maxSlice is how long one load runs before the next has its turn. Callers
// finish what they have begun, and that is counted: what a slice loses at its end
// is the time of one step.
const maxSlice = 250 * time.Millisecond

// step is what a caller does over and over.
type step = func(context.Context) error

// load is one of the things that are compared.
type load struct {
	name  string
	steps []step // one for each caller
	tally tally
}

// A Comparison runs loads in turn, in short slices, so that what else the
// machine does hits all of them alike. What it says of one of them is worth
// little; what it says of two in relation is worth much.
//
// The processor time is that of the whole process, so nothing else should work
// in it meanwhile.
type Comparison struct {
	name    string
	callers int
	loads   []*load
	row     func(*Comparison) []Metric
	close   []func() error
}

// add adds a load by what makes the step of a caller, who is from 0.
func (c *Comparison) add(name string, newStep func(caller int) step) {
	l := &load{name: name}
	for i := range c.callers {
		l.steps = append(l.steps, newStep(i))
	}
	c.loads = append(c.loads, l)
}

// addBare adds a load of bare callers, each on a session of its own, which is
// closed with the Comparison.
func (c *Comparison) addBare(ctx context.Context, token *hsm.Token, name string, newStep func(s *hsm.Bare) step) error {
	l := &load{name: name}
	for range c.callers {
		s, err := token.Bare(ctx)
		if err != nil {
			return err
		}
		c.close = append(c.close, s.Close)
		l.steps = append(l.steps, newStep(s))
	}
	c.loads = append(c.loads, l)
	return nil
}

// tallies are those of the loads, by name.
func (c *Comparison) tallies() map[string]*tally {
	by := make(map[string]*tally, len(c.loads))
	for _, l := range c.loads {
		by[l.name] = &l.tally
	}
	return by
}

// Round gives every load one slice.
func (c *Comparison) Round(ctx context.Context) error { return c.round(ctx, maxSlice) }

func (c *Comparison) round(ctx context.Context, slice time.Duration) error {
	for _, l := range c.loads {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := l.run(ctx, slice); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	return nil
}

// Run makes rounds for as long as d, and one at least, in shorter slices where d
// is short.
func (c *Comparison) Run(ctx context.Context, d time.Duration) error {
	slice := min(maxSlice, d/time.Duration(len(c.loads)))
	for start := time.Now(); ; {
		if err := c.round(ctx, slice); err != nil || time.Since(start) >= d {
			return err
		}
	}
}

// Name says what is compared.
func (c *Comparison) Name() string { return c.name }

// Row is what the rounds have shown.
func (c *Comparison) Row() Row { return Row{Name: c.name, Callers: c.callers, Metrics: c.row(c)} }

// Close ends the sessions of the callers.
func (c *Comparison) Close() error {
	var errs []error
	for _, end := range c.close {
		errs = append(errs, end())
	}
	c.close = nil
	return errors.Join(errs...)
}

func (l *load) run(ctx context.Context, slice time.Duration) error {
	var wg sync.WaitGroup
	parts, errs := make([]tally, len(l.steps)), make([]error, len(l.steps))
	use, start := ProcessorTime(), time.Now()
	end := start.Add(slice)
	for i, step := range l.steps {
		wg.Go(func() {
			part := &parts[i]
			for now := time.Now(); now.Before(end); {
				if errs[i] = step(ctx); errs[i] != nil {
					return
				}
				done := time.Now()
				part.add(done.Sub(now))
				now = done
			}
		})
	}
	wg.Wait()
	l.tally.wall += time.Since(start)
	l.tally.use += ProcessorTime() - use
	for i := range parts {
		l.tally.merge(&parts[i])
	}
	return errors.Join(errs...)
}

// tally is what a load did in its slices.
type tally struct {
	n         int
	wall, use time.Duration
	latencies [buckets]int // of steps, by bucket
}

// Latencies are kept in buckets of 2 percent, from a tenth of a microsecond to
// a minute.
const (
	buckets    = 1024
	bucketBase = 1.02
	shortest   = 100 * time.Nanosecond
)

func (t *tally) add(d time.Duration) {
	t.n++
	i := 0
	if d > shortest {
		i = min(int(math.Log(float64(d)/float64(shortest))/math.Log(bucketBase)), buckets-1)
	}
	t.latencies[i]++
}

func (t *tally) merge(o *tally) {
	t.n += o.n
	for i, n := range &o.latencies {
		t.latencies[i] += n
	}
}

// perSecond is how many steps a second were made.
func (t *tally) perSecond() float64 { return float64(t.n) / t.wall.Seconds() }

// cpu is the processor time of a step in microseconds.
func (t *tally) cpu() float64 { return float64(t.use) / float64(time.Microsecond) / float64(t.n) }

// percentile is the time within which p percent of the steps came to an end, in
// microseconds.
func (t *tally) percentile(p float64) float64 {
	left := int(math.Ceil(float64(t.n) * p / 100))
	for i, n := range &t.latencies {
		if left -= n; left <= 0 {
			return float64(shortest) / float64(time.Microsecond) * math.Pow(bucketBase, float64(i)+0.5)
		}
	}
	return math.NaN()
}

// ProcessorTime is what this process has used, in user mode and in the kernel.
func ProcessorTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // of one's own: never fails
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
