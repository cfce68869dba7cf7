package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// journal is the file of results of an import by a manifest, in JSON Lines: a
// head, and then what became of each item, as it happens. A run that is given
// the file of an earlier one goes on where that ended.
//
// A line is with the operating system before the item counts as done, and on
// the disk soon after: one fsync is for all lines that have come meanwhile. A
// line that a power failure takes is no loss: what the KMS answers tells the
// next run as much (see once).
type journal struct {
	head journalHead
	past map[string]*past // by name, of earlier runs

	resumed bool // there was an earlier run
	opened  time.Time

	mu     sync.Mutex // guards writes
	file   *os.File
	broken error // of the first write that failed

	dirty chan struct{} // holds one token while there is something to sync
	ended chan error    // receives what the syncing ended with
}

// journalHead is the first line.
type journalHead struct {
	Journal     string    `json:"journal"`
	Version     int       `json:"version"`
	Run         string    `json:"run"` // random; nonces and marks of keys come from it
	Started     time.Time `json:"started"`
	Endpoint    string    `json:"endpoint"`
	AccessKeyID string    `json:"access_key_id"`
}

const (
	journalName    = "keyferry-import"
	journalVersion = 1
)

// What a line says of an item. The last one of an item counts.
const (
	statusCreated  = "created"  // its key is made, nothing more
	statusStarted  = "started"  // wrapped material is about to be sent
	statusImported = "imported" // done
	statusPresent  = "present"  // the KMS had the same material, until the same time, already
	statusFailed   = "failed"   // to be tried again by the next run
)

// result is a line about an item.
type result struct {
	Name   string `json:"name"`
	Line   int    `json:"line"` // of the manifest
	KeyID  string `json:"key_id,omitempty"`
	Status string `json:"status"`

	Code  string `json:"code,omitempty"` // the KMS's; clientCode for what this program found
	Error string `json:"error,omitempty"`

	KCV                string `json:"kcv,omitempty"`
	KCVAlgorithm       string `json:"kcv_algorithm,omitempty"`
	MaterialID         string `json:"material_id,omitempty"`
	MaterialExpireTime string `json:"material_expire_time,omitempty"` // absent: never
	MeasuredByKMS      bool   `json:"measured_by_kms,omitempty"`

	State  string    `json:"state,omitempty"`  // of the key when it was started
	Digest string    `json:"digest,omitempty"` // of the item's line
	At     time.Time `json:"at"`
}

// clientCode is the code of a failure that the KMS has no part in.
const clientCode = "Client"

func (r *result) done() bool { return r.Status == statusImported || r.Status == statusPresent }

// past is what is known of an item from earlier runs.
type past struct {
	last     result
	keyID    string // of the key that was made
	state    string // of the key when its wrapped material was first sent
	digest   string // of the line that it was sent for
	failures int
}

// target is where an import goes, and as whom.
type target struct {
	endpoint, accessKeyID string
	sameKMS               bool // whatever endpoint the results are of
}

// openJournal opens the results of an earlier run, or with O_CREATE makes the
// file; without it the error may be os.ErrNotExist. Nobody else can use it until
// close.
func openJournal(name string, create int, to target) (_ *journal, err error) {
	j := &journal{past: map[string]*past{}, opened: time.Now(), dirty: make(chan struct{}, 1), ended: make(chan error, 1)}
	if j.file, err = os.OpenFile(name, os.O_RDWR|create, 0o600); err != nil {
		return nil, fmt.Errorf("the results: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, j.file.Close())
		}
	}()
	info, err := j.file.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("the results: %w", err)
	case !info.Mode().IsRegular():
		return nil, withHint(fmt.Errorf("%s is no regular file", name), "give another name to --results")
	case !isOurs(info):
		// It says which key material goes into.
		return nil, withHint(fmt.Errorf("%s is another user's, or everybody may write to it", name), "give another name to --results, in a directory of yours")
	}
	switch err := lockFile(j.file); {
	case errors.Is(err, errInUse):
		return nil, withHint(fmt.Errorf("%s is in use by another import", name), "give another name to --results, or wait")
	case err != nil:
		return nil, withHint(fmt.Errorf("%s cannot be locked: %w", name, err), "give --results a name on another file system")
	}
	data, err := io.ReadAll(j.file)
	if err != nil {
		return nil, fmt.Errorf("the results: %w", err)
	}
	whole := data[:bytes.LastIndexByte(data, '\n')+1] // a crash may have cut the last line off
	if len(whole) == 0 {
		if len(data) > 0 && !bytes.HasPrefix(data, []byte(`{"journal":"`+journalName)) {
			return nil, notResults(name)
		}
		err = j.begin(name, to)
	} else {
		err = j.resume(name, whole, to)
	}
	if err != nil {
		return nil, err
	}
	go j.sync()
	return j, nil
}

// errInUse: another process has locked the file.
var errInUse = errors.New("locked by another process")

func notResults(name string) error {
	return withHint(fmt.Errorf("%s is not the results of an import", name), "it is not overwritten: give another name to --results")
}

// begin makes the head durable: what is sent from now on can be found again.
func (j *journal) begin(name string, to target) error {
	run := make([]byte, 16)
	if _, err := rand.Read(run); err != nil {
		return fmt.Errorf("drawing random bytes: %w", err)
	}
	j.head = journalHead{
		Journal: journalName, Version: journalVersion, Run: hex.EncodeToString(run),
		Started: time.Now().UTC().Truncate(time.Second), Endpoint: to.endpoint, AccessKeyID: to.accessKeyID,
	}
	if err := j.cut(0); err != nil {
		return err
	}
	if err := j.write(j.head); err != nil {
		return err
	}
	err := j.file.Sync()
	if err == nil {
		err = syncDir(filepath.Dir(name))
	}
	if err != nil {
		return fmt.Errorf("the results: %w", err)
	}
	return nil
}

// cut drops what is after a whole line.
func (j *journal) cut(n int) error {
	err := j.file.Truncate(int64(n))
	if err == nil {
		_, err = j.file.Seek(int64(n), io.SeekStart)
	}
	if err != nil {
		return fmt.Errorf("the results: %w", err)
	}
	return nil
}

func syncDir(name string) error {
	dir, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// resume reads what earlier runs have done.
func (j *journal) resume(name string, data []byte, to target) error {
	n := 0
	for line := range bytes.Lines(data) {
		n++
		if n == 1 {
			if json.Unmarshal(line, &j.head) != nil || j.head.Journal != journalName {
				return notResults(name)
			}
			continue
		}
		var r result
		if json.Unmarshal(line, &r) != nil || r.Name == "" {
			return withHint(fmt.Errorf("%s: line %d is damaged", name, n),
				"take that line out, as with sed -i %dd %s, and run the same command again: what the line was about is found again in the KMS; with a new file the keys that were made would be made again", n, quote(name))
		}
		j.remember(r)
	}
	switch h := &j.head; {
	case h.Version != journalVersion:
		return withHint(fmt.Errorf("%s is of another version of keyferry", name), "give another name to --results")
	case h.AccessKeyID != to.accessKeyID:
		return withHint(fmt.Errorf("%s is of an import into %s by access key %s", name, h.Endpoint, h.AccessKeyID),
			"go on with that access key, or give another name to --results; if it was replaced in the same KMS, change the first line of the file")
	case h.Endpoint != to.endpoint && !to.sameKMS:
		return withHint(fmt.Errorf("%s is of an import into %s", name, h.Endpoint),
			"give another name to --results; if %s is the same KMS, as another node on its store is, give --same-kms", to.endpoint)
	}
	j.resumed = true
	return j.cut(len(data))
}

func (j *journal) remember(r result) {
	p := j.past[r.Name]
	if p == nil {
		p = &past{}
		j.past[r.Name] = p
	}
	p.last = r
	switch r.Status {
	case statusCreated:
		p.keyID = r.KeyID
	case statusStarted:
		p.state, p.digest = r.State, r.Digest
	case statusFailed:
		p.failures++
	}
}

// add writes a line about an item.
func (j *journal) add(r result) error {
	r.At = time.Now().UTC().Truncate(time.Millisecond)
	return j.write(r)
}

func (j *journal) write(v any) error {
	var line bytes.Buffer
	e := json.NewEncoder(&line)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return err
	}
	if err := j.append(line.Bytes()); err != nil {
		return fmt.Errorf("the results: %w", err)
	}
	select {
	case j.dirty <- struct{}{}:
	default:
	}
	return nil
}

// append adds a line at the end. After a failure nothing is added any more: what
// it left of its line, on a disk that is full, has to stay the end of the file,
// which the next run cuts off.
func (j *journal) append(line []byte) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.broken == nil {
		_, j.broken = j.file.Write(line)
	}
	return j.broken
}

// sync is the goroutine that brings lines to the disk.
func (j *journal) sync() {
	var failed error
	for range j.dirty {
		if err := j.file.Sync(); err != nil && failed == nil {
			failed = fmt.Errorf("the results: %w", err)
		}
	}
	j.ended <- failed
}

// close returns when all lines are on the disk. No line may be added any more.
func (j *journal) close() error {
	close(j.dirty)
	err := <-j.ended
	return errors.Join(err, j.file.Sync(), j.file.Close())
}

// token derives something from the run that is the same whenever it is asked
// for, and that nobody else comes by: 32 hexadecimal digits.
func (j *journal) token(parts ...string) string {
	return digest(append([]string{j.head.Run}, parts...))
}

// digest is 32 hexadecimal digits of the SHA-256 of a list of strings, each
// preceded by its length: no other list gives the same input.
func digest(parts []string) string {
	h := sha256.New()
	for _, part := range parts {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
