package receipt_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/keyferry/keyferry/engine/receipt"
)

// kms signs logs as a KMS does, with a key that is not in a token.
type kms struct {
	key     *ecdsa.PrivateKey
	public  *receipt.PublicKey
	log     receipt.LogID
	entries [][]byte
	hashes  []receipt.Hash // as package tlog stores them
	last    map[string]receipt.Hash
}

func newKMS(tb testing.TB) *kms {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(tb, err)
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	require.NoError(tb, err)
	public, err := receipt.ParsePublicKey(spki)
	require.NoError(tb, err)
	k := &kms{key: key, public: public, last: map[string]receipt.Hash{}}
	_, _ = rand.Read(k.log[:])
	return k
}

func (k *kms) sign(digest [sha256.Size]byte) ([]byte, error) {
	return ecdsa.SignASN1(rand.Reader, k.key, digest[:])
}

// imports adds an import into a key.
func (k *kms) imports(tb testing.TB, keyID string) {
	tb.Helper()
	e := sample()
	e.Log, e.KeyID, e.Revision, e.Previous = k.log, keyID, int64(len(k.entries)+2), k.last[keyID]
	k.add(tb, e.Text())
	k.last[keyID] = e.Hash()
}

func (k *kms) add(tb testing.TB, text []byte) {
	tb.Helper()
	hashes, err := tlog.StoredHashes(int64(len(k.entries)), text, k)
	require.NoError(tb, err)
	k.hashes = append(k.hashes, hashes...)
	k.entries = append(k.entries, text)
}

func (k *kms) ReadHashes(indexes []int64) ([]receipt.Hash, error) {
	out := make([]receipt.Hash, len(indexes))
	for i, index := range indexes {
		out[i] = k.hashes[index]
	}
	return out, nil
}

// headOf is the head of the first n entries, signed.
func (k *kms) headOf(tb testing.TB, n int64) (receipt.Head, []byte) {
	tb.Helper()
	root, err := tlog.TreeHash(n, k)
	require.NoError(tb, err)
	head := receipt.Head{Log: k.log, Size: n, Root: root, Time: sampleTime, TokenSerial: "0123456789abcdef"}
	signed, err := receipt.SignHead(head, k.public, k.sign)
	require.NoError(tb, err)
	return head, signed
}

// receipt is that of entry i, by the head of all entries.
func (k *kms) receipt(tb testing.TB, i int64) *receipt.Receipt {
	tb.Helper()
	n := int64(len(k.entries))
	_, head := k.headOf(tb, n)
	proof, err := tlog.ProveRecord(n, i, k)
	require.NoError(tb, err)
	return &receipt.Receipt{
		Index: i, Entry: k.entries[i], EntryHash: receipt.HashOf(k.entries[i]), Proof: proof, Head: head, PublicKey: k.public.SPKI(),
	}
}

// since adds a proof that the log continues its first n entries.
func (k *kms) since(tb testing.TB, r *receipt.Receipt, n int64) {
	tb.Helper()
	proof, err := tlog.ProveTree(int64(len(k.entries)), n, k)
	require.NoError(tb, err)
	r.Since = &receipt.Consistency{Size: n, Proof: proof}
}

// logFile is the whole log as a customer downloads it.
func (k *kms) logFile(tb testing.TB) string {
	tb.Helper()
	_, head := k.headOf(tb, int64(len(k.entries)))
	var b strings.Builder
	w, err := receipt.NewLogWriter(&b, head, k.public)
	require.NoError(tb, err)
	for i, e := range k.entries {
		require.NoError(tb, w.Write(receipt.LogEntry{Index: int64(i), Hash: receipt.HashOf(e), Entry: e}))
	}
	return b.String()
}

var sampleTime = time.Date(2026, 11, 25, 7, 10, 0, 0, time.UTC)

func sample() receipt.Entry {
	return receipt.Entry{
		Kind: receipt.Import, KeyID: "2f9c8b1e-6d0a-4c55-9a43-1b7e5d3c0f21", KeySpec: "Aliyun_AES_256", Revision: 2,
		Time: sampleTime, RequestID: "4C467B38-3910-447D-87BC-AC049166F216", TokenSerial: "0123456789abcdef",
		MaterialID: [32]byte{1}, KCV: [3]byte{2}, KCVAlgorithm: "AES-ECB", WrappingAlgorithm: "RSAES_OAEP_SHA_256",
		WrappingKey: [32]byte{3}, Ciphertext: [32]byte{4}, ExpireAt: sampleTime.Add(time.Hour), Custody: "sealed",
		Attributes: []string{"CKA_SENSITIVE=true", "CKA_EXTRACTABLE=true"},
	}
}

// The form of an entry and of a head is for ever: customers keep them.
func TestGoldenTexts(t *testing.T) {
	e := sample()
	require.Equal(t, `keyferry receipt v1
log 00000000000000000000000000000000
kind import
key 2f9c8b1e-6d0a-4c55-9a43-1b7e5d3c0f21
key_spec Aliyun_AES_256
revision 2
time 2026-11-25T07:10:00Z
request 4C467B38-3910-447D-87BC-AC049166F216
token 0123456789abcdef
material 0100000000000000000000000000000000000000000000000000000000000000
kcv 020000
kcv_algorithm AES-ECB
wrapping_algorithm RSAES_OAEP_SHA_256
wrapping_key 0300000000000000000000000000000000000000000000000000000000000000
ciphertext 0400000000000000000000000000000000000000000000000000000000000000
expires 2026-11-25T08:10:00Z
custody sealed
attributes CKA_SENSITIVE=true CKA_EXTRACTABLE=true
previous none
`, string(e.Text()))
	sum := sha256.Sum256(append([]byte{0}, e.Text()...))
	require.Equal(t, receipt.Hash(sum), e.Hash())

	head := receipt.Head{Log: receipt.LogID{0xab}, Size: 3, Root: receipt.Hash{1}, Time: sampleTime, TokenSerial: "a token", Previous: receipt.Hash{2}}
	require.Equal(t, `keyferry-receipts/ab000000000000000000000000000000
3
AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
time 2026-11-25T07:10:00Z
token "a\x20token"
previous 0200000000000000000000000000000000000000000000000000000000000000
`, head.Text())
}

func TestEntryRoundTrip(t *testing.T) {
	deletion := receipt.Entry{Kind: receipt.Deletion, KeyID: "k", Revision: 9, Time: sampleTime, Reason: receipt.Expired, Previous: receipt.Hash{7}}
	odd := sample()
	odd.RequestID, odd.TokenSerial, odd.ExpireAt, odd.Attributes = "", "a \"serial\"\nkind deletion", time.Time{}, nil
	odd.KeyID = "ключ\\ 钥匙"
	for _, e := range []receipt.Entry{sample(), deletion, odd} {
		read, err := receipt.ParseEntry(e.Text())
		require.NoError(t, err, "%s", e.Text())
		require.Equal(t, e, read)
	}
}

// There is one text for an entry: any other is refused, line by line.
func TestEntryIsReadStrictly(t *testing.T) {
	e := sample()
	text := string(e.Text())
	for name, bad := range map[string]string{
		"empty":              "",
		"another version":    strings.Replace(text, "v1", "v2", 1),
		"another kind":       strings.Replace(text, "kind import", "kind export", 1),
		"upper case":         strings.Replace(text, "kcv 020000", "kcv 02000A", 1),
		"another time zone":  strings.Replace(text, "07:10:00Z", "09:10:00+02:00", 1),
		"a quoted plain":     strings.Replace(text, "custody sealed", `custody "sealed"`, 1),
		"a plus":             strings.Replace(text, "revision 2", "revision +2", 1),
		"two spaces":         strings.Replace(text, "CKA_SENSITIVE=true ", "CKA_SENSITIVE=true  ", 1),
		"carriage returns":   strings.ReplaceAll(text, "\n", "\r\n"),
		"a line twice":       strings.Replace(text, "custody sealed\n", "custody sealed\ncustody sealed\n", 1),
		"lines exchanged":    strings.Replace(text, "kind import\nkey 2f9c8b1e-6d0a-4c55-9a43-1b7e5d3c0f21\n", "key 2f9c8b1e-6d0a-4c55-9a43-1b7e5d3c0f21\nkind import\n", 1),
		"more at the end":    text + "x y\n",
		"no end":             strings.TrimSuffix(text, "\n"),
		"a zero hash spelt":  strings.Replace(text, "previous none", "previous "+strings.Repeat("0", 64), 1),
		"fractional seconds": strings.Replace(text, "07:10:00Z", "07:10:00.5Z", 1),
	} {
		require.NotEqual(t, text, bad, name)
		_, err := receipt.ParseEntry([]byte(bad))
		require.ErrorIs(t, err, receipt.ErrSyntax, name)
	}
	for i, line := range strings.SplitAfter(text, "\n") {
		_, err := receipt.ParseEntry([]byte(strings.Replace(text, line, "", 1)))
		if line != "" {
			require.ErrorIs(t, err, receipt.ErrSyntax, "without line %d", i)
		}
	}
}

func TestReceipt(t *testing.T) {
	k := newKMS(t)
	for i := range 11 {
		k.imports(t, fmt.Sprintf("key-%d", i%3))
	}
	for i := range int64(11) {
		r := k.receipt(t, i)
		data, err := json.MarshalIndent(r, "", "  ")
		require.NoError(t, err)
		var read receipt.Receipt
		require.NoError(t, json.Unmarshal(data, &read))
		require.Equal(t, r, &read)
		entry, head, err := read.Verify(k.public)
		require.NoError(t, err)
		require.Equal(t, k.entries[i], entry.Text())
		require.EqualValues(t, 11, head.Size)
	}
	k2 := newKMS(t)
	k2.imports(t, "key")
	r := k2.receipt(t, 0) // of a log of one entry: no proof at all
	_, _, err := r.Verify(k2.public)
	require.NoError(t, err)
}

// Whatever is changed in a receipt is named.
func TestReceiptAltered(t *testing.T) {
	k, other := newKMS(t), newKMS(t)
	other.log = k.log // the thief's key, for the same log
	for range 6 {
		k.imports(t, "key")
		other.imports(t, "key")
	}
	elsewhere := newKMS(t)
	elsewhere.key, elsewhere.public = k.key, k.public // another log of the same KMS
	for range 6 {
		elsewhere.imports(t, "key")
	}
	good := k.receipt(t, 3)
	e, err := receipt.ParseEntry(good.Entry)
	require.NoError(t, err)

	for name, tt := range map[string]struct {
		alter func(r *receipt.Receipt)
		want  error
	}{
		"entry of the same log":     {func(r *receipt.Receipt) { r.Entry = k.entries[2] }, receipt.ErrAltered},
		"entry and its hash":        {func(r *receipt.Receipt) { r.Entry, r.EntryHash = k.entries[2], receipt.HashOf(k.entries[2]) }, receipt.ErrProof},
		"hash":                      {func(r *receipt.Receipt) { r.EntryHash[0] ^= 1 }, receipt.ErrAltered},
		"index":                     {func(r *receipt.Receipt) { r.Index = 2 }, receipt.ErrProof},
		"index beyond the head":     {func(r *receipt.Receipt) { r.Index = 6 }, receipt.ErrProof},
		"negative index":            {func(r *receipt.Receipt) { r.Index = -1 }, receipt.ErrProof},
		"proof":                     {func(r *receipt.Receipt) { r.Proof[1][5] ^= 1 }, receipt.ErrProof},
		"proof too short":           {func(r *receipt.Receipt) { r.Proof = r.Proof[1:] }, receipt.ErrProof},
		"proof too long":            {func(r *receipt.Receipt) { r.Proof = append(r.Proof, receipt.Hash{}) }, receipt.ErrProof},
		"no proof":                  {func(r *receipt.Receipt) { r.Proof = nil }, receipt.ErrProof},
		"head of fewer entries":     {func(r *receipt.Receipt) { _, r.Head = k.headOf(t, 3) }, receipt.ErrProof},
		"head of another log":       {func(r *receipt.Receipt) { _, r.Head = elsewhere.headOf(t, 6) }, receipt.ErrProof},
		"everything of another log": {func(r *receipt.Receipt) { *r = *elsewhere.receipt(t, 3); r.Head = good.Head }, receipt.ErrProof},
		"head of another key":       {func(r *receipt.Receipt) { _, r.Head = other.headOf(t, 6) }, receipt.ErrKey},
		"everything of another key": {func(r *receipt.Receipt) { *r = *other.receipt(t, 3) }, receipt.ErrKey},
		"another key named":         {func(r *receipt.Receipt) { r.PublicKey = other.public.SPKI() }, receipt.ErrKey},
		"size in the head":          {func(r *receipt.Receipt) { r.Head = bytes.Replace(r.Head, []byte("\n6\n"), []byte("\n7\n"), 1) }, receipt.ErrSignature},
		"time in the head":          {func(r *receipt.Receipt) { r.Head = bytes.Replace(r.Head, []byte("2026"), []byte("2027"), 1) }, receipt.ErrSignature},
		"token in the head":         {func(r *receipt.Receipt) { r.Head = bytes.Replace(r.Head, []byte("token 0"), []byte("token 1"), 1) }, receipt.ErrSignature},
		"previous in the head":      {func(r *receipt.Receipt) { r.Head = bytes.Replace(r.Head, []byte("none"), []byte("nine"), 1) }, receipt.ErrSignature},
		"log in the head": {func(r *receipt.Receipt) {
			r.Head = bytes.Replace(r.Head, []byte(k.log.String()), []byte(elsewhere.log.String()), 1)
		}, receipt.ErrSignature},
		"signature of another head":     {func(r *receipt.Receipt) { r.Head = graft(t, r.Head, second(k.headOf(t, 5))) }, receipt.ErrSignature},
		"signature removed":             {func(r *receipt.Receipt) { r.Head, _, _ = bytes.Cut(r.Head, []byte("—")) }, receipt.ErrSyntax},
		"no head":                       {func(r *receipt.Receipt) { r.Head = nil }, receipt.ErrSyntax},
		"an entry that is signed as no": {func(r *receipt.Receipt) { *r = *foreign(t, k, "no entry\n") }, receipt.ErrSyntax},
		"an entry of another log": {func(r *receipt.Receipt) {
			e := e
			e.Log = elsewhere.log
			*r = *foreign(t, k, string(e.Text()))
		}, receipt.ErrOtherLog},
	} {
		t.Run(name, func(t *testing.T) {
			r := *k.receipt(t, 3)
			tt.alter(&r)
			_, _, err := r.Verify(k.public)
			require.ErrorIs(t, err, tt.want)
			for _, kind := range kinds {
				require.Equal(t, errors.Is(tt.want, kind), isKind(err, kind), "%v", err)
			}
		})
	}
	// Every line of the entry counts, and every byte of it.
	for i := range good.Entry {
		r := *good
		r.Entry = bytes.Clone(good.Entry)
		r.Entry[i] ^= 1
		_, _, err := r.Verify(k.public)
		require.ErrorIs(t, err, receipt.ErrAltered)
	}
}

var kinds = []error{
	receipt.ErrSyntax, receipt.ErrKey, receipt.ErrSignature, receipt.ErrOtherLog, receipt.ErrAltered, receipt.ErrMissing,
	receipt.ErrProof, receipt.ErrRepeated, receipt.ErrRoot, receipt.ErrChain, receipt.ErrRolledBack, receipt.ErrForked, receipt.ErrNoConsistency,
}

// What stands in a file twice, of which a person reads the first and a decoder
// takes the last, is refused.
func TestReceiptSaysNothingTwice(t *testing.T) {
	k := newKMS(t)
	k.imports(t, "key")
	k.imports(t, "key")
	r := k.receipt(t, 1)
	k.since(t, r, 1)
	good, err := r.MarshalJSON()
	require.NoError(t, err)
	require.NoError(t, new(receipt.Receipt).UnmarshalJSON(good))
	for _, name := range []string{"index", "entry", "hash", "head", "public_key", "since", "size"} {
		member := regexp.MustCompile(`"` + name + `":(\[[^]]*\]|\{.*?\}|"[^"]*"|[0-9]+),?`).FindString(string(good))
		require.NotEmpty(t, member, name)
		twice := strings.TrimSuffix(member, ",") + "," + member
		for _, first := range []string{name, strings.ToUpper(name), strings.Replace(name, "s", "ſ", 1)} {
			bad := strings.Replace(string(good), member, strings.Replace(twice, name, first, 1), 1)
			require.ErrorIs(t, new(receipt.Receipt).UnmarshalJSON([]byte(bad)), receipt.ErrSyntax, first)
		}
	}
}

// A head of an impossible size, though the KMS has signed it, does not have its
// customer compute for ever.
func TestHeadOfImpossibleSize(t *testing.T) {
	k := newKMS(t)
	k.imports(t, "key")
	r := k.receipt(t, 0)
	for _, size := range []int64{1<<50 + 1, math.MaxInt64} {
		head := receipt.Head{Log: k.log, Size: size, Time: sampleTime}
		_, err := receipt.SignHead(head, k.public, func(digest [sha256.Size]byte) ([]byte, error) {
			signature, err := k.sign(digest)
			sum := sha256.Sum256(k.public.SPKI())
			r.Head = fmt.Appendf(nil, "%s\n— keyferry-receipts/%s %s\n", head.Text(), k.log,
				base64.StdEncoding.EncodeToString(append(sum[:4:4], signature...)))
			return signature, err
		})
		require.ErrorIs(t, err, receipt.ErrSyntax)
		_, _, err = r.Verify(k.public)
		require.ErrorIs(t, err, receipt.ErrSyntax)
	}
}

func second(_ receipt.Head, signed []byte) []byte { return signed }

// graft puts the signature of one head under the text of another.
func graft(t *testing.T, head, from []byte) []byte {
	t.Helper()
	cut := func(b []byte) int { return bytes.Index(b, []byte("—")) }
	return append(bytes.Clone(head[:cut(head)]), from[cut(from):]...)
}

// foreign is a good receipt of an entry that the KMS should not have signed.
func foreign(t *testing.T, k *kms, text string) *receipt.Receipt {
	t.Helper()
	bad := newKMS(t)
	bad.key, bad.public, bad.log = k.key, k.public, k.log
	bad.add(t, []byte(text))
	return bad.receipt(t, 0)
}

// A head that was kept shows whether a later log still has what it had.
func TestSince(t *testing.T) {
	k := newKMS(t)
	for range 9 {
		k.imports(t, "key")
	}
	fork := newKMS(t) // the same KMS, put back to 4 entries, and gone on
	fork.key, fork.public, fork.log = k.key, k.public, k.log
	for i, e := range k.entries {
		if i == 4 {
			fork.imports(t, "key")
			continue
		}
		fork.add(t, e)
	}
	head := func(r *receipt.Receipt) receipt.Head {
		_, head, err := r.Verify(k.public)
		require.NoError(t, err)
		return head
	}
	for n := int64(1); n <= 9; n++ {
		old, _ := k.headOf(t, n)
		r := k.receipt(t, 2)
		if n < 9 {
			require.ErrorIs(t, r.VerifySince(old, head(r)), receipt.ErrNoConsistency)
		}
		k.since(t, r, n)
		require.NoError(t, r.VerifySince(old, head(r)), "since %d", n)
		if n < 9 {
			old.Root[0] ^= 1
			require.ErrorIs(t, r.VerifySince(old, head(r)), receipt.ErrForked)
		}
		old, _ = fork.headOf(t, n)
		if n > 4 {
			require.ErrorIs(t, r.VerifySince(old, head(r)), receipt.ErrForked, "since %d", n)
		} else {
			require.NoError(t, r.VerifySince(old, head(r)))
		}
	}
	old, _ := k.headOf(t, 9)
	short := newKMS(t)
	short.key, short.public, short.log = k.key, k.public, k.log
	for _, e := range k.entries[:5] {
		short.add(t, e)
	}
	r := short.receipt(t, 2)
	require.ErrorIs(t, r.VerifySince(old, head(r)), receipt.ErrRolledBack)
	old.Log[0] ^= 1
	require.ErrorIs(t, r.VerifySince(old, head(r)), receipt.ErrOtherLog)
}

func TestPublicKey(t *testing.T) {
	k := newKMS(t)
	read, err := receipt.ParsePublicKey(k.public.PEM())
	require.NoError(t, err)
	require.Equal(t, k.public.SPKI(), read.SPKI())
	require.True(t, read.HasFingerprint(strings.ToUpper(k.public.Fingerprint())))
	require.False(t, read.HasFingerprint(newKMS(t).public.Fingerprint()))
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	require.NoError(t, err)
	spki, err := x509.MarshalPKIXPublicKey(&p384.PublicKey)
	require.NoError(t, err)
	for _, bad := range [][]byte{nil, []byte("x"), spki, append(k.public.SPKI(), 0), append(k.public.PEM(), k.public.PEM()...), []byte("-----BEGIN PUBLIC KEY-----\n")} {
		_, err := receipt.ParsePublicKey(bad)
		require.ErrorIs(t, err, receipt.ErrSyntax)
	}
}

// A KMS whose token signs wrongly notices before a customer does.
func TestSignHeadVerifies(t *testing.T) {
	k, other := newKMS(t), newKMS(t)
	_, err := receipt.SignHead(receipt.Head{Size: 1}, k.public, other.sign)
	require.ErrorIs(t, err, receipt.ErrSignature)
}
