package acs

import (
	"bytes"
	"encoding/json"
	"maps"
	"mime"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

// The content types of bodies that carry parameters.
const (
	typeForm = "application/x-www-form-urlencoded"
	typeJSON = "application/json"
)

// maxParams is many times what any action has. Whoever sends more need not have
// signed them for this to read them.
const maxParams = 256

// parseForm reads a query or a form body. A name given twice is refused: which
// of the two values counts would be the sender's guess against the signer's.
func parseForm(s string) (map[string]string, error) {
	n := strings.Count(s, "&") + 1
	if n > maxParams {
		return nil, fail(ErrParameters, "query or form body has too many parameters")
	}
	params := make(map[string]string, n)
	again, twice := "", false // the name may be empty
	for s != "" {
		var pair string
		pair, s, _ = strings.Cut(s, "&")
		if pair == "" {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		name, err := url.QueryUnescape(name)
		if err == nil {
			value, err = url.QueryUnescape(value)
		}
		if err != nil || strings.Contains(pair, ";") { // as url.ParseQuery has it
			return nil, fail(ErrParameters, "query or form body is not URL-encoded")
		}
		if !utf8.ValidString(name) || !utf8.ValidString(value) {
			return nil, fail(ErrParameters, "query or form body is not UTF-8")
		}
		if _, there := params[name]; there && !twice {
			again, twice = name, true
		}
		params[name] = value
	}
	if twice {
		return nil, fail(ErrDuplicate, again)
	}
	return params, nil
}

// parseJSON reads an object whose members are parameters.
func parseJSON(body []byte) (map[string]string, error) {
	malformed := fail(ErrParameters, "body is not a JSON object")
	if !utf8.Valid(body) {
		return nil, malformed
	}
	d := json.NewDecoder(bytes.NewReader(body))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, malformed
	}
	params := make(map[string]string)
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, malformed
		}
		name := t.(string) // a member's name is always one
		var value json.RawMessage
		if d.Decode(&value) != nil {
			return nil, malformed
		}
		if _, ok := params[name]; ok {
			return nil, fail(ErrDuplicate, name)
		}
		if string(value) == "null" {
			continue
		}
		params[name] = jsonText(value)
	}
	if _, err := d.Token(); err != nil || len(bytes.TrimSpace(body[d.InputOffset():])) != 0 {
		return nil, malformed
	}
	return params, nil
}

// jsonText is what a valid JSON value would be as a query parameter.
func jsonText(value json.RawMessage) string {
	var s string
	if json.Unmarshal(value, &s) == nil {
		return s
	}
	var b bytes.Buffer
	_ = json.Compact(&b, value) // cannot fail, the decoder has read it
	return b.String()
}

// bodyParams reads the parameters of a body by its content type, as far as
// the scheme allows that type.
func bodyParams(r *http.Request, body []byte, types ...string) (map[string]string, error) {
	if len(body) == 0 {
		return nil, nil
	}
	ct, err := one(r.Header, "Content-Type")
	if err != nil {
		return nil, err
	}
	ct, _, err = mime.ParseMediaType(ct)
	switch {
	case err != nil || !slices.Contains(types, ct):
		return nil, fail(ErrParameters, "Content-Type of the body must be "+strings.Join(types, " or "))
	case ct == typeJSON:
		return parseJSON(body)
	default:
		return parseForm(string(body))
	}
}

// requestParams are those of the query and of the body together, which may be
// the same map.
func requestParams(r *http.Request, body []byte, types ...string) (all, query map[string]string, err error) {
	query, err = parseForm(r.URL.RawQuery)
	if err != nil {
		return nil, nil, err
	}
	inBody, err := bodyParams(r, body, types...)
	if err != nil {
		return nil, nil, err
	}
	if len(inBody) == 0 {
		return query, query, nil
	}
	all = maps.Clone(query)
	for name, value := range inBody {
		if _, ok := all[name]; ok {
			return nil, nil, fail(ErrDuplicate, name)
		}
		all[name] = value
	}
	return all, query, nil
}

// one is the only value of a header, "" if there is none.
func one(h http.Header, name string) (string, error) {
	switch v := valuesOf(h, name); len(v) {
	case 0:
		return "", nil
	case 1:
		return strings.TrimSpace(v[0]), nil
	default:
		return "", fail(ErrDuplicate, name)
	}
}

// keys are the headers of the protocol as http.Header has them, and lowers the
// other way round: both would else be computed for each request.
var keys, lowers = func() (keys, lowers map[string]string) {
	keys, lowers = map[string]string{}, map[string]string{}
	for _, name := range []string{
		headerAuthorization, headerHost, headerType, headerAction, headerVersion, headerDate, headerNonce, headerHash, headerAccessKey,
	} {
		key := textproto.CanonicalMIMEHeaderKey(name)
		keys[name], lowers[key] = key, name
	}
	return keys, lowers
}()

func valuesOf(h http.Header, name string) []string {
	if key, ok := keys[name]; ok {
		return h[key]
	}
	return h.Values(name)
}

// appendQuery joins the named parameters in the byte order of their names, which
// it sorts, both sides percent-encoded. bare leaves the = out where the value is
// empty.
func appendQuery(b []byte, params map[string]string, names []string, bare bool) []byte {
	slices.Sort(names)
	for i, name := range names {
		if i > 0 {
			b = append(b, '&')
		}
		b = appendPercent(b, name)
		value := params[name]
		if value != "" || !bare {
			b = append(b, '=')
		}
		b = appendPercent(b, value)
	}
	return b
}

// appendPercent leaves only the unreserved characters of RFC 3986, section 2.3,
// as they are.
func appendPercent[T string | []byte](b []byte, s T) []byte {
	const digits = "0123456789ABCDEF"
	for i := range len(s) {
		c := s[i]
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.' || c == '~' {
			b = append(b, c)
		} else {
			b = append(b, '%', digits[c>>4], digits[c&15])
		}
	}
	return b
}
