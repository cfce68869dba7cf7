package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// Bounds of --parallel. Beyond a few dozen an HSM is not faster.
const (
	defaultParallel = 8
	maxParallel     = 64
)

// bulk imports what a manifest lists.
//
// Nothing is imported, and no key made, twice, whatever ends the program or the
// connection: see one for how.
type bulk struct {
	*importOptions
	*caller
	std      *streams
	progress *progress

	offered atomic.Bool       // the KMS has given parameters for import in this run
	found   map[string]string // KeyIds of keys that earlier runs have made, by their mark
}

// bulkReport is what became of the items of a manifest.
type bulkReport struct {
	Items    int `json:"items"`
	Imported int `json:"imported"` // by this run
	Present  int `json:"present"`  // the KMS had it already
	Earlier  int `json:"earlier"`  // done by earlier runs
	Failed   int `json:"failed"`
	Left     int `json:"left"` // not tried, as the run was ended
}

// runManifest imports what a manifest lists.
func (o *importOptions) runManifest(ctx context.Context, std *streams) error {
	if o.parallel < 1 || o.parallel > maxParallel {
		return usage("--parallel is from 1 to %d", maxParallel)
	}
	c, err := o.conn.client(std)
	if err != nil {
		return err
	}
	if o.results == "" {
		o.results = o.manifest + ".results"
	}
	to := target{endpoint: c.url, accessKeyID: c.cred.AccessKeyID, sameKMS: o.sameKMS}
	j, err := openJournal(o.results, 0, to)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var before map[string]*past
	if j != nil {
		before = j.past
	}
	items, err := readManifest(std, o.manifest, before)
	if err == nil && j == nil { // nor did anybody make it meanwhile, or a link in its place
		j, err = openJournal(o.results, os.O_CREATE|os.O_EXCL, to)
	}
	if err != nil {
		if j != nil {
			err = errors.Join(err, j.close())
		}
		return err
	}
	b := &bulk{importOptions: o, caller: &caller{client: c, journal: j}, std: std}
	report, err := b.run(ctx, items)
	if err = errors.Join(err, j.close()); err != nil && report == nil {
		return err
	}
	return b.tell(report, err)
}

// run imports the items that earlier runs have not. With a report the error, if
// any, is what ended the run early.
func (b *bulk) run(ctx context.Context, items []*item) (*bulkReport, error) {
	report := &bulkReport{Items: len(items)}
	var todo []*item
	for _, it := range items {
		if p := b.journal.past[it.name]; p != nil && p.last.done() {
			report.Earlier++
			continue
		}
		todo = append(todo, it)
	}
	b.progress = newProgress(b.std, len(items), report.Earlier)
	defer b.progress.end()
	b.waiting = b.progress.waiting

	// At an interrupt what is under way is finished; at the second one it is not.
	interrupted, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(interrupted, stop)

	if err := b.findKeys(ctx, todo); err != nil {
		return nil, err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(b.parallel)
	var mu sync.Mutex // guards report
	for _, it := range todo {
		if interrupted.Err() != nil || ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			if interrupted.Err() != nil || ctx.Err() != nil {
				return nil
			}
			r, err := b.item(ctx, it)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			switch r.Status {
			case statusImported:
				report.Imported++
			case statusPresent:
				report.Present++
			default:
				report.Failed++
			}
			b.progress.done(r)
			return nil
		})
	}
	err := group.Wait()
	report.Left = report.Items - report.Earlier - report.Imported - report.Present - report.Failed
	if err == nil && report.Left > 0 {
		err = errors.New("interrupted")
	}
	return report, err
}

// item imports one item and writes down what became of it. An error ends the
// run.
func (b *bulk) item(ctx context.Context, it *item) (result, error) {
	w := &work{bulk: b, item: it, past: b.journal.past[it.name]}
	if w.past == nil {
		w.past = &past{}
	}
	r, err := w.do(ctx)
	var ends *abort
	switch {
	case errors.As(err, &ends), ctx.Err() != nil && err != nil:
		return result{}, fmt.Errorf("line %d: %w", it.line, err)
	case err != nil:
		r = result{Status: statusFailed, Code: codeOf(err), Error: textOf(err)}
	}
	r.Name, r.Line, r.KeyID, r.Digest = it.name, it.line, w.key.KeyID, it.digest
	if r.KeyID == "" {
		r.KeyID = it.keyID
	}
	return r, b.journal.add(r)
}

// tell ends the run for its user.
func (b *bulk) tell(report *bulkReport, err error) error {
	if told := b.std.report(report,
		row{"Items", fmt.Sprint(report.Items)},
		row{"Imported", fmt.Sprint(report.Imported)},
		row{"There already", fmt.Sprint(report.Present)},
		row{"By earlier runs", fmt.Sprint(report.Earlier)},
		row{"Failed", fmt.Sprint(report.Failed)},
		row{"Not tried", fmt.Sprint(report.Left)},
		row{"Results", b.results},
	); told != nil {
		err = errors.Join(err, told)
	}
	switch {
	case err != nil && refuses(err, "Wrapping"):
		return withHint(fmt.Errorf("the import has ended early: %w", err),
			"%sto go on, run the command again with that: the keys that were made are used", hintOf(err))
	case err != nil:
		return withHint(fmt.Errorf("the import has ended early: %w", err), "%sto go on, run the same command again", hintOf(err))
	case report.Failed > 0:
		return &itemsFailed{withHint(fmt.Errorf("%d of %d items failed", report.Failed, report.Items),
			"see %s; what is done stays done when the same command is run again", b.results), report.Failed}
	}
	return nil
}

// hintOf is an error's hint as the beginning of another one.
func hintOf(err error) string {
	var hinted *hintedError
	if errors.As(err, &hinted) {
		return hinted.hint + "; "
	}
	return ""
}

// itemsFailed counts the items that failed.
type itemsFailed struct {
	err error
	n   int
}

func (e *itemsFailed) Error() string { return e.err.Error() }
func (e *itemsFailed) Unwrap() error { return e.err }

// status is the exit status.
func (e *itemsFailed) status() int { return exitItems + min(e.n, maxExitItems) }

// markOf ends the description of a key that is made for an item, so that a
// later run finds a key of which this one never heard.
func (b *bulk) markOf(it *item) string {
	return markBegin + b.journal.token("mark", it.name) + "]"
}

const markBegin = "[keyferry import "

// maxKeys is more keys than a KMS has.
const maxKeys = 1 << 30

// clockSkew is how far the KMS's clock may be behind this machine's.
const clockSkew = time.Hour

// findKeys looks for keys that earlier runs have made without learning of it.
func (b *bulk) findKeys(ctx context.Context, todo []*item) error {
	marks := map[string]bool{}
	for _, it := range todo {
		p := b.journal.past[it.name]
		if it.makesKey() && (p == nil || p.keyID == "") {
			marks[b.markOf(it)] = true
		}
	}
	if len(marks) == 0 || !b.journal.resumed {
		return nil
	}
	var err error
	b.found, err = b.search(ctx, marks)
	return err
}

// search looks through the keys of the KMS, the last page first, for such
// whose descriptions end in one of the marks, and answers their KeyIds. It
// stops at a page of older keys, if keys are listed by their age.
func (b *bulk) search(ctx context.Context, marks map[string]bool) (map[string]string, error) {
	const size = 100
	found := map[string]string{}
	known := map[string]bool{}
	for _, p := range b.journal.past {
		known[p.last.KeyID] = true
	}
	since := b.journal.head.Started.Add(-clockSkew)
	list := func(page int) (ids []string, total int, err error) {
		var answer struct {
			Keys       struct{ Key []struct{ KeyID string } }
			TotalCount int
		}
		err = b.repeat(ctx, "ListKeys", url.Values{"PageNumber": {fmt.Sprint(page)}, "PageSize": {fmt.Sprint(size)}}, &answer)
		for _, k := range answer.Keys.Key {
			ids = append(ids, k.KeyID)
		}
		total = answer.TotalCount
		// Else this would end without having looked, or never.
		if err == nil && (len(ids) > total || total > size*(page-1) && len(ids) == 0 || total > maxKeys) {
			err = fmt.Errorf("ListKeys: the KMS says that it has %d keys, and lists %d on page %d", total, len(ids), page)
		}
		return ids, total, err
	}
	_, total, err := list(1)
	if err != nil {
		return nil, err
	}
	for page := (total + size - 1) / size; page >= 1 && len(found) < len(marks); page-- {
		ids, _, err := list(page)
		if err != nil {
			return nil, err
		}
		older, sorted, last := 0, true, ""
		for _, id := range ids {
			if known[id] {
				continue
			}
			k, err := b.describe(ctx, id)
			var refused *apiError
			if errors.As(err, &refused) && refused.Code == "Forbidden.KeyNotFound" {
				continue // deleted meanwhile
			}
			if err != nil {
				return nil, err
			}
			if mark := markIn(k.Description); marks[mark] {
				found[mark] = id
			}
			sorted = sorted && last <= k.CreationDate
			last = k.CreationDate
			if at, err := time.Parse(time.RFC3339, k.CreationDate); err == nil && at.Before(since) {
				older++
			}
		}
		if older == size && sorted {
			break
		}
	}
	return found, nil
}

// markIn is the mark that a description ends in, if any.
func markIn(description string) string {
	return description[max(strings.LastIndex(description, markBegin), 0):]
}

// describe is DescribeKey, as often as it takes.
func (b *bulk) describe(ctx context.Context, keyID string) (keyMetadata, error) {
	var answer struct{ KeyMetadata keyMetadata }
	err := b.repeat(ctx, "DescribeKey", url.Values{"KeyId": {keyID}}, &answer)
	k := answer.KeyMetadata
	if err == nil && k.KeyID != keyID && !names(keyID, k.KeyID) {
		err = fmt.Errorf("DescribeKey: the KMS was asked for key %s, and answered for %s", keyID, orNone(k.KeyID))
	}
	return k, err
}

// names reports whether s is another name of a key than its KeyId: an alias,
// which can be any key's, or its resource name.
func names(s, keyID string) bool {
	return keyID != "" && (strings.HasPrefix(s, "alias/") || strings.Contains(s, ":alias/") || strings.HasSuffix(s, "/"+keyID))
}
