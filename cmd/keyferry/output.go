package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"unicode"
)

// row is one line of a table: what, and what it is.
type row struct{ name, value string }

// report writes a result: as a JSON object if that was asked for, else as
// rows, of which a lone nameless one is just its value.
func (s *streams) report(object any, rows ...row) error { return s.reportTo(s.out, object, rows...) }

// reportBeside is report of what is in the named output. If that is standard
// output, the report is on standard error.
func (s *streams) reportBeside(name string, object any, rows ...row) error {
	if name == stdio {
		return s.reportTo(s.err, object, rows...)
	}
	return s.report(object, rows...)
}

func (s *streams) reportTo(out io.Writer, object any, rows ...row) error {
	if s.json {
		e := json.NewEncoder(out)
		e.SetEscapeHTML(false)
		return e.Encode(object)
	}
	if len(rows) == 1 && rows[0].name == "" {
		_, err := fmt.Fprintln(out, printable(rows[0].value))
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintf(w, "%s:\t%s\n", r.name, orNone(oneLine(r.value)))
	}
	return w.Flush()
}

// printable is s without what a terminal would obey: a KMS, or who is on the way
// to it, could else rewrite what a person has read.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// oneLine is printable as one line: no other line can be feigned.
func oneLine(s string) string {
	return printable(strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\t' || r == '\r' }), " "))
}

// orNone keeps a row from ending in nothing.
func orNone(s string) string {
	if strings.TrimSpace(s) == "" {
		return "-"
	}
	return s
}

// createFile writes a new file that only its owner can read, to the disk
// before it returns. It never overwrites: that file may be somebody's key.
func createFile(name string, data []byte) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return withHint(fmt.Errorf("%s is there already", name), "it is not overwritten, as it may be a key; give another name")
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// tryFile reports whether createFile can make a file, of which nothing is left.
func tryFile(name string) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(name))
}

// writeOut writes to standard output if the name is that, else to a new file as
// createFile does.
func (s *streams) writeOut(name string, data []byte) error {
	if name != stdio {
		return createFile(name, data)
	}
	_, err := s.out.Write(data)
	return err
}
