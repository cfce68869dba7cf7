package engine

import "github.com/keyferry/keyferry/hsm"

// operation is what the state of a CMK decides over.
type operation int

const (
	opUse operation = iota // encrypt, decrypt, make data keys
	opEnable
	opDisable
	opSchedule // deletion of the CMK
	opCancel   // that deletion
	opImport
	opDeleteMaterial
)

// A cell says what an operation does in one state: leads to a state, or is
// refused.
type cell struct {
	to     KeyState
	refuse Kind
}

// transitions is the state table of the Alibaba Cloud KMS API. What it leaves
// open is decided so: material that comes back enables a CMK that waited for
// it, and never one that was disabled; a cancelled deletion enables the CMK,
// or leaves it waiting if it has no material (CancelKeyDeletion).
//
// CreateKey, DescribeKey, ListKeys and GetParametersForImport are allowed in
// every state.
var transitions = map[operation]map[KeyState]cell{
	opUse: {
		Enabled:         {to: Enabled},
		Disabled:        {refuse: KeyDisabled},
		PendingDeletion: {refuse: KeyPendingDeletion},
		PendingImport:   {refuse: KeyPendingImport},
	},
	opEnable: {
		Enabled:         {to: Enabled},
		Disabled:        {to: Enabled},
		PendingDeletion: {refuse: StateModified},
		PendingImport:   {refuse: StateModified},
	},
	opDisable: {
		Enabled:         {to: Disabled},
		Disabled:        {to: Disabled},
		PendingDeletion: {refuse: StateModified},
		PendingImport:   {refuse: StateModified},
	},
	opSchedule: {
		Enabled:         {to: PendingDeletion},
		Disabled:        {to: PendingDeletion},
		PendingDeletion: {refuse: StateModified},
		PendingImport:   {to: PendingDeletion},
	},
	opCancel: {
		Enabled:         {refuse: StateModified},
		Disabled:        {refuse: StateModified},
		PendingDeletion: {to: Enabled},
		PendingImport:   {refuse: StateModified},
	},
	opImport: {
		Enabled:         {to: Enabled},
		Disabled:        {to: Disabled},
		PendingDeletion: {refuse: StateModified},
		PendingImport:   {to: Enabled},
	},
	opDeleteMaterial: {
		Enabled:         {to: PendingImport},
		Disabled:        {to: PendingImport},
		PendingDeletion: {to: PendingDeletion},
		PendingImport:   {to: PendingImport},
	},
}

// next returns the state that an operation leads to, or why it is refused.
func (op operation) next(from KeyState) (KeyState, error) {
	c, ok := transitions[op][from]
	if !ok {
		return "", &Error{Kind: Internal, Hint: "the key is in no known state"}
	}
	if c.refuse != "" {
		return "", &Error{Kind: c.refuse}
	}
	return c.to, nil
}

// materialSpec says what a CMK of that spec is made of.
func (s KeySpec) materialSpec() hsm.MaterialSpec {
	switch s {
	case AliyunAES256:
		return hsm.AES256
	case AliyunSM4:
		return hsm.SM4
	}
	return ""
}
