package receipt_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"github.com/keyferry/keyferry/engine/receipt"
)

func isKind(err, kind error) bool { return errors.Is(err, kind) }

// naive is MTH of RFC 6962 section 2.1, as it is written there.
func naive(entries [][]byte) [32]byte {
	if len(entries) == 1 {
		return sha256.Sum256(append([]byte{0}, entries[0]...))
	}
	k := 1
	for 2*k < len(entries) {
		k *= 2
	}
	left, right := naive(entries[:k]), naive(entries[k:])
	return sha256.Sum256(append(append([]byte{1}, left[:]...), right[:]...))
}

// The trees of heads, proofs and whole logs are those of the RFC.
func TestAgainstNaiveTree(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		k := newKMS(t)
		for range rapid.IntRange(1, 70).Draw(rt, "entries") {
			k.imports(t, fmt.Sprint(rapid.IntRange(0, 4).Draw(rt, "key")))
		}
		n := int64(len(k.entries))
		old := rapid.Int64Range(1, n).Draw(rt, "since")
		head, _ := k.headOf(t, n)
		before, _ := k.headOf(t, old)
		require.Equal(rt, naive(k.entries), [32]byte(head.Root))
		require.Equal(rt, naive(k.entries[:old]), [32]byte(before.Root))
		report, err := receipt.VerifyLog(strings.NewReader(k.logFile(t)), k.public, receipt.LogChecks{Since: []receipt.Head{before}})
		require.NoError(rt, err)
		require.Equal(rt, n, report.Entries)
		r := k.receipt(t, rapid.Int64Range(0, n-1).Draw(rt, "index"))
		k.since(t, r, old)
		_, now, err := r.Verify(k.public)
		require.NoError(rt, err)
		require.NoError(rt, r.VerifySince(before, now))
	})
}

// What is wrong with a log is told by the number of the entry.
func TestLogAltered(t *testing.T) {
	k := newKMS(t)
	for i := range 20 {
		k.imports(t, fmt.Sprintf("key-%d", i%4))
	}
	good := strings.SplitAfter(strings.TrimSuffix(k.logFile(t), "\n"), "\n")
	good[len(good)-1] += "\n"
	at := func(i int) int { return 1 + i } // the line of entry i
	edited := func(i int) string { return strings.Replace(good[at(i)], "sealed", "opened", 1) }
	// An entry of a thief, with its right hash.
	rehashed := func(i int, edit func(e *receipt.Entry)) string {
		e, err := receipt.ParseEntry(k.entries[i])
		require.NoError(t, err)
		edit(&e)
		line := regexp.MustCompile(`"hash":"[^"]*"`).ReplaceAllString(good[at(i)], `"hash":"`+e.Hash().String()+`"`)
		return regexp.MustCompile(`"kcv [0-9a-f]*"`).ReplaceAllString(line, fmt.Sprintf(`"kcv %x"`, e.KCV))
	}

	for name, tt := range map[string]struct {
		alter func(lines []string) []string
		want  map[int64]error
	}{
		"nothing": {func(l []string) []string { return l }, nil},
		"an entry": {func(l []string) []string { l[at(7)] = edited(7); return l }, map[int64]error{
			7: receipt.ErrAltered, 11: receipt.ErrChain,
		}},
		"the last entry": {func(l []string) []string { l[at(19)] = edited(19); return l }, map[int64]error{19: receipt.ErrAltered}},
		"an entry with its hash": {func(l []string) []string {
			l[at(7)] = rehashed(7, func(e *receipt.Entry) { e.KCV[0] ^= 1 })
			return l
		}, map[int64]error{-1: receipt.ErrRoot, 11: receipt.ErrChain}},
		"an entry removed": {func(l []string) []string { return append(l[:at(7)], l[at(8):]...) }, map[int64]error{
			7: receipt.ErrMissing, 11: receipt.ErrChain, -1: receipt.ErrRoot,
		}},
		"an entry lost, its hash kept": {func(l []string) []string {
			head, _, _ := strings.Cut(l[at(7)], `,"entry"`)
			l[at(7)] = head + "}\n"
			return l
		}, map[int64]error{7: receipt.ErrMissing, 11: receipt.ErrChain}},
		"the first removed": {func(l []string) []string { return append(l[:at(0)], l[at(1):]...) }, map[int64]error{
			0: receipt.ErrMissing, 4: receipt.ErrChain, -1: receipt.ErrRoot,
		}},
		"cut short":      {func(l []string) []string { return l[:at(18)] }, map[int64]error{18: receipt.ErrMissing, -1: receipt.ErrRoot}},
		"nothing but it": {func(l []string) []string { return l[:1] }, map[int64]error{0: receipt.ErrMissing, -1: receipt.ErrRoot}},
		"two exchanged": {func(l []string) []string { l[at(5)], l[at(6)] = l[at(6)], l[at(5)]; return l }, map[int64]error{
			5: receipt.ErrMissing, 9: receipt.ErrChain, -1: receipt.ErrRoot,
		}},
		"two exchanged and renumbered": {func(l []string) []string {
			five, six := l[at(5)], l[at(6)]
			l[at(5)] = strings.Replace(six, `"index":6`, `"index":5`, 1)
			l[at(6)] = strings.Replace(five, `"index":5`, `"index":6`, 1)
			return l
		}, map[int64]error{-1: receipt.ErrRoot}},
		"an entry twice": {func(l []string) []string { return append(l[:at(6):at(6)], l[at(5):]...) }, map[int64]error{5: receipt.ErrProof}},
		"no JSON":        {func(l []string) []string { l[at(7)] = "{}}\n"; return l }, map[int64]error{7: receipt.ErrSyntax, 11: receipt.ErrChain, -1: receipt.ErrRoot}},
		"entries added": {func(l []string) []string {
			return append(l, strings.Replace(l[at(19)], `"index":19`, `"index":20`, 1))
		}, map[int64]error{20: receipt.ErrProof}},
	} {
		t.Run(name, func(t *testing.T) {
			file := strings.Join(tt.alter(append([]string(nil), good...)), "")
			report, err := receipt.VerifyLog(strings.NewReader(file), k.public, receipt.LogChecks{})
			if tt.want == nil {
				require.NoError(t, err)
				require.EqualValues(t, 20, report.Imports)
				return
			}
			require.Error(t, err)
			found := map[int64]error{}
			for _, p := range report.Problems {
				for _, kind := range kinds {
					if _, known := found[p.Index]; !known && errors.Is(p, kind) {
						found[p.Index] = kind
					}
				}
			}
			for index, kind := range tt.want {
				require.Equal(t, kind, found[index], "entry %d of %v", index, err)
			}
			if len(found) > len(tt.want) && name != "entries added" {
				require.Equal(t, tt.want, found, "%v", err)
			}
		})
	}
}

// A log is of one key, one log and no other.
func TestLogOfAnother(t *testing.T) {
	k, other := newKMS(t), newKMS(t)
	for range 5 {
		k.imports(t, "key")
		other.imports(t, "key")
	}
	verify := func(file string, checks receipt.LogChecks) error {
		_, err := receipt.VerifyLog(strings.NewReader(file), k.public, checks)
		return err
	}
	require.ErrorIs(t, verify(other.logFile(t), receipt.LogChecks{}), receipt.ErrKey)
	head := func(file string) string { return file[:strings.IndexByte(file, '\n')+1] }
	body := func(file string) string { return file[strings.IndexByte(file, '\n')+1:] }
	mixed := head(k.logFile(t)) + body(other.logFile(t))
	require.ErrorIs(t, verify(mixed, receipt.LogChecks{}), receipt.ErrOtherLog)
	require.ErrorIs(t, verify(mixed, receipt.LogChecks{}), receipt.ErrRoot)
	require.ErrorIs(t, verify(strings.Replace(k.logFile(t), "time 2026", "time 2025", 1), receipt.LogChecks{}), receipt.ErrSignature)
	for _, bad := range []string{"", "{}", "x", "[1]", `{"format":"keyferry receipt v1"}`} {
		require.Error(t, verify(bad, receipt.LogChecks{}))
	}

	// Heads and receipts that were kept.
	old, _ := k.headOf(t, 3)
	kept := k.receipt(t, 4)
	require.NoError(t, verify(k.logFile(t), receipt.LogChecks{Since: []receipt.Head{old}, Receipts: []*receipt.Receipt{kept}}))
	foreign, _ := other.headOf(t, 3)
	require.ErrorIs(t, verify(k.logFile(t), receipt.LogChecks{Since: []receipt.Head{foreign}}), receipt.ErrOtherLog)
	forked := old
	forked.Root[0] ^= 1
	require.ErrorIs(t, verify(k.logFile(t), receipt.LogChecks{Since: []receipt.Head{forked}}), receipt.ErrForked)
	now, _ := k.headOf(t, 5)
	short := newKMS(t)
	short.key, short.public, short.log = k.key, k.public, k.log
	for range 4 {
		short.imports(t, "another")
	}
	err := verify(short.logFile(t), receipt.LogChecks{Since: []receipt.Head{now}, Receipts: []*receipt.Receipt{kept, k.receipt(t, 0)}})
	for _, kind := range []error{receipt.ErrRolledBack, receipt.ErrMissing, receipt.ErrAltered} {
		require.ErrorIs(t, err, kind)
	}
}

// A row that was put back in the database shows in the chain of its key.
func TestLogShowsUndoneRows(t *testing.T) {
	k := newKMS(t)
	k.imports(t, "key")
	first := k.last["key"]
	k.imports(t, "key")
	k.last["key"] = first
	k.imports(t, "key")
	report, err := receipt.VerifyLog(strings.NewReader(k.logFile(t)), k.public, receipt.LogChecks{})
	require.ErrorIs(t, err, receipt.ErrChain)
	require.Len(t, report.Problems, 1)
	require.EqualValues(t, 2, report.Problems[0].Index)
}

func TestReadOutline(t *testing.T) {
	k := newKMS(t)
	k.imports(t, "key")
	data, err := k.receipt(t, 0).MarshalJSON()
	require.NoError(t, err)
	for _, tt := range []struct {
		file string
		log  bool
	}{{k.logFile(t), true}, {string(data), false}} {
		outline, err := receipt.ReadOutline(strings.NewReader(tt.file))
		require.NoError(t, err)
		require.Equal(t, tt.log, outline.Log)
		require.Equal(t, k.public.SPKI(), outline.PublicKey.SPKI())
		head, err := receipt.OpenHead(outline.Head, k.public)
		require.NoError(t, err)
		require.EqualValues(t, 1, head.Size)
	}
	for _, bad := range []string{"", "{}", `{"format":"x"}`, `{"format":"keyferry receipt v1"}`} {
		_, err := receipt.ReadOutline(strings.NewReader(bad))
		require.ErrorIs(t, err, receipt.ErrSyntax)
	}
}

// What a thief has written into a log does not reach a terminal as it is.
func TestLogProblemsAreText(t *testing.T) {
	k := newKMS(t)
	name := "key\x1b[2K\nVerified: all"
	k.imports(t, name)
	k.imports(t, name)
	e := sample()
	e.Log, e.KeyID, e.Revision, e.Previous = k.log, name, 9, receipt.Hash{1}
	k.add(t, e.Text()) // follows nothing
	file := strings.Replace(k.logFile(t), "kcv 02", "kcv 03", 1)
	_, err := receipt.VerifyLog(strings.NewReader(file), k.public, receipt.LogChecks{})
	require.ErrorIs(t, err, receipt.ErrAltered)
	require.ErrorIs(t, err, receipt.ErrChain)
	require.NotContains(t, err.Error(), "\x1b")
	require.NotContains(t, err.Error(), "\nVerified")
}

// A hundred problems are told, and how many more there are.
func TestLogOfManyProblems(t *testing.T) {
	k := newKMS(t)
	for i := range 150 {
		k.imports(t, fmt.Sprint(i))
	}
	file := strings.ReplaceAll(k.logFile(t), "sealed", "opened")
	report, err := receipt.VerifyLog(strings.NewReader(file), k.public, receipt.LogChecks{})
	require.ErrorContains(t, err, "and 50 problems more")
	require.Len(t, report.Problems, 100)
	require.Zero(t, report.Entries)
}

func FuzzParseEntry(f *testing.F) {
	e := sample()
	f.Add(e.Text())
	e.Kind, e.Reason = receipt.Deletion, receipt.Requested
	f.Add(e.Text())
	f.Fuzz(func(t *testing.T, text []byte) {
		if e, err := receipt.ParseEntry(text); err == nil {
			require.Equal(t, text, e.Text())
		}
	})
}

func FuzzVerify(f *testing.F) {
	k := newKMS(f)
	for range 3 {
		k.imports(f, "key")
	}
	r := k.receipt(f, 1)
	k.since(f, r, 2)
	data, err := r.MarshalJSON()
	require.NoError(f, err)
	f.Add(data)
	f.Add([]byte(k.logFile(f)))
	f.Fuzz(func(t *testing.T, data []byte) {
		var read receipt.Receipt
		if read.UnmarshalJSON(data) == nil {
			if e, head, err := read.Verify(k.public); err == nil { // nothing but what was signed
				require.Equal(t, k.entries[read.Index], e.Text())
				old, _ := k.headOf(t, 2)
				_ = read.VerifySince(old, head)
			}
		}
		if report, err := receipt.VerifyLog(strings.NewReader(string(data)), k.public, receipt.LogChecks{}); err == nil {
			require.EqualValues(t, 3, report.Entries)
		}
	})
}

var _ tlog.HashReader = (*kms)(nil)
