package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/keyferry/keyferry/engine/byok"
)

// work is the import of one item.
type work struct {
	*bulk
	item   *item
	past   *past
	key    keyMetadata // once there is one
	before string      // its state then

	kcv, materialID string // of the material, as far as they are known here
}

// How long a request may be under way in a KMS after its connection is gone.
// keyferryd gives such a one up at once; what it waits for then is no more than
// a disk. To make a key again would be to make two; to import the same material
// again is merely not needed.
const (
	settleCreate = 10 * time.Second
	settleImport = 3 * time.Second
)

// newParameters is how often parameters for import are asked for anew, where
// the KMS no longer takes the ones it gave.
const newParameters = 3

// do imports the item. An error is why it failed, or an *abort.
func (w *work) do(ctx context.Context) (result, error) {
	if err := w.findKey(ctx); err != nil {
		return result{}, err
	}
	if err := w.checkKey(); err != nil {
		return result{}, err
	}
	var material []byte
	if w.item.materialFile != "" {
		var err error
		if material, err = w.item.readMaterial(w.std); err != nil {
			return result{}, err
		}
		defer wipe(material)
		if err := w.identify(material); err != nil {
			return result{}, err
		}
	} else {
		w.kcv, w.materialID = w.item.kcv, w.item.materialID
	}
	status := statusImported
	switch {
	case w.key.hasOther(w.materialID):
		return result{}, w.key.errHasOther()
	case w.holds(&w.key):
		if w.past.last.Name == "" {
			status = statusPresent
		}
	default:
		if err := w.imports(ctx, material); err != nil {
			return result{}, err
		}
		var err error
		if w.key, err = w.describe(ctx, w.key.KeyID); err != nil {
			return result{}, err
		}
	}
	return w.result(status)
}

// findKey describes the key to import into, and makes it first if need be.
func (w *work) findKey(ctx context.Context) (err error) {
	keyID := w.item.keyID
	if keyID == "" {
		keyID = w.past.keyID
	}
	if keyID == "" {
		if keyID = w.found[w.markOf(w.item)]; keyID == "" {
			if w.key, err = w.create(ctx); err != nil {
				return err
			}
			keyID = w.key.KeyID
		}
		if err := w.journal.add(result{Name: w.item.name, Line: w.item.line, KeyID: keyID, Status: statusCreated}); err != nil {
			return &abort{err}
		}
	}
	if w.key.KeyState == "" {
		w.key.KeyID = keyID // for the results, should it not be there
		k, err := w.describe(ctx, keyID)
		if err != nil {
			return err
		}
		w.key = k
	}
	w.before = w.key.KeyState
	return nil
}

// create makes a key, once. If it had to be found again, its KeyId is all that is
// known of it.
func (w *work) create(ctx context.Context) (keyMetadata, error) {
	mark := w.markOf(w.item)
	params := url.Values{
		"Origin": {origin}, "KeySpec": {w.item.specToMake()},
		"Description": {strings.TrimPrefix(w.item.description+" "+mark, " ")},
	}
	if w.item.protectionLevel != "" {
		params.Set("ProtectionLevel", w.item.protectionLevel)
	}
	var answer struct{ KeyMetadata keyMetadata }
	o := w.one("CreateKey", settleCreate, func(ctx context.Context) (bool, error) {
		found, err := w.search(ctx, map[string]bool{mark: true})
		answer.KeyMetadata = keyMetadata{KeyID: found[mark]}
		return found[mark] != "", err
	})
	err := w.once(ctx, o, params, &answer)
	return answer.KeyMetadata, err
}

// one is an action for this item. After a failure that was written down no
// earlier attempt is under way.
func (w *work) one(action string, settle time.Duration, happened func(context.Context) (bool, error)) *one {
	return &one{
		action: action, key: []string{w.item.name, strconv.Itoa(w.past.failures)}, settle: settle, happened: happened,
	}
}

// checkKey refuses a key that this material cannot be imported into.
func (w *work) checkKey() error {
	switch k := &w.key; {
	case k.Origin != origin:
		return withHint(fmt.Errorf("key %s is of origin %s", k.KeyID, k.Origin), "%s", hints["Unsupported.Origin"])
	case w.item.keySpec != "" && w.item.keySpec != k.KeySpec, w.item.makesKey() && w.item.specToMake() != k.KeySpec:
		return fmt.Errorf("key %s is of spec %s, not %s", k.KeyID, k.KeySpec, w.item.specToMake())
	case byok.MaterialLen(k.KeySpec) == 0:
		return fmt.Errorf("key %s is of spec %s, whose material this program cannot import", k.KeyID, k.KeySpec)
	}
	return nil
}

// identify measures raw material, which may have changed since the manifest was
// read.
func (w *work) identify(material []byte) (err error) {
	w.kcv, w.materialID, err = w.key.measure(material)
	switch {
	case err != nil:
		return err
	case w.item.kcv != "" && w.item.kcv != w.kcv:
		return errOtherKCV
	case w.item.materialID != "" && w.item.materialID != w.materialID:
		return errors.New("the material has another material id than the line's material_id")
	}
	return nil
}

// holds reports whether a key has this item's material, until the time that the
// item wants, so that there is nothing to do. What a KMS does not measure is
// known only of a key that had none before this run sent it, or before another
// run sent the same wrapped material: a file may have changed since.
func (w *work) holds(k *keyMetadata) bool {
	if k.KeyState != "Enabled" && k.KeyState != "Disabled" {
		return false
	}
	var until time.Time
	if k.MaterialExpireTime != "" {
		var err error
		if until, err = time.Parse(time.RFC3339, k.MaterialExpireTime); err != nil {
			return false
		}
	}
	if !until.Equal(w.item.expireAt) {
		return false
	}
	if k.KeyMaterialID != "" && w.materialID != "" {
		return k.KeyMaterialID == w.materialID
	}
	return w.before == "PendingImport" || w.past.state == "PendingImport" && w.past.digest == w.item.digest
}

// imports wraps the material, unless that is done, and imports it.
func (w *work) imports(ctx context.Context, material []byte) error {
	o := w.one("ImportKeyMaterial", settleImport, func(ctx context.Context) (bool, error) {
		k, err := w.describe(ctx, w.key.KeyID)
		return err == nil && w.holds(&k), err
	})
	o.harmless = true
	if material == nil {
		if err := w.start(); err != nil {
			return err
		}
		params := w.params()
		params.Set("EncryptedKeyMaterial", w.item.wrapped)
		params.Set("ImportToken", w.item.importToken)
		return w.explainImport(w.once(ctx, o, params, nil))
	}
	for try := 1; ; try++ {
		params := w.params()
		if err := w.wrap(ctx, material, params); err != nil {
			return err
		}
		err := w.once(ctx, o, params, nil)
		code := codeOf(err)
		if try == newParameters || code != "ExpiredImportToken" && code != "InvalidImportToken" {
			return w.explainImport(err)
		}
	}
}

// start writes down, before wrapped material is first sent, in what state the
// key was: what the material is may not be known here.
func (w *work) start() error {
	if w.past.state != "" && w.past.digest == w.item.digest {
		return nil
	}
	err := w.journal.add(result{Name: w.item.name, Line: w.item.line, KeyID: w.key.KeyID, Status: statusStarted, State: w.before, Digest: w.item.digest})
	if err != nil {
		return &abort{err}
	}
	return nil
}

// params are those of ImportKeyMaterial but for the material.
func (w *work) params() url.Values {
	params := importParams(w.key.KeyID, w.item.expireAt)
	if w.verify || w.item.wrapped != "" && w.materialID != "" {
		params.Set("ExpectKeyMaterialId", w.materialID)
	}
	if w.item.wrapped != "" && w.kcv != "" && w.key.KeySpec != byok.SM4 { // which some tokens cannot check
		params.Set("ExpectKeyCheckValue", w.kcv)
	}
	return params
}

// wrap gets parameters for import and wraps raw material under them.
func (w *work) wrap(ctx context.Context, material []byte, params url.Values) error {
	var answer parametersForImport
	err := w.repeat(ctx, "GetParametersForImport", url.Values{
		"KeyId": {w.key.KeyID}, "WrappingAlgorithm": {w.algorithm}, "WrappingKeySpec": {w.pairSpec},
	}, &answer)
	switch {
	case err == nil:
		w.offered.Store(true)
	case refuses(err, "Wrapping") && !w.offered.Load():
		// Else a key would be made for every item.
		return &abort{w.explainParameters(err)}
	default:
		return w.explainParameters(err)
	}
	return answer.wrap(w.algorithm, material, params)
}

// result compares what the KMS has now with what it was given.
func (w *work) result(status string) (result, error) {
	k := &w.key
	switch {
	case k.hasOther(w.materialID):
		return result{}, k.errMeasured("material id", k.KeyMaterialID, w.materialID)
	case k.KeyCheckValueAlgorithm == k.kcvAlgorithm() && w.kcv != "" && k.KeyCheckValue != w.kcv:
		return result{}, k.errMeasured("key check value", k.KeyCheckValue, w.kcv)
	}
	r := result{
		Status: status, KCV: w.kcv, KCVAlgorithm: k.kcvAlgorithm(), MaterialID: w.materialID,
		MaterialExpireTime: k.MaterialExpireTime, MeasuredByKMS: k.KeyMaterialID != "",
	}
	if r.MaterialID == "" {
		r.MaterialID = k.KeyMaterialID
	}
	if r.KCV == "" {
		r.KCV, r.KCVAlgorithm = k.KeyCheckValue, k.KeyCheckValueAlgorithm
	}
	return r, nil
}
