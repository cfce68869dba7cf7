package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/hsm"
)

func doctorCommand() *cobra.Command {
	var d doctor
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor --config FILE",
		Short: "Say what the token can do, which guarantees hold, and what to change",
		Long: `Finds out by known answers what the configuration's token can do, and which
wrapping algorithms, key specs and guarantees follow; looks at the files, the
database and the keys that the configuration names; and says what to change.

It makes session objects alone and changes nothing. It shows the token the user
PIN once. It can be run before init, and then says what init would do, and
beside a running server. It exits with 0 if the token has all that the
configuration asks for, with 2 if not, and with 1 if the configuration cannot
be read.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			diagnosis, err := d.examine(cmd.Context())
			if err != nil {
				return err
			}
			write := diagnosis.writeText
			if asJSON {
				write = diagnosis.writeJSON
			}
			if err := write(cmd.OutOrStdout()); err != nil {
				return err
			}
			if n := len(diagnosis.Problems); n > 0 {
				return &statusError{status: statusProblem, err: fmt.Errorf("%d of the things found have to be changed", n)}
			}
			return nil
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&d.config, "config", "", "the configuration file")
	flags.BoolVar(&asJSON, "json", false, "write one JSON object instead of text for people")
	flags.BoolVar(&d.quick, "quick", false, "generate no RSA pair larger than 2048 bits, and take the token's word")
	requireFlag(cmd, "config")
	return cmd
}

// doctor is one run of the command.
type doctor struct {
	config string
	quick  bool
}

// diagnosis is what doctor found. Its JSON is for programs: fields are added,
// and never change their meaning.
type diagnosis struct {
	// Token is null if it could not be examined; Problems says why.
	Token *hsm.TokenInfo `json:"token"`
	// Ready: serve would start.
	Ready bool `json:"ready"`
	// Problems are what the configuration asks for and does not get, and
	// Warnings what works and should not stay so.
	Problems []advice `json:"problems"`
	Warnings []advice `json:"warnings"`
	// Next is what init would do, empty if nothing.
	Next         []string          `json:"next"`
	Capabilities []hsm.Finding     `json:"capabilities"`
	Wrapping     []wrapping        `json:"wrapping"`
	Materials    []keySpec         `json:"key_specs"`
	Exceptions   []exception       `json:"exceptions"`
	Guarantees   []guarantee       `json:"guarantees"`
	Holes        []hole            `json:"holes"`
	Limits       []string          `json:"limits"`
	Keys         []foundKey        `json:"keys"`
	Objects      *hsm.ObjectCounts `json:"objects"`
}

// advice is what is wrong, and what to do about it.
type advice struct {
	What string `json:"what"`
	Do   string `json:"do"`
}

// wrapping is one wrapping algorithm with one spec of pairs.
type wrapping struct {
	Algorithm hsm.Algorithm `json:"algorithm"`
	Spec      hsm.PairSpec  `json:"spec"`
	Offered   bool          `json:"offered"`
	Reason    string        `json:"reason,omitempty"` // why not
}

// keySpec is one kind of key material.
type keySpec struct {
	Spec   hsm.MaterialSpec `json:"spec"`
	Usable bool             `json:"usable"` // it can be imported in any case
	Reason string           `json:"reason,omitempty"`
}

// exception is a rule that the token cannot keep.
type exception struct {
	Name     hsm.Exception `json:"name"`
	Loses    string        `json:"loses"`
	Evidence string        `json:"evidence"`
	Accepted bool          `json:"accepted"`
}

// guarantee is what a kind of thief does not get, and why it does where it
// does.
type guarantee struct {
	Statement string   `json:"statement"`
	Holds     bool     `json:"holds"`
	Because   []string `json:"because,omitempty"`
}

// hole is one of stock SoftHSM2.
type hole struct {
	ID    string `json:"id"`
	Limit string `json:"limit"`
	// State is "open" or "closed" where that was tried. What takes a race, a crash
	// or a second token is not tried: it is "listed" where the library says that it
	// is the stock SoftHSM2 which has it, "patched" where it says that it is our
	// build, which has not, and else "unknown".
	State string `json:"state"`
}

// foundKey is one of the keys that init makes.
type foundKey struct {
	Name    string            `json:"name"`
	Pinned  string            `json:"pinned,omitempty"`
	Found   []hsm.Fingerprint `json:"found"`
	Problem string            `json:"problem,omitempty"`
}

func (d *doctor) examine(ctx context.Context) (*diagnosis, error) {
	cfg, err := loadConfig(d.config)
	if err != nil {
		return nil, err
	}
	out := &diagnosis{
		Problems: []advice{}, Warnings: []advice{}, Next: []string{}, Capabilities: []hsm.Finding{}, Wrapping: []wrapping{},
		Materials: []keySpec{}, Exceptions: []exception{}, Guarantees: []guarantee{}, Holes: []hole{}, Limits: []string{}, Keys: []foundKey{},
	}
	out.checkConfig(&cfg, d.config)
	out.checkFiles(ctx, &cfg)
	out.checkStore(ctx, &cfg)
	if cfg.validateToken() == nil {
		out.checkToken(ctx, &cfg, !d.quick)
	}
	out.Ready = len(out.Problems) == 0 && len(out.Next) == 0 && out.Token != nil
	return out, nil
}

func (d *diagnosis) problem(what, do string, args ...any) {
	d.Problems = append(d.Problems, advice{what, fmt.Sprintf(do, args...)})
}

func (d *diagnosis) warn(what, do string, args ...any) {
	d.Warnings = append(d.Warnings, advice{what, fmt.Sprintf(do, args...)})
}

// checkToken examines the token.
func (d *diagnosis) checkToken(ctx context.Context, cfg *config, thorough bool) {
	if err := errors.Join(cfg.applyEnvironment(), checkModule(cfg.Token.Module)); err != nil {
		d.problem(err.Error(), "name the module of your token in token.module")
		return
	}
	open, err := cfg.hsmConfig(slog.New(slog.DiscardHandler))
	if err != nil {
		d.problem(err.Error(), "correct token.profiles_file")
		return
	}
	x, err := hsm.Examine(ctx, open, thorough)
	if err != nil {
		d.unexamined(err, cfg)
		return
	}
	d.Token, d.Objects = &x.Token, &x.Objects
	d.Capabilities = x.Capabilities.Findings
	d.checkCapabilities(x, cfg)
	d.checkKeys(x, cfg)
	d.judge(x, cfg)
}

// unexamined says why there is nothing to say about the token.
func (d *diagnosis) unexamined(err error, cfg *config) {
	switch {
	case errors.Is(err, hsm.ErrPIN):
		d.problem(err.Error(), "put the right PIN into %s; it was tried once", cfg.Token.UserPINFile)
	case errors.Is(err, hsm.ErrUntrusted):
		d.problem(err.Error(), "have token.label and token.pins name the token that init was run on, and no other token of that label in the module")
	case errors.Is(err, os.ErrNotExist):
		d.problem(err.Error(), "put the user PIN there")
	default:
		do := "correct token.module, token.label, token.init_args and token.environment, or " + otherwise(cfg)
		if errors.Is(err, hsm.ErrUnavailable) {
			do = cmp.Or(softHSMConf(cfg), do)
		}
		d.problem(err.Error(), "%s", do)
	}
}

func (d *diagnosis) writeJSON(w io.Writer) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	encoder.SetEscapeHTML(false)
	return encoder.Encode(d)
}
