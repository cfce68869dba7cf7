package main

import (
	"context"
	"net/url"

	"github.com/spf13/cobra"
)

// keyMetadata is what DescribeKey and CreateKey answer, as far as it matters
// here. The last three are answered by keyferryd alone.
type keyMetadata struct {
	KeyID              string `json:"KeyId"`
	KeySpec            string
	KeyState           string
	Origin             string
	Description        string
	CreationDate       string
	DeleteDate         string
	MaterialExpireTime string

	KeyMaterialID          string `json:"KeyMaterialId"`
	KeyCheckValue          string
	KeyCheckValueAlgorithm string
}

// keyReport is keyMetadata as this program writes it.
type keyReport struct {
	KeyID              string `json:"key_id"`
	KeySpec            string `json:"key_spec"`
	State              string `json:"state"`
	Origin             string `json:"origin"`
	CreatedAt          string `json:"created_at"`
	DeleteAt           string `json:"delete_at,omitempty"`
	MaterialExpireTime string `json:"material_expire_time,omitempty"` // absent: never, or no material
	KCV                string `json:"kcv,omitempty"`
	KCVAlgorithm       string `json:"kcv_algorithm,omitempty"`
	MaterialID         string `json:"material_id,omitempty"`
}

func describe(ctx context.Context, c *client, keyID string) (keyMetadata, error) {
	var answer struct{ KeyMetadata keyMetadata }
	err := c.call(ctx, "DescribeKey", url.Values{"KeyId": {keyID}}, &answer)
	return answer.KeyMetadata, err
}

func newStatus(std *streams) *cobra.Command {
	var conn connection
	var keyID string
	cmd := &cobra.Command{
		Use:   "status --key-id ID",
		Short: "Show a key of the KMS and what is known of its material",
		Long: `Show a key of the KMS. keyferryd answers the key check value and the material
id as its token measured them; compare them with keyferry kcv and material-id.`,
		Example: "  keyferry status --key-id 2f9c8b1e-6d0a-4c55-9a43-1b7e5d3c0f21 --credentials credentials.json",
		Args:    noArguments,
		RunE:    failing(func(ctx context.Context) error { return status(ctx, std, &conn, keyID) }),
	}
	conn.register(cmd)
	cmd.Flags().StringVar(&keyID, "key-id", "", "`KeyId` of the key")
	markRequired(cmd, "key-id")
	return cmd
}

func status(ctx context.Context, std *streams, conn *connection, keyID string) error {
	c, err := conn.client(std)
	if err != nil {
		return err
	}
	k, err := describe(ctx, c, keyID)
	if err != nil {
		return err
	}
	kcv := k.KeyCheckValue
	if k.KeyCheckValueAlgorithm != "" {
		kcv += " (" + k.KeyCheckValueAlgorithm + ")"
	}
	expires := k.MaterialExpireTime
	if expires == "" && k.Origin == origin && (k.KeyState == "Enabled" || k.KeyState == "Disabled") {
		expires = "never" // in other states there may be no material
	}
	return std.report(
		keyReport{
			KeyID: k.KeyID, KeySpec: k.KeySpec, State: k.KeyState, Origin: k.Origin,
			CreatedAt: k.CreationDate, DeleteAt: k.DeleteDate, MaterialExpireTime: k.MaterialExpireTime,
			KCV: k.KeyCheckValue, KCVAlgorithm: k.KeyCheckValueAlgorithm, MaterialID: k.KeyMaterialID,
		},
		row{"KeyId", k.KeyID},
		row{"Key spec", k.KeySpec},
		row{"Origin", k.Origin},
		row{"State", k.KeyState},
		row{"Created", k.CreationDate},
		row{"To be deleted", k.DeleteDate},
		row{"Material expires", expires},
		row{"Key check value", kcv},
		row{"Material id", k.KeyMaterialID},
	)
}
