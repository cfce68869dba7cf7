package kmsapi

import (
	"context"
	"encoding/base64"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/receipt"
)

// The actions of this file are Keyferry's own: the published API has none for
// receipts. Texts are as they are hashed and signed, with their newlines;
// hashes are in Base64. What they mean, and how a customer verifies it, says
// package receipt.

// hashList is a list as the API writes them.
type hashList struct {
	Hash []string
}

func hashes(list []receipt.Hash) hashList {
	out := hashList{Hash: make([]string, len(list))}
	for i, h := range list {
		out.Hash[i] = h.String()
	}
	return out
}

type receiptAnswer struct {
	KeyID     string `json:"KeyId" xml:"KeyId"`
	Index     int64
	Entry     string
	EntryHash string
	Proof     hashList
	Head      string
	PublicKey string // Base64 of a SubjectPublicKeyInfo in DER
	Since     int64  // 0: there is no proof since an older head
	SinceHash hashList
	envelope
}

// getImportReceipt takes a KeyId and, optionally, ImportRequestId (the
// RequestId of the import; without it the last import is meant) and Since (the
// size of an older head).
func (h *Handler) getImportReceipt(ctx context.Context, in *input) (body, error) {
	asked := engine.ReceiptInput{
		KeyID:     in.keyID("KeyId", engine.UnsupportedAlias),
		RequestID: in.optional("ImportRequestId"),
		Since:     int64(in.integer("Since", 0, 0, maxLogSize)),
	}
	if in.err != nil {
		return nil, in.err
	}
	r, err := h.cfg.Engine.Receipt(ctx, asked)
	if err != nil {
		return nil, err
	}
	answer := &receiptAnswer{
		KeyID: asked.KeyID, Index: r.Index, Entry: string(r.Entry), EntryHash: r.EntryHash.String(), Proof: hashes(r.Proof),
		Head: string(r.Head), PublicKey: base64.StdEncoding.EncodeToString(r.PublicKey), SinceHash: hashes(nil),
	}
	if r.Since != nil {
		answer.Since, answer.SinceHash = r.Since.Size, hashes(r.Since.Proof)
	}
	return answer, nil
}

// maxLogSize is more entries than any log has.
const maxLogSize = 1 << 50

type listReceiptsAnswer struct {
	KeyID      string `json:"KeyId" xml:"KeyId"`
	Receipts   listedReceipts
	TotalCount int
	PageNumber int
	PageSize   int
	envelope
}

type listedReceipts struct {
	Receipt []listedReceipt
}

type listedReceipt struct {
	Index int64 // -1: no signed head covers it yet
	Entry string
}

// listImportReceipts lists the entries of one key, the last first, deletions
// too.
func (h *Handler) listImportReceipts(ctx context.Context, in *input) (body, error) {
	keyID := in.keyID("KeyId", engine.UnsupportedAlias)
	page := in.integer("PageNumber", 1, 1, maxPageNumber)
	size := in.integer("PageSize", defaultPageSize, 1, maxPageSize)
	if in.err != nil {
		return nil, in.err
	}
	list, total, err := h.cfg.Engine.KeyReceipts(ctx, keyID, (page-1)*size, size)
	if err != nil {
		return nil, err
	}
	answer := &listReceiptsAnswer{
		KeyID: keyID, Receipts: listedReceipts{Receipt: []listedReceipt{}}, TotalCount: total, PageNumber: page, PageSize: size,
	}
	for _, r := range list {
		answer.Receipts.Receipt = append(answer.Receipts.Receipt, listedReceipt{Index: r.Index, Entry: string(r.Entry)})
	}
	return answer, nil
}

type logHeadAnswer struct {
	Head      string // "" while the log is empty
	Size      int64
	PublicKey string
	envelope
}

func (h *Handler) getReceiptLogHead(ctx context.Context, in *input) (body, error) {
	if in.err != nil {
		return nil, in.err
	}
	head, err := h.cfg.Engine.LogHead(ctx)
	if err != nil {
		return nil, err
	}
	return &logHeadAnswer{
		Head: string(head.Head), Size: head.Size, PublicKey: base64.StdEncoding.EncodeToString(head.PublicKey),
	}, nil
}

type logAnswer struct {
	Start   int64
	Entries logEntries
	envelope
}

type logEntries struct {
	Entry []logEntry
}

type logEntry struct {
	Index int64
	Hash  string
	Text  string // "" if the server has lost it
}

// getReceiptLog answers the log from entry Start on, Limit entries at the most.
func (h *Handler) getReceiptLog(ctx context.Context, in *input) (body, error) {
	start := in.integer("Start", 0, 0, maxLogSize)
	limit := in.integer("Limit", engine.MaxLogPage, 1, engine.MaxLogPage)
	if in.err != nil {
		return nil, in.err
	}
	list, err := h.cfg.Engine.LogEntries(ctx, int64(start), limit)
	if err != nil {
		return nil, err
	}
	answer := &logAnswer{Start: int64(start), Entries: logEntries{Entry: []logEntry{}}}
	for _, e := range list {
		answer.Entries.Entry = append(answer.Entries.Entry, logEntry{Index: e.Index, Hash: e.Hash.String(), Text: string(e.Entry)})
	}
	return answer, nil
}
