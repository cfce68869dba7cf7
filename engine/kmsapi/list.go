package kmsapi

import (
	"context"
	"encoding/json"
	"slices"
	"strings"

	"github.com/keyferry/keyferry/engine"
)

// Bounds of ListKeys.
const (
	maxPageNumber    = 1 << 30
	maxPageSize      = 100
	defaultPageSize  = 10
	maxFilters       = 10
	maxFiltersValues = 10
)

type listKeysAnswer struct {
	Keys       listedKeys
	TotalCount int
	PageNumber int
	PageSize   int
	envelope
}

type listedKeys struct {
	Key []listedKey
}

type listedKey struct {
	KeyID  string `json:"KeyId" xml:"KeyId"`
	KeyARN string `json:"KeyArn" xml:"KeyArn"`
}

func (h *Handler) listKeys(ctx context.Context, in *input) (body, error) {
	page := in.integer("PageNumber", 1, 1, maxPageNumber)
	size := in.integer("PageSize", defaultPageSize, 1, maxPageSize)
	selected, none := h.filters(in)
	if in.err != nil {
		return nil, in.err
	}
	answer := &listKeysAnswer{Keys: listedKeys{Key: []listedKey{}}, PageNumber: page, PageSize: size}
	if none {
		return answer, nil
	}
	selected.Offset, selected.Limit = (page-1)*size, size
	keys, total, err := h.cfg.Engine.ListKeys(ctx, selected)
	if err != nil {
		return nil, err
	}
	answer.TotalCount = total
	for i := range keys {
		answer.Keys.Key = append(answer.Keys.Key, listedKey{KeyID: keys[i].KeyID, KeyARN: h.keyARN(keys[i].KeyID)})
	}
	return answer, nil
}

// filters reads the parameter Filters: values of one filter key, also of one
// that is repeated, are alternatives; a key must pass all filter keys. A
// filter without values selects everything. none means that no key can pass.
func (h *Handler) filters(in *input) (selected engine.ListKeysInput, none bool) {
	const name = "Filters"
	text := in.optional(name)
	if text == "" || in.err != nil {
		return selected, false
	}
	var list []struct {
		Key    string
		Values []string
	}
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		in.fail(invalid(name, `%s must be JSON like [{"Key":"KeyState","Values":["Enabled"]}]`, name))
		return selected, false
	}
	if len(list) > maxFilters {
		in.fail(invalid(name, "%s takes at most %d entries", name, maxFilters))
		return selected, false
	}
	wanted := map[string][]string{}
	for _, f := range list {
		if len(f.Values) > maxFiltersValues {
			in.fail(invalid(name, "%s takes at most %d values for an entry", name, maxFiltersValues))
			return selected, false
		}
		wanted[f.Key] = append(wanted[f.Key], f.Values...)
	}
	// What every key of this server has.
	constant := map[string][]string{
		"KeyUsage":        {keyUsage},
		"ProtectionLevel": {protectionLevel},
		"CreatorType":     {creatorType},
		"Creator":         {h.cfg.Account},
		"DKMSInstanceId":  {""},
		"AliasName":       nil,
		"TagKey":          nil,
		"TagValue":        nil,
	}
	for key, values := range wanted {
		switch key {
		case "KeyState":
			for _, v := range values {
				if !slices.Contains(states, engine.KeyState(v)) {
					in.fail(invalid(name, "a KeyState is one of %s", strings.Join(toStrings(states), ", ")))
				}
				selected.States = append(selected.States, engine.KeyState(v))
			}
		case "KeySpec":
			for _, v := range values {
				selected.Specs = append(selected.Specs, engine.KeySpec(v))
			}
		case "KeyId", "keyId": // the documentation spells it both ways
			selected.KeyIDs = append(selected.KeyIDs, values...)
		default:
			have, known := constant[key]
			if !known {
				in.fail(invalid(name, "%q is no key of a filter", key))
			}
			pass := slices.ContainsFunc(values, func(v string) bool { return slices.Contains(have, v) })
			none = none || len(values) > 0 && !pass
		}
	}
	return selected, none
}

var states = []engine.KeyState{engine.Enabled, engine.Disabled, engine.PendingDeletion, engine.PendingImport}

func toStrings[S ~string](list []S) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = string(s)
	}
	return out
}
