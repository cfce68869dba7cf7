package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/receipt"
)

func newReceipt(std *streams) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "receipt",
		Short: "Fetch and verify receipts of imports (keyferryd only)",
		Long: `Every import into keyferryd leaves an entry in a log that its token signs. A
receipt is an entry with the proof that it is in that log. Keep receipts: who
holds one can show later that the log was cut, changed or put back.`,
		Args: noArguments,
		RunE: func(*cobra.Command, []string) error { return errors.New("a command is missing") },
	}
	cmd.AddCommand(newReceiptGet(std), newReceiptLog(std), newReceiptVerify(std))
	return cmd
}

func newReceiptGet(std *streams) *cobra.Command {
	var conn connection
	var keyID, requestID, since, out string
	cmd := &cobra.Command{
		Use:   "get --key-id ID --out FILE",
		Short: "Fetch the receipt of an import",
		Long: `Fetch the receipt of the last import into a key, or of the one with the given
RequestId, and write it to a file: text that people can read, and all that
"keyferry receipt verify" needs but the pinned key. It works for deleted keys,
too. With --since it holds the proof that the log continues an older one.`,
		Example: `  keyferry receipt get --key-id 2f9c8b1e-6d0a-4c55-9a43-1b7e5d3c0f21 --out import.receipt
  keyferry receipt get --key-id 2f9c8b1e-6d0a-4c55-9a43-1b7e5d3c0f21 --since import.receipt --out now.receipt`,
		Args: noArguments,
		RunE: failing(func(ctx context.Context) error {
			params := url.Values{"KeyId": {keyID}}
			if requestID != "" {
				params.Set("ImportRequestId", requestID)
			}
			if since != "" {
				size, err := sizeOf(since)
				if err != nil {
					return err
				}
				params.Set("Since", strconv.FormatInt(size, 10))
			}
			c, err := conn.client(std)
			if err != nil {
				return err
			}
			return writeReceipt(ctx, std, c, out, params)
		}),
	}
	conn.register(cmd)
	f := cmd.Flags()
	f.StringVar(&keyID, "key-id", "", "`KeyId` of the key")
	f.StringVar(&requestID, "request-id", "", "`RequestId` of the import (default: the last import)")
	f.StringVar(&since, "since", "", "`FILE` with an older receipt or log of this KMS")
	f.StringVar(&out, "out", "", "`FILE` to write the receipt to, which must not exist; - for standard output")
	markRequired(cmd, "key-id")
	markRequired(cmd, "out")
	return cmd
}

// writeReceipt fetches a receipt into a new file, or to standard output. It
// verifies nothing, as it knows no pinned key.
func writeReceipt(ctx context.Context, std *streams, c *client, out string, params url.Values) error {
	var answer struct {
		Index            int64
		Entry, Head      string
		EntryHash        receipt.Hash
		PublicKey        []byte
		Proof, SinceHash struct{ Hash []receipt.Hash }
		Since            int64
	}
	if err := c.call(ctx, "GetImportReceipt", params, &answer); err != nil {
		return err
	}
	r := &receipt.Receipt{
		Index: answer.Index, Entry: []byte(answer.Entry), EntryHash: answer.EntryHash, Proof: answer.Proof.Hash,
		Head: []byte(answer.Head), PublicKey: answer.PublicKey,
	}
	if answer.Since > 0 {
		r.Since = &receipt.Consistency{Size: answer.Since, Proof: answer.SinceHash.Hash}
	}
	if _, err := receipt.ParsePublicKey(r.PublicKey); err != nil {
		return fmt.Errorf("GetImportReceipt: %w", err)
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return std.writeOut(out, append(text, '\n'))
}

func newReceiptLog(std *streams) *cobra.Command {
	var conn connection
	var out string
	cmd := &cobra.Command{
		Use:   "log --out FILE",
		Short: "Download the whole log of receipts",
		Long: `Download the log of all imports and deletions of the KMS, as it is there, into a
file of one JSON object a line. "keyferry receipt verify" says what is missing
or altered.`,
		Example: "  keyferry receipt log --out imports.log",
		Args:    noArguments,
		RunE: failing(func(ctx context.Context) error {
			c, err := conn.client(std)
			if err != nil {
				return err
			}
			n, err := downloadLog(ctx, std, c, out)
			if err != nil {
				return err
			}
			return std.reportBeside(out, struct {
				Entries int64 `json:"entries"`
			}{n}, row{"Entries", strconv.FormatInt(n, 10)})
		}),
	}
	conn.register(cmd)
	cmd.Flags().StringVar(&out, "out", "", "`FILE` to write the log to, which must not exist; - for standard output")
	markRequired(cmd, "out")
	return cmd
}

// downloadLog writes a log as far as the head reaches that it began with.
func downloadLog(ctx context.Context, std *streams, c *client, out string) (entries int64, err error) {
	var head struct {
		Head, PublicKey string
		Size            int64
	}
	if err := c.call(ctx, "GetReceiptLogHead", url.Values{}, &head); err != nil {
		return 0, err
	}
	if head.Size == 0 {
		return 0, errors.New("the log of receipts is empty: nothing was imported yet")
	}
	spki, err := base64.StdEncoding.DecodeString(head.PublicKey)
	if err != nil {
		return 0, errors.New("GetReceiptLogHead: the public key is not Base64")
	}
	key, err := receipt.ParsePublicKey(spki)
	if err != nil {
		return 0, fmt.Errorf("GetReceiptLogHead: %w", err)
	}
	f := std.out
	if out != stdio {
		f, err = os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, os.ErrExist) {
			return 0, withHint(fmt.Errorf("%s is there already", out), "give another name")
		}
		if err != nil {
			return 0, err
		}
		defer func() {
			err = errors.Join(err, f.Sync(), f.Close())
			if err != nil {
				err = errors.Join(err, os.Remove(out)) // half a log would look like one that was cut
			}
		}()
	}
	w, err := receipt.NewLogWriter(f, []byte(head.Head), key)
	for entries < head.Size && err == nil {
		var page struct {
			Entries struct {
				Entry []struct {
					Index int64
					Hash  receipt.Hash
					Text  string
				}
			}
		}
		if err = c.call(ctx, "GetReceiptLog", url.Values{"Start": {strconv.FormatInt(entries, 10)}}, &page); err != nil {
			break
		}
		if len(page.Entries.Entry) == 0 {
			break // verify says from where on the log is missing
		}
		for _, e := range page.Entries.Entry {
			if e.Index >= head.Size || err != nil {
				break
			}
			line := receipt.LogEntry{Index: e.Index, Hash: e.Hash}
			if e.Text != "" {
				line.Entry = []byte(e.Text)
			}
			err = w.Write(line)
		}
		entries += int64(len(page.Entries.Entry))
	}
	return min(entries, head.Size), err
}
