package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/keyferry/keyferry/engine/byok"
)

// item is one line of a manifest; MANIFEST.md says what its fields mean. All of
// them are strings.
type item struct {
	line int

	name            string // unique; the KeyId if the line has none
	keyID           string // "": a key is made
	keySpec         string
	description     string
	protectionLevel string
	materialFile    string // raw material, or else
	wrapped         string // what ImportKeyMaterial takes, in Base64, and
	importToken     string // the import token that it was wrapped for
	expire          string // as written
	kcv             string // expected, in lower-case hexadecimal
	materialID      string

	expireAt time.Time // zero: never
	digest   string    // tells lines apart that mean different things
}

// manifestFields are the fields of a line, in the order of MANIFEST.md.
var manifestFields = []struct {
	name string
	of   func(*item) *string
}{
	{"name", func(it *item) *string { return &it.name }},
	{"key_id", func(it *item) *string { return &it.keyID }},
	{"key_spec", func(it *item) *string { return &it.keySpec }},
	{"description", func(it *item) *string { return &it.description }},
	{"protection_level", func(it *item) *string { return &it.protectionLevel }},
	{"material_file", func(it *item) *string { return &it.materialFile }},
	{"encrypted_key_material", func(it *item) *string { return &it.wrapped }},
	{"import_token", func(it *item) *string { return &it.importToken }},
	{"expire", func(it *item) *string { return &it.expire }},
	{"kcv", func(it *item) *string { return &it.kcv }},
	{"material_id", func(it *item) *string { return &it.materialID }},
}

// digestOf is over the line's values as they are written. The name of a file is
// among them, its bytes are not.
func digestOf(it *item) string {
	values := make([]string, len(manifestFields))
	for i, f := range manifestFields {
		values[i] = *f.of(it)
	}
	return digest(values)
}

// makesKey reports whether the line asks for a new key.
func (it *item) makesKey() bool { return it.keyID == "" }

// problem is what is wrong with a field of a line; without a field, with the
// line as a whole. It repeats no value: somebody may have put a key there.
type problem struct {
	line        int
	field, text string
}

func (p problem) String() string {
	if p.field == "" {
		return fmt.Sprintf("line %d: %s", p.line, p.text)
	}
	return fmt.Sprintf("line %d: %s: %s", p.line, p.field, p.text)
}

// maxProblems are told at once.
const maxProblems = 20

// manifestError is all that is wrong with a manifest.
type manifestError struct {
	file     string
	problems []problem
}

func (e *manifestError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s has mistakes, nothing was sent", e.file)
	for i, p := range e.problems {
		if i == maxProblems {
			fmt.Fprintf(&b, "\n  and %d more", len(e.problems)-i)
			break
		}
		fmt.Fprintf(&b, "\n  %s", p)
	}
	return b.String()
}

// maxManifestLine is more than a line has with wrapped material, an import
// token and the longest description.
const maxManifestLine = 256 << 10

// readManifest reads and checks every line, and the files that they name but for
// those of lines that are done. All that is wrong is in one error.
func readManifest(std *streams, file string, before map[string]*past) ([]*item, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	var items []*item
	var problems []problem
	names, ids := map[string]int{}, map[string]int{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, maxManifestLine)
	n := 0
	for lines.Scan() {
		n++
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		it, bad := parseItem(lines.Bytes(), n)
		if len(bad) == 0 {
			bad = it.check(filepath.Dir(file))
		}
		if len(bad) == 0 {
			bad = it.checkNow(std, before[it.name])
		}
		if len(bad) == 0 {
			bad = append(unique(names, it.name, n, "name"), unique(ids, it.keyID, n, "key_id")...)
		}
		items, problems = append(items, it), append(problems, bad...)
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		problems = append(problems, problem{n + 1, "", fmt.Sprintf("longer than %d bytes", maxManifestLine)})
	case err != nil:
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	switch {
	case len(problems) > 0:
		return nil, withHint(&manifestError{file, problems}, "each line is a JSON object; its fields are in keyferry import --help")
	case len(items) == 0:
		return nil, fmt.Errorf("%s has no lines", file)
	}
	return items, nil
}

// unique remembers a value and finds the line that has it already.
func unique(seen map[string]int, value string, line int, field string) []problem {
	if value == "" {
		return nil
	}
	if first, there := seen[value]; there {
		return []problem{{line, field, fmt.Sprintf("line %d has the same", first)}}
	}
	seen[value] = line
	return nil
}

// parseItem is stricter than encoding/json, which takes names in any case and
// the last of equal ones.
func parseItem(text []byte, line int) (*item, []problem) {
	it := &item{line: line}
	whole := func(s string) (*item, []problem) { return it, []problem{{line, "", s}} }
	if !utf8.Valid(text) {
		return whole("not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(text))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return whole("not a JSON object")
	}
	var bad []problem
	seen := map[string]bool{}
	for d.More() {
		t, err := d.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return whole("not a JSON object")
		}
		var raw json.RawMessage
		if d.Decode(&raw) != nil {
			return whole("not a JSON object")
		}
		known := slices.IndexFunc(manifestFields, func(f struct {
			name string
			of   func(*item) *string
		},
		) bool {
			return f.name == name
		})
		var value *string
		switch {
		case known < 0:
			bad = append(bad, problem{line, shown(name), "no such field" + likely(name)})
		case seen[name]:
			bad = append(bad, problem{line, name, "is there twice"})
		case json.Unmarshal(raw, &value) != nil || value == nil:
			bad = append(bad, problem{line, name, "not a string"})
		default:
			*manifestFields[known].of(it) = *value
		}
		seen[name] = true
	}
	if _, err := d.Token(); err != nil {
		return whole("not a JSON object")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return whole("more than one JSON object")
	}
	for _, f := range manifestFields {
		if seen[f.name] && *f.of(it) == "" && len(bad) == 0 {
			bad = append(bad, problem{line, f.name, "is empty: leave it out"})
		}
	}
	it.digest = digestOf(it)
	return it, bad
}

// shown is the name of a field as far as it is safe to print.
func shown(name string) string {
	const longest = 40
	if len(name) > longest || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return "a field"
	}
	return name
}

func likely(name string) string {
	switch strings.ToLower(name) {
	case "material", "key", "key_material", "raw":
		return ": raw material is in a file of its own, which material_file names"
	case "keyid", "id":
		return ": it is key_id"
	case "importtoken":
		return ": it is import_token"
	case "encryptedkeymaterial", "wrapped":
		return ": it is encrypted_key_material"
	}
	return ""
}

const maxItemName = 200

// check finds what is wrong with the values of a line. Paths become relative
// to this process instead of the manifest.
func (it *item) check(dir string) (bad []problem) {
	wrong := func(field, format string, args ...any) {
		bad = append(bad, problem{it.line, field, fmt.Sprintf(format, args...)})
	}
	if it.name == "" {
		it.name = it.keyID
	}
	switch {
	case it.name == "":
		wrong("name", "is missing: it tells which key was made for this line; or give key_id")
	case len(it.name) > maxItemName || strings.ContainsFunc(it.name, func(r rune) bool { return !unicode.IsPrint(r) }):
		wrong("name", "more than %d bytes, or not printable", maxItemName)
	}
	if strings.ContainsFunc(it.keyID, unicode.IsSpace) {
		wrong("key_id", "has white space in it")
	}
	if it.keySpec != "" && byok.MaterialLen(it.keySpec) == 0 {
		wrong("key_spec", "is %s or %s", byok.AES256, byok.SM4)
	}
	if !it.makesKey() && it.description != "" {
		wrong("description", "is for a new key, and key_id names one")
	}
	if !it.makesKey() && it.protectionLevel != "" {
		wrong("protection_level", "is for a new key, and key_id names one")
	}
	if it.expire != "" {
		at, err := time.Parse(time.RFC3339, it.expire)
		if err != nil {
			wrong("expire", "is a time as 2027-01-31T00:00:00Z")
		}
		it.expireAt = at.UTC().Truncate(time.Second)
	}
	for _, h := range []struct {
		field string
		value *string
		n     int
	}{{"kcv", &it.kcv, byok.KCVLen}, {"material_id", &it.materialID, byok.MaterialIDLen}} {
		b, err := hex.DecodeString(*h.value)
		if *h.value != "" && (err != nil || len(b) != h.n) {
			wrong(h.field, "is %d hexadecimal digits", 2*h.n)
		}
		*h.value = strings.ToLower(*h.value)
	}
	switch {
	case it.materialFile != "" && (it.wrapped != "" || it.importToken != ""):
		wrong("material_file", "is for raw material, encrypted_key_material and import_token are for wrapped material")
	case it.materialFile != "":
		if !filepath.IsAbs(it.materialFile) {
			it.materialFile = filepath.Join(dir, it.materialFile)
		}
	case it.wrapped == "" && it.importToken == "":
		wrong("material_file", "is missing, and so is encrypted_key_material")
	case it.wrapped == "":
		wrong("encrypted_key_material", "is missing")
	case it.importToken == "":
		wrong("import_token", "is missing: it came with the public key that the material is wrapped under")
	case it.makesKey():
		wrong("key_id", "is missing: wrapped material is for the key that its import token is for")
	default:
		if b, err := base64.StdEncoding.DecodeString(it.wrapped); err != nil || len(b) == 0 {
			wrong("encrypted_key_material", "is not Base64")
		}
	}
	return bad
}

// checkNow finds what is wrong with a line that is still to be imported, in
// view of today and of its file.
func (it *item) checkNow(std *streams, before *past) (bad []problem) {
	if before != nil && before.last.done() {
		if before.last.Digest != it.digest {
			bad = append(bad, problem{it.line, "", "was imported with other values: give it another name, or the import other --results"})
		}
		return bad
	}
	if !it.expireAt.IsZero() && !it.expireAt.After(time.Now()) {
		bad = append(bad, problem{it.line, "expire", "is not in the future"})
	}
	if it.materialFile != "" {
		bad = append(bad, it.checkMaterial(std)...)
	}
	return bad
}

// specToMake is the key spec of a new key.
func (it *item) specToMake() string {
	if it.keySpec == "" {
		return byok.AES256
	}
	return it.keySpec
}

// checkMaterial looks at a file of raw material. What key spec a key has that
// the line does not say is looked at before it is wrapped.
func (it *item) checkMaterial(std *streams) []problem {
	said := &bytes.Buffer{}
	quiet := &streams{in: std.in, out: std.out, err: said}
	material, err := it.readMaterial(quiet)
	if err == nil {
		spec := it.specToMake()
		if !it.makesKey() && it.keySpec == "" && len(material) == byok.MaterialLen(byok.SM4) {
			spec = byok.SM4
		}
		err = check(quiet, material, spec)
		if err == nil && it.kcv != "" {
			err = compareKCV(it.kcv, spec, material)
		}
		wipe(material)
	}
	for warning := range strings.Lines(said.String()) {
		fmt.Fprint(std.err, strings.Replace(warning, "keyferry: warning: ", fmt.Sprintf("keyferry: warning: line %d: ", it.line), 1))
	}
	if err == nil {
		return nil
	}
	text := err.Error()
	var hinted *hintedError
	if errors.As(err, &hinted) {
		text += " (" + hinted.hint + ")"
	}
	field := "material_file"
	if errors.Is(err, errOtherKCV) {
		field = "kcv"
	}
	return []problem{{it.line, field, text}}
}

// readMaterial reads the file of a line. The caller wipes what it gets.
func (it *item) readMaterial(std *streams) ([]byte, error) {
	source := materialSource{file: it.materialFile}
	return source.read(std)
}

func compareKCV(expected, spec string, material []byte) error {
	kcv, err := byok.KCV(spec, material)
	if err == nil && hex.EncodeToString(kcv[:]) != expected {
		err = errOtherKCV
	}
	return err
}

var errOtherKCV = errors.New("the material has another key check value")
