package kmsapi

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/keyferry/keyferry/engine"
)

// input reads the parameters of one action. The first one that is at fault
// decides the error; the methods answer zero values from then on, and the
// action looks at err once, before it does anything.
//
// A parameter that is there and empty is absent: that is how clients send what
// was not set.
type input struct {
	values          url.Values
	call            *call
	region, account string
	err             error
}

func (in *input) fail(err error) {
	if in.err == nil {
		in.err = err
	}
}

// optional returns a parameter, "" if it is absent.
func (in *input) optional(name string) string {
	values := in.values[name]
	if len(values) > 1 {
		in.fail(invalid(name, "%s is given %d times", name, len(values)))
		return ""
	}
	if len(values) == 0 {
		return ""
	}
	return values[0]
}

func (in *input) required(name string) string {
	value := in.optional(name)
	if value == "" {
		in.fail(missing(name))
	}
	return value
}

// unsupported are parameters of the published API that ask for something this
// server does not do, with the values that ask for nothing. To ignore the
// others would be to promise what is not kept.
var unsupported = []struct {
	name     string
	harmless []string
}{
	{"DKMSInstanceId", nil},
	{"EnableAutomaticRotation", []string{"false"}},
	{"Policy", nil},
	{"Recipient", nil},
	{"RotationInterval", nil},
	{"SourceEncryptionAlgorithm", nil},
	{"SourceKeyId", nil},
	{"SourceKeyVersionId", nil},
	{"Tags", []string{"[]"}},
}

// expectations are our own parameters. One that is misspelt must not pass for
// one that is absent, as other unknown parameters do.
var expectations = []string{expectKeyCheckValue, expectMaterialID}

const (
	expectKeyCheckValue = "ExpectKeyCheckValue"
	expectMaterialID    = "ExpectKeyMaterialId"
)

func (in *input) refuseUnsupported() {
	for _, p := range unsupported {
		if value := in.optional(p.name); value != "" && !slices.Contains(p.harmless, value) {
			in.fail(invalid(p.name, "%s is not supported by Keyferry", p.name))
		}
	}
	for name := range in.values {
		const prefix = "expect"
		if len(name) >= len(prefix) && strings.EqualFold(name[:len(prefix)], prefix) && !slices.Contains(expectations, name) {
			in.fail(invalid(name, "the expectations are %s", strings.Join(expectations, " and ")))
		}
	}
}

// keyID reads a required key: an id, or the ARN of one. aliasKind is what an
// alias is answered with, as there are none.
func (in *input) keyID(name string, aliasKind engine.Kind) string {
	id := in.required(name)
	if in.err != nil {
		return ""
	}
	id, err := resolve(name, id, in.region, in.account)
	if errors.Is(err, errAlias) {
		err = &engine.Error{Kind: aliasKind}
	}
	if err != nil {
		in.fail(err)
		return ""
	}
	in.call.keyID = id
	return id
}

// base64 reads required Base64. White space around it, and around each of its
// lines if it was wrapped, is forgiven, because people paste it from files.
// Anything else is not: a space inside a line was a plus sign that somebody
// forgot to escape.
func (in *input) base64(name string) []byte {
	lines := strings.Split(in.required(name), "\n")
	for i, line := range lines {
		lines[i] = strings.Trim(line, " \t\r")
	}
	text := strings.Join(lines, "")
	if in.err == nil && text == "" {
		in.fail(missing(name))
	}
	if in.err != nil {
		return nil
	}
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil {
		in.fail(invalid(name, "%s must be Base64 (RFC 4648 section 4)", name))
		return nil
	}
	return b
}

// hex reads an optional value of n bytes, nil if it is absent. White space
// around it is forgiven; nothing but white space is an expectation that got
// lost on the way, and not one that was not made.
func (in *input) hex(name string, n int) []byte {
	text := in.optional(name)
	if text == "" || in.err != nil {
		return nil
	}
	b, err := hex.DecodeString(strings.TrimSpace(text))
	if err != nil || len(b) != n {
		in.fail(invalid(name, "%s must be %d hexadecimal digits", name, 2*n))
		return nil
	}
	return b
}

// integer reads a decimal number from least to most, absent if the parameter
// is.
func (in *input) integer(name string, absent, least, most int) int {
	text := in.optional(name)
	if text == "" || in.err != nil {
		return absent
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		in.fail(invalid(name, "%s must be a number from %d to %d", name, least, most))
		return absent
	}
	return n
}

// boolean reads true or false, false if the parameter is absent.
func (in *input) boolean(name string) bool {
	switch text := in.optional(name); {
	case strings.EqualFold(text, "true"):
		return true
	case text != "" && !strings.EqualFold(text, "false"):
		in.fail(invalid(name, "%s must be true or false", name))
	}
	return false
}

// lastUnixTime is the last second of the year 9999; later ones cannot be
// written as the API writes times.
const lastUnixTime = 253402300799

// unixTime reads seconds since 1970; absent and 0 are the zero time. Whether
// the time is in the past is the engine's to say.
func (in *input) unixTime(name string) time.Time {
	text := in.optional(name)
	if text == "" || in.err != nil {
		return time.Time{}
	}
	n, err := strconv.ParseInt(text, 10, 64)
	switch {
	case err != nil || n < 0:
		in.fail(invalid(name, "%s must be a Unix time in seconds, or 0 for never", name))
	case n > lastUnixTime:
		in.fail(invalid(name, "%s must be in seconds; this looks like milliseconds", name))
	case n != 0:
		return time.Unix(n, 0).UTC()
	}
	return time.Time{}
}

// encryptionContext reads an optional encryption context: a JSON object of
// strings. The engine compares it as a map and bounds its size.
func (in *input) encryptionContext(name string) map[string]string {
	text := in.optional(name)
	if text == "" || in.err != nil {
		return nil
	}
	m, ok := stringMap(text)
	if !ok {
		in.fail(invalid(name, "%s must be a JSON object whose values are strings, each name once", name))
		return nil
	}
	return m
}

// stringMap decodes a JSON object of strings. It is stricter than
// encoding/json, which keeps the last of equal names and takes null for a map
// or a string: what is authenticated must be what was meant.
func stringMap(text string) (map[string]string, bool) {
	if !utf8.ValidString(text) {
		return nil, false
	}
	dec := json.NewDecoder(bytes.NewReader([]byte(text)))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, false
	}
	m := map[string]string{}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return nil, false
		}
		value, err := dec.Token()
		if err != nil {
			return nil, false
		}
		key := name.(string) // of an object, the decoder takes no other
		text, isString := value.(string)
		if _, twice := m[key]; twice || !isString {
			return nil, false
		}
		m[key] = text
	}
	if _, err := dec.Token(); err != nil { // the closing brace
		return nil, false
	}
	_, err := dec.Token()
	return m, err == io.EOF
}
