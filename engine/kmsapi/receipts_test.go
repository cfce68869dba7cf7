package kmsapi_test

import (
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/receipt"
)

func TestReceiptActions(t *testing.T) {
	s := newService(t)
	b64 := func(n byte) string { return receipt.Hash{n}.String() }
	list := func(values ...any) map[string]any { return map[string]any{"Hash": append([]any{}, values...)} }
	single := map[string]any{
		"KeyId": keyID, "Index": 3.0, "Entry": "entry\nof two lines\n", "EntryHash": b64(1), "Proof": list(b64(2), b64(3)),
		"Head": "head\n", "PublicKey": "c3BraQ==", "Since": 0.0, "SinceHash": list(),
	}
	since := map[string]any{}
	for k, v := range single {
		since[k] = v
	}
	since["Since"], since["SinceHash"] = 2.0, list(b64(4))
	for _, tt := range []struct {
		action string
		params map[string]string
		asked  any
		want   map[string]any
	}{
		{"GetImportReceipt", params("KeyId", keyID), engine.ReceiptInput{KeyID: keyID}, single},
		{
			"GetImportReceipt", params("KeyId", keyID, "ImportRequestId", "R", "Since", "2"),
			engine.ReceiptInput{KeyID: keyID, RequestID: "R", Since: 2},
			since,
		},
		{"ListImportReceipts", params("KeyId", keyID, "PageNumber", "3", "PageSize", "20"), [2]int{40, 20}, map[string]any{
			"KeyId": keyID, "TotalCount": 7.0, "PageNumber": 3.0, "PageSize": 20.0,
			"Receipts": map[string]any{"Receipt": []any{map[string]any{"Index": -1.0, "Entry": "entry\n"}}},
		}},
		{"GetReceiptLogHead", nil, nil, map[string]any{"Head": "head\n", "Size": 4.0, "PublicKey": "c3BraQ=="}},
		{"GetReceiptLog", params("Start", "256", "Limit", "2"), [2]int64{256, 2}, map[string]any{
			"Start": 256.0, "Entries": map[string]any{"Entry": []any{
				map[string]any{"Index": 256.0, "Hash": b64(1), "Text": "entry\n"}, map[string]any{"Index": 257.0, "Hash": b64(2), "Text": ""},
			}},
		}},
		{"GetReceiptLog", nil, [2]int64{0, engine.MaxLogPage}, nil},
	} {
		status, fields := s.do(t, tt.action, tt.params)
		require.Equal(t, http.StatusOK, status, fields)
		require.Equal(t, tt.asked, s.engine.last, tt.action)
		delete(fields, "RequestId")
		if tt.want != nil {
			require.Equal(t, tt.want, fields, tt.action)
		}
	}
	s.engine.calls = nil
	for action, p := range map[string]map[string]string{
		"GetImportReceipt":   params("KeyId", keyID, "Since", "-1"),
		"ListImportReceipts": params("KeyId", keyID, "PageSize", "101"),
		"GetReceiptLog":      params("Limit", "257"),
	} {
		s.refused(t, "InvalidParameter", action, p)
	}
	require.Empty(t, s.engine.calls)
}
