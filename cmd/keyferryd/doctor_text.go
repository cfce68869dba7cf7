package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"

	"github.com/keyferry/keyferry/hsm"
)

// writeText writes a diagnosis for people. What has to be changed stands last,
// where a terminal shows it.
func (d *diagnosis) writeText(w io.Writer) error {
	var out bytes.Buffer
	if t := d.Token; t != nil {
		_, _ = fmt.Fprintf(&out, "Token %q, serial %s (%s, %s): %d keys on it, %d of them wrapping pairs and %d resident key material\n",
			t.Label, t.Serial, t.Manufacturer, t.Model, d.Objects.Keys, d.Objects.Pairs, d.Objects.Resident)
		if m := t.Memory; m.Total > 0 {
			_, _ = fmt.Fprintf(&out, "Its memory for them: %d KiB, %d KiB of them free\n", m.Total>>10, m.Free>>10)
		}
		d.tables(&out)
	}
	list := func(title string, lines []advice) {
		if len(lines) == 0 {
			return
		}
		_, _ = fmt.Fprintf(&out, "\n%s\n", title)
		for _, a := range lines {
			_, _ = fmt.Fprintf(&out, "  - %s:\n    %s\n", a.What, a.Do)
		}
	}
	list("To think about", d.Warnings)
	list("To change: the configuration asks for more than there is", d.Problems)
	if len(d.Next) > 0 {
		_, _ = fmt.Fprintf(&out, "\nNot yet done; \"keyferryd init\" would\n")
		for _, line := range d.Next {
			_, _ = fmt.Fprintf(&out, "  - %s\n", line)
		}
	}
	if d.Ready {
		_, _ = fmt.Fprintf(&out, "\nThe token has all that the configuration asks for: \"keyferryd serve\" starts.\n")
	}
	_, err := w.Write(out.Bytes())
	return err
}

// marks are what the first column of the tables says.
var marks = map[hsm.Verdict]string{hsm.Proven: "yes", hsm.Absent: "no", hsm.Ignored: "NO", hsm.Wrong: "WRONG", hsm.Off: "off", hsm.Unknown: "?"}

func (d *diagnosis) tables(out *bytes.Buffer) {
	_, _ = fmt.Fprintf(out, "\nWhat it has shown by known answers\n")
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, f := range d.Capabilities {
		_, _ = fmt.Fprintf(table, "  %s\t%s\t%s\n", marks[f.Verdict], f.Statement, f.Evidence)
	}
	_ = table.Flush() // to a buffer
	_, _ = fmt.Fprintf(out, "\nWhat customers can use\n")
	for _, w := range d.Wrapping {
		_, _ = fmt.Fprintf(table, "  %s\t%s with %s\t%s\n", yes(w.Offered), w.Algorithm, w.Spec, w.Reason)
	}
	for _, m := range d.Materials {
		_, _ = fmt.Fprintf(table, "  %s\tencrypting with imported %s keys\t%s\n", yes(m.Usable), m.Spec, m.Reason)
	}
	_ = table.Flush()
	_, _ = fmt.Fprintf(out, "\nKeys\n")
	for _, k := range d.Keys {
		state := "not there"
		switch {
		case k.Problem != "":
			state = k.Problem
		case len(k.Found) > 0 && k.Pinned == "":
			state = "there, and not pinned"
		case len(k.Found) > 0:
			state = "there, as pinned"
		}
		_, _ = fmt.Fprintf(table, "  %s\t%s\t%s\n", yes(len(k.Found) > 0 && k.Problem == ""), k.Name, state)
	}
	_ = table.Flush()
	but := ""
	if slices.ContainsFunc(d.Holes, func(h hole) bool { return h.State != "closed" && h.State != "patched" }) {
		but = ", unless by a hole below that is open, listed or unknown"
	}
	_, _ = fmt.Fprintf(out, "\nWhat holds on it%s\n", but)
	for _, g := range d.Guarantees {
		_, _ = fmt.Fprintf(out, "  %-3s  %s\n", yes(g.Holds), g.Statement)
		for _, why := range g.Because {
			_, _ = fmt.Fprintf(out, "         because %s\n", why)
		}
	}
	if len(d.Exceptions) > 0 {
		_, _ = fmt.Fprintf(out, "\nWhat it cannot keep\n")
		for _, e := range d.Exceptions {
			state := "accepted"
			if !e.Accepted {
				state = "NOT accepted"
			}
			_, _ = fmt.Fprintf(out, "  %s (%s): %s\n", e.Name, state, e.Loses)
		}
	}
	_, _ = fmt.Fprintf(out, "\nHoles of SoftHSM2: open or closed as tried here; listed or patched as its library says\n")
	for _, h := range d.Holes {
		_, _ = fmt.Fprintf(out, "  %-7s  %s  %s\n", h.State, h.ID, h.Limit)
	}
	_, _ = fmt.Fprintf(out, "\nWhat no token, or no software token, prevents\n")
	for _, limit := range d.Limits {
		_, _ = fmt.Fprintf(out, "  - %s\n", limit)
	}
}

func yes(v bool) string {
	if v {
		return "yes"
	}
	return "no"
}
