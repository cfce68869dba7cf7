package enginebench

import (
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"
)

// Metric is one number of a Row. Its name says the unit, as those of package
// testing do: "bare/s", "ours-cpu-µs".
type Metric struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
}

// Row is one line of a Table.
type Row struct {
	Name    string   `json:"name"`
	Callers int      `json:"callers"` // at a time
	Metrics []Metric `json:"metrics"`
}

// Value returns a number by its name, 0 if there is none.
func (r Row) Value(name string) float64 {
	for _, m := range r.Metrics {
		if m.Name == name {
			return m.Value
		}
	}
	return 0
}

// Report gives the numbers to a testing.B.
func (r Row) Report(b interface{ ReportMetric(n float64, unit string) }) {
	for _, m := range r.Metrics {
		b.ReportMetric(m.Value, m.Name)
	}
	b.ReportMetric(0, "ns/op")
}

// Table is rows that have the same metrics.
type Table struct {
	Title string `json:"title"`
	Rows  []Row  `json:"rows"`
}

// Write writes the table for people.
func (t *Table) Write(w io.Writer) error {
	if len(t.Rows) == 0 {
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintf(tw, "\n%s\n\tcallers\t", t.Title)
	for _, m := range t.Rows[0].Metrics {
		_, _ = fmt.Fprintf(tw, "%s\t", m.Name)
	}
	for _, r := range t.Rows {
		_, _ = fmt.Fprintf(tw, "\n%s\t%d\t", r.Name, r.Callers)
		for _, m := range r.Metrics {
			_, _ = fmt.Fprintf(tw, "%s\t", number(m.Value))
		}
	}
	_, _ = fmt.Fprintln(tw)
	return tw.Flush()
}

// number has three digits that count.
func number(v float64) string {
	switch {
	case v < 10 && v > -10:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case v < 100 && v > -100:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 0, 64)
}
