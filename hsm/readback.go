package hsm

import (
	"bytes"
	"fmt"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// attributeNames are the attributes that messages name.
var attributeNames = map[p11.Attribute]string{
	p11.Class: "CLASS", p11.OnToken: "TOKEN", p11.Private: "PRIVATE", p11.Label: "LABEL", p11.Trusted: "TRUSTED",
	p11.KeyType: "KEY_TYPE", p11.ID: "ID", p11.Sensitive: "SENSITIVE", p11.Encrypt: "ENCRYPT", p11.Decrypt: "DECRYPT",
	p11.Wrap: "WRAP", p11.Unwrap: "UNWRAP", p11.Sign: "SIGN", p11.SignRecover: "SIGN_RECOVER", p11.Verify: "VERIFY",
	p11.VerifyRecover: "VERIFY_RECOVER", p11.Derive: "DERIVE", p11.ECParams: "EC_PARAMS", p11.ValueLen: "VALUE_LEN",
	p11.Extractable: "EXTRACTABLE", p11.Local: "LOCAL", p11.NeverExtractable: "NEVER_EXTRACTABLE",
	p11.AlwaysSensitive: "ALWAYS_SENSITIVE", p11.Modifiable: "MODIFIABLE", p11.Copyable: "COPYABLE",
	p11.Destroyable: "DESTROYABLE", p11.WrapWithTrusted: "WRAP_WITH_TRUSTED", p11.WrapTemplate: "WRAP_TEMPLATE",
	p11.UnwrapTemplate: "UNWRAP_TEMPLATE", p11.AllowedMechanisms: "ALLOWED_MECHANISMS",
}

func attributeName(t p11.Attribute) string {
	if name, ok := attributeNames[t]; ok {
		return "CKA_" + name
	}
	return fmt.Sprintf("CKA 0x%X", uint32(t))
}

// readBack compares an object's attributes with want, and returns ErrUntrusted
// naming the first that differs or is not reported. CKA_VALUE_LEN is left out:
// tokens do not agree on reporting it.
func readBack(s *p11.Session, o p11.Handle, want []p11.Attr) error {
	var flat []p11.Attr
	var types []p11.Attribute
	for _, a := range want {
		if a.Type != p11.ValueLen && a.Nested() == nil {
			flat = append(flat, a)
			types = append(types, a.Type)
		}
	}
	got, err := s.Attributes(o, types...)
	if err != nil {
		return err
	}
	for _, a := range flat {
		if v, ok := got[a.Type]; !ok || !bytes.Equal(v, a.Value()) {
			return fmt.Errorf("%w: %s is not what was asked for", ErrUntrusted, attributeName(a.Type))
		}
	}
	for _, a := range want {
		if a.Nested() == nil {
			continue
		}
		equal, err := s.NestedEquals(o, a.Type, a.Nested())
		if err != nil {
			return err
		}
		if !equal {
			return fmt.Errorf("%w: %s is not what was asked for", ErrUntrusted, attributeName(a.Type))
		}
	}
	return nil
}
