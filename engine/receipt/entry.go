package receipt

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"
)

// Kind is what an entry says has happened.
type Kind string

// The kinds of entries.
const (
	Import   Kind = "import"
	Deletion Kind = "deletion" // of material: nothing can use it any more
)

// Reasons of a deletion.
const (
	Requested  = "requested"
	Expired    = "expired"
	KeyDeleted = "key-deleted" // with the whole CMK, which is gone
)

// Entry is one entry of a log. Its text has one line for each field, in this
// order, each a name, a space and the value:
//
//	keyferry receipt v1
//	log <32 hexadecimal digits>
//	kind import
//	key <KeyId>
//	key_spec Aliyun_AES_256
//	revision 2
//	time 2026-11-25T07:10:00Z
//	request <RequestId of the import, "" if it had none>
//	token <serial of the token>
//	material <material id, 64 hexadecimal digits>
//	kcv 0a1b2c
//	kcv_algorithm AES-ECB
//	wrapping_algorithm RSAES_OAEP_SHA_256
//	wrapping_key <SHA-256 of the SubjectPublicKeyInfo>
//	ciphertext <SHA-256 of EncryptedKeyMaterial, decoded from Base64>
//	expires <a time, or never>
//	custody sealed
//	attributes CKA_CLASS=CKO_SECRET_KEY CKA_SENSITIVE=true ...
//	previous <hash of the entry before of the same key, or none>
//
// A deletion has a line "reason" in place of those from wrapping_algorithm to
// attributes. Every line ends in a newline. A value that is empty or has other
// characters than the printable ones of ASCII, a quotation mark or a backslash
// is written as a string of Go in ASCII. One entry has one text only, and what
// is hashed is that text: SHA-256 of a zero byte and the text.
type Entry struct {
	Log         LogID
	Kind        Kind
	KeyID       string
	KeySpec     string
	Revision    int64 // of the CMK's row; grows with every change of the CMK
	Time        time.Time
	RequestID   string
	TokenSerial string

	MaterialID   [32]byte
	KCV          [3]byte
	KCVAlgorithm string

	// Of an import only.
	WrappingAlgorithm string
	WrappingKey       [32]byte
	Ciphertext        [32]byte
	ExpireAt          time.Time // zero: never
	Custody           string
	Attributes        []string // as read back from the unwrapped object in the token; words, NAME=VALUE

	Reason string // of a deletion only

	Previous Hash // zero: the first entry of this key
}

const entryTitle = "keyferry receipt v1\n"

// Text is the entry as it is hashed.
func (e *Entry) Text() []byte {
	w := make(writer, 0, 1024)
	w = append(w, entryTitle...)
	w.hex("log", e.Log[:])
	w.word("kind", string(e.Kind))
	w.word("key", e.KeyID)
	w.word("key_spec", e.KeySpec)
	w.number("revision", e.Revision)
	w.time("time", e.Time, "never")
	w.word("request", e.RequestID)
	w.word("token", e.TokenSerial)
	w.hex("material", e.MaterialID[:])
	w.hex("kcv", e.KCV[:])
	w.word("kcv_algorithm", e.KCVAlgorithm)
	if e.Kind == Import {
		w.word("wrapping_algorithm", e.WrappingAlgorithm)
		w.hex("wrapping_key", e.WrappingKey[:])
		w.hex("ciphertext", e.Ciphertext[:])
		w.time("expires", e.ExpireAt, "never")
		w.word("custody", e.Custody)
		w.words("attributes", e.Attributes)
	} else {
		w.word("reason", e.Reason)
	}
	w.hash("previous", e.Previous)
	return w
}

// Hash is the hash of the entry in the log.
func (e *Entry) Hash() Hash { return HashOf(e.Text()) }

// HashOf is the hash in the log of the text of an entry, of RFC 6962 section
// 2.1.
func HashOf(text []byte) Hash { return tlog.RecordHash(text) }

// ParseEntry reads the text of an entry. It takes no other text than Text
// writes. Errors wrap ErrSyntax.
func ParseEntry(text []byte) (Entry, error) {
	var e Entry
	rest, ok := strings.CutPrefix(string(text), entryTitle)
	if !ok {
		return Entry{}, fmt.Errorf("%w: an entry begins with %q", ErrSyntax, strings.TrimSpace(entryTitle))
	}
	r := reader{rest: rest}
	r.hex("log", e.Log[:])
	e.Kind = Kind(r.word("kind"))
	e.KeyID = r.word("key")
	e.KeySpec = r.word("key_spec")
	e.Revision = r.number("revision")
	e.Time = r.time("time", "never")
	e.RequestID = r.word("request")
	e.TokenSerial = r.word("token")
	r.hex("material", e.MaterialID[:])
	r.hex("kcv", e.KCV[:])
	e.KCVAlgorithm = r.word("kcv_algorithm")
	switch e.Kind {
	case Import:
		e.WrappingAlgorithm = r.word("wrapping_algorithm")
		r.hex("wrapping_key", e.WrappingKey[:])
		r.hex("ciphertext", e.Ciphertext[:])
		e.ExpireAt = r.time("expires", "never")
		e.Custody = r.word("custody")
		e.Attributes = r.words("attributes")
	case Deletion:
		e.Reason = r.word("reason")
	default:
		r.fail("kind", fmt.Errorf("%q is not known; a newer keyferry may know it", e.Kind))
	}
	e.Previous = r.hash("previous")
	if err := r.end(); err != nil {
		return Entry{}, err
	}
	if !bytes.Equal(e.Text(), text) {
		return Entry{}, fmt.Errorf("%w: an entry is written in another way than it should be", ErrSyntax)
	}
	return e, nil
}

// writer writes lines of a name and a value.
type writer []byte

func (w *writer) line(name, value string) {
	*w = append(append(append(append(*w, name...), ' '), value...), '\n')
}

func (w *writer) hex(name string, value []byte) {
	*w = append(append(*w, name...), ' ')
	*w = append(hex.AppendEncode(*w, value), '\n')
}

func (w *writer) word(name, value string)         { w.line(name, quote(value)) }
func (w *writer) number(name string, value int64) { w.line(name, strconv.FormatInt(value, 10)) }

func (w *writer) time(name string, t time.Time, zero string) {
	if t.IsZero() {
		w.line(name, zero)
		return
	}
	w.line(name, stamp(t))
}

// hash writes "none" for the zero hash, which nothing has.
func (w *writer) hash(name string, h Hash) {
	if h == (Hash{}) {
		w.line(name, none)
		return
	}
	w.hex(name, h[:])
}

func (w *writer) words(name string, values []string) {
	if len(values) == 0 {
		w.line(name, none)
		return
	}
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = quote(v)
	}
	w.line(name, strings.Join(quoted, " "))
}

const none = "none"

// stamp writes a time in whole seconds.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// quote leaves a plain word as it is.
func quote(s string) string {
	if !plain(s) {
		return strings.ReplaceAll(strconv.QuoteToASCII(s), " ", `\x20`)
	}
	return s
}

func plain(s string) bool {
	for i := range len(s) { // by bytes: those of other characters than ASCII's are greater
		if c := s[i]; c <= ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return s != ""
}

func unquote(s string) (string, error) {
	if !strings.HasPrefix(s, `"`) {
		return s, nil
	}
	return strconv.Unquote(s)
}

// reader reads what writer wrote. It keeps the first error.
type reader struct {
	rest string
	err  error
}

func (r *reader) fail(name string, err error) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: line %q: %w", ErrSyntax, name, err)
	}
}

func (r *reader) line(name string) string {
	line, rest, ok := strings.Cut(r.rest, "\n")
	value, named := strings.CutPrefix(line, name+" ")
	if r.err != nil {
		return ""
	}
	if !ok || !named {
		r.fail(name, fmt.Errorf("it is missing, or not in its place"))
		return ""
	}
	r.rest = rest
	return value
}

func (r *reader) hex(name string, dst []byte) {
	if err := fixedHex(dst, r.line(name)); err != nil {
		r.fail(name, err)
	}
}

func (r *reader) word(name string) string {
	value, err := unquote(r.line(name))
	if err != nil {
		r.fail(name, err)
	}
	return value
}

func (r *reader) number(name string) int64 {
	n, err := strconv.ParseInt(r.line(name), 10, 64)
	if err != nil {
		r.fail(name, err)
	}
	return n
}

func (r *reader) time(name, zero string) time.Time {
	value := r.line(name)
	if value == zero {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, value)
	if err != nil {
		r.fail(name, err)
	}
	return t.UTC()
}

func (r *reader) hash(name string) (h Hash) {
	value := r.line(name)
	if value == none {
		return Hash{}
	}
	if err := fixedHex(h[:], value); err != nil {
		r.fail(name, err)
	}
	return h
}

func (r *reader) words(name string) []string {
	value := r.line(name)
	if value == none {
		return nil
	}
	words := strings.Split(value, " ")
	for i, w := range words {
		var err error
		if words[i], err = unquote(w); err != nil {
			r.fail(name, err)
		}
	}
	return slices.Clip(words)
}

func (r *reader) end() error {
	if r.err == nil && r.rest != "" {
		r.fail("after the last", fmt.Errorf("there is more"))
	}
	return r.err
}

func fixedHex(dst []byte, text string) error {
	if len(text) != hex.EncodedLen(len(dst)) {
		return fmt.Errorf("%d hexadecimal digits, not %d", hex.EncodedLen(len(dst)), len(text))
	}
	_, err := hex.Decode(dst, []byte(text))
	return err
}
