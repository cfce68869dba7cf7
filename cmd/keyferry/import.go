package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/byok"
)

// origin is that of keys whose material is imported.
const origin = "EXTERNAL"

type importOptions struct {
	conn            connection
	source          materialSource
	keyID           string
	keySpec         string
	description     string
	protectionLevel string
	algorithm       string
	pairSpec        string
	expire          string
	verify          bool
	receipt         string
	manifest        string
	results         string
	sameKMS         bool
	parallel        int
	cmd             *cobra.Command // knows the flags as they were given
}

func newImport(std *streams) *cobra.Command {
	var o importOptions
	cmd := &cobra.Command{
		Use:   "import [--key-id ID] [--in FILE]",
		Short: "Import key material into a key of the KMS",
		Long: `Import key material into a key of the KMS, a new one unless --key-id names one:
get a public key, wrap the material under it, and hand it over. Prints what
identifies the material, to be compared with what the KMS shows.

Once material was imported into a key, only the same can be imported again.

With --manifest, import what a file lists, each line of it a JSON object whose
values are strings:

  name                    tells the line apart; default: key_id
  key_id                  the key to import into; without it a new one is made
  key_spec                as --key-spec
  description             of a new key; a mark is added to it
  protection_level        of a new key
  material_file           raw material, relative to the manifest; or else
  encrypted_key_material  wrapped material in Base64, and
  import_token            the import token it is for; these two need key_id
  expire                  2027-01-31T00:00:00Z; default: never
  kcv, material_id        what the material must have, in hexadecimal

Mistakes in it are told by line and field before anything is sent. What became
of each line is in the results, JSON Lines, too. After a crash run the same
command again: it goes on where it ended, makes no key twice and imports nothing
twice. Lines that failed are tried again. The exit status is 10 plus the number
of lines that failed, 110 at most. More is in cmd/keyferry/MANIFEST.md.`,
		Example: `  keyferry import --in key.bin --credentials credentials.json --algorithm RSAES_OAEP_SHA_1
  keyferry import --in key.bin --key-id 2f9c8b1e-6d0a-4c55-9a43-1b7e5d3c0f21 --expire 90d
  keyferry import --manifest keys.jsonl --credentials credentials.json --parallel 16`,
		Args: noArguments,
		RunE: failing(func(ctx context.Context) error {
			if o.manifest == "" {
				return o.run(ctx, std)
			}
			if err := o.validate(); err != nil {
				return err
			}
			return o.runManifest(ctx, std)
		}),
	}
	o.conn.register(cmd)
	o.source.register(cmd)
	registerAlgorithm(cmd, &o.algorithm)
	f := cmd.Flags()
	o.cmd = cmd
	f.StringVar(&o.keyID, "key-id", "", "`KeyId` of the key to import into (default: a new key)")
	f.StringVar(&o.keySpec, "key-spec", "", "what the material is for: Aliyun_AES_256 (32 bytes) or Aliyun_SM4 (16 bytes) (default: that of the key; of a new one, Aliyun_AES_256)")
	f.StringVar(&o.description, "description", "", "`TEXT` that describes a new key")
	f.StringVar(&o.protectionLevel, "protection-level", "", "protection `LEVEL` of a new key: SOFTWARE or HSM (default: as the KMS decides)")
	f.StringVar(&o.pairSpec, "wrapping-key-spec", "", "`SPEC` of the public key to wrap under: "+strings.Join(pairSpecs, ", ")+" (default: RSA_2048, or EC_SM2 for SM2PKE)")
	f.StringVar(&o.expire, "expire", "", "`WHEN` the material expires: 2027-01-31T00:00:00Z, or 90d or 12h from now (default: never)")
	f.BoolVar(&o.verify, "verify", false, "have the KMS refuse material that it does not measure as this (keyferryd only)")
	f.StringVar(&o.receipt, "receipt", "", "write the receipt of the import to `FILE` (keyferryd only); to check it: keyferry receipt verify")
	f.StringVar(&o.manifest, "manifest", "", "import what the lines of `FILE` list")
	f.StringVar(&o.results, "results", "", "with --manifest, `FILE` for what became of each line, and to go on from (default: that of the manifest with .results added)")
	f.BoolVar(&o.sameKMS, "same-kms", false, "with --manifest, go on from results of an import into another --endpoint, as it is the same KMS: another node, or a new name")
	f.IntVar(&o.parallel, "parallel", defaultParallel, "with --manifest, import `N` at a time")
	for _, single := range []string{"in", "key-id", "key-spec", "description", "protection-level", "expire", "receipt"} {
		cmd.MarkFlagsMutuallyExclusive("manifest", single)
	}
	return cmd
}

// importReport is what an import answers.
type importReport struct {
	KeyID              string `json:"key_id"`
	State              string `json:"state"`
	KCV                string `json:"kcv"`
	KCVAlgorithm       string `json:"kcv_algorithm"`
	MaterialID         string `json:"material_id"`
	MaterialExpireTime string `json:"material_expire_time,omitempty"` // absent: never
	MeasuredByKMS      bool   `json:"measured_by_kms"`                // the KMS measured the same material id
}

func (o *importOptions) run(ctx context.Context, std *streams) error {
	if err := o.validate(); err != nil {
		return err
	}
	expireAt, err := parseExpire(o.expire, time.Now())
	if err != nil {
		return err
	}
	c, err := o.conn.client(std)
	if err != nil {
		return err
	}
	// Material first: no key is made for a file that is not there.
	material, err := o.source.read(std)
	if err != nil {
		return err
	}
	defer wipe(material)
	if o.receipt != "" { // nor for a receipt that has no place
		switch err := tryFile(o.receipt); {
		case errors.Is(err, os.ErrExist):
			return withHint(fmt.Errorf("%s is there already, nothing was imported", o.receipt), "give another name to --receipt")
		case err != nil:
			return withHint(fmt.Errorf("no receipt could be written, nothing was imported: %w", err), "give --receipt a name in a directory that is there and that you may write to")
		}
	}
	key, err := o.key(ctx, std, c, material)
	if err != nil {
		return err
	}
	report, err := o.importInto(ctx, c, key, material, expireAt)
	if err != nil {
		return err
	}
	if o.receipt != "" {
		if err := writeReceipt(ctx, std, c, o.receipt, url.Values{"KeyId": {report.KeyID}}); err != nil {
			return withHint(fmt.Errorf("the material was imported into key %s, but no receipt was written: %w", report.KeyID, err),
				"to fetch it: keyferry receipt get --key-id %s --out FILE", report.KeyID)
		}
	}
	return o.print(std, report)
}

// pairSpecs are those of the public keys that algorithms wrap under.
var pairSpecs = []string{"RSA_2048", "RSA_3072", "RSA_4096", pairSM2}

// pairSM2 is the spec for SM2PKE, and for it alone.
const pairSM2 = "EC_SM2"

func defaultPairSpec(algorithm string) string {
	if algorithm == byok.SM2PKE {
		return pairSM2
	}
	return "RSA_2048"
}

// validate finds what is wrong with the command line before anything is done:
// what the KMS refuses later leaves a key without material behind.
func (o *importOptions) validate() error {
	if o.pairSpec == "" {
		o.pairSpec = defaultPairSpec(o.algorithm)
	}
	switch {
	case o.keyID != "" && (o.description != "" || o.protectionLevel != ""):
		return usage("--description and --protection-level are for a new key, and --key-id names one")
	case o.keySpec != "" && byok.MaterialLen(o.keySpec) == 0:
		return unknownKeySpec(o.keySpec)
	case o.receipt == stdio || o.results == stdio:
		return usage("--receipt and --results are names of files: standard output has the report")
	case o.manifest == "" && o.results != "":
		return usage("--results goes with --manifest")
	case o.manifest == "" && o.sameKMS:
		return usage("--same-kms goes with --manifest")
	case !slices.Contains(algorithms, o.algorithm):
		return withHint(usage("unknown wrapping algorithm %q", o.algorithm), "give --algorithm as one of %s", strings.Join(algorithms, ", "))
	case !slices.Contains(pairSpecs, o.pairSpec):
		return withHint(usage("unknown wrapping key spec %q", o.pairSpec), "give --wrapping-key-spec as one of %s", strings.Join(pairSpecs, ", "))
	case (o.algorithm == byok.SM2PKE) != (o.pairSpec == pairSM2):
		return withHint(usage("%s does not wrap under a key of spec %s", o.algorithm, o.pairSpec), "%s goes with %s, all others with RSA", byok.SM2PKE, pairSM2)
	}
	return nil
}

// key is the key to import into, made if none is named, for which the
// material was checked.
func (o *importOptions) key(ctx context.Context, std *streams, c *client, material []byte) (keyMetadata, error) {
	if o.keyID == "" {
		keySpec := o.keySpec
		if keySpec == "" {
			keySpec = byok.AES256
		}
		if err := check(std, material, keySpec); err != nil {
			return keyMetadata{}, err
		}
		return o.create(ctx, c, keySpec)
	}
	key, err := describe(ctx, c, o.keyID)
	switch {
	case err != nil:
		return keyMetadata{}, err
	case key.Origin != origin:
		return keyMetadata{}, withHint(fmt.Errorf("key %s is of origin %s", key.KeyID, key.Origin), "%s", hints["Unsupported.Origin"])
	case o.keySpec != "" && o.keySpec != key.KeySpec:
		return keyMetadata{}, withHint(fmt.Errorf("key %s is of spec %s, not %s", key.KeyID, key.KeySpec, o.keySpec), "leave --key-spec out, or name another key")
	case byok.MaterialLen(key.KeySpec) == 0:
		return keyMetadata{}, fmt.Errorf("key %s is of spec %s, whose material this program cannot import", key.KeyID, key.KeySpec)
	}
	return key, check(std, material, key.KeySpec)
}

func (o *importOptions) create(ctx context.Context, c *client, keySpec string) (keyMetadata, error) {
	params := url.Values{"Origin": {origin}, "KeySpec": {keySpec}}
	if o.description != "" {
		params.Set("Description", o.description)
	}
	if o.protectionLevel != "" {
		params.Set("ProtectionLevel", o.protectionLevel)
	}
	var answer struct{ KeyMetadata keyMetadata }
	err := c.call(ctx, "CreateKey", params, &answer)
	if err == nil && answer.KeyMetadata.KeySpec != keySpec {
		err = fmt.Errorf("key %s was made with spec %s instead of %s", answer.KeyMetadata.KeyID, answer.KeyMetadata.KeySpec, keySpec)
	}
	return answer.KeyMetadata, err
}

func (o *importOptions) importInto(ctx context.Context, c *client, key keyMetadata, material []byte, expireAt time.Time) (importReport, error) {
	kcv, materialID, err := key.measure(material)
	if err != nil {
		return importReport{}, err
	}
	if key.hasOther(materialID) {
		return importReport{}, key.errHasOther()
	}
	report := importReport{KeyID: key.KeyID, KCV: kcv, KCVAlgorithm: key.kcvAlgorithm(), MaterialID: materialID}

	params := importParams(key.KeyID, expireAt)
	if o.verify {
		params.Set("ExpectKeyMaterialId", report.MaterialID)
		// A token without SM4 measures SM4 material, but not its check value;
		// the material id says all that it could.
		if key.KeySpec != byok.SM4 {
			params.Set("ExpectKeyCheckValue", report.KCV)
		}
	}
	if err := o.wrapFor(ctx, c, key.KeyID, material, params); err != nil {
		return importReport{}, o.explainNew(key.KeyID, err)
	}
	if err := c.call(ctx, "ImportKeyMaterial", params, nil); err != nil {
		return importReport{}, o.explainNew(key.KeyID, o.explainImport(err))
	}

	after, err := describe(ctx, c, key.KeyID)
	if err != nil {
		return importReport{}, fmt.Errorf("the material was imported into key %s, but then: %w", key.KeyID, err)
	}
	if after.hasOther(materialID) {
		return importReport{}, key.errMeasured("material id", after.KeyMaterialID, materialID)
	}
	report.State, report.MaterialExpireTime, report.MeasuredByKMS = after.KeyState, after.MaterialExpireTime, after.KeyMaterialID != ""
	return report, nil
}

// wrapFor gets parameters for import, wraps the material and adds what
// ImportKeyMaterial needs of both.
func (o *importOptions) wrapFor(ctx context.Context, c *client, keyID string, material []byte, params url.Values) error {
	var answer parametersForImport
	err := c.call(ctx, "GetParametersForImport", url.Values{
		"KeyId": {keyID}, "WrappingAlgorithm": {o.algorithm}, "WrappingKeySpec": {o.pairSpec},
	}, &answer)
	if err != nil {
		return o.explainParameters(err)
	}
	return answer.wrap(o.algorithm, material, params)
}

// explainParameters says what to try if the KMS refuses this algorithm with this
// spec. It is never tried unasked: the customer decides how a key travels.
func (o *importOptions) explainParameters(err error) error {
	var e *apiError
	if !errors.As(err, &e) || !refuses(err, "Wrapping") {
		return err
	}
	algorithm, pairSpec := o.instead(err)
	hint := fmt.Sprintf("the KMS does not offer %s with %s: try", o.algorithm, o.pairSpec)
	if algorithm != o.algorithm {
		hint += " --algorithm " + algorithm
	}
	if pairSpec != o.pairSpec {
		hint += " --wrapping-key-spec " + pairSpec
	}
	if e.Recommend != "" && !strings.Contains(e.Recommend, "://") {
		said := e.Recommend
		if refusal, list, ok := strings.Cut(said, "; it offers "); ok && strings.HasPrefix(refusal, "this server does not offer ") {
			said = "it offers " + list // the refusal was said
		}
		hint += " (" + oneLine(said) + ")"
	}
	return withHint(err, "%s", hint)
}

// offers are as keyferryd lists what it answers parameters for.
var offers = regexp.MustCompile(`\b(\w+) with (\w+)\b`)

// instead is what to try where the KMS refuses this algorithm with this spec: of
// what the error lists the one that is most like it, else the usual ones.
func (o *importOptions) instead(err error) (algorithm, pairSpec string) {
	var e *apiError
	best := 0
	if errors.As(err, &e) {
		for _, offer := range offers.FindAllStringSubmatch(e.Recommend, -1) {
			likeness := 1
			switch {
			case !slices.Contains(algorithms, offer[1]) || !slices.Contains(pairSpecs, offer[2]),
				offer[1] == o.algorithm && offer[2] == o.pairSpec:
				continue
			case offer[1] == o.algorithm:
				likeness = 3
			case offer[2] == o.pairSpec:
				likeness = 2
			}
			if likeness > best {
				best, algorithm, pairSpec = likeness, offer[1], offer[2]
			}
		}
	}
	switch {
	case best > 0:
		return algorithm, pairSpec
	case o.pairSpec != defaultPairSpec(o.algorithm):
		return o.algorithm, defaultPairSpec(o.algorithm)
	case o.algorithm == byok.OAEPSHA1:
		return byok.OAEPSHA256, defaultPairSpec(byok.OAEPSHA256)
	}
	return byok.OAEPSHA1, defaultPairSpec(byok.OAEPSHA1)
}

// explainImport knows the one refusal that --verify mends: keyferryd takes
// RSAES_PKCS1_V1_5 from some tokens only with an expectation.
func (o *importOptions) explainImport(err error) error {
	if !o.verify && refuses(err, "Expect") {
		return withHint(err, "with %s this KMS imports only what is expected: give --verify", o.algorithm)
	}
	return err
}

// refuses reports whether the KMS refused a parameter whose name begins so.
func refuses(err error, parameter string) bool {
	var e *apiError
	return errors.As(err, &e) && e.Code == "InvalidParameter" && strings.Contains(e.Message, parameter)
}

// explainNew says of a key that was made by this command that it is there, and
// how to go on with it, so that a second try does not make a second key.
func (o *importOptions) explainNew(keyID string, err error) error {
	if o.keyID != "" {
		return err
	}
	hint := "to go on: " + o.again(keyID, err)
	var hinted *hintedError
	if errors.As(err, &hinted) {
		hint = hinted.hint + "; " + hint
	}
	return withHint(fmt.Errorf("key %s was made, but nothing imported: %w", keyID, err), "%s", hint)
}

// again is the command line that goes on after an error with the key that was
// made. It holds no secret, as no flag does.
func (o *importOptions) again(keyID string, err error) string {
	algorithm, pairSpec := o.algorithm, o.pairSpec
	if refuses(err, "Wrapping") {
		algorithm, pairSpec = o.instead(err)
	}
	command := "keyferry import --key-id " + quote(keyID) + " --algorithm " + algorithm
	if pairSpec != defaultPairSpec(algorithm) {
		command += " --wrapping-key-spec " + pairSpec
	}
	command += o.given("in", "key-spec", "expire", "credentials", "endpoint", "region", "access-key-id", "access-key-secret-file", "ca-file")
	if o.conn.plainHTTP != nil {
		command += " --plain-http=" + strconv.FormatBool(*o.conn.plainHTTP)
	}
	if o.verify || refuses(err, "Expect") {
		command += " --verify"
	}
	return command
}

// given are those of the named flags that were given, as they were.
func (o *importOptions) given(names ...string) string {
	var text string
	for _, name := range names {
		if o.cmd.Flags().Changed(name) {
			text += " --" + name + " " + quote(o.cmd.Flags().Lookup(name).Value.String())
		}
	}
	return text
}

// quote makes a word of a shell's command line.
func quote(s string) string {
	plain := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-_./:+", r)
	}
	if s != "" && strings.TrimLeftFunc(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func (o *importOptions) print(std *streams, r importReport) error {
	expires := r.MaterialExpireTime
	if expires == "" {
		expires = "never"
	}
	measured := "not by this KMS: compare the key check value if it shows one"
	if r.MeasuredByKMS {
		measured = "the same material id, in the KMS"
	}
	return std.report(r,
		row{"KeyId", r.KeyID},
		row{"State", r.State},
		row{"Key check value", r.KCV + " (" + r.KCVAlgorithm + ")"},
		row{"Material id", r.MaterialID},
		row{"Measured", measured},
		row{"Material expires", expires},
	)
}
