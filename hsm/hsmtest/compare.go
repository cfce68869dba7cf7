package hsmtest

import (
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Compare runs two loads, each by as many callers as it has steps, and reports
// how many steps a second each makes, the ratio of the two, and the processor
// time of a step of ours, whole and beyond one of the bare load. The loads take
// turns in slices, so that what else the machine does hits both alike: read
// the ratio.
func Compare(b *testing.B, bare, ours []func() error) {
	b.Helper()
	var theirs, mine tally
	for b.Loop() {
		theirs.run(b, bare)
		mine.run(b, ours)
	}
	b.ReportMetric(theirs.rate(), "bare/s")
	b.ReportMetric(mine.rate(), "ours/s")
	b.ReportMetric(mine.rate()/theirs.rate(), "ratio")
	b.ReportMetric(mine.cpu(), "cpu-µs")
	b.ReportMetric(mine.cpu()-theirs.cpu(), "extra-cpu-µs")
	b.ReportMetric(0, "ns/op")
}

// slice is how long one load runs before the other has its turn.
const slice = 100 * time.Millisecond

// tally is what a load did in its slices.
type tally struct {
	n         int64
	wall, use time.Duration
}

func (l *tally) rate() float64 { return float64(l.n) / l.wall.Seconds() }
func (l *tally) cpu() float64  { return float64(l.use.Microseconds()) / float64(l.n) }

func (l *tally) run(b *testing.B, steps []func() error) {
	b.Helper()
	var n atomic.Int64
	var wg sync.WaitGroup
	before, start := processorTime(), time.Now()
	for _, step := range steps {
		wg.Go(func() {
			for time.Since(start) < slice {
				if err := step(); err != nil {
					b.Error(err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	l.n += n.Load()
	l.wall += time.Since(start)
	l.use += processorTime() - before
}

func processorTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // of one's own: never fails
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
