package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
)

// longList is a KMS with many keys, in the order of their age or not.
type longList struct {
	keys      []keyMetadata
	described int
}

func (l *longList) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	params := r.URL.Query()
	if r.Header.Get("X-Acs-Action") == "DescribeKey" {
		l.described++
		i := slices.IndexFunc(l.keys, func(k keyMetadata) bool { return k.KeyID == params.Get("KeyId") })
		_ = json.NewEncoder(w).Encode(map[string]any{"KeyMetadata": l.keys[i]})
		return
	}
	page, _ := strconv.Atoi(params.Get("PageNumber"))
	size, _ := strconv.Atoi(params.Get("PageSize"))
	var ids []map[string]string
	for _, k := range l.keys[min((page-1)*size, len(l.keys)):min(page*size, len(l.keys))] {
		ids = append(ids, map[string]string{"KeyId": k.KeyID})
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"Keys": map[string]any{"Key": ids}, "TotalCount": len(l.keys)})
}

// A key that was made without its KeyId being heard of is found by its mark,
// without a look at keys that are older than the run, unless the KMS lists keys
// in some other order.
func TestSearchStopsAtOlderKeys(t *testing.T) {
	const old, young = 730, 120
	started := time.Date(2026, 11, 25, 9, 0, 0, 0, time.UTC)
	for name, tc := range map[string]struct {
		order func(keys []keyMetadata)
		most  int // keys that may be described
	}{
		"by age":         {func([]keyMetadata) {}, young + 200},
		"youngest first": {slices.Reverse[[]keyMetadata], old + young},
	} {
		t.Run(name, func(t *testing.T) {
			kms := &longList{}
			for i := range old + young {
				at := started.Add(time.Duration(i-old)*time.Minute - 2*time.Hour)
				if i >= old {
					at = started.Add(time.Duration(i) * time.Second)
				}
				kms.keys = append(kms.keys, keyMetadata{KeyID: fmt.Sprintf("key-%d", i), CreationDate: at.Format(time.RFC3339)})
			}
			j := &journal{head: journalHead{Run: "run", Started: started}}
			b := &bulk{caller: &caller{journal: j}}
			lost := b.markOf(&item{name: "lost"})
			kms.keys[old+7].Description = "one of many " + lost
			tc.order(kms.keys)
			s := httptest.NewServer(kms)
			defer s.Close()
			b.client = &client{url: s.URL + "/", http: s.Client(), cred: acs.Credential{AccessKeyID: "id", Secret: acs.NewSecret([]byte("secret"))}}
			found, err := b.search(t.Context(), map[string]bool{lost: true})
			require.NoError(t, err)
			require.Equal(t, map[string]string{lost: fmt.Sprintf("key-%d", old+7)}, found)
			require.LessOrEqual(t, kms.described, tc.most)

			kms.described = 0
			found, err = b.search(t.Context(), map[string]bool{b.markOf(&item{name: "never sent"}): true})
			require.NoError(t, err)
			require.Empty(t, found)
			require.LessOrEqual(t, kms.described, tc.most)
		})
	}
}

func TestOutcomes(t *testing.T) {
	api := func(status int, code string) error {
		return fmt.Errorf("ImportKeyMaterial: %w", &apiError{Status: status, Code: code})
	}
	for _, tc := range []struct {
		err  error
		want outcome
	}{
		{nil, answered},
		{api(400, "InvalidKeyMaterial"), answered},
		{api(409, "Rejected.StateModifiedFailed"), answered},
		{api(500, "InternalFailure"), answered},
		{api(400, "SignatureNonceUsed"), replayed},
		{api(400, "Throttling.User"), throttled},
		{api(429, "Rejected.Throttling"), throttled},
		{api(503, "ServiceUnavailableTemporary"), unavailable},
		{api(400, "SignatureDoesNotMatch"), hopeless},
		{api(404, "InvalidAccessKeyId.NotFound"), hopeless},
		{&foreignError{status: 502}, lost},
		{&foreignError{status: 404}, hopeless},
		{errors.New("connection reset by peer"), lost},
	} {
		require.Equal(t, tc.want, outcomeOf(tc.err), "%v", tc.err)
	}
}
