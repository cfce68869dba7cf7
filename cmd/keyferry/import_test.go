package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// What the hint proposes is a pair that the KMS has, or else one that is usual.
func TestInstead(t *testing.T) {
	for _, tc := range []struct{ algorithm, pairSpec, recommend, want string }{
		{"RSAES_OAEP_SHA_256", "RSA_2048", "this server offers RSAES_OAEP_SHA_1 with RSA_3072, RSAES_OAEP_SHA_256 with RSA_3072", "RSAES_OAEP_SHA_256 with RSA_3072"},
		{"RSAES_OAEP_SHA_256", "RSA_4096", "it offers RSAES_OAEP_SHA_1 with RSA_2048, RSAES_OAEP_SHA_1 with RSA_4096, SM2PKE with EC_SM2", "RSAES_OAEP_SHA_1 with RSA_4096"},
		{"SM2PKE", "EC_SM2", "this server does not offer SM2PKE with EC_SM2; it offers RSAES_OAEP_SHA_1 with RSA_3072", "RSAES_OAEP_SHA_1 with RSA_3072"},
		{"RSAES_OAEP_SHA_256", "RSA_2048", "it offers x with y, RSAES_OAEP_SHA_256 with y", "RSAES_OAEP_SHA_1 with RSA_2048"},
		{"RSAES_OAEP_SHA_1", "RSA_3072", "", "RSAES_OAEP_SHA_1 with RSA_2048"},
		{"RSAES_OAEP_SHA_1", "RSA_2048", "https://kms.example/", "RSAES_OAEP_SHA_256 with RSA_2048"},
		{"SM2PKE", "EC_SM2", "", "RSAES_OAEP_SHA_1 with RSA_2048"},
	} {
		o := importOptions{algorithm: tc.algorithm, pairSpec: tc.pairSpec}
		algorithm, pairSpec := o.instead(&apiError{Code: "InvalidParameter", Recommend: tc.recommend})
		require.Equal(t, tc.want, algorithm+" with "+pairSpec, tc.recommend)
	}
	o := importOptions{algorithm: "RSAES_OAEP_SHA_1", pairSpec: "RSA_3072"}
	err := o.explainParameters(&apiError{
		Code: "InvalidParameter", Message: "The specified parameter WrappingAlgorithm is not valid.",
		Recommend: "this server does not offer RSAES_OAEP_SHA_1 with RSA_3072; it offers SM2PKE with EC_SM2",
	})
	var hinted *hintedError
	require.ErrorAs(t, err, &hinted)
	require.Equal(t, "the KMS does not offer RSAES_OAEP_SHA_1 with RSA_3072: try --algorithm SM2PKE --wrapping-key-spec EC_SM2 (it offers SM2PKE with EC_SM2)", hinted.hint)
}
