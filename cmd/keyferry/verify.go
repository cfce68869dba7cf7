package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/receipt"
)

type verifyOptions struct {
	publicKey   string
	fingerprint string
	since       string
	source      materialSource
	ciphertext  string
	materialID  string
	in          bool   // --in was given
	material    []byte // of --in
}

func newReceiptVerify(std *streams) *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "verify FILE... (--public-key FILE | --fingerprint HEX)",
		Short: "Verify receipts and logs, offline",
		Long: `Verify receipts, or a whole log, against the public key that the operator of the
KMS has published (keyferryd receipt-key prints it), without any network. It
says which entry is missing or altered. Receipts that are given beside a log
must be in it.

With --since, what is verified must continue the log of an older receipt: so a
database that was put back to an older state does not pass. For a receipt that
takes one fetched with the same --since.

The exit status is 0 only if everything is as it should be.`,
		Example: `  keyferry receipt verify import.receipt --fingerprint 1f2e... --in key.bin
  keyferry receipt verify imports.log import.receipt --public-key kms.pem`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, files []string) error {
			o.in = cmd.Flags().Changed("in")
			return failing(func(context.Context) error { return o.run(std, files) })(cmd, nil)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.publicKey, "public-key", "", "`FILE` with the pinned public key, PEM or DER")
	f.StringVar(&o.fingerprint, "fingerprint", "", "pinned SHA-256 of the public key, in `HEX`adecimal")
	f.StringVar(&o.since, "since", "", "`FILE` with an older receipt or log, whose log this one must continue")
	f.StringVar(&o.source.file, "in", "", "`FILE` with the key material that the receipts must be of, - for standard input")
	f.StringVar(&o.ciphertext, "ciphertext", "", "`FILE` with the wrapped material, raw bytes, that the receipts must be of")
	f.StringVar(&o.materialID, "material-id", "", "material id that the receipts must have, in `HEX`adecimal")
	return cmd
}

// verified is one file as it is reported.
type verified struct {
	File    string   `json:"file"`
	OK      bool     `json:"ok"`
	Kind    string   `json:"kind"` // receipt or log
	Entries int64    `json:"entries,omitempty"`
	Index   *int64   `json:"index,omitempty"`
	Entry   []string `json:"entry,omitempty"`
	Head    string   `json:"head_time,omitempty"`
	Errors  []string `json:"errors,omitempty"`
}

func (o *verifyOptions) run(std *streams, files []string) error {
	if (o.publicKey == "") == (o.fingerprint == "") {
		return usage("give the pinned key, either with --public-key or with --fingerprint")
	}
	key, err := o.pinned(files)
	if err != nil {
		return err
	}
	var since []receipt.Head
	if o.since != "" {
		old, err := headOf(o.since, key)
		if err != nil {
			return fmt.Errorf("%s: %w", o.since, err)
		}
		since = append(since, old)
	}
	defer func() { wipe(o.material) }()
	expected, err := o.expectations(std)
	if err != nil {
		return err
	}
	var logs []string
	var receipts []*receipt.Receipt
	var results []verified
	for _, file := range files {
		outline, err := outlineOf(file)
		if err == nil && outline.Log {
			logs = append(logs, file)
			continue
		}
		result := verified{File: file, Kind: "receipt"}
		var r *receipt.Receipt
		if err == nil {
			r, err = readReceipt(file)
		}
		if err == nil {
			err = verifyReceipt(r, key, since, expected, &result)
		}
		if err == nil {
			receipts = append(receipts, r)
		}
		results = append(results, result.of(err))
	}
	for _, file := range logs {
		results = append(results, verifyLog(file, key, receipt.LogChecks{Since: since, Receipts: receipts}))
	}
	if len(expected) > 0 && len(results) == len(logs) {
		return usage("--in, --ciphertext and --material-id say what receipts must be of: give a receipt, too")
	}
	return report(std, results)
}

// pinned is the pinned key. With a fingerprint alone the key itself is taken
// from the first file.
func (o *verifyOptions) pinned(files []string) (*receipt.PublicKey, error) {
	if o.publicKey != "" {
		data, err := os.ReadFile(o.publicKey)
		if err != nil {
			return nil, err
		}
		key, err := receipt.ParsePublicKey(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.publicKey, err)
		}
		return key, nil
	}
	if raw, err := hex.DecodeString(o.fingerprint); err != nil || len(raw) != sha256.Size {
		return nil, usage("--fingerprint takes %d hexadecimal digits", 2*sha256.Size)
	}
	var failed error
	for _, file := range files {
		outline, err := outlineOf(file)
		switch {
		case err != nil:
			failed = errors.Join(failed, fmt.Errorf("%s: %w", file, err))
		case !outline.PublicKey.HasFingerprint(o.fingerprint):
			failed = errors.Join(failed, fmt.Errorf("%s: %w: its key has the fingerprint %s", file, receipt.ErrKey, outline.PublicKey.Fingerprint()))
		default:
			return outline.PublicKey, nil
		}
	}
	return nil, failed
}

// expectations are checks of what a receipt must be of.
func (o *verifyOptions) expectations(std *streams) (checks []func(receipt.Entry) error, err error) {
	if o.in {
		if o.material, err = o.source.read(std); err != nil {
			return nil, err
		}
		checks = append(checks, func(e receipt.Entry) error {
			id, err := byok.MaterialID(e.KeyID, o.material)
			if err != nil {
				return err
			}
			return same("the material id of --in", id[:], e.MaterialID[:])
		})
	}
	if o.materialID != "" {
		id, err := hex.DecodeString(o.materialID)
		if err != nil {
			return nil, usage("--material-id takes %d hexadecimal digits", 2*byok.MaterialIDLen)
		}
		checks = append(checks, func(e receipt.Entry) error { return same("--material-id", id, e.MaterialID[:]) })
	}
	if o.ciphertext != "" {
		blob, err := os.ReadFile(o.ciphertext)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(blob)
		checks = append(checks, func(e receipt.Entry) error { return same("the hash of --ciphertext", sum[:], e.Ciphertext[:]) })
	}
	if len(checks) > 0 {
		checks = append(checks, func(e receipt.Entry) error {
			if e.Kind != receipt.Import {
				return fmt.Errorf("%w: a %s", errOther, e.Kind)
			}
			return nil
		})
	}
	return checks, nil
}

// errOther: a good receipt, of something else than was expected.
var errOther = errors.New("it is a receipt of something else")

func same(what string, want, have []byte) error {
	if !bytes.Equal(want, have) {
		return fmt.Errorf("%w: %s is %x, and the receipt has %x", errOther, what, want, have)
	}
	return nil
}

func verifyReceipt(r *receipt.Receipt, key *receipt.PublicKey, since []receipt.Head, expected []func(receipt.Entry) error, result *verified) error {
	entry, head, err := r.Verify(key)
	if err != nil {
		return err
	}
	result.Index, result.Head = &r.Index, head.Time.Format("2006-01-02T15:04:05Z")
	result.Entry = strings.Split(strings.TrimSuffix(string(r.Entry), "\n"), "\n")
	for _, old := range since {
		err = errors.Join(err, r.VerifySince(old, head))
	}
	for _, check := range expected {
		err = errors.Join(err, check(entry))
	}
	return err
}

func verifyLog(file string, key *receipt.PublicKey, checks receipt.LogChecks) verified {
	result := verified{File: file, Kind: "log"}
	f, err := os.Open(file)
	if err != nil {
		return result.of(err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	report, err := receipt.VerifyLog(f, key, checks)
	result.Entries = report.Entries
	if !report.Head.Time.IsZero() {
		result.Head = report.Head.Time.Format("2006-01-02T15:04:05Z")
	}
	return result.of(err)
}

// of completes a result with its errors, a line for each.
func (v verified) of(err error) verified {
	v.OK = err == nil
	if err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			v.Errors = append(v.Errors, strings.ReplaceAll(line, "receipt: ", ""))
		}
	}
	return v
}

// report prints what was found. Of several objects each has a line of its own.
func report(std *streams, results []verified) error {
	bad := 0
	for i, r := range results {
		if !r.OK {
			bad++
		}
		rows := []row{{"File", r.File}}
		switch {
		case r.OK && r.Kind == "log":
			rows = append(rows, row{"Verified", fmt.Sprintf("all %d entries, by the head of %s", r.Entries, r.Head)})
		case r.OK:
			rows = append(rows, row{"Verified", fmt.Sprintf("entry %d of the log, by the head of %s", *r.Index, r.Head)})
		}
		for _, line := range r.Errors {
			rows = append(rows, row{"NOT VERIFIED", line})
		}
		for _, line := range r.Entry {
			if name, value, ok := strings.Cut(line, " "); ok && r.OK && line != r.Entry[0] {
				rows = append(rows, row{name, value})
			}
		}
		if i > 0 && !std.json {
			fmt.Fprintln(std.out)
		}
		if err := std.report(r, rows...); err != nil {
			return err
		}
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d files are not what they should be", bad, len(results))
	}
	return nil
}

func outlineOf(file string) (receipt.Outline, error) {
	f, err := os.Open(file)
	if err != nil {
		return receipt.Outline{}, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	return receipt.ReadOutline(f)
}

// maxReceipt is more than any receipt has, in bytes.
const maxReceipt = 1 << 20

func readReceipt(file string) (*receipt.Receipt, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	data, err := io.ReadAll(io.LimitReader(f, maxReceipt))
	if err != nil {
		return nil, err
	}
	r := new(receipt.Receipt)
	if err := r.UnmarshalJSON(data); err != nil {
		return nil, err
	}
	return r, nil
}

// headOf is the head in a receipt or a log.
func headOf(file string, key *receipt.PublicKey) (receipt.Head, error) {
	outline, err := outlineOf(file)
	if err != nil {
		return receipt.Head{}, err
	}
	return receipt.OpenHead(outline.Head, key)
}

// sizeOf is how many entries the log had when a file was fetched, by its own
// word: it is verified later.
func sizeOf(file string) (int64, error) {
	outline, err := outlineOf(file)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	lines := strings.SplitN(string(outline.Head), "\n", 3)
	if len(lines) == 3 {
		if n, err := strconv.ParseInt(lines[1], 10, 64); err == nil && n > 0 {
			return n, nil
		}
	}
	return 0, fmt.Errorf("%s: its head has no size", file)
}
