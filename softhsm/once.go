package softhsm

import "os"

// secondRunEnv is set by test.sh when it runs tests again on another token.
const secondRunEnv = "KEYFERRY_SECOND_RUN"

// Once is called by tests that show nothing about the token: of the two runs
// of "make test" the one on the distribution's SoftHSM2 is enough for them.
func Once(t interface {
	Helper()
	Skip(args ...any)
},
) {
	t.Helper()
	if os.Getenv(secondRunEnv) != "" {
		t.Skip(secondRunEnv + " is set: it shows nothing about the token, and was run on the distribution's SoftHSM2")
	}
}
