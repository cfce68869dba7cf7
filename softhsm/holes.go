package softhsm

// Hole is something that a thief with the user PIN can do although every
// attribute of every key forbids it, or that no attribute can forbid. The
// README and "keyferryd doctor" say it in the same words.
type Hole struct {
	// ID is short and never given to another hole. T is theft, O an oracle, S
	// substitution or forgery, D denial of service.
	ID string
	// Limit is one sentence for whoever operates the token.
	Limit string
	// Closed says by what our own build of SoftHSM2 (softhsm/patches) closes
	// it; empty if nothing does on a software token.
	Closed string
	// Shown is the package whose tests go through the hole on a stock
	// SoftHSM2, and find it closed on ours, so that this list stays true.
	Shown string
}

const (
	shownByThief    = "hsm/adversary"
	shownByDatabase = "engine"
)

// What C_GetInfo says of stock SoftHSM2 2.6.1, which has KnownHoles, and of our
// build, in libraryDescription (patches/0012-name.patch).
const (
	Manufacturer     = "SoftHSM"
	StockDescription = "Implementation of PKCS11"
	StockVersion     = "2.6"
	OurDescription   = "SoftHSM with Keyferry's patches"
)

// KnownHoles are those of stock SoftHSM2 2.6.1. A hole that tests find and
// that is not listed here fails them, and so does one that is listed and that
// they do not find.
var KnownHoles = []Hole{
	{
		ID: "T9", Shown: shownByThief,
		Limit:  "Stock SoftHSM2 reads the template of C_UnwrapKey again after it was checked, so that a process with the PIN that loads the module reads what it unwraps.",
		Closed: "C_UnwrapKey works on its own copy of the template",
	},
	{
		ID: "T12", Shown: shownByThief,
		Limit: "Stock SoftHSM2 shows objects before they have all of their attributes, so that a process with the PIN that loads the module makes a copy of " +
			"the vault key without its guards and opens every sealed key.",
		Closed: "objects are found only when they are complete",
	},
	{
		ID: "T13", Shown: shownByThief,
		Limit:  "Stock SoftHSM2 reads the mechanism again after it was checked, so that RSAES_OAEP pairs answer to PKCS#1 v1.5, too, and are the padding oracle that they must not be.",
		Closed: "every call works on its own copy of the mechanism",
	},
	{
		ID: "T14", Shown: shownByThief,
		Limit: "Stock SoftHSM2 lets another session change an object while C_UnwrapKey makes it, so that a process with the PIN that loads the module reads " +
			"what customers have wrapped while its pair lives.",
		Closed: "objects are found only when they are complete",
	},
	{
		ID: "T15", Shown: shownByThief,
		Limit: "Stock SoftHSM2 takes keys of one token in sessions of another, so that whoever has the PIN makes a token of their own, a trusted key of a known " +
			"value there, and reads what customers have wrapped while its pair lives.",
		Closed: "handles mean something only in sessions of the token that the object is on",
	},
	{
		ID: "T16", Shown: shownByThief,
		Limit: "Stock SoftHSM2 reads the handle that C_UnwrapKey returns again before it stores the value, so that a process with the PIN that loads the module " +
			"has every sealed key stored in an object that it can read.",
		Closed: "every call that makes a key works on its own copy of the handle",
	},
	{
		ID: "O3", Shown: shownByThief,
		Limit:  "Stock SoftHSM2 digests keys that must not be revealed, by which two keys are compared and guesses checked; keys of full length stay unknown.",
		Closed: "C_DigestKey refuses keys that are sensitive or not extractable",
	},
	{
		ID: "O8", Shown: shownByThief,
		Limit:  "Stock SoftHSM2 finds keys by values that must not be revealed, by which guesses are checked; keys of full length stay unknown.",
		Closed: "C_FindObjectsInit does not compare what must not be revealed",
	},
	{
		ID: "D3", Shown: shownByThief,
		Limit:  "Stock SoftHSM2 begins to sign by RSA, DSA or ECDSA with secret keys, which crashes the process that does so.",
		Closed: "C_SignInit refuses keys that are no private keys",
	},

	{
		ID: "T6", Shown: shownByThief,
		Limit: "Whoever has the SO PIN sets the user PIN, makes a trusted key of a value they know and reads what customers have wrapped while its pair lives: " +
			"the SO PIN is not kept on the host.",
	},
	{
		ID: "T10", Shown: shownByThief,
		Limit: "Attributes in the files of a software token are in the clear and unauthenticated: whoever holds a copy of the files and a PIN edits the copy " +
			"and reads every key.",
	},
	{
		ID: "T17", Shown: shownByThief,
		Limit: "SoftHSM2 never locks a token, and whoever has its files tries some thousand PINs a second and processor: only PINs of random characters hold.",
	},
	{
		ID: "T18", Shown: shownByDatabase,
		Limit: "Deletion is final only as far as no backup of the database survives together with the token, or a backup of it, whose vault key opens the database.",
	},
	{
		ID: "T11", Shown: shownByThief,
		Limit: "RSAES_PKCS1_V1_5 cannot be made safe against the PIN: the unwrap of a living pair is a padding oracle that opens what was wrapped under it.",
	},
	{
		ID: "O5", Shown: shownByThief,
		Limit: "Whoever has the PIN and the database uses every key: they decrypt with it, though they do not learn it.",
	},
	{
		ID: "O6", Shown: shownByThief,
		Limit: "Sealing is deterministic: equal key material shows as equal blobs in the database.",
	},
	{
		ID: "S3", Shown: shownByDatabase,
		Limit: "Whoever writes to the database puts back rows that were there before, and deleted key material with them: only an import log outside the database shows it.",
	},
	{
		ID: "S4", Shown: shownByThief,
		Limit: "Whoever has the PIN authenticates rows, signs import tokens and receipts, and seals keys that they know, as the server does.",
	},
	{
		ID: "D1", Shown: shownByThief,
		Limit: "Whoever has the PIN destroys wrapping pairs and changes the PIN; only the vault, the MAC key and the receipt key cannot be destroyed but with the whole token.",
	},
	{
		ID: "D4", Shown: shownByThief,
		Limit: "Whoever reaches the module, with a PIN or without, stores public objects on the token until its disk is full.",
	},
	{
		ID: "D2", Shown: shownByThief,
		Limit: "Whoever has the PIN makes copies of the vault key; a copy is guarded as the key is, cannot be destroyed, and outlives a vault that is retired.",
	},
}
