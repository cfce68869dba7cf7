package receipt

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/mod/sumdb/tlog"
)

const logFormat = "keyferry receipt log v1"

// logJSON is the first line of a log in a file, a JSON object. One line follows
// for each entry, in order.
type logJSON struct {
	Format    string   `json:"format"`
	Head      []string `json:"head"`
	PublicKey []string `json:"public_key"`
}

type lineJSON struct {
	Index int64    `json:"index"`
	Hash  Hash     `json:"hash"`
	Entry []string `json:"entry,omitempty"` // absent: the KMS has the hash alone
}

// LogEntry is one entry of a log as a KMS hands it out, for LogWriter.
type LogEntry struct {
	Index int64
	Hash  Hash   // as the tree has it
	Entry []byte // text of the entry, nil if the KMS has lost it
}

// LogWriter writes a log in the form that VerifyLog reads.
type LogWriter struct{ to *json.Encoder }

// NewLogWriter begins a log with its signed head.
func NewLogWriter(w io.Writer, head []byte, key *PublicKey) (*LogWriter, error) {
	to := json.NewEncoder(w)
	to.SetEscapeHTML(false)
	return &LogWriter{to}, to.Encode(logJSON{Format: logFormat, Head: lines(head), PublicKey: lines(key.PEM())})
}

// Write adds an entry.
func (w *LogWriter) Write(e LogEntry) error {
	line := lineJSON{Index: e.Index, Hash: e.Hash}
	if e.Entry != nil {
		line.Entry = lines(e.Entry)
	}
	return w.to.Encode(line)
}

// Outline is what the file of a receipt or of a log begins with. Nothing of it
// is verified.
type Outline struct {
	Log       bool // it is a log, else a receipt
	Head      []byte
	PublicKey *PublicKey
}

// ReadOutline reads the beginning of a file. Errors wrap ErrSyntax.
func ReadOutline(r io.Reader) (Outline, error) {
	var in logJSON // of which a receipt has the same members
	var unread *fs.PathError
	switch err := json.NewDecoder(io.LimitReader(r, maxLine)).Decode(&in); {
	case errors.As(err, &unread):
		return Outline{}, err
	case err != nil:
		// Not json's own words, which quote what was read: it may be key material.
		return Outline{}, fmt.Errorf("%w: it is neither a receipt nor a log", ErrSyntax)
	}
	if in.Format != logFormat && in.Format != receiptFormat {
		return Outline{}, fmt.Errorf("%w: its format is %q", ErrSyntax, in.Format)
	}
	key, err := ParsePublicKey(text(in.PublicKey))
	return Outline{Log: in.Format == logFormat, Head: text(in.Head), PublicKey: key}, err
}

// LogChecks is what a log is compared with.
type LogChecks struct {
	Since    []Head     // older heads, which the log must continue
	Receipts []*Receipt // which were verified, and whose entries must be there
}

// LogReport is what VerifyLog found.
type LogReport struct {
	Head     Head
	Entries  int64 // that are there and are what their hashes say
	Imports  int64
	Problems []*Problem // at most maxProblems, in order of discovery
	More     int        // problems beyond those
}

// Problem is something wrong with a log, at one entry or with the whole.
type Problem struct {
	Index int64 // -1: of the whole log
	Err   error
}

// Error says what is wrong and where.
func (p *Problem) Error() string {
	if p.Index < 0 {
		return p.Err.Error()
	}
	return fmt.Sprintf("entry %d: %v", p.Index, p.Err)
}

// Unwrap returns the error with its kind.
func (p *Problem) Unwrap() error { return p.Err }

const maxProblems = 100

// VerifyLog reads a log as LogWriter wrote it and checks all of it against the
// pinned key: the signature of the head, that each entry is the one of its hash,
// that the hashes make up the tree of the head, that no entry is there twice, and
// that the entries of each key follow each other. It keeps the hash of each entry
// and its place in memory, and one for each key.
//
// The report is there whenever the head could be read; the error joins its
// problems, so that errors.Is tells of which kinds they are.
func VerifyLog(r io.Reader, pinned *PublicKey, checks LogChecks) (LogReport, error) {
	in := bufio.NewReaderSize(r, 1<<16)
	first, err := readLine(in)
	if err != nil {
		return LogReport{}, err
	}
	var top logJSON
	if err := strict(first, &top); err != nil {
		return LogReport{}, err
	}
	if top.Format != logFormat {
		return LogReport{}, fmt.Errorf("%w: its format is %q, not %q", ErrSyntax, top.Format, logFormat)
	}
	key, err := ParsePublicKey(text(top.PublicKey))
	if err != nil {
		return LogReport{}, err
	}
	if err := pinned.check(key.spki); err != nil {
		return LogReport{}, err
	}
	head, err := OpenHead(text(top.Head), pinned)
	if err != nil {
		return LogReport{}, err
	}
	v := &logVerifier{report: LogReport{Head: head}, keys: map[string]lastEntry{}, places: map[Hash]int64{}, roots: map[int64]Hash{head.Size: {}}}
	for _, old := range checks.Since {
		v.roots[old.Size] = Hash{}
	}
	if err := v.entries(in); err != nil {
		return v.report, err
	}
	v.whole(checks)
	return v.report, v.err()
}

// maxLine bounds a line of a log. An entry has about a thousand bytes.
const maxLine = 1 << 20

func readLine(in *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		line = append(line, part...)
		switch {
		case errors.Is(err, io.EOF) && len(line) == 0:
			return nil, io.EOF
		case err == nil, errors.Is(err, io.EOF):
			return line, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, fmt.Errorf("%w: %w", ErrSyntax, err)
		case len(line) > maxLine:
			return nil, fmt.Errorf("%w: a line is too long", ErrSyntax)
		}
	}
}

type logVerifier struct {
	report  LogReport
	hashes  []Hash         // of the entries from 0 on, without a gap
	places  map[Hash]int64 // of every entry, its first
	broken  bool           // hashes are missing
	tree    frontier
	roots   map[int64]Hash       // of the sizes that are asked for
	keys    map[string]lastEntry // by KeyId
	strange bool                 // more entries than the head has
}

// lastEntry is the last entry of one key so far.
type lastEntry struct {
	index    int64
	hash     Hash
	revision int64
}

func (v *logVerifier) problem(index int64, format string, args ...any) {
	if len(v.report.Problems) == maxProblems {
		v.report.More++
		return
	}
	v.report.Problems = append(v.report.Problems, &Problem{Index: index, Err: fmt.Errorf(format, args...)})
}

func (v *logVerifier) err() error {
	var errs []error
	for _, p := range v.report.Problems {
		errs = append(errs, p)
	}
	if v.report.More > 0 {
		errs = append(errs, fmt.Errorf("receipt: and %d problems more", v.report.More))
	}
	return errors.Join(errs...)
}

// entries reads the lines of the entries.
func (v *logVerifier) entries(in *bufio.Reader) error {
	expected := int64(0)
	for {
		data, err := readLine(in)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return errors.Join(v.err(), err)
		}
		var line lineJSON
		if err := strict(data, &line); err != nil {
			v.problem(expected, "%w", err)
			v.broken = true
			expected++
			continue
		}
		switch {
		case line.Index < expected:
			v.problem(line.Index, "%w: it stands after entry %d, out of its order or twice", ErrProof, expected-1)
			continue
		case line.Index > expected:
			v.missing(expected, line.Index)
			expected = line.Index
		}
		v.entry(line)
		expected++
	}
	if expected < v.report.Head.Size {
		v.missing(expected, v.report.Head.Size)
	}
	return nil
}

// missing reports the entries from first up to next. A log that is cut short is
// told once.
func (v *logVerifier) missing(first, next int64) {
	v.broken = true
	if next-first == 1 {
		v.problem(first, "%w", ErrMissing)
		return
	}
	v.problem(first, "%w, and so are all up to entry %d", ErrMissing, next-1)
}

func (v *logVerifier) entry(line lineJSON) {
	if line.Index >= v.report.Head.Size && !v.strange {
		v.strange = true
		v.problem(line.Index, "%w: it has %d entries", ErrProof, v.report.Head.Size)
	}
	if !v.broken {
		v.hashes = append(v.hashes, line.Hash)
		v.tree.add(line.Hash)
		if _, asked := v.roots[v.tree.size]; asked {
			v.roots[v.tree.size] = v.tree.root()
		}
	}
	first, repeated := v.places[line.Hash]
	if !repeated {
		v.places[line.Hash] = line.Index
	}
	switch {
	case repeated && line.Index < v.report.Head.Size:
		v.problem(line.Index, "%w: it is entry %d already, whose place someone has taken from it in the database", ErrRepeated, first)
		return
	case line.Entry == nil:
		v.problem(line.Index, "%w: the log has its hash only", ErrMissing)
		return
	}
	body := text(line.Entry)
	if tlog.RecordHash(body) != line.Hash {
		v.problem(line.Index, "%w%s", ErrAltered, keyOf(body))
		return
	}
	e, err := ParseEntry(body)
	switch {
	case err != nil:
		v.problem(line.Index, "%w", err)
		return
	case e.Log != v.report.Head.Log:
		v.problem(line.Index, "%w: of log %s, and the head is of log %s", ErrOtherLog, e.Log, v.report.Head.Log)
		return
	}
	v.follow(line, &e)
	v.report.Entries++
	if e.Kind == Import {
		v.report.Imports++
	}
}

// keyOf names the key of an entry that is not what it should be, if it can
// still be told.
func keyOf(body []byte) string {
	if e, err := ParseEntry(body); err == nil {
		return ", of key " + quote(e.KeyID)
	}
	return ""
}

// follow checks an entry against the one before of the same key. A row of the
// database that was put back to what it was shows here: its next entry follows
// an older one than the last.
func (v *logVerifier) follow(line lineJSON, e *Entry) {
	last, known := v.keys[e.KeyID]
	switch {
	case !known && e.Previous == Hash{}, known && e.Previous == last.hash && e.Revision > last.revision:
	case !known:
		v.problem(line.Index, "%w: the entry before it of key %s, with hash %x, is not there or was altered", ErrChain, quote(e.KeyID), e.Previous[:])
	default:
		v.problem(line.Index, "%w: it does not follow entry %d of key %s, which is missing, was altered, or was undone in the database", ErrChain, last.index, quote(e.KeyID))
	}
	v.keys[e.KeyID] = lastEntry{line.Index, line.Hash, e.Revision}
}

// whole checks what only the whole log shows.
func (v *logVerifier) whole(checks LogChecks) {
	head := v.report.Head
	switch {
	case v.broken:
		v.problem(-1, "%w, as some are missing", ErrRoot)
	case v.roots[head.Size] != head.Root:
		v.problem(-1, "%w: an entry was altered together with its hash, or removed, or entries were exchanged", ErrRoot)
	}
	for _, old := range checks.Since {
		switch err := old.precedes(head); {
		case err != nil:
			v.problem(-1, "%w", err)
		case !v.broken && v.roots[old.Size] != old.Root:
			v.problem(-1, "%w: its first %d entries are not those of %s", ErrForked, old.Size, stamp(old.Time))
		}
	}
	for _, r := range checks.Receipts {
		switch {
		case r.Index >= head.Size:
			v.problem(r.Index, "%w: a receipt has it, and this log ends before", ErrMissing)
		case r.Index < int64(len(v.hashes)) && v.hashes[r.Index] != r.EntryHash:
			v.problem(r.Index, "%w: a receipt has another entry there%s", ErrAltered, keyOf(r.Entry))
		}
	}
}

// frontier is the right edge of a tree that grows: the roots of its full
// subtrees, the largest first.
type frontier struct {
	size  int64
	roots []Hash
}

func (f *frontier) add(h Hash) {
	for n := f.size; n&1 == 1; n >>= 1 {
		last := len(f.roots) - 1
		h = tlog.NodeHash(f.roots[last], h)
		f.roots = f.roots[:last]
	}
	f.roots = append(f.roots, h)
	f.size++
}

func (f *frontier) root() Hash {
	h := f.roots[len(f.roots)-1]
	for i := len(f.roots) - 2; i >= 0; i-- {
		h = tlog.NodeHash(f.roots[i], h)
	}
	return h
}
