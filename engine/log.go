package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// Bounds of the log of receipts.
const (
	// logBatch is how many entries one transaction gives a place.
	logBatch = 1024
	// tileHeight is that of store.Tile: 2^8 hashes.
	tileHeight = 8
	// headInterval is how long an entry may wait for a signed head that nobody
	// asks for.
	headInterval = time.Minute
	// MaxLogPage bounds a page of LogEntries.
	MaxLogPage = 1 << tileHeight
)

// logState is the log as of one signed head.
type logState struct {
	signed []byte // nil while it is empty
	head   receipt.Head
	hashes tlog.HashReader // of the tree of head; checks what it reads against it
}

func (l *logState) proveEntry(n int64) ([]receipt.Hash, error) {
	return tlog.ProveRecord(l.head.Size, n, l.hashes)
}

func (l *logState) proveSince(n int64) ([]receipt.Hash, error) {
	return tlog.ProveTree(l.head.Size, n, l.hashes)
}

// errPutBack: this process has seen more of the log than there is now.
var errPutBack = errors.New("the database has an older log of receipts than this process has seen: someone put it back")

// readLog reads the last head and believes nothing that the token has not
// signed. Nobody need have the PIN to have put an older head there: that is
// noticed by the process that signed the newer one, and by customers who kept
// it.
func (e *Engine) readLog(ctx context.Context) (*logState, error) {
	if e.receiptKey == nil {
		return nil, &Error{Kind: UnsupportedOp, Hint: "this server has no receipt key"}
	}
	log, err := e.store.Log(ctx)
	if err != nil {
		return nil, storeError(err)
	}
	state := &logState{signed: log.Head}
	if log.Size > 0 {
		if state.head, err = receipt.OpenHead(log.Head, e.receiptKey); err != nil {
			return nil, e.spoiltLog(ctx, err)
		}
	}
	if state.head.Size != log.Size || log.Size > 0 && state.head.Log != e.logID || receipt.LogID(log.ID) != e.logID {
		return nil, e.spoiltLog(ctx, errors.New("its head is not its own"))
	}
	e.headMu.Lock()
	last := e.lastHead
	e.headMu.Unlock()
	if state.head.Size == last.Size && state.head.Root != last.Root {
		return nil, e.spoiltLog(ctx, errPutBack)
	}
	if state.head.Size < last.Size {
		// Another call may have extended it since this one read.
		if log, err = e.store.Log(ctx); err != nil {
			return nil, storeError(err)
		}
		if log.Size < last.Size {
			return nil, e.spoiltLog(ctx, errPutBack)
		}
		return e.readLog(ctx)
	}
	state.hashes = tlog.TileHashReader(tlog.Tree{N: state.head.Size, Hash: state.head.Root}, &tiles{ctx: ctx, store: e.store})
	if err := e.follow(state, last); err != nil {
		return nil, e.spoiltLog(ctx, err)
	}
	return state, nil
}

// follow makes sure that a longer log still has what this process has seen: one
// that was put back may have been extended by another process since.
func (e *Engine) follow(log *logState, last receipt.Head) error {
	if log.head.Size == last.Size {
		return nil
	}
	if last.Size > 0 {
		proof, err := log.proveSince(last.Size)
		if err != nil {
			return err
		}
		if tlog.CheckTree(proof, log.head.Size, log.head.Root, last.Size, last.Root) != nil {
			return errPutBack
		}
	}
	e.headMu.Lock()
	defer e.headMu.Unlock()
	if log.head.Size > e.lastHead.Size {
		e.lastHead = log.head
	}
	return nil
}

// spoiltLog is for a log that does not verify.
func (e *Engine) spoiltLog(ctx context.Context, err error) error {
	if errors.Is(err, store.ErrUnavailable) || interrupted(err) {
		return storeError(err)
	}
	e.log.LogAttrs(ctx, slog.LevelError, "the log of receipts was changed by someone else", slog.Any("error", err))
	return &Error{Kind: Internal, cause: err}
}

// tiles reads the tiles of the store for package tlog, each once.
type tiles struct {
	ctx   context.Context //nolint:containedctx // for one call; tlog has no contexts
	store store.Store
	read  map[tileName][]byte
}

type tileName struct {
	level int
	n     int64
}

// Height is the levels of the tree that one tile has.
func (t *tiles) Height() int { return tileHeight }

// SaveTiles is for caches; the store is the only one.
func (t *tiles) SaveTiles([]tlog.Tile, [][]byte) {}

// ReadTiles cuts tiles that have grown since to the width that is asked for.
func (t *tiles) ReadTiles(wanted []tlog.Tile) ([][]byte, error) {
	if t.read == nil {
		t.read = make(map[tileName][]byte)
	}
	var lacking []store.Tile
	for _, w := range wanted {
		if _, have := t.read[tileName{w.L, w.N}]; !have {
			lacking = append(lacking, store.Tile{Level: w.L, N: w.N})
		}
	}
	if len(lacking) > 0 {
		found, err := t.store.LogTiles(t.ctx, lacking)
		if err != nil {
			return nil, err
		}
		for _, tile := range found {
			t.read[tileName{tile.Level, tile.N}] = tile.Hashes
		}
	}
	out := make([][]byte, len(wanted))
	for i, w := range wanted {
		hashes := t.read[tileName{w.L, w.N}]
		if len(hashes) < w.W*tlog.HashSize {
			return nil, fmt.Errorf("tile %d of level %d of the log of receipts is missing", w.N, w.L)
		}
		out[i] = hashes[:w.W*tlog.HashSize]
	}
	return out, nil
}

// sweepLog signs a head over the entries that have waited long enough for one, or
// are many: while they are young, their MACs are remembered and the token is not
// asked for each of them again.
func (e *Engine) sweepLog(ctx context.Context, now time.Time) error {
	if e.receiptKey == nil || now.Sub(e.headAt) < headInterval && e.entered.Load() < e.headAfter {
		return nil
	}
	e.entered.Store(0)
	if err := e.extendLog(ctx); err != nil {
		return err
	}
	e.headAt = now
	return nil
}

// extendLog gives every pending entry a place in the log and has the token sign
// heads over them. It does nothing if there is none.
func (e *Engine) extendLog(ctx context.Context) error {
	select {
	case e.extending <- struct{}{}:
		defer func() { <-e.extending }()
	case <-ctx.Done():
		return &Error{Kind: Unavailable, cause: ctx.Err()}
	}
	conflicts := 0
	for {
		more, err := e.extendOnce(ctx)
		switch {
		case errors.Is(err, store.ErrConflict) && conflicts < maxConflicts:
			conflicts++ // another node did it first
		case errors.Is(err, store.ErrConflict):
			return &Error{Kind: Unavailable, cause: err}
		case err != nil || !more:
			return err
		}
	}
}

// extendOnce extends the log by one batch and reports whether more may be
// pending. It returns store.ErrConflict as it is.
func (e *Engine) extendOnce(ctx context.Context) (more bool, err error) {
	limit := logBatch + len(e.strangers)
	pending, err := e.store.PendingReceipts(ctx, limit)
	if err != nil {
		return false, storeError(err)
	}
	var batch []store.Receipt
	for i := range pending {
		stranger := digest(receiptDomain, pending[i].Entry, append(pending[i].RowDigest, pending[i].MAC...))
		if e.strangers[stranger] {
			continue
		}
		switch err := e.verifyReceipt(ctx, &pending[i]); {
		case err == nil:
			batch = append(batch, pending[i])
		case errors.Is(err, hsm.ErrUntrusted):
			e.strangers[stranger] = true // it must not hide those behind it, nor be told of each time
		default:
			return false, err
		}
	}
	if len(batch) == 0 {
		return false, nil
	}
	log, err := e.readLog(ctx)
	if err != nil {
		return false, err
	}
	extension, head, err := e.extension(ctx, log, batch)
	if err != nil {
		return false, err
	}
	err = e.store.ExtendLog(ctx, extension)
	switch {
	case errors.Is(err, store.ErrConflict):
		return false, err
	case err != nil:
		return false, storeError(err)
	}
	e.headMu.Lock()
	defer e.headMu.Unlock()
	if head.Size > e.lastHead.Size {
		e.lastHead = head
	}
	return len(pending) == limit, nil
}

// extension computes what the log becomes with a batch of entries.
func (e *Engine) extension(ctx context.Context, log *logState, batch []store.Receipt) (store.LogExtension, receipt.Head, error) {
	x := store.LogExtension{Size: log.head.Size}
	fresh := make(map[int64]tlog.Hash, 2*len(batch))
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		return readHashes(indexes, fresh, log.hashes)
	})
	for i := range batch {
		n := x.Size + int64(i)
		hashes, err := tlog.StoredHashesForRecordHash(n, receipt.HashOf(batch[i].Entry), read)
		if err != nil {
			return x, receipt.Head{}, e.spoiltLog(ctx, err)
		}
		for j, h := range hashes {
			fresh[tlog.StoredHashIndex(0, n)+int64(j)] = h
		}
		x.Entries = append(x.Entries, batch[i].Seq)
	}
	head := receipt.Head{Log: e.logID, Size: x.Size + int64(len(batch)), Time: e.second(), TokenSerial: e.token.Serial()}
	if log.head.Size > 0 {
		head.Previous = log.head.Digest()
	}
	var err error
	if head.Root, err = tlog.TreeHash(head.Size, read); err != nil {
		return x, receipt.Head{}, e.spoiltLog(ctx, err)
	}
	for _, t := range tlog.NewTiles(tileHeight, x.Size, head.Size) {
		hashes, err := tlog.ReadTileData(t, read)
		if err != nil {
			return x, receipt.Head{}, e.spoiltLog(ctx, err)
		}
		x.Tiles = append(x.Tiles, store.Tile{Level: t.L, N: t.N, Hashes: hashes})
	}
	x.Head, err = receipt.SignHead(head, e.receiptKey, func(digest [32]byte) ([]byte, error) {
		return e.token.SignReceipt(ctx, digest)
	})
	if err != nil {
		return x, receipt.Head{}, tokenError(err)
	}
	return x, head, nil
}

// readHashes takes hashes from fresh, and what is not there from the old tree.
func readHashes(indexes []int64, fresh map[int64]tlog.Hash, old tlog.HashReader) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	var places []int
	var lacking []int64
	for i, index := range indexes {
		if h, ok := fresh[index]; ok {
			out[i] = h
			continue
		}
		places, lacking = append(places, i), append(lacking, index)
	}
	if len(lacking) == 0 {
		return out, nil
	}
	hashes, err := old.ReadHashes(lacking)
	if err != nil {
		return nil, err
	}
	for i, h := range hashes {
		out[places[i]] = h
	}
	return out, nil
}

// LogHead is the log of receipts as of its last signed head.
type LogHead struct {
	Head      []byte // signed; nil while the log is empty
	Size      int64
	PublicKey []byte // SubjectPublicKeyInfo, DER
}

// LogHead returns the last head, after one was signed over what was pending.
func (e *Engine) LogHead(ctx context.Context) (LogHead, error) {
	if e.receiptKey == nil {
		return LogHead{}, &Error{Kind: UnsupportedOp, Hint: "this server has no receipt key"}
	}
	if err := e.extendLog(ctx); err != nil {
		return LogHead{}, err
	}
	log, err := e.readLog(ctx)
	if err != nil {
		return LogHead{}, err
	}
	return LogHead{Head: log.signed, Size: log.head.Size, PublicKey: e.receiptKey.SPKI()}, nil
}

// LogEntries returns the log from an entry on, at most MaxLogPage entries, just
// as it is in the database: whoever reads it verifies it (receipt.VerifyLog)
// and learns what was changed, which is more than a refusal would say. An entry
// that the database has lost is there with its hash alone.
func (e *Engine) LogEntries(ctx context.Context, from int64, limit int) ([]receipt.LogEntry, error) {
	switch {
	case from < 0:
		return nil, invalid("Start", "")
	case limit < 1 || limit > MaxLogPage:
		return nil, invalid("Limit", fmt.Sprintf("from 1 to %d", MaxLogPage))
	}
	log, err := e.store.Log(ctx)
	if err != nil {
		return nil, storeError(err)
	}
	until := min(log.Size, from+int64(limit))
	if until <= from {
		return nil, nil
	}
	var wanted []store.Tile
	for n := from >> tileHeight; n <= (until-1)>>tileHeight; n++ {
		wanted = append(wanted, store.Tile{N: n})
	}
	found, err := e.store.LogTiles(ctx, wanted)
	if err != nil {
		return nil, storeError(err)
	}
	stored, err := e.store.LogReceipts(ctx, from, int(until-from))
	if err != nil {
		return nil, storeError(err)
	}
	entries := make([]receipt.LogEntry, until-from)
	for i := range entries {
		entries[i].Index = from + int64(i)
		for _, t := range found {
			at := int(entries[i].Index-t.N<<tileHeight) * tlog.HashSize
			if at >= 0 && at+tlog.HashSize <= len(t.Hashes) {
				copy(entries[i].Hash[:], t.Hashes[at:])
			}
		}
	}
	for i := range stored {
		if place := stored[i].Index - from; place >= 0 && place < int64(len(entries)) {
			entries[place].Entry = stored[i].Entry
		}
	}
	return entries, nil
}
