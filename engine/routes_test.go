package engine_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
)

// route is how material comes in: what it is for, and how it is wrapped.
type route struct {
	spec engine.KeySpec
	pair hsm.PairSpec
	alg  hsm.Algorithm
}

// defaultRoute is that of every test that does not go over all routes.
var defaultRoute = route{engine.AliyunAES256, hsm.RSA2048, hsm.OAEPSHA1}

// material is new material for a route.
func (r route) material() []byte { return randomBytes(r.len()) }

func (r route) len() int { return byok.MaterialLen(string(r.spec)) }

// onEveryRoute runs a test for both key specs and every wrapping algorithm of
// the published API. What the token lacks is refused by name. PKCS#1 v1.5 has a
// house to itself, because its pairs are not shared.
func onEveryRoute(t *testing.T, test func(t *testing.T, h *house), settings ...func(*house)) {
	t.Helper()
	shared := newHouse(t, settings...)
	pkcs1 := newHouse(t, append(settings, withToken(pkcs1Token()), withPairs(4))...)
	offered := pkcs1.Algorithms()
	for _, spec := range []engine.KeySpec{engine.AliyunAES256, engine.AliyunSM4} {
		for _, o := range []engine.WrappingOffer{
			{Spec: hsm.RSA2048, Algorithm: hsm.OAEPSHA1},
			{Spec: hsm.RSA2048, Algorithm: hsm.OAEPSHA256},
			{Spec: hsm.RSA2048, Algorithm: hsm.PKCS1v15},
			{Spec: hsm.ECSM2, Algorithm: hsm.SM2PKE},
		} {
			t.Run(string(spec)+"/"+string(o.Algorithm), func(t *testing.T) {
				h := shared
				if o.Algorithm == hsm.PKCS1v15 {
					h = pkcs1
				}
				h.route = route{spec, o.Spec, o.Algorithm}
				if !containsOffer(offered, o) {
					_, err := h.GetParametersForImport(t.Context(), h.newKey(t, spec), o.Spec, o.Algorithm)
					require.Contains(t, requireKind(t, engine.InvalidParameter, err).Hint, string(o.Algorithm))
					t.Skipf("this token does not do %s", o.Algorithm)
				}
				test(t, h)
			})
		}
	}
}

func containsOffer(offers []engine.WrappingOffer, offer engine.WrappingOffer) bool {
	for _, o := range offers {
		if o == offer {
			return true
		}
	}
	return false
}

// needUse skips a test that uses SM4 material, on a token that cannot.
func (h *house) needUse(t *testing.T) {
	t.Helper()
	if h.route.spec == engine.AliyunSM4 && h.cfg.Token.Usable(hsm.SM4) != nil {
		keyID := h.newKey(t, engine.AliyunSM4)
		h.importInto(t, keyID, h.route.material())
		_, err := h.Encrypt(t.Context(), keyID, []byte("x"), nil)
		require.Contains(t, requireKind(t, engine.UnsupportedOp, err).Hint, "SM4")
		t.Skip("this token has no SM4")
	}
}

// input is the request of a customer who wraps material as the house's route
// says. Where the token answers damaged PKCS#1 v1.5 with a random key, the
// customer says what to expect.
func (h *house) input(tb testing.TB, params engine.ImportParameters, material []byte) engine.ImportInput {
	tb.Helper()
	in := inputFor(tb, params, h.route.alg, material)
	if h.route.alg == hsm.PKCS1v15 && h.cfg.Token.ImplicitRejection() {
		id, err := byok.MaterialID(params.KeyID, material)
		require.NoError(tb, err)
		in.ExpectMaterialID = id[:]
	}
	return in
}

// Data keys and texts, by every kind of material however it came in.
func TestUseOnEveryRoute(t *testing.T) {
	onEveryRoute(t, func(t *testing.T, h *house) {
		h.needUse(t)
		keyID, material := h.newKey(t, h.route.spec), h.route.material()
		imported := h.importInto(t, keyID, material)
		kcv, err := byok.KCV(string(h.route.spec), material)
		require.NoError(t, err)
		require.Equal(t, kcv, imported.CheckValue.Value)
		h.useAll(t, keyID)
		h.reopen(t)
		h.useAll(t, keyID)
	})
}
