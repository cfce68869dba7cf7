package adversary

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm/adversary/thief"
	"github.com/keyferry/keyferry/softhsm"
)

// verdict is the answer that an attempt must get.
type verdict struct {
	refusals []pkcs11.Error // one of these, from the token
	server   error          // or this, from hsm, where the thief waits for the server
	hole     string         // of softhsm.KnownHoles: it goes through, unless this is our build and closes it
	luck     bool           // a race, which may be lost where it could be won
	control  bool           // it goes through, or refusals of its like prove nothing
}

func refused(by ...pkcs11.Error) verdict { return verdict{refusals: by} }

// byServer is for attempts that the server must notice.
func byServer(err error) verdict { return verdict{server: err} }

// hole is for attempts that go through where softhsm.KnownHoles says so, and
// are refused by one of these elsewhere.
func hole(id string, by ...pkcs11.Error) verdict { return verdict{refusals: by, hole: id} }

// race is a hole that takes luck. A race that is lost returns errLost.
func race(id string) verdict { return verdict{hole: id, luck: true} }

var control = verdict{control: true}

// The classes of refusal, as narrow as SoftHSM2 lets them be: a refusal for a
// malformed argument would prove nothing.
var (
	secretKept = refused(pkcs11.CKR_ATTRIBUTE_SENSITIVE)
	noUse      = refused(pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, pkcs11.CKR_KEY_TYPE_INCONSISTENT,
		pkcs11.CKR_FUNCTION_NOT_SUPPORTED)
	frozen = refused(pkcs11.CKR_ACTION_PROHIBITED)
	pinned = refused(pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID,
		pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_TEMPLATE_INCOMPLETE)
	notOpening = refused(pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_WRAPPED_KEY_INVALID, pkcs11.CKR_WRAPPED_KEY_LEN_RANGE)
)

// Outcomes that are no errors of the token's.
var (
	errHarmless = errors.New("went through, and what came of it is no less guarded than it should be")
	errLost     = errors.New("the race was lost")
)

// Refusals that are no return values of PKCS#11.
const (
	errNotFound   = pkcs11.Error(pkcs11.CKR_VENDOR_DEFINED + 1 + iota) // a search found nothing
	errProvenance                                                      // LOCAL, ALWAYS_SENSITIVE, NEVER_EXTRACTABLE: not all are true
	errNotRead                                                         // a value was not to be read
)

// rv is a return value as an error.
func rv(code thief.RV) error {
	if code == pkcs11.CKR_OK {
		return nil
	}
	return pkcs11.Error(code)
}

// report is what all groups on one module did.
type report struct {
	ours              bool // the module is our build of SoftHSM2
	lines             []string
	attempts, refused int
	shown, unlucky    map[string]bool // holes
}

// closes reports whether this module closes a hole.
func (r *report) closes(id string) bool {
	i := slices.IndexFunc(softhsm.KnownHoles, func(h softhsm.Hole) bool { return h.ID == id })
	if i < 0 {
		panic("softhsm.KnownHoles has no " + id)
	}
	return r.ours && softhsm.KnownHoles[i].Closed != ""
}

// group is a number of attempts of one kind on one scene.
type group struct {
	*scene
	t     *testing.T
	names map[string]bool

	attempts, refused, harmless int
	through                     map[string]int // by hole
}

// inGroup makes the attempts of one group and says in a line what came of them.
func inGroup(t *testing.T, s *scene, name string, attempts func(*group)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		g := &group{scene: s, t: t, names: map[string]bool{}, through: map[string]int{}}
		attempts(g)
		require.NotZero(t, g.attempts)
		line := fmt.Sprintf("%-24s %5d attempts, %5d refused, %3d harmless", name, g.attempts, g.refused, g.harmless)
		for _, h := range softhsm.KnownHoles {
			if n := g.through[h.ID]; n > 0 {
				line += fmt.Sprintf(", %d through %s", n, h.ID)
				s.report.shown[h.ID] = true
			}
		}
		s.report.lines = append(s.report.lines, line)
		s.report.attempts += g.attempts
		s.report.refused += g.refused
	})
}

// try makes one attempt: do returns nil if it went through.
func (g *group) try(name string, want verdict, do func() error) {
	g.t.Helper()
	if want.control {
		require.NoError(g.t, do(), "control: %s", name)
		return
	}
	if g.names[name] {
		g.t.Errorf("two attempts are named %q", name)
	}
	g.names[name] = true
	g.attempts++
	err := do()
	switch {
	case err == nil:
		if want.hole == "" || g.report.closes(want.hole) {
			g.t.Errorf("%s: went through", name)
		}
		g.through[want.hole]++
	case errors.Is(err, errHarmless):
		g.harmless++
	case want.luck && errors.Is(err, errLost):
		g.refused++
		if !g.report.closes(want.hole) {
			g.t.Logf("%s: not reproduced this time", name)
			g.report.unlucky[want.hole] = true
		}
	case want.expects(err):
		g.refused++
		if want.hole != "" && !g.report.closes(want.hole) {
			g.t.Errorf("%s: this token refuses (%v), but hole %s is listed for it", name, err, want.hole)
		}
	default:
		g.t.Errorf("%s: %v, which was not expected", name, err)
	}
}

func (v verdict) expects(err error) bool {
	var code pkcs11.Error
	return v.server != nil && errors.Is(err, v.server) || errors.As(err, &code) && slices.Contains(v.refusals, code)
}
