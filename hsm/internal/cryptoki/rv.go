package cryptoki

import "fmt"

// RV is a PKCS#11 return value other than CKR_OK, as an error. It is a type of
// its own so that it cannot be mixed up with attributes and mechanisms.
type RV uint64

// Return values that are told apart; PKCS#11 v2.40 section 5.1.
const (
	OK                         RV = 0x000
	HostMemory                 RV = 0x002
	SlotIDInvalid              RV = 0x003
	GeneralError               RV = 0x005
	FunctionFailed             RV = 0x006
	ArgumentsBad               RV = 0x007
	AttributeReadOnly          RV = 0x010
	AttributeSensitive         RV = 0x011
	AttributeTypeInvalid       RV = 0x012
	AttributeValueInvalid      RV = 0x013
	ActionProhibited           RV = 0x01b
	DataInvalid                RV = 0x020
	DataLenRange               RV = 0x021
	DeviceError                RV = 0x030
	DeviceMemory               RV = 0x031
	DeviceRemoved              RV = 0x032
	EncryptedDataInvalid       RV = 0x040
	EncryptedDataLenRange      RV = 0x041
	FunctionNotSupported       RV = 0x054
	KeyHandleInvalid           RV = 0x060
	KeySizeRange               RV = 0x062
	KeyTypeInconsistent        RV = 0x063
	KeyFunctionNotPermitted    RV = 0x068
	KeyNotWrappable            RV = 0x069
	KeyUnextractable           RV = 0x06a
	MechanismInvalid           RV = 0x070
	MechanismParamInvalid      RV = 0x071
	ObjectHandleInvalid        RV = 0x082
	OperationActive            RV = 0x090
	OperationNotInitialized    RV = 0x091
	PINIncorrect               RV = 0x0a0
	PINInvalid                 RV = 0x0a1
	PINLenRange                RV = 0x0a2
	PINExpired                 RV = 0x0a3
	PINLocked                  RV = 0x0a4
	SessionClosed              RV = 0x0b0
	SessionCount               RV = 0x0b1
	SessionHandleInvalid       RV = 0x0b3
	TemplateIncomplete         RV = 0x0d0
	TemplateInconsistent       RV = 0x0d1
	TokenNotPresent            RV = 0x0e0
	TokenNotRecognized         RV = 0x0e1
	UnwrappingKeyHandleInvalid RV = 0x0f0
	UnwrappingKeySizeRange     RV = 0x0f1
	UnwrappingKeyType          RV = 0x0f2
	UserAlreadyLoggedIn        RV = 0x100
	UserNotLoggedIn            RV = 0x101
	UserPINNotInitialized      RV = 0x102
	UserTypeInvalid            RV = 0x103
	AnotherAlreadyLoggedIn     RV = 0x104
	WrappedKeyInvalid          RV = 0x110
	WrappedKeyLenRange         RV = 0x112
	WrappingKeyHandleInvalid   RV = 0x113
	BufferTooSmall             RV = 0x150
	NotInitialized             RV = 0x190
	AlreadyInitialized         RV = 0x191
)

var rvNames = map[RV]string{
	HostMemory: "HOST_MEMORY", SlotIDInvalid: "SLOT_ID_INVALID", GeneralError: "GENERAL_ERROR",
	FunctionFailed: "FUNCTION_FAILED", ArgumentsBad: "ARGUMENTS_BAD", AttributeReadOnly: "ATTRIBUTE_READ_ONLY",
	AttributeSensitive: "ATTRIBUTE_SENSITIVE", AttributeTypeInvalid: "ATTRIBUTE_TYPE_INVALID",
	AttributeValueInvalid: "ATTRIBUTE_VALUE_INVALID", ActionProhibited: "ACTION_PROHIBITED", DataInvalid: "DATA_INVALID",
	DataLenRange: "DATA_LEN_RANGE", DeviceError: "DEVICE_ERROR", DeviceMemory: "DEVICE_MEMORY",
	DeviceRemoved: "DEVICE_REMOVED", EncryptedDataInvalid: "ENCRYPTED_DATA_INVALID",
	EncryptedDataLenRange: "ENCRYPTED_DATA_LEN_RANGE", FunctionNotSupported: "FUNCTION_NOT_SUPPORTED",
	KeyHandleInvalid: "KEY_HANDLE_INVALID", KeySizeRange: "KEY_SIZE_RANGE", KeyTypeInconsistent: "KEY_TYPE_INCONSISTENT",
	KeyFunctionNotPermitted: "KEY_FUNCTION_NOT_PERMITTED", KeyNotWrappable: "KEY_NOT_WRAPPABLE", KeyUnextractable: "KEY_UNEXTRACTABLE",
	MechanismInvalid: "MECHANISM_INVALID", MechanismParamInvalid: "MECHANISM_PARAM_INVALID",
	ObjectHandleInvalid: "OBJECT_HANDLE_INVALID", OperationActive: "OPERATION_ACTIVE",
	OperationNotInitialized: "OPERATION_NOT_INITIALIZED", PINIncorrect: "PIN_INCORRECT", PINInvalid: "PIN_INVALID",
	PINLenRange: "PIN_LEN_RANGE", PINExpired: "PIN_EXPIRED", PINLocked: "PIN_LOCKED", SessionClosed: "SESSION_CLOSED",
	SessionCount: "SESSION_COUNT", SessionHandleInvalid: "SESSION_HANDLE_INVALID", TemplateIncomplete: "TEMPLATE_INCOMPLETE",
	TemplateInconsistent: "TEMPLATE_INCONSISTENT", TokenNotPresent: "TOKEN_NOT_PRESENT",
	TokenNotRecognized: "TOKEN_NOT_RECOGNIZED", UnwrappingKeyHandleInvalid: "UNWRAPPING_KEY_HANDLE_INVALID",
	UnwrappingKeySizeRange: "UNWRAPPING_KEY_SIZE_RANGE", UnwrappingKeyType: "UNWRAPPING_KEY_TYPE_INCONSISTENT",
	UserAlreadyLoggedIn: "USER_ALREADY_LOGGED_IN", UserNotLoggedIn: "USER_NOT_LOGGED_IN",
	UserPINNotInitialized: "USER_PIN_NOT_INITIALIZED", UserTypeInvalid: "USER_TYPE_INVALID",
	AnotherAlreadyLoggedIn: "USER_ANOTHER_ALREADY_LOGGED_IN", WrappedKeyInvalid: "WRAPPED_KEY_INVALID",
	WrappedKeyLenRange: "WRAPPED_KEY_LEN_RANGE", WrappingKeyHandleInvalid: "WRAPPING_KEY_HANDLE_INVALID",
	BufferTooSmall: "BUFFER_TOO_SMALL", NotInitialized: "CRYPTOKI_NOT_INITIALIZED",
	AlreadyInitialized: "CRYPTOKI_ALREADY_INITIALIZED",
}

// Error is the name of the value in the specification.
func (rv RV) Error() string {
	if name, ok := rvNames[rv]; ok {
		return "CKR_" + name
	}
	return fmt.Sprintf("CKR 0x%08X", uint64(rv))
}

// err makes OK the nil error.
func (rv RV) err() error {
	if rv == OK {
		return nil
	}
	return rv
}

// Fault says what a return value means for the session and the token.
type Fault int

// The faults, the worse the greater.
const (
	NoFault      Fault = iota // about the arguments, or ambiguous
	HandleFault               // an object handle died
	SessionFault              // the session is dead or in an unknown state
	TokenFault                // the token, or the login, is gone
	PINFault                  // the PIN was refused; trying again may lock the token
)

// Doubtful reports whether rv gives no reason that tells the input's fault from
// the token's.
func (rv RV) Doubtful() bool {
	switch rv {
	case OK:
		return false
	case GeneralError, FunctionFailed, DeviceError, DeviceMemory, HostMemory:
		return true
	}
	_, known := rvNames[rv]
	return !known
}

// Fault classifies rv. GENERAL_ERROR and FUNCTION_FAILED are NoFault: tokens
// answer them to undecryptable input, so only a known-answer operation tells.
func (rv RV) Fault() Fault {
	switch rv {
	case KeyHandleInvalid, ObjectHandleInvalid, UnwrappingKeyHandleInvalid, WrappingKeyHandleInvalid:
		return HandleFault
	case SessionClosed, SessionHandleInvalid, OperationActive, OperationNotInitialized, BufferTooSmall:
		return SessionFault
	case DeviceError, DeviceMemory, DeviceRemoved, HostMemory, TokenNotPresent, TokenNotRecognized, SlotIDInvalid,
		UserNotLoggedIn, NotInitialized:
		return TokenFault
	case PINIncorrect, PINInvalid, PINLenRange, PINExpired, PINLocked, UserPINNotInitialized:
		return PINFault
	}
	return NoFault
}
