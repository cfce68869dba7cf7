// Package store defines what the engine needs of a database.
//
// A store keeps rows and compares revisions; it interprets nothing and trusts
// nothing. Every Key row carries a MAC that only the token can make and that
// the engine checks, so a store need not be honest, only durable.
//
// Start with Store. Every implementation passes storetest.Run.
package store

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Kinds of errors. An implementation wraps them; anything else a method
// returns is a failure of the database and says nothing of what was stored.
var (
	// ErrNotFound: there is no such row.
	ErrNotFound = errors.New("store: not found")
	// ErrExists: a row with that identifier is there already.
	ErrExists = errors.New("store: exists already")
	// ErrConflict: the row has changed since it was read. Read it again.
	ErrConflict = errors.New("store: changed since it was read")
	// ErrNoPair: no ready pair is left; generate one.
	ErrNoPair = errors.New("store: no wrapping pair is ready")
	// ErrCondemned is the ErrConflict of an Update whose Holding is not
	// Expected or Kept, of that CMK.
	ErrCondemned = fmt.Errorf("%w: an object of the token that was given up", ErrConflict)
	// ErrSpent: the import token of an Update has as many failures as it may
	// have, or is gone.
	ErrSpent = errors.New("store: the import token is used up")
	// ErrLimit: there are as many entries as there may be.
	ErrLimit = errors.New("store: limit is reached")
	// ErrUnavailable: the database is locked, full or gone; the change was
	// not made, or (after a lost commit) is not known to have been made.
	ErrUnavailable = errors.New("store: unavailable")
)

// Key is the row of one CMK. Times are UTC with a precision of one second,
// here and in every row: a store drops the fraction. The zero time means none
// and is stored as such. A nil slice is not an empty one.
type Key struct {
	KeyID        string
	KeyVersionID string // unique; ciphertexts carry it
	Revision     int64  // 1 when created; every update adds one
	Spec         string
	State        string
	Description  string
	CreatedAt    time.Time
	DeleteAt     time.Time // scheduled deletion, in state PendingDeletion only

	// Identity of the material. It stays after the material is gone.
	KCV                 []byte // 3 bytes, nil if nothing was ever imported
	MaterialID          []byte // 32 bytes, nil likewise
	CheckValueAlgorithm string
	CheckValue          []byte

	// The material itself: hsm.Material encoded, nil when there is none.
	Material          []byte
	ExpireAt          time.Time // zero: never
	WrappingAlgorithm string
	PairID            []byte // 16 bytes
	PairFingerprint   []byte // 32 bytes

	Custody string // of its material, whether there is one or not; "": sealed

	// Receipt is the hash of the CMK's last entry in the log of receipts, 32
	// bytes, nil while it has none.
	Receipt []byte

	MAC []byte // 32 bytes over all of the above, Revision included
}

// Update is a change of one CMK and what is committed with it.
type Update struct {
	Key     Key      // the new row, of the next Revision
	Receipt *Receipt // nil: none
	Holding *Holding // nil: what the token holds of the CMK stays as it is
	Budget  *Budget  // nil: nothing is asked
	// Stale: whoever uses the CMK as it was must stop. Other Stores of the
	// database report it; see Watch.
	Stale bool
}

// Holding says which object of the token the new row of a CMK refers to. The
// entry of that object becomes Kept if it was Expected, and those of the CMK's
// other Kept ones become Condemned.
type Holding struct {
	ID []byte // 16 bytes; nil: none
}

// Budget has an Update made only while an import token has fewer failures.
type Budget struct {
	TokenID  [16]byte
	Failures int
}

// Deletion is the end of one CMK and what is committed with it.
type Deletion struct {
	KeyID    string
	Revision int64    // that is stored
	Receipt  *Receipt // nil: none
}

// Receipt is the row of one entry of the log of receipts. It is never changed
// but for its Index, and never removed: not with its CMK either.
//
// An entry is added without a place in the log, so that transactions that add
// some do not wait for each other. It is pending until ExtendLog gives it one.
type Receipt struct {
	Seq       int64 // given by the store, greater than that of every entry committed before it was added
	Index     int64 // place in the log, from 0; -1 while pending
	KeyID     string
	Revision  int64  // of the CMK's row
	RequestID string // "" if none is known
	Import    bool   // else of a deletion
	Entry     []byte // what is hashed
	RowDigest []byte // what the MAC is over beside the entry's hash, 32 bytes
	MAC       []byte // 32 bytes
}

// Log is the state of the log of receipts.
type Log struct {
	ID   [16]byte // random, made when the database was
	Size int64    // entries that have a place
	Head []byte   // the last signed head, which is of Size entries; nil while Size is 0
}

// Tile is a run of at most 256 hashes of one level of the log's tree: hash i of
// tile N at level L is that of the full subtree over 256^L entries, of which it
// is number 256*N+i.
type Tile struct {
	Level  int
	N      int64
	Hashes []byte // 32 bytes each
}

// LogExtension gives pending entries their places and replaces the head.
type LogExtension struct {
	Size    int64   // of the log so far
	Entries []int64 // Seq of those that follow, in order
	Tiles   []Tile  // new, or longer than they were
	Head    []byte
}

// ResidentState is what may be said of an object that holds material in the
// token.
type ResidentState int64

// The states of a Resident. An object is made only after its entry is durable,
// and an entry is removed only after its object is gone.
const (
	ResidentExpected  ResidentState = 1 // there may be an object, and no row refers to it yet
	ResidentKept      ResidentState = 2 // a row refers to it
	ResidentCondemned ResidentState = 3 // no row refers to it, or ever will again
)

// Resident is the journal's entry of one object of the token that holds, or may
// hold, a CMK's material.
type Resident struct {
	ID    [16]byte
	KeyID string
	Node  string    // who made the entry
	Since time.Time // when
	State ResidentState
}

// Pair is the row of one wrapping pair, whose private half is in the token.
// A pair is ready from AddPair until BindPair first takes it.
type Pair struct {
	ID          [16]byte
	Spec        string
	Algorithm   string
	Fingerprint [32]byte // SHA-256 of the SubjectPublicKeyInfo
	CreatedAt   time.Time
	BoundAt     time.Time // zero while ready
	ExpiresAt   time.Time // zero while ready; else of the last token bound to it
}

// ImportToken is the row of one import token: it binds a pair to a CMK.
type ImportToken struct {
	ID        [16]byte
	KeyID     string
	Pair      Pair
	IssuedAt  time.Time
	ExpiresAt time.Time
	Failures  int // of unwraps with it, so far
}

// BindRequest asks for a pair for a new import token.
type BindRequest struct {
	TokenID   [16]byte
	KeyID     string
	Spec      string
	Algorithm string
	Now       time.Time
	ExpiresAt time.Time // of the token, and so of the pair

	// Bound is how many bound, unexpired pairs of this spec and algorithm
	// there may be before pairs are shared.
	Bound int
	// ShareSince: beyond Bound, the newest pair bound at or after this time
	// is shared. Zero: pairs are never shared.
	ShareSince time.Time
}

// Usage counts the AES-GCM encryptions under one CMK's material.
type Usage struct {
	KeyID string
	Uses  uint64
	Boot  uint64 // the Store.NextBoot number under which it was written; 0: none
	MAC   []byte // 32 bytes
}

// UsageUpdate replaces a CMK's usage, or is its first.
type UsageUpdate struct {
	Usage
	Was uint64 // the Uses that are stored
}

// Nonce is a signature nonce that must not be used again before it expires.
type Nonce struct {
	AccessKeyID string
	Value       string
	ExpiresAt   time.Time
}

// KeyFilter selects rows of ListKeys: each non-empty list must contain the
// row's value.
type KeyFilter struct {
	KeyIDs, States, Specs []string
}

// PairCount is how many pairs of one spec and algorithm there are.
type PairCount struct {
	Spec, Algorithm string
	Ready           int
	Bound           int // bound and not expired
	LastBoundAt     time.Time
}

// Store is a database of CMKs. All methods are safe for concurrent use.
//
// A method that writes returns nil only when the change is durable: it
// survives the loss of power that follows at once. A context that ends bounds
// the waiting; a write given up that way may still take effect, as a whole.
// Callers own the slices they pass and get.
type Store interface {
	// CreateKey adds a row with Revision 1. ErrExists, for the KeyID or the
	// KeyVersionID.
	CreateKey(ctx context.Context, key Key) error
	// Key returns a row. ErrNotFound.
	Key(ctx context.Context, keyID string) (Key, error)
	// KeyByVersion returns the row with that KeyVersionID. ErrNotFound.
	KeyByVersion(ctx context.Context, versionID string) (Key, error)
	// UpdateKey replaces the row if the stored Revision is one less than the
	// new one's, and does all else that the Update says in the same
	// transaction. ErrConflict if it is not, ErrNotFound if there is no row,
	// ErrExists if the KeyVersionID is another key's, ErrCondemned, ErrSpent. Seq and
	// Index of the Receipt are given by the store.
	UpdateKey(ctx context.Context, update Update) error
	// DeleteKey removes the row, its usage and its import tokens if the
	// stored Revision is the Deletion's, and adds the Receipt. The entries of
	// the CMK's objects become Condemned. ErrConflict, ErrNotFound.
	DeleteKey(ctx context.Context, deletion Deletion) error
	// ListKeys returns rows in order of creation, then KeyID, and how many
	// match in all.
	ListKeys(ctx context.Context, filter KeyFilter, offset, limit int) (keys []Key, total int, err error)
	// DueKeys returns at most limit rows that have material with ExpireAt, or
	// a DeleteAt, at or before now, the earliest first.
	DueKeys(ctx context.Context, now time.Time, limit int) ([]Key, error)

	// AddPair adds a ready pair, whatever its BoundAt and ExpiresAt say.
	// ErrExists.
	AddPair(ctx context.Context, pair Pair) error
	// BindPair takes the oldest ready pair, or shares one, as BindRequest
	// says, and adds the import token, in one transaction. ErrNoPair when
	// there is neither; the error says whether the bound was the reason by
	// wrapping ErrBound as well. ErrNotFound if there is no such CMK,
	// ErrExists if there is a token of that ID.
	BindPair(ctx context.Context, req BindRequest) (ImportToken, error)
	// LoadImport returns a CMK's row and an import token's in one read, as of
	// one moment. The token need not be of that CMK: the caller compares.
	// ErrNotFound if the CMK is not there; a token with a zero ID if it is not.
	LoadImport(ctx context.Context, keyID string, tokenID [16]byte) (Key, ImportToken, error)
	// CountFailure adds one to a token's failures and returns the sum.
	// ErrNotFound.
	CountFailure(ctx context.Context, tokenID [16]byte) (int, error)
	// Pairs returns every pair, or with due set at most limit of those whose
	// ExpiresAt is at or before it.
	Pairs(ctx context.Context, due time.Time, limit int) ([]Pair, error)
	// PairCounts counts pairs as of now.
	PairCounts(ctx context.Context, now time.Time) ([]PairCount, error)
	// RetirePair makes a ready pair one that BindPair never takes and that
	// is due at once. One that is retired already, or bound, stays as it is;
	// for the latter the answer is ErrConflict. ErrNotFound.
	RetirePair(ctx context.Context, id [16]byte, now time.Time) error
	// DeletePair removes a pair and every import token bound to it. It is no
	// error if it is gone already.
	DeletePair(ctx context.Context, id [16]byte) error

	// Log returns the state of the log of receipts.
	Log(ctx context.Context) (Log, error)
	// PendingReceipts returns at most limit entries that have no place in the
	// log yet, in order of Seq.
	PendingReceipts(ctx context.Context, limit int) ([]Receipt, error)
	// ExtendLog gives places to pending entries, stores tiles, replacing those
	// of the same Level and N, and replaces the head, in one transaction.
	// ErrConflict if the log's size is not Size, or an entry is not pending.
	ExtendLog(ctx context.Context, extension LogExtension) error
	// LogTiles returns those of the named tiles (their Hashes do not matter)
	// that there are, in any order.
	LogTiles(ctx context.Context, tiles []Tile) ([]Tile, error)
	// LogReceipts returns at most limit entries with Index from from on, in
	// order.
	LogReceipts(ctx context.Context, from int64, limit int) ([]Receipt, error)
	// KeyReceipts returns entries of one CMK, pending ones too, the last first,
	// and how many there are in all.
	KeyReceipts(ctx context.Context, keyID string, offset, limit int) (receipts []Receipt, total int, err error)
	// ImportReceipt returns the last entry of an import into a CMK, of the
	// request with that id unless it is "". ErrNotFound.
	ImportReceipt(ctx context.Context, keyID, requestID string) (Receipt, error)

	// Shared reports whether other Stores may work on the same database at the
	// same time. It never changes.
	Shared() bool
	// Watch has stale called with the names of each CMK that another Store of
	// the same database has changed with Update.Stale, or deleted, soon after.
	// Calls come from one goroutine until Close, or until Watch is called
	// again; a call holds up those that come next.
	Watch(stale func(keyID, versionID string))
	// Epoch says what a row is worth that was read a while ago. While it
	// returns the same number as before the row was read, and that is not 0,
	// every change that Watch reports and that was made by half a second ago
	// has been reported. Else the row must be read again. It waits for nothing.
	Epoch() uint64
	// Lease takes or renews a lease of that name for a time, and reports
	// whether the holder has it now: nobody else has until the time is up, by
	// the store's clock.
	Lease(ctx context.Context, name, holder string, life time.Duration) (held bool, err error)

	// AddResident adds an entry, whatever its State says as Expected. ErrExists;
	// ErrLimit if there are limit entries or more, unless limit is 0. Nodes that
	// add at once may exceed the limit by as many.
	AddResident(ctx context.Context, resident Resident, limit int) error
	// Residents returns every entry, or with due set at most limit of those that
	// are Condemned, or Expected since due or longer, the oldest first.
	Residents(ctx context.Context, due time.Time, limit int) ([]Resident, error)
	// CondemnResident makes an Expected entry Condemned. One that is so already
	// stays as it is. ErrConflict if it is Kept, ErrNotFound.
	CondemnResident(ctx context.Context, id [16]byte) error
	// RemoveResidents removes entries in one transaction, but for Kept ones. It
	// is no error if one is gone already.
	RemoveResidents(ctx context.Context, ids [][16]byte) error

	// NextBoot returns a number greater than any it returned before.
	NextBoot(ctx context.Context) (uint64, error)
	// Usage returns a CMK's usage. ErrNotFound.
	Usage(ctx context.Context, keyID string) (Usage, error)
	// PutUsages stores usages in one transaction and reports which. One whose
	// CMK has a usage with other Uses than Was is not stored, and neither is
	// that of a CMK that is gone.
	PutUsages(ctx context.Context, usages []UsageUpdate) (stored []bool, err error)

	// AddNonce remembers a nonce until it expires and reports whether it was
	// new. An expired one counts as new. Fractions of a second round up: it
	// never expires early.
	AddNonce(ctx context.Context, nonce Nonce, now time.Time) (fresh bool, err error)
	// DeleteNonces frees what is kept of nonces that have expired at now.
	DeleteNonces(ctx context.Context, now time.Time) error

	// Instance returns a random identifier, made when the database was:
	// 16 hexadecimal digits.
	Instance(ctx context.Context) (string, error)
	// Close releases everything. Calls under way fail or finish, later ones
	// fail with ErrUnavailable.
	Close() error
}

// ErrBound is wrapped beside ErrNoPair when the bound on outstanding pairs is
// reached and there is no pair that may be shared.
var ErrBound = errors.New("store: bound on outstanding wrapping pairs is reached")
