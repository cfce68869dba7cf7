package main

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/mattn/go-isatty"
	"github.com/schollz/progressbar/v3"
)

// maxTold are the failures that standard error is told of; all are in the
// results.
const (
	maxTold     = 10
	barInterval = 100 * time.Millisecond
)

// progress shows how far an import by a manifest is: a bar where standard error
// is a terminal, else nothing but failures.
type progress struct {
	mu      sync.Mutex
	std     *streams
	bar     *progressbar.ProgressBar // nil: none
	failed  int
	outages bool // was told that the KMS does not answer
}

func newProgress(std *streams, items, done int) *progress {
	p := &progress{std: std}
	if f, ok := std.err.(*os.File); ok && isatty.IsTerminal(f.Fd()) {
		p.bar = progressbar.NewOptions(items,
			progressbar.OptionSetWriter(f),
			progressbar.OptionSetDescription("importing"),
			progressbar.OptionShowCount(),
			progressbar.OptionShowIts(),
			progressbar.OptionSetItsString("keys"),
			progressbar.OptionSetPredictTime(true),
			progressbar.OptionClearOnFinish(),
			progressbar.OptionThrottle(barInterval),
		)
		_ = p.bar.Add(done)
	}
	return p
}

// say writes a line where the bar is not.
func (p *progress) say(format string, args ...any) {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
	fmt.Fprintf(p.std.err, "keyferry: %s\n", oneLine(fmt.Sprintf(format, args...)))
}

// done shows an item that is done or has failed.
func (p *progress) done(r result) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.outages = false
	if !r.done() {
		p.failed++
		switch {
		case p.failed <= maxTold:
			p.say("line %d: %s", r.Line, r.Error)
		case p.failed == maxTold+1:
			p.say("more lines have failed: see the results")
		}
	}
	if p.bar != nil {
		_ = p.bar.Add(1)
	}
}

// waiting tells once that calls are made again.
func (p *progress) waiting(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.outages {
		p.outages = true
		p.say("trying again for up to %s: %v", patience, err)
	}
}

func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}
