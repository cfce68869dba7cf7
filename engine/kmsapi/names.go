package kmsapi

import (
	"errors"
	"strings"
	"time"

	"github.com/keyferry/keyferry/engine"
)

// errAlias: a name is an alias.
var errAlias = errors.New("kmsapi: name is an alias")

// maxKeyID is more than the longest id of any server that speaks this API.
const maxKeyID = 64

// resolve returns the key id that name means: an id, or the ARN of one.
// errAlias for an alias or the ARN of one.
func resolve(parameter, name, region, account string) (keyID string, err error) {
	if strings.HasPrefix(name, "acs:") {
		resource, ours := strings.CutPrefix(name, arnPrefix(region, account))
		if !ours {
			return "", &engine.Error{Kind: engine.KeyNotFound, Hint: "the keys of this server are " + arnPrefix(region, account) + "key/…"}
		}
		id, isKey := strings.CutPrefix(resource, "key/")
		if !isKey {
			id = resource
		}
		name = id
	}
	if strings.HasPrefix(name, "alias/") {
		return "", errAlias
	}
	if name == "" || len(name) > maxKeyID || strings.ContainsFunc(name, notInKeyID) {
		return "", invalid(parameter, "%s must be the id or the ARN of a key", parameter)
	}
	return name, nil
}

func notInKeyID(r rune) bool {
	switch {
	case '0' <= r && r <= '9', 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', r == '-':
		return false
	}
	return true
}

// arnPrefix is what every ARN of this server begins with.
func arnPrefix(region, account string) string { return "acs:kms:" + region + ":" + account + ":" }

func (h *Handler) keyARN(keyID string) string {
	return arnPrefix(h.cfg.Region, h.cfg.Account) + "key/" + keyID
}

// formatTime writes a time as the API does. An absent one is "", not omitted.
func formatTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05Z")
}
