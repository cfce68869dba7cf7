package main

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// secret is a value that must not be where it does not belong.
type secret struct {
	kind  kind
	name  string
	value []byte
}

// kind is what a secret is.
type kind string

// The forms in which a secret is looked for are taken of every fragment of it
// of so many bytes: a scanner that wants the whole of it is deceived by a line
// break.
const (
	fragment       = 8
	fragmentBase64 = 12 // characters, of three groups
	fragmentDigits = 20
)

// finding is a secret, or a fragment of one, in a place.
type finding struct {
	secret *secret
	form   string
	offset int
}

func (f finding) String() string {
	return fmt.Sprintf("%s (%s) at offset %d, %s", f.secret.name, f.secret.kind, f.offset, f.form)
}

// scanner looks for secrets in whatever form they may have been written down.
type scanner struct {
	patterns map[uint64][]pattern // by the first eight bytes
	filter   []uint64             // a bit for each hash of such eight bytes
}

type pattern struct {
	text   []byte
	secret *secret
	form   string
}

// filterBits keeps the filter in a processor's cache.
const filterBits = 22

func filterHash(head uint64) uint64 { return head * 0x9e3779b97f4a7c15 >> (64 - filterBits) }

func newScanner(secrets []*secret) *scanner {
	s := &scanner{patterns: map[uint64][]pattern{}, filter: make([]uint64, 1<<filterBits/64)}
	for _, secret := range secrets {
		if len(secret.value) < fragment {
			panic(secret.name + " is too short to be looked for")
		}
		forms(secret.value, func(form, text string) {
			head := binary.LittleEndian.Uint64([]byte(text))
			s.patterns[head] = append(s.patterns[head], pattern{[]byte(text), secret, form})
			hash := filterHash(head)
			s.filter[hash/64] |= 1 << (hash % 64)
		})
	}
	return s
}

// forms gives every form of every fragment of a value, eight bytes long at
// least.
func forms(value []byte, give func(form, text string)) {
	backwards := bytes.Clone(value)
	slices.Reverse(backwards) // as libraries keep large numbers
	// windows gives the fragments of a text in which every byte of the value
	// takes so many characters.
	windows := func(form, text string, each, length int) {
		for i := 0; i+length <= len(text); i += each {
			give(form, text[i:][:length])
		}
	}
	windows("raw", string(value), 1, fragment)
	windows("reversed", string(backwards), 1, fragment)
	for name, separator := range map[string]string{"": "", ", with spaces": " ", ", with colons": ":"} {
		text, each := hexadecimal(value, separator), 2+len(separator)
		windows("hexadecimal"+name, text, each, each*fragment-len(separator))
		windows("hexadecimal"+name, strings.ToUpper(text), each, each*fragment-len(separator))
	}
	decimal, hexes := make([]string, len(value)), make([]string, len(value))
	for i, b := range value {
		decimal[i], hexes[i] = strconv.Itoa(int(b)), strconv.FormatInt(int64(b), 16)
	}
	for i := range len(value) - fragment + 1 {
		give("a list of numbers", strings.Join(decimal[i:][:fragment], " "))
		give("a list of numbers", strings.Join(decimal[i:][:fragment], ","))
		give("Go", strings.Join(hexes[i:][:fragment], ", 0x"))
	}
	// Whatever stands before a value, three bytes of it in a row from one of
	// the first three on are a group of four characters.
	for i := range min(3, len(value)) {
		windows("Base64", base64.RawStdEncoding.EncodeToString(value[i:]), 4, fragmentBase64)
		windows("Base64", base64.RawURLEncoding.EncodeToString(value[i:]), 4, fragmentBase64)
	}
	windows("a number", new(big.Int).SetBytes(value).String(), 1, fragmentDigits)
}

func hexadecimal(b []byte, separator string) string {
	text := make([]string, len(b))
	for i := range b {
		text[i] = hex.EncodeToString(b[i : i+1])
	}
	return strings.Join(text, separator)
}

// scan returns the first finding of each secret in each form.
func (s *scanner) scan(content []byte) []finding {
	type key struct {
		secret *secret
		form   string
	}
	found := map[key]finding{}
	for i := s.next(content, 0); i >= 0; i = s.next(content, i+1) {
		for _, p := range s.patterns[binary.LittleEndian.Uint64(content[i:])] {
			k := key{p.secret, p.form}
			if _, again := found[k]; !again && bytes.HasPrefix(content[i:], p.text) {
				found[k] = finding{p.secret, p.form, i}
			}
		}
	}
	var all []finding
	for _, f := range found {
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b finding) int {
		return cmp.Or(cmp.Compare(a.secret.name, b.secret.name), cmp.Compare(a.form, b.form))
	})
	return all
}

// next is where the filter lets something through, from an offset on, or -1.
// The race detector would look at every byte of megabytes with it.
//
//go:norace
func (s *scanner) next(content []byte, from int) int {
	for i := from; i+8 <= len(content); i++ {
		hash := filterHash(binary.LittleEndian.Uint64(content[i:]))
		if s.filter[hash/64]&(1<<(hash%64)) != 0 {
			return i
		}
	}
	return -1
}

// writings are ways to write a value down that a leak might take.
var writings = map[string]func(b []byte) string{
	"raw":          func(b []byte) string { return string(b) },
	"reversed":     func(b []byte) string { b = bytes.Clone(b); slices.Reverse(b); return string(b) },
	"%x":           func(b []byte) string { return fmt.Sprintf("%x", b) },
	"%X":           func(b []byte) string { return fmt.Sprintf("%X", b) },
	"% x":          func(b []byte) string { return fmt.Sprintf("% x", b) },
	"% X":          func(b []byte) string { return fmt.Sprintf("% X", b) },
	"%#v":          func(b []byte) string { return fmt.Sprintf("%#v", b) },
	"%v":           func(b []byte) string { return fmt.Sprintf("%v", b) },
	"%d of bignum": func(b []byte) string { return new(big.Int).SetBytes(b).String() },
	"%x of bignum": func(b []byte) string { return new(big.Int).SetBytes(b).Text(16) },
	"colons":       func(b []byte) string { return hexadecimal(b, ":") },
	"hexdump":      hex.Dump,
	"Base64":       func(b []byte) string { return base64.StdEncoding.EncodeToString(b) },
	"Base64, 1":    func(b []byte) string { return base64.StdEncoding.EncodeToString(append([]byte{7}, b...)) },
	"Base64, 2":    func(b []byte) string { return base64.RawStdEncoding.EncodeToString(append([]byte{7, 7}, b...)) },
	"Base64, URL":  func(b []byte) string { return base64.RawURLEncoding.EncodeToString(append([]byte{7}, b...)) },
	"a half":       func(b []byte) string { return fmt.Sprintf("%x", b[len(b)/2:]) },
}

// What looks for leaks has to find them: in every way in which they may be
// written down, at every offset, and nothing where there is none.
func TestScanner(t *testing.T) {
	t.Parallel()
	leaked := &secret{"canary", "the canary", randomMaterial(16)}
	s := newScanner([]*secret{leaked, {"other", "another", randomMaterial(256)}, {"other", "a short one", randomMaterial(16)}})
	haystack := randomMaterial(1 << 14)
	require.Empty(t, s.scan(haystack))
	require.Empty(t, s.scan([]byte(hex.EncodeToString(haystack)+base64.StdEncoding.EncodeToString(haystack)+fmt.Sprint(haystack))))
	for name, write := range writings {
		text := write(leaked.value)
		for _, at := range []int{0, 1, 2, 3, 4097, len(haystack)} {
			found := s.scan(slices.Concat(haystack[:at], []byte(text), haystack[at:]))
			require.NotEmpty(t, found, "%s at %d", name, at)
			for _, f := range found {
				require.Equal(t, leaked, f.secret, name)
			}
		}
	}
}
