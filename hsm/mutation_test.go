package hsm_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// slow reports whether a run may take minutes: KEYFERRY_SLOW=1.
func slow() bool { return os.Getenv("KEYFERRY_SLOW") == "1" }

// Damaged blobs of every kind have one answer, and leave neither an object nor
// a session behind, nor a token that works less well.
func TestMutatedBlobs(t *testing.T) {
	// In slow runs 10,000 and more by OAEP, by PKCS#1 v1.5 and by SM2.
	oaep, pkcs1, sm2pke := 75, 75, 75
	if slow() {
		oaep, pkcs1, sm2pke = 5_000, 10_000, 3_400
	}
	soft := softhsm.New(t, softhsm.WithKeys())
	cfg := soft.Config()
	cfg.AllowPKCS1v15 = true
	for alg, each := range map[hsm.Algorithm]int{hsm.OAEPSHA1: oaep, hsm.OAEPSHA256: oaep, hsm.PKCS1v15: pkcs1} {
		t.Run(string(alg), func(t *testing.T) {
			b, end := newMutationBench(t, soft, cfg, hsm.RSA2048, alg)
			b.damage(t, each, [][]byte{b.wrap(t, random(32)), b.wrap(t, random(32)), b.wrap(t, random(16))})
			end()
		})
	}
	// Profiles in which a token has both layouts, and only one of them: what
	// comes in the other is rewritten.
	both := hsm.BuiltinProfiles()[0]
	raw, asn1 := both, both
	raw.Name, raw.SM2.DER = "only raw", 0
	asn1.Name, asn1.SM2.Raw = "only ASN.1", 0
	cfg.Profiles = []hsm.Profile{raw, asn1}
	for _, profile := range []string{both.Name, raw.Name, asn1.Name} {
		t.Run("SM2PKE "+profile, func(t *testing.T) {
			needSM(t, soft)
			cfg := cfg
			cfg.Profile = profile
			b, end := newMutationBench(t, soft, cfg, hsm.ECSM2, hsm.SM2PKE)
			var blobs [][]byte
			for _, n := range []int{32, 32, 16} {
				raw := b.wrap(t, random(n))
				asn1, err := sm2.PlainCiphertext2ASN1(raw, sm2.C1C3C2)
				require.NoError(t, err)
				blobs = append(blobs, raw, asn1)
			}
			b.damage(t, sm2pke, blobs)
			end()
		})
	}
}

// newMutationBench opens the token with one pair; end closes it and counts.
func newMutationBench(t *testing.T, soft *softhsm.Token, cfg hsm.Config, spec hsm.PairSpec, alg hsm.Algorithm) (b *bench, end func()) {
	t.Helper()
	tap := hsmtest.On(t, soft.Module)
	b = &bench{soft: soft, token: open(t, cfg)}
	if err := b.token.Offers(spec, alg); err != nil {
		t.Skipf("%s: %v", soft.Module, err)
	}
	if alg == hsm.SM2PKE {
		b.pair, b.sm2 = newSM2Pair(t, b.token)
	} else {
		b.pair, b.pub = newPair(t, b.token, alg)
	}
	p, s := user(t, soft)
	before := find(t, p, s)
	return b, func() {
		b.works(t)
		require.ElementsMatch(t, before, find(t, p, s), "objects")
		require.NoError(t, p.CloseSession(s))
		require.NoError(t, b.token.Close())
		require.Equal(t, tap.Calls()["C_OpenSession"], tap.Calls()["C_CloseSession"])
	}
}

// damage imports that many mutants of good blobs.
func (b *bench) damage(t testing.TB, times int, good [][]byte) {
	t.Helper()
	seed := [2]uint64{rand.Uint64(), rand.Uint64()}
	r := rand.New(rand.NewPCG(seed[0], seed[1]))
	var known []hsm.Identity
	for _, blob := range good {
		for _, spec := range []hsm.MaterialSpec{hsm.AES256, hsm.SM4} {
			req := b.request(blob)
			req.Spec = spec
			if out, err := b.token.Import(context.Background(), req); err == nil {
				known = append(known, out.Identity)
			}
		}
	}
	require.Len(t, known, len(good))
	for i := range times {
		blob := mutant(r, good)
		if slices.ContainsFunc(good, func(g []byte) bool { return bytes.Equal(g, blob) }) {
			continue
		}
		req := b.request(blob)
		req.Spec = []hsm.MaterialSpec{hsm.AES256, hsm.SM4}[i%2]
		out, err := b.token.Import(context.Background(), req)
		if err == nil && b.pair.Algorithm == hsm.PKCS1v15 && b.token.ImplicitRejection() {
			require.NotContains(t, known, out.Identity)
			continue
		}
		require.Equal(t, hsm.ErrInvalidMaterial, err, "mutant %d of seed %d: %x", i, seed, blob)
		require.Zero(t, out)
	}
}

// mutant damages one of the blobs in up to four ways.
func mutant(r *rand.Rand, good [][]byte) []byte {
	blob := slices.Clone(good[r.IntN(len(good))])
	n := len(blob)
	for range 1 + r.IntN(4) {
		if len(blob) == 0 {
			break
		}
		at := r.IntN(len(blob))
		if r.IntN(3) == 0 {
			at = r.IntN(min(len(blob), 8)) // where lengths and tags are
		}
		switch r.IntN(8) {
		case 0, 1:
			blob[at] ^= 1 << r.IntN(8)
		case 2:
			blob[at] = byte(r.Uint32())
		case 3:
			blob[at] = []byte{0, 1, 2, 4, 0x30, 0x7f, 0x80, 0x81, 0x82, 0x84, 0xff}[r.IntN(11)]
		case 4:
			blob = blob[:at]
		case 5:
			blob = append(blob, random(1+r.IntN(40))...)
		case 6:
			blob = slices.Delete(blob, at, min(len(blob), at+1+r.IntN(4)))
		case 7:
			other := good[r.IntN(len(good))]
			blob = append(blob[:at], other[min(at, len(other)):]...)
		}
	}
	if r.IntN(4) > 0 { // of another length it may go no further than this process
		blob = append(blob, make([]byte, max(0, n-len(blob)))...)[:n]
	}
	return blob
}
