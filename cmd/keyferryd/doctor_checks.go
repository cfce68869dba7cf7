package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
)

// checkConfig looks at the file itself.
func (d *diagnosis) checkConfig(cfg *config, path string) {
	if err := cfg.validateUnpinned(); err != nil { // what is missing in the pins is said where the keys are
		for _, line := range strings.Split(err.Error(), "\n") {
			d.problem(line, "correct it in %s", path)
		}
	}
	if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o022 != 0 {
		d.problem(fmt.Sprintf("%s can be written by others (mode %04o), and says which token and keys are trusted", path, info.Mode().Perm()), "chmod go-w %s", path)
	}
	if cfg.AllowPlainHTTP && cfg.TLS == nil {
		d.warn("plaintexts can be read on the way: plain HTTP is served beyond loopback", "set tls, unless TLS ends in front of this server")
	}
	if cfg.Token.AllowPKCS1v15 {
		d.warn("RSAES_PKCS1_V1_5 cannot be made safe against whoever has the PIN", "take token.allow_pkcs1_v15 out unless a customer has nothing else")
	}
}

// checkFiles looks at secrets and certificates.
func (d *diagnosis) checkFiles(ctx context.Context, cfg *config) {
	files := map[string]int{} // and how many bytes they must have
	if cfg.Token.UserPINFile != "" {
		files[cfg.Token.UserPINFile] = hsm.MinPINLen
	}
	for _, key := range cfg.AccessKeys {
		if key.SecretFile != "" {
			files[key.SecretFile] = minSecretLen
		}
	}
	for path, least := range files {
		secret, err := readSecret(path, slog.New(slog.DiscardHandler))
		n := len(secret)
		clear(secret)
		info, statErr := os.Stat(path)
		switch {
		case err != nil:
			d.problem(err.Error(), "make it a file of mode 0600 that holds the secret")
		case n < least:
			d.problem(fmt.Sprintf("what %s holds has fewer than %d characters and can be guessed", path, least), "replace it by 24 random bytes in base64")
		case statErr == nil && info.Mode().Perm()&0o044 != 0:
			d.warn(fmt.Sprintf("%s can be read by other users of this machine (mode %04o)", path, info.Mode().Perm()), "chmod 600 %s", path)
		}
	}
	if cfg.TLS == nil {
		return
	}
	serving, err := cfg.serverTLS()
	if err != nil {
		d.problem(err.Error(), "correct tls.cert_file and tls.key_file")
		return
	}
	leaf, err := x509.ParseCertificate(serving.Certificates[0].Certificate[0])
	switch left := time.Until(leaf.NotAfter); {
	case err != nil || ctx.Err() != nil:
	case left < 0:
		d.problem(fmt.Sprintf("the certificate of %s ended on %s", cfg.TLS.CertFile, leaf.NotAfter.Format(time.DateOnly)), "renew it")
	case left < 30*24*time.Hour:
		d.warn(fmt.Sprintf("the certificate of %s ends on %s", cfg.TLS.CertFile, leaf.NotAfter.Format(time.DateOnly)), "renew it")
	}
}

// checkStore looks whether the database is there. A file of SQLite is not
// opened: a server may be using it, and opening it writes.
func (d *diagnosis) checkStore(ctx context.Context, cfg *config) {
	if cfg.Store.validate() != nil {
		return // said already
	}
	if cfg.Store.Postgres != nil {
		db, err := openStore(ctx, &cfg.Store, slog.New(slog.DiscardHandler))
		if err == nil {
			err = db.Close()
		}
		var known *adviceError
		switch {
		case errors.As(err, &known):
			d.problem(known.What, "%s", known.Do)
		case err != nil:
			d.problem(err.Error(), "correct store.postgres")
		}
		return
	}
	path := cfg.Store.SQLite
	file, err := os.Open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && cfg.Token.Pins.Serial == "":
		d.Next = append(d.Next, fmt.Sprintf("make the database %s", path))
		return
	case errors.Is(err, fs.ErrNotExist):
		d.problem(fmt.Sprintf("there is no database at %s, although token.pins says that init was run", path),
			"restore it, or on a new server make it with %q", "keyferryd init")
		return
	case err != nil:
		d.problem(err.Error(), "run this as the user who serves, and let that user read and write the database")
		return
	}
	defer func() { _ = file.Close() }()
	head := make([]byte, 16)
	if n, err := file.Read(head); n > 0 && (err != nil || string(head[:n]) != "SQLite format 3\x00") {
		d.problem(path+" is no database of SQLite", "name the right file in store.sqlite, or restore it")
	}
}

// checkCapabilities compares what the configuration asks for with what the
// token has.
func (d *diagnosis) checkCapabilities(x *hsm.Examination, cfg *config) {
	caps := x.Capabilities
	if err := caps.Refusal(); err != nil {
		for _, line := range strings.Split(err.Error(), "\n") {
			d.problem(line, "use another token: nothing is done outside the token in its place")
		}
	}
	accepted := cfg.accept()
	for _, need := range caps.Needs {
		e := exception{need.Exception, need.Exception.Loses(), need.Evidence, slices.Contains(accepted, need.Exception)}
		d.Exceptions = append(d.Exceptions, e)
		if !e.Accepted && caps.Refusal() == nil {
			d.problem(fmt.Sprintf("the token %s (%s), so %s", e.Name.Does(), e.Evidence, e.Loses), "use another token, or accept that: %s",
				acceptance([]hsm.Need{need}, cfg))
		}
	}
	for _, e := range caps.Superfluous(accepted) {
		if e == hsm.TrustedUnavailable && !slices.ContainsFunc(x.Trusted, func(o hsm.TrustedObject) bool { return o.Err == nil }) {
			d.Exceptions = append(d.Exceptions, exception{e, e.Loses(), "as the configuration says; nothing the user can try shows it", true})
			d.warn("the token may have CKA_TRUSTED: it keeps CKA_WRAP_WITH_TRUSTED", "take vault.trusted out of the configuration before init is run for the first time, and give it --so-pin-file")
			continue
		}
		d.warn(fmt.Sprintf("%q is accepted and the token does not need it: the rule is kept", e), "take it out of the configuration")
	}
	specs := cfg.Pairs.Specs
	if len(specs) == 0 {
		specs = engine.DefaultPairSpecs()
	}
	for _, spec := range []hsm.PairSpec{hsm.RSA2048, hsm.RSA3072, hsm.RSA4096, hsm.ECSM2} {
		var offered bool
		for _, alg := range []hsm.Algorithm{hsm.OAEPSHA1, hsm.OAEPSHA256, hsm.PKCS1v15, hsm.SM2PKE} {
			if (spec == hsm.ECSM2) != (alg == hsm.SM2PKE) {
				continue
			}
			w := wrapping{Algorithm: alg, Spec: spec, Offered: true}
			if err := caps.Offers(spec, alg); err != nil {
				w.Offered, w.Reason = false, plain(err)
			}
			offered = offered || w.Offered
			if w.Offered && !slices.Contains(specs, spec) {
				w.Offered, w.Reason = false, "the token could; "+string(spec)+" is not in wrapping_pairs.specs"
			}
			d.Wrapping = append(d.Wrapping, w)
		}
		if !offered && slices.Contains(cfg.Pairs.Specs, spec) {
			d.problem(fmt.Sprintf("wrapping_pairs.specs asks for %s, and the token has no algorithm for it", spec), "take it out, or use another token")
		}
	}
	if err := caps.Offers(hsm.RSA2048, hsm.PKCS1v15); err != nil && cfg.Token.AllowPKCS1v15 {
		d.problem("token.allow_pkcs1_v15 asks for what the token has not: "+plain(err), "take it out")
	}
	if f := caps.Finding(hsm.FindResident); cfg.custody() == hsm.Resident && f.Verdict != hsm.Proven {
		d.problem("custody: resident asks for what the token has not: "+f.Evidence, "take it out, or use another token")
	}
	for _, spec := range []hsm.MaterialSpec{hsm.AES256, hsm.SM4} {
		m := keySpec{Spec: spec, Usable: true}
		if err := caps.Usable(spec); err != nil {
			m.Usable, m.Reason = false, plain(err)
		}
		d.Materials = append(d.Materials, m)
	}
	if cfg.Token.Profile != "" && caps.Finding(hsm.FindSM4).Verdict != hsm.Proven && caps.Finding(hsm.FindSM2).Verdict != hsm.Proven {
		d.problem(fmt.Sprintf("token.profile: by the numbers of %q the token has neither SM4 nor SM2", cfg.Token.Profile), "name the right profile, or take it out")
	}
	room := engine.Room{Objects: x.Objects.Resident, Memory: x.Token.Memory}
	if cfg.custody() == hsm.Resident || x.Objects.Resident > 0 {
		room.Limit = cmp.Or(cfg.Resident.Limit, engine.DefaultResidentLimit)
	}
	switch {
	case !room.Low():
	case x.Token.Memory.Low():
		d.warn(fmt.Sprintf("the token is nearly full: %d KiB of its %d KiB are free", x.Token.Memory.Free>>10, x.Token.Memory.Total>>10),
			"remove what is not Keyferry's, have keys sealed (custody), or use a larger token")
	default:
		d.warn(fmt.Sprintf("of at most %d objects of resident key material %d are there", room.Limit, room.Objects),
			"raise resident.limit if the token has room for more, or have new keys sealed (custody)")
	}
	const keepers, ordinary = 2, 32 // as package hsm has them
	wanted := cfg.Token.Sessions
	if wanted == 0 {
		wanted = ordinary
	}
	if most := x.Token.MaxSessions; most > 0 && most < wanted+keepers {
		d.warn(fmt.Sprintf("the token grants %d sessions, %d fewer than the server would use", most, wanted+keepers-most), "set token.sessions to %d", max(1, most-keepers))
	}
}

// plain is an error without the kind that package hsm gives it.
func plain(err error) string {
	return strings.TrimPrefix(strings.ReplaceAll(err.Error(), "\n", ": "), hsm.ErrUnsupported.Error()+": ")
}

// checkKeys compares the keys of the token with the pins.
func (d *diagnosis) checkKeys(x *hsm.Examination, cfg *config) {
	for _, o := range x.Trusted {
		if o.Err != nil {
			d.problem(fmt.Sprintf("object %q has CKA_TRUSTED and is no vault key of ours (%s): whoever knows it opens everything", o.Label, plain(o.Err)),
				"dedicate a token to Keyferry, or remove the object")
		}
	}
	for _, key := range x.Keys {
		out := foundKey{Name: key.Name, Found: key.Found}
		if out.Found == nil {
			out.Found = []hsm.Fingerprint{}
		}
		if key.Pinned != (hsm.Fingerprint{}) {
			out.Pinned = key.Pinned.String()
		}
		switch {
		case key.Err != nil:
			out.Problem = key.Err.Error()
			do := "restore the token's backup, or correct token.pins; \"keyferryd init\" says more"
			if errors.As(key.Err, new(*hsm.PinnedKeyError)) {
				do = keyGone
			}
			if !slices.ContainsFunc(d.Keys, func(k foundKey) bool { return k.Problem == out.Problem }) {
				d.problem(key.Name+": "+out.Problem, "%s", do)
			}
		case !key.Wanted && key.Pinned == hsm.Fingerprint{}:
		case len(key.Found) == 0:
			d.Next = append(d.Next, "make the "+key.Name+howMade(key.Name, cfg))
		case out.Pinned == "":
			d.Next = append(d.Next, "pin the "+key.Name+" that is on the token in the configuration")
		}
		d.Keys = append(d.Keys, out)
	}
	if cfg.Token.Pins.Serial == "" {
		d.Next = append(d.Next, fmt.Sprintf("pin the token's serial %s in the configuration", x.Token.Serial))
	}
}

func howMade(name string, cfg *config) string {
	switch {
	case !strings.HasPrefix(name, "vault"):
		return ""
	case cfg.Vault.Trusted == trustByVendor:
		return ", and stop for the vendor's tool to mark it as trusted"
	case cfg.Vault.Trusted == trustUnavailable:
		return ", without CKA_TRUSTED unless the security officer's PIN is given"
	}
	return ", for which it needs the security officer's PIN"
}
