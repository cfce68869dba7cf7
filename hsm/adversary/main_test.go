// Package adversary is a thief: with the user PIN, the database and, where it
// is said, the SO PIN or the token's files in hand, it attacks by PKCS#11 what
// hsm.Init, GeneratePair, Import and OpenMaterial really make.
//
// Every attempt has a name, is counted, and must be refused by the token
// itself with a return value of the class that is expected; the server has no
// part in it. What a stock SoftHSM2 cannot refuse is listed in
// softhsm.KnownHoles: it must go through there, and be refused by our build.
//
// Names begin with where an attack is from: T, O, S and D are those of
// softhsm.KnownHoles and of the rules that hsm's templates follow; further
//
//	clulow    Clulow: On the Security of PKCS #11, CHES 2003
//	tookan    Bortolozzo, Centenaro, Focardi, Steel: Attacking and Fixing
//	          PKCS#11 Security Tokens, CCS 2010
//	dks       Delaune, Kremer, Steel: Formal Security Analysis of PKCS#11 and
//	          Proprietary Extensions, JCS 2010
//	bardou    Bardou, Focardi, Kawamoto, Simionato, Steel, Tsay: Efficient
//	          Padding Oracle Attacks on Cryptographic Hardware, CRYPTO 2012
//	manger    Manger: A Chosen Ciphertext Attack on RSA-OAEP, CRYPTO 2001
//
// KEYFERRY_SLOW=1 races longer and conjures more, KEYFERRY_RACES=1 races at all.
package adversary

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if what := os.Getenv(accompliceEnv); what != "" {
		os.Exit(accomplice(what))
	}
	goleak.VerifyTestMain(m)
}

// racing reports whether the attacks run that race the token in memory.
func racing() bool { return os.Getenv("KEYFERRY_RACES") == "1" }

// slow reports whether a run may take minutes.
func slow() bool { return os.Getenv("KEYFERRY_SLOW") == "1" }

// tries is how often a race or a guess is tried.
func tries(fast, inSlow int) int {
	if slow() {
		return inSlow
	}
	return fast
}
