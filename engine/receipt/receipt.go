// Package receipt is what a customer can hold against a KMS: the entry that
// every import of key material leaves in a log, the signed heads of that log,
// and how both are verified, offline and in pure Go.
//
// Start with [Receipt.Verify] for the receipt of one import and with
// [VerifyLog] for a whole log.
//
// The log is the Merkle tree of RFC 6962 section 2.1 over its entries, in
// SHA-256. An entry is text, and what is hashed is that text: see [Entry]. A
// head is a checkpoint of C2SP's tlog-checkpoint, signed as a note (signed-note)
// by an ECDSA P-256 key that does not leave the token of the KMS: see [Head].
// One database has one log, whichever of its nodes makes an import: an import
// adds its entry without a place in the log, so that no node waits for
// another; places are given later, to many entries at once, before a head is
// signed over them.
//
// What it proves: whoever keeps a head can be shown that a later log still has
// everything that was in it, in the same order (see [Receipt.VerifySince]), so
// a database that was put back to an older state, or edited, does not pass.
// What it does not: a KMS that signs two logs for two customers is found out
// only when these compare their heads.
package receipt

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// Kinds of what is wrong with a receipt or a log. Every error of this package
// wraps one of them, and says more.
var (
	// ErrSyntax: it is no receipt, no log or no head, or one that was damaged
	// beyond reading.
	ErrSyntax = errors.New("receipt: cannot be read")
	// ErrKey: it is not signed by the pinned key.
	ErrKey = errors.New("receipt: signed by another key than the pinned one")
	// ErrSignature: the head was altered, or its signature is forged.
	ErrSignature = errors.New("receipt: the signature of the head is bad")
	// ErrOtherLog: an entry or a head is of another log.
	ErrOtherLog = errors.New("receipt: of another log")
	// ErrAltered: an entry is not the one whose hash the log holds.
	ErrAltered = errors.New("receipt: entry was altered")
	// ErrMissing: an entry is not there.
	ErrMissing = errors.New("receipt: entry is missing")
	// ErrProof: the head does not cover this entry at this place.
	ErrProof = errors.New("receipt: not in the log that the head is of")
	// ErrRoot: the hashes of a log do not add up to its signed head.
	ErrRoot = errors.New("receipt: the hashes do not add up to the signed head")
	// ErrChain: an entry does not follow the one before of the same key.
	ErrChain = errors.New("receipt: entries of a key do not follow each other")
	// ErrRepeated: an entry has two places in a log. No server gives it a second
	// one unless someone has taken the first from it in the database.
	ErrRepeated = errors.New("receipt: the entry stands in the log twice")
	// ErrRolledBack: the log is shorter than it was.
	ErrRolledBack = errors.New("receipt: the log was put back to an older state")
	// ErrForked: the log no longer has what it had.
	ErrForked = errors.New("receipt: the log does not continue what it was")
	// ErrNoConsistency: nothing shows whether it continues the older head.
	ErrNoConsistency = errors.New("receipt: no proof that it continues that head")
)

// Hash is a SHA-256: of an entry by [Entry.Hash], or of a node of the tree.
type Hash = tlog.Hash

// LogID names a log. It is random.
type LogID [16]byte

// String is the id in hexadecimal.
func (id LogID) String() string { return hex.EncodeToString(id[:]) }

// ParseLogID reads 32 hexadecimal digits.
func ParseLogID(text string) (id LogID, err error) {
	if err := fixedHex(id[:], text); err != nil {
		return LogID{}, fmt.Errorf("%w: %w", ErrSyntax, err)
	}
	return id, nil
}

// Receipt is an entry with all that is needed to verify it but the pinned key.
// Its JSON is one object, made to be read by people too.
type Receipt struct {
	Index     int64  // of the entry in the log, from 0
	Entry     []byte // text of an Entry
	EntryHash Hash
	Proof     []Hash // RFC 6962 section 2.1.1, from the entry to the root
	Head      []byte // a signed head
	PublicKey []byte // SubjectPublicKeyInfo, DER

	// Since shows that the log of Head continues an older one; nil if that was
	// not asked for.
	Since *Consistency
}

// Consistency is the proof of RFC 6962 section 2.1.2 that the first Size
// entries of a log are those of the log of an older head.
type Consistency struct {
	Size  int64  `json:"size"`
	Proof []Hash `json:"proof"`
}

// Verify checks a receipt against the pinned key and returns what it says.
func (r *Receipt) Verify(pinned *PublicKey) (Entry, Head, error) {
	if err := pinned.check(r.PublicKey); err != nil {
		return Entry{}, Head{}, err
	}
	head, err := OpenHead(r.Head, pinned)
	if err != nil {
		return Entry{}, Head{}, err
	}
	if tlog.RecordHash(r.Entry) != r.EntryHash {
		return Entry{}, Head{}, fmt.Errorf("%w: entry %d", ErrAltered, r.Index)
	}
	if err := tlog.CheckRecord(r.Proof, head.Size, head.Root, r.Index, r.EntryHash); err != nil {
		return Entry{}, Head{}, fmt.Errorf("%w: entry %d of %d", ErrProof, r.Index, head.Size)
	}
	entry, err := ParseEntry(r.Entry)
	if err != nil {
		return Entry{}, Head{}, err
	}
	if entry.Log != head.Log {
		return Entry{}, Head{}, fmt.Errorf("%w: the entry is of log %s, the head of log %s", ErrOtherLog, entry.Log, head.Log)
	}
	return entry, head, nil
}

// VerifySince checks that head, which Verify returned, continues old.
func (r *Receipt) VerifySince(old, head Head) error {
	if err := old.precedes(head); err != nil {
		return err
	}
	switch {
	case old.Size == head.Size:
		return nil
	case r.Since == nil || r.Since.Size != old.Size:
		return fmt.Errorf("%w: fetch the receipt again, since the head of %d entries", ErrNoConsistency, old.Size)
	case tlog.CheckTree(r.Since.Proof, head.Size, head.Root, old.Size, old.Root) != nil:
		return fmt.Errorf("%w: its first %d entries are not those of %s", ErrForked, old.Size, stamp(old.Time))
	}
	return nil
}

// precedes refuses what no proof is needed to refuse.
func (h Head) precedes(head Head) error {
	switch {
	case h.Log != head.Log:
		return fmt.Errorf("%w: the older head is of log %s, this one of log %s", ErrOtherLog, h.Log, head.Log)
	case h.Size > head.Size:
		return fmt.Errorf("%w: it had %d entries at %s and has %d in the head of %s",
			ErrRolledBack, h.Size, stamp(h.Time), head.Size, stamp(head.Time))
	case h.Size == head.Size && h.Root != head.Root:
		return fmt.Errorf("%w: two heads of %d entries differ", ErrForked, h.Size)
	}
	return nil
}

const receiptFormat = "keyferry receipt v1"

// receiptJSON is the form of a receipt in a file. Text stands in it as a list of
// its lines, which is what is hashed and signed: nothing is there twice.
type receiptJSON struct {
	Format    string       `json:"format"`
	Index     int64        `json:"index"`
	Entry     []string     `json:"entry"`
	Hash      Hash         `json:"hash"`
	Proof     []Hash       `json:"proof"`
	Head      []string     `json:"head"`
	PublicKey []string     `json:"public_key"`
	Since     *Consistency `json:"since,omitempty"`
}

// MarshalJSON writes the form that UnmarshalJSON reads.
func (r *Receipt) MarshalJSON() ([]byte, error) {
	return json.Marshal(receiptJSON{
		Format: receiptFormat, Index: r.Index, Entry: lines(r.Entry), Hash: r.EntryHash, Proof: append([]Hash{}, r.Proof...),
		Head: lines(r.Head), PublicKey: lines(encodePEM(r.PublicKey)), Since: r.Since,
	})
}

// UnmarshalJSON reads a receipt and verifies nothing. Errors wrap ErrSyntax.
func (r *Receipt) UnmarshalJSON(data []byte) error {
	var in receiptJSON
	if err := strict(data, &in); err != nil {
		return err
	}
	if in.Format != receiptFormat {
		return fmt.Errorf("%w: its format is %q, not %q", ErrSyntax, in.Format, receiptFormat)
	}
	key, err := ParsePublicKey(text(in.PublicKey))
	if err != nil {
		return err
	}
	*r = Receipt{
		Index: in.Index, Entry: text(in.Entry), EntryHash: in.Hash, Proof: in.Proof,
		Head: text(in.Head), PublicKey: key.spki, Since: in.Since,
	}
	return nil
}

// strict decodes one JSON value that has no members but those it should have,
// each once and as it is spelt: of two the decoder would take the last, while a
// person may read the first.
func strict(data []byte, to any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil {
		return fmt.Errorf("%w: %w", ErrSyntax, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: something follows it", ErrSyntax)
	}
	if err := once(json.NewDecoder(bytes.NewReader(data))); err != nil { // which is not nested deeply, as it was decoded
		return fmt.Errorf("%w: %w", ErrSyntax, err)
	}
	return nil
}

// once reads one JSON value and refuses a member that is there twice, or in
// capitals, which the decoder would take for the same.
func once(d *json.Decoder) error {
	opening, err := d.Token()
	if err != nil || opening != json.Delim('{') && opening != json.Delim('[') {
		return err
	}
	seen := map[json.Token]bool{}
	for d.More() {
		if opening == json.Delim('{') {
			name, err := d.Token()
			if err != nil {
				return err
			}
			if seen[name] || strings.ContainsFunc(name.(string), func(r rune) bool { return r != '_' && (r < 'a' || r > 'z') }) {
				return fmt.Errorf("member %q is there twice, or is not spelt so", name)
			}
			seen[name] = true
		}
		if err := once(d); err != nil {
			return err
		}
	}
	_, err = d.Token()
	return err
}

func lines(text []byte) []string {
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

func text(lines []string) []byte { return []byte(strings.Join(lines, "\n") + "\n") }

// digestText is what a head says of the head before it.
func digestText(text string) Hash { return sha256.Sum256([]byte(text)) }
