package engine_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// pinned is the key of the house's receipts.
func (h *house) pinned(tb testing.TB) *receipt.PublicKey {
	tb.Helper()
	spki, err := h.cfg.Token.ReceiptKey(tb.Context())
	require.NoError(tb, err)
	key, err := receipt.ParsePublicKey(spki)
	require.NoError(tb, err)
	return key
}

// receipt fetches a receipt, and verifies it as the customer does.
func (h *house) receipt(tb testing.TB, in engine.ReceiptInput) (receipt.Entry, receipt.Head, *receipt.Receipt) {
	tb.Helper()
	r, err := h.Receipt(tb.Context(), in)
	require.NoError(tb, err)
	entry, head, err := r.Verify(h.pinned(tb))
	require.NoError(tb, err)
	return entry, head, r
}

// verifyLog downloads the whole log and verifies it as the customer does.
func (h *house) verifyLog(tb testing.TB, since ...receipt.Head) (receipt.LogReport, error) {
	tb.Helper()
	head, err := h.LogHead(tb.Context())
	require.NoError(tb, err)
	key, err := receipt.ParsePublicKey(head.PublicKey)
	require.NoError(tb, err)
	var b bytes.Buffer
	w, err := receipt.NewLogWriter(&b, head.Head, key)
	require.NoError(tb, err)
	for from := int64(0); from < head.Size; from += engine.MaxLogPage {
		page, err := h.LogEntries(tb.Context(), from, engine.MaxLogPage)
		require.NoError(tb, err)
		for _, e := range page {
			require.NoError(tb, w.Write(e))
		}
	}
	return receipt.VerifyLog(&b, h.pinned(tb), receipt.LogChecks{Since: since})
}

// entries are those of one key, the first first.
func (h *house) entries(tb testing.TB, keyID string) (list []receipt.Entry) {
	tb.Helper()
	stored, total, err := h.KeyReceipts(tb.Context(), keyID, 0, 0)
	require.NoError(tb, err)
	require.Len(tb, stored, total)
	for _, s := range slices.Backward(stored) {
		e, err := receipt.ParseEntry(s.Entry)
		require.NoError(tb, err)
		list = append(list, e)
	}
	return list
}

// A receipt says what was imported, how and when, and is signed by the token.
func TestReceipt(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	in := input(t, params, randomBytes(32))
	in.RequestID, in.ExpireAt = "REQUEST-1", h.clock.in(time.Hour)
	key, err := h.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)

	entry, head, r := h.receipt(t, engine.ReceiptInput{KeyID: keyID})
	stays := key.Custody == hsm.Resident
	for _, want := range []string{
		"CKA_CLASS=CKO_SECRET_KEY", "CKA_KEY_TYPE=CKK_AES", fmt.Sprintf("CKA_TOKEN=%t", stays), "CKA_SENSITIVE=true", "CKA_WRAP_WITH_TRUSTED=true",
		fmt.Sprintf("CKA_EXTRACTABLE=%t", !stays), fmt.Sprintf("CKA_DECRYPT=%t", stays),
		"CKA_UNWRAP=false", "CKA_COPYABLE=false", "CKA_MODIFIABLE=false", "CKA_ALLOWED_MECHANISMS=0x1081,0x1087,0x108A",
	} {
		require.Contains(t, entry.Attributes, want)
	}
	require.Equal(t, receipt.Entry{
		Log: entry.Log, Kind: receipt.Import, KeyID: keyID, KeySpec: "Aliyun_AES_256", Revision: 2,
		Time: h.clock.in(0), RequestID: "REQUEST-1", TokenSerial: h.cfg.Token.Serial(),
		MaterialID: key.MaterialID, KCV: key.CheckValue.Value, KCVAlgorithm: "AES-ECB", WrappingAlgorithm: "RSAES_OAEP_SHA_1",
		WrappingKey: sha256.Sum256(params.PublicKey), Ciphertext: sha256.Sum256(in.EncryptedKeyMaterial),
		ExpireAt: in.ExpireAt, Custody: key.Custody.String(), Attributes: entry.Attributes,
	}, entry)
	require.Equal(t, receipt.Head{Log: entry.Log, Size: 1, Root: r.EntryHash, Time: h.clock.in(0), TokenSerial: h.cfg.Token.Serial()}, head)

	// Of two imports each has its receipt; the log goes on.
	in.RequestID, in.ExpireAt = "REQUEST-2", time.Time{}
	_, err = h.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
	second, newer, r2 := h.receipt(t, engine.ReceiptInput{KeyID: keyID, Since: 1})
	require.Equal(t, "REQUEST-2", second.RequestID)
	require.True(t, second.ExpireAt.IsZero())
	require.Equal(t, r.EntryHash, second.Previous)
	require.Equal(t, head.Digest(), newer.Previous)
	require.NoError(t, r2.VerifySince(head, newer))
	again, _, _ := h.receipt(t, engine.ReceiptInput{KeyID: keyID, RequestID: "REQUEST-1"})
	require.Equal(t, entry, again)

	_, err = h.Receipt(t.Context(), engine.ReceiptInput{KeyID: keyID, RequestID: "REQUEST-3"})
	requireKind(t, engine.ReceiptNotFound, err)
	_, err = h.Receipt(t.Context(), engine.ReceiptInput{KeyID: h.newKey(t, engine.AliyunAES256)})
	requireKind(t, engine.ReceiptNotFound, err)
	_, err = h.Receipt(t.Context(), engine.ReceiptInput{KeyID: "nobody"})
	requireKind(t, engine.KeyNotFound, err)
	_, _, err = h.KeyReceipts(t.Context(), "nobody", 0, 0)
	requireKind(t, engine.KeyNotFound, err)
	_, err = h.Receipt(t.Context(), engine.ReceiptInput{KeyID: keyID, Since: -1})
	requireKind(t, engine.InvalidParameter, err)
	in.RequestID = strings.Repeat("x", 129)
	_, err = h.ImportKeyMaterial(t.Context(), in)
	requireKind(t, engine.InvalidParameter, err)
}

// What takes material away leaves an entry; so does the end of a key, after
// which its receipts are still there. What changes nothing leaves none.
func TestReceiptsOfDeletions(t *testing.T) {
	h := newHouse(t)
	keyID, material := h.enabledKey(t)
	require.NoError(t, h.DisableKey(t.Context(), keyID))
	require.NoError(t, h.EnableKey(t.Context(), keyID))
	require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID))
	require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID))
	h.importUntil(t, keyID, material, h.clock.in(time.Minute))
	_, err := h.ImportKeyMaterial(t.Context(), input(t, h.parameters(t, keyID), randomBytes(32)))
	requireKind(t, engine.InvalidKeyMaterial, err)
	h.clock.advance(time.Minute)
	require.NoError(t, h.Sweep(t.Context()))
	h.importInto(t, keyID, material)
	require.NoError(t, h.ScheduleKeyDeletion(t.Context(), keyID, 7))
	never := h.newKey(t, engine.AliyunAES256)
	require.NoError(t, h.ScheduleKeyDeletion(t.Context(), never, 7))
	h.clock.advance(7 * 24 * time.Hour)
	require.NoError(t, h.Sweep(t.Context()))
	_, err = h.DescribeKey(t.Context(), keyID)
	requireKind(t, engine.KeyNotFound, err)

	var told []string
	entries := h.entries(t, keyID)
	for i, e := range entries {
		told = append(told, strings.TrimSpace(string(e.Kind)+" "+e.Reason))
		require.Equal(t, entries[0].MaterialID, e.MaterialID)
		if i > 0 {
			require.Equal(t, entries[i-1].Hash(), e.Previous)
		}
	}
	require.Equal(t, []string{"import", "deletion requested", "import", "deletion expired", "import", "deletion key-deleted"}, told)
	last, _, _ := h.receipt(t, engine.ReceiptInput{KeyID: keyID})
	require.Equal(t, entries[4], last)
	_, _, err = h.KeyReceipts(t.Context(), never, 0, 0)
	requireKind(t, engine.KeyNotFound, err)
	report, err := h.verifyLog(t)
	require.NoError(t, err)
	require.EqualValues(t, 6, report.Entries)
	require.EqualValues(t, 3, report.Imports)
}

// Heads are signed by the sweep once a minute if there is something to sign, sooner
// if there is much, and at the end; never by an import.
func TestHeadsAreSignedInBatches(t *testing.T) {
	h := newHouse(t)
	log := func() store.Log {
		log, err := h.store.Log(t.Context())
		require.NoError(t, err)
		return log
	}
	keyID, material := h.enabledKey(t)
	h.importInto(t, keyID, material)
	require.NoError(t, h.Sweep(t.Context()))
	require.Zero(t, log().Size, "too early")
	h.clock.advance(time.Minute)
	require.NoError(t, h.Sweep(t.Context()))
	before := log()
	require.EqualValues(t, 2, before.Size)
	h.clock.advance(time.Hour)
	require.NoError(t, h.Sweep(t.Context()))
	require.Equal(t, before, log(), "nothing new, nothing signed")
	h.SetHeadAfter(2)
	h.importInto(t, keyID, material)
	require.NoError(t, h.Sweep(t.Context()))
	require.Equal(t, before, log(), "not many yet")
	h.importInto(t, keyID, material)
	require.NoError(t, h.Sweep(t.Context()))
	require.EqualValues(t, 4, log().Size, "many")
	h.importInto(t, keyID, material)
	h.reopen(t)
	require.EqualValues(t, 5, log().Size, "signed at the end")
	_, err := h.verifyLog(t)
	require.NoError(t, err)
}

// Two engines on one database share its log, and neither waits for the other.
func TestTwoEnginesOneLog(t *testing.T) {
	h := newHouse(t)
	second, err := engine.New(t.Context(), h.cfg)
	require.NoError(t, err)
	engines := []*engine.Engine{h.Engine, second}
	const keys, imports = 3, 4
	pinned := h.pinned(t)
	var wg sync.WaitGroup
	errs := make([]error, keys)
	for i := range keys {
		keyID := h.newKey(t, engine.AliyunAES256)
		in := input(t, h.parameters(t, keyID), randomBytes(32))
		wg.Go(func() {
			for n := range imports {
				in := in
				in.RequestID = fmt.Sprint(n)
				var r *receipt.Receipt
				if _, errs[i] = engines[n%2].ImportKeyMaterial(t.Context(), in); errs[i] == nil {
					r, errs[i] = engines[(n+i)%2].Receipt(t.Context(), engine.ReceiptInput{KeyID: keyID, RequestID: in.RequestID})
				}
				if errs[i] == nil {
					_, _, errs[i] = r.Verify(pinned)
				}
				if errs[i] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	require.NoError(t, second.Close())
	report, err := h.verifyLog(t)
	require.NoError(t, err)
	require.EqualValues(t, keys*imports, report.Imports)
}

// More entries than fill a tile, in several batches, and every one of them is
// proven from a few tiles.
func TestLogOfManyEntries(t *testing.T) {
	h := newHouse(t)
	keyID, material := h.enabledKey(t)
	in := input(t, h.parameters(t, keyID), material)
	const imports = 270
	var heads []receipt.Head
	for n := range imports {
		in.RequestID = fmt.Sprint(n)
		_, err := h.ImportKeyMaterial(t.Context(), in)
		require.NoError(t, err)
		if n%97 == 0 {
			_, head, _ := h.receipt(t, engine.ReceiptInput{KeyID: keyID})
			heads = append(heads, head)
		}
	}
	for n := 0; n < imports; n += 23 {
		old := heads[n%len(heads)]
		entry, head, r := h.receipt(t, engine.ReceiptInput{KeyID: keyID, RequestID: fmt.Sprint(n), Since: old.Size})
		require.Equal(t, fmt.Sprint(n), entry.RequestID)
		require.NoError(t, r.VerifySince(old, head))
	}
	report, err := h.verifyLog(t, heads...)
	require.NoError(t, err)
	require.EqualValues(t, imports+1, report.Entries)
	_, err = h.LogEntries(t.Context(), 0, engine.MaxLogPage+1)
	requireKind(t, engine.InvalidParameter, err)
	_, err = h.LogEntries(t.Context(), -1, 1)
	requireKind(t, engine.InvalidParameter, err)
	page, err := h.LogEntries(t.Context(), imports+1, 1)
	require.NoError(t, err)
	require.Empty(t, page)
}

// An engine that dies between import and head loses no receipt: the next one
// signs it, once the token has said that it is ours.
func TestReceiptsOfACrash(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	pending, err := h.store.PendingReceipts(t.Context(), 10)
	require.NoError(t, err)
	require.Len(t, pending, 1)
	other, err := engine.New(t.Context(), h.cfg) // which knows no MAC yet
	require.NoError(t, err)
	defer func() { require.NoError(t, other.Close()) }()
	r, err := other.Receipt(t.Context(), engine.ReceiptInput{KeyID: keyID})
	require.NoError(t, err)
	_, _, err = r.Verify(h.pinned(t))
	require.NoError(t, err)
}

// A commit that fails leaves no entry; one whose answer is lost leaves one.
func TestReceiptOfAFailedCommit(t *testing.T) {
	faulty := &faultyStore{}
	h := newHouse(t, withStore(func(s store.Store) store.Store { faulty.Store = s; return faulty }))
	keyID := h.newKey(t, engine.AliyunAES256)
	in := input(t, h.parameters(t, keyID), randomBytes(32))
	for want, fault := range []func(update func() error) error{
		func(func() error) error { return store.ErrUnavailable },
		func(update func() error) error { _ = update(); return store.ErrUnavailable },
	} {
		faulty.updateKey = fault
		_, err := h.ImportKeyMaterial(t.Context(), in)
		requireKind(t, engine.Unavailable, err)
		faulty.updateKey = nil
		pending, err := h.store.PendingReceipts(t.Context(), 10)
		require.NoError(t, err)
		require.Len(t, pending, want)
	}
	h.receipt(t, engine.ReceiptInput{KeyID: keyID})
}

// Without a receipt key imports go on, and receipts are refused by name.
func TestNoReceiptKey(t *testing.T) {
	cfg := tokenConfig()
	cfg.Pins.ReceiptKey = hsm.Fingerprint{}
	token, err := hsm.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, token.Close()) })
	h := newHouse(t, withToken(token))
	keyID, _ := h.enabledKey(t)
	h.clock.advance(time.Hour)
	require.NoError(t, h.Sweep(t.Context()))
	_, err = h.Receipt(t.Context(), engine.ReceiptInput{KeyID: keyID})
	requireKind(t, engine.UnsupportedOp, err)
	_, err = h.LogHead(t.Context())
	requireKind(t, engine.UnsupportedOp, err)
	require.Len(t, h.entries(t, keyID), 1)
}

// A thief who writes to the database and has no PIN. Whatever he changes in the
// log is not signed, refused, or named by whoever verifies.
func TestReceiptsOfADatabaseWriter(t *testing.T) {
	h := newHouse(t)
	victims, material := h.enabledKey(t)
	thiefs, _ := h.enabledKey(t)
	get := func(keyID string) error {
		_, err := h.Receipt(t.Context(), engine.ReceiptInput{KeyID: keyID})
		return err
	}
	require.NoError(t, get(thiefs)) // entries 0 and 1
	h.importInto(t, victims, material)
	var tables []*rows
	keep := func() {
		tables = nil
		for _, name := range []string{"receipt", "receipt_tile", "receipt_log", "cmk"} {
			tables = append(tables, h.rows(t, name))
		}
	}
	restore := func(t *testing.T) {
		h.exec(t, "DELETE FROM receipt")
		for _, r := range tables {
			r.restore(t)
		}
	}
	opened := "UPDATE receipt SET entry = CAST(replace(CAST(entry AS TEXT), 'custody " + h.describe(t, victims).Custody.String() + "', 'custody opened') AS BLOB) WHERE "
	swap := "UPDATE receipt SET place = 9 WHERE place = 0; UPDATE receipt SET place = 0 WHERE place = 1; UPDATE receipt SET place = 1 WHERE place = 9"

	keep() // before it is signed
	for name, edit := range map[string]string{
		"the entry":             opened + "place IS NULL",
		"another's entry":       "UPDATE receipt SET entry = (SELECT entry FROM receipt WHERE key_id = '" + thiefs + "') WHERE place IS NULL",
		"another of the same":   "UPDATE receipt SET (entry, row_digest, mac) = (SELECT entry, row_digest, mac FROM receipt WHERE place = 0) WHERE place IS NULL",
		"the MAC":               "UPDATE receipt SET mac = zeroblob(32) WHERE place IS NULL",
		"the digest of the row": "UPDATE receipt SET row_digest = zeroblob(32) WHERE place IS NULL",
		"whose it is":           "UPDATE receipt SET key_id = '" + thiefs + "' WHERE place IS NULL",
		"its presence":          "DELETE FROM receipt WHERE place IS NULL",
		"its place":             "UPDATE receipt SET place = 2 WHERE place IS NULL",
	} {
		t.Run("pending, "+name, func(t *testing.T) {
			defer restore(t)
			h.exec(t, edit)
			requireKind(t, engine.Internal, get(victims))
			log, err := h.store.Log(t.Context())
			require.NoError(t, err)
			require.EqualValues(t, 2, log.Size, "it is not signed")
		})
	}

	require.NoError(t, get(victims))
	keep()
	for name, tt := range map[string]struct {
		edit string
		want []error // what the customer finds who downloads the log; nil: it is refused
	}{
		"an entry":    {opened + "place = 2", []error{receipt.ErrAltered}},
		"no entry":    {"DELETE FROM receipt WHERE place = 2", []error{receipt.ErrMissing}},
		"other tiles": {"UPDATE receipt_tile SET hashes = zeroblob(96)", []error{receipt.ErrAltered, receipt.ErrRoot}},
		"no tiles":    {"DELETE FROM receipt_tile", []error{receipt.ErrAltered, receipt.ErrRoot}},
		"no head":     {"UPDATE receipt_log SET head = zeroblob(10)", nil},
		"a longer":    {"UPDATE receipt_log SET size = 4", nil},
		"a shorter":   {"UPDATE receipt_log SET size = 1", nil},
		"another log": {"UPDATE receipt_log SET log_id = zeroblob(16)", nil},
		"put back":    {"UPDATE receipt_log SET size = 0, head = NULL; UPDATE receipt SET place = NULL", nil},
	} {
		t.Run("signed, "+name, func(t *testing.T) {
			defer restore(t)
			h.exec(t, tt.edit)
			requireKind(t, engine.Internal, get(victims))
			if tt.want == nil {
				_, err := h.LogHead(t.Context())
				requireKind(t, engine.Internal, err)
				return
			}
			_, err := h.verifyLog(t)
			for _, want := range tt.want {
				require.ErrorIs(t, err, want)
			}
		})
	}
	t.Run("signed, exchanged", func(t *testing.T) {
		defer restore(t)
		h.exec(t, swap)
		requireKind(t, engine.Internal, get(thiefs))
		_, err := h.verifyLog(t)
		require.ErrorIs(t, err, receipt.ErrAltered)
	})
	require.NoError(t, get(victims))
	_, err := h.verifyLog(t)
	require.NoError(t, err)

	// An entry whose place was taken from it gets another one, and the log says so
	// by name.
	t.Run("placed again", func(t *testing.T) {
		h := newHouse(t)
		one, _ := h.enabledKey(t)
		two, _ := h.enabledKey(t)
		for _, keyID := range []string{one, two} {
			require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID))
		}
		_, err := h.verifyLog(t)
		require.NoError(t, err)
		h.exec(t, "UPDATE receipt SET place = NULL WHERE key_id = ?", one) // its last one too
		report, err := h.verifyLog(t)
		require.ErrorIs(t, err, receipt.ErrRepeated)
		require.ErrorIs(t, err, receipt.ErrMissing, "where it was before")
		require.NotErrorIs(t, err, receipt.ErrChain, "what is not repeated is in order")
		require.EqualValues(t, 6, report.Head.Size)
	})

	// The row of before, put back whole, is in order by itself (S3). The log
	// has a later entry, and tells: the next import does not follow it.
	before := h.rows(t, "cmk")
	require.NoError(t, h.DeleteKeyMaterial(t.Context(), victims))
	before.restore(t)
	require.NoError(t, get(victims))
	h.importInto(t, victims, material)
	_, err = h.verifyLog(t)
	require.ErrorIs(t, err, receipt.ErrChain)
}

// The row that was put back is told to the operator, too.
func TestRowPutBackIsLogged(t *testing.T) {
	log, logger := newLog()
	h := newHouse(t, with(func(c *engine.Config) { c.Logger = logger }))
	keyID, _ := h.enabledKey(t)
	before := h.rows(t, "cmk")
	require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID))
	h.receipt(t, engine.ReceiptInput{KeyID: keyID})
	require.NotContains(t, log.String(), "put back")
	before.restore(t)
	h.receipt(t, engine.ReceiptInput{KeyID: keyID})
	require.Contains(t, log.String(), "someone put back the row of before")
}

// A database that is put back whole is consistent in itself. A head that the
// customer kept shows it.
func TestDatabasePutBack(t *testing.T) {
	h := newHouse(t)
	keyID, material := h.enabledKey(t)
	h.receipt(t, engine.ReceiptInput{KeyID: keyID})
	var tables []*rows
	for _, name := range []string{"cmk", "receipt", "receipt_tile", "receipt_log"} {
		tables = append(tables, h.rows(t, name))
	}
	h.importInto(t, keyID, material)
	h.importInto(t, keyID, material)
	_, kept, _ := h.receipt(t, engine.ReceiptInput{KeyID: keyID})
	require.EqualValues(t, 3, kept.Size)

	h.shut(t)
	h.exec(t, "DELETE FROM receipt")
	for _, r := range tables {
		r.restore(t)
	}
	h.open(t)
	_, head, r := h.receipt(t, engine.ReceiptInput{KeyID: keyID, Since: kept.Size})
	require.ErrorIs(t, r.VerifySince(kept, head), receipt.ErrRolledBack)
	for range 3 {
		h.importInto(t, keyID, material)
	}
	_, head, r = h.receipt(t, engine.ReceiptInput{KeyID: keyID, Since: kept.Size})
	require.ErrorIs(t, r.VerifySince(kept, head), receipt.ErrForked)
	_, err := h.verifyLog(t)
	require.NoError(t, err, "it is consistent in itself")
	_, err = h.verifyLog(t, kept)
	require.ErrorIs(t, err, receipt.ErrForked)
}

// A process that has seen more notices it, too, also when another one, which
// has not, has made the log longer again.
func TestDatabasePutBackUnderANode(t *testing.T) {
	log, logger := newLog()
	h := newHouse(t, with(func(c *engine.Config) { c.Logger = logger }))
	keyID, material := h.enabledKey(t)
	h.receipt(t, engine.ReceiptInput{KeyID: keyID})
	var tables []*rows
	for _, name := range []string{"cmk", "receipt", "receipt_tile", "receipt_log"} {
		tables = append(tables, h.rows(t, name))
	}
	h.importInto(t, keyID, material)
	h.receipt(t, engine.ReceiptInput{KeyID: keyID})
	h.exec(t, "DELETE FROM receipt")
	for _, r := range tables {
		r.restore(t)
	}
	other, err := engine.New(t.Context(), h.cfg)
	require.NoError(t, err)
	in := input(t, h.parameters(t, keyID), material)
	for range 2 {
		_, err = other.ImportKeyMaterial(t.Context(), in)
		require.NoError(t, err)
	}
	longer, err := other.LogHead(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 3, longer.Size)
	for range 2 {
		_, err = h.LogHead(t.Context())
		requireKind(t, engine.Internal, err)
	}
	require.Contains(t, log.String(), "someone put it back")
	require.NoError(t, other.Close())
}
