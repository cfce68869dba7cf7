package hsm

import (
	"bytes"
	"fmt"
	"net/url"
	"os"
	"strings"
)

// ParseURI reads a PKCS#11 URI (RFC 7512) into a Config: the path attributes
// token and serial, the query attributes module-path and pin-source. Pins
// other than the serial are not part of a URI.
//
// A URI that carries a PIN (pin-value) is refused: URIs end up in logs and
// process lists. So is any attribute that would be ignored otherwise.
func ParseURI(uri string) (Config, error) {
	rest, ok := strings.CutPrefix(uri, "pkcs11:")
	if !ok {
		return Config{}, fmt.Errorf("hsm: a PKCS#11 URI begins with %q", "pkcs11:")
	}
	var cfg Config
	path, query, _ := strings.Cut(rest, "?")
	set := func(pair string, known map[string]func(string)) error {
		name, value, _ := strings.Cut(pair, "=")
		f, ok := known[name]
		if !ok {
			return fmt.Errorf("hsm: attribute %q of a PKCS#11 URI is not supported", name)
		}
		value, err := url.PathUnescape(value)
		if err != nil {
			return fmt.Errorf("hsm: attribute %q of a PKCS#11 URI is not well escaped", name)
		}
		f(value)
		delete(known, name) // section 2.3: none occurs twice
		return nil
	}
	inPath := map[string]func(string){
		"token":  func(v string) { cfg.Label = v },
		"serial": func(v string) { cfg.Pins.Serial = v },
	}
	inQuery := map[string]func(string){
		"module-path": func(v string) { cfg.Module = v },
		"pin-source":  func(v string) { cfg.PIN = PINFile(strings.TrimPrefix(v, "file:")) },
	}
	for _, part := range []struct {
		text, separator string
		known           map[string]func(string)
	}{{path, ";", inPath}, {query, "&", inQuery}} {
		if part.text == "" {
			continue
		}
		for pair := range strings.SplitSeq(part.text, part.separator) {
			if err := set(pair, part.known); err != nil {
				return Config{}, err
			}
		}
	}
	return cfg, nil
}

// PINFile returns a function for Config.PIN that reads the PIN from a file.
// One line end at the end of the file is not part of the PIN.
func PINFile(path string) func() ([]byte, error) {
	return func() ([]byte, error) {
		pin, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		return bytes.TrimSuffix(bytes.TrimSuffix(pin, []byte("\n")), []byte("\r")), nil
	}
}
