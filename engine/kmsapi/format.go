package kmsapi

import (
	"encoding/json"
	"encoding/xml"
	"io"
	"strings"
)

// format is how an answer is written.
type format int

const (
	formatJSON format = iota // the default
	formatXML
)

// formatOf reads the parameter Format, which clients spell in either case. One
// that is not known is answered in JSON, as a client that asks for it would
// not read a complaint in any other.
func formatOf(name string) format {
	if strings.EqualFold(name, "XML") {
		return formatXML
	}
	return formatJSON
}

// encode writes b and returns its content type. The tea SDK reads an XML error
// only with the root Error and exactly this content type; no client minds the
// root of a success.
func (f format) encode(w io.Writer, b body) (contentType string, err error) {
	if f == formatXML {
		root := "KMS"
		if _, failed := b.(*errorBody); failed {
			root = "Error"
		}
		if _, err := io.WriteString(w, xml.Header); err != nil {
			return "", err
		}
		err := xml.NewEncoder(w).EncodeElement(b, xml.StartElement{Name: xml.Name{Local: root}})
		return "text/xml;charset=utf-8", err
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return "application/json;charset=utf-8", enc.Encode(b)
}
