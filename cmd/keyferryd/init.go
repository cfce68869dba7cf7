package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/hsm"
)

func initCommand() *cobra.Command {
	var ceremony ceremony
	cmd := &cobra.Command{
		Use:   "init --config FILE",
		Short: "Make the keys a token needs, and pin them in the configuration",
		Long: `Makes the keys of the configuration's token that are missing (vault, MAC key,
receipt key), touches nothing that is there, and writes the token's serial and
the fingerprints of the keys to token.pins of the configuration. It makes the
SQLite database, too, if the configuration names one that is not there; a
PostgreSQL is for "keyferryd migrate". It can be run again at any time. Serving
needs all of it, and nobody but init makes it.

The security officer's PIN is needed only where the vault key or the token
itself has to be made. Do not leave it on this machine.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ceremony.stdin, ceremony.out = cmd.InOrStdin(), cmd.OutOrStdout()
			ceremony.log = newLogger(logConfig{}, cmd.ErrOrStderr())
			return ceremony.run(cmd.Context())
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&ceremony.config, "config", "", "the configuration file")
	flags.StringVar(&ceremony.soPINFile, "so-pin-file", "", `file with the security officer's PIN, "-" for standard input`)
	flags.BoolVar(&ceremony.initToken, "init-token", false, "initialise the module's one uninitialised slot first, and set both PINs")
	flags.BoolVar(&ceremony.reseal, "reseal", false, "make a vault whose blobs can be sealed anew one day; a thief of both PINs can then open them")
	flags.BoolVar(&ceremony.print, "print", false, "print the pins instead of writing them to the configuration, and make no database")
	requireFlag(cmd, "config")
	return cmd
}

// ceremony is one run of init.
type ceremony struct {
	config    string
	soPINFile string
	initToken bool
	reseal    bool
	print     bool
	stdin     io.Reader
	out       io.Writer
	log       *slog.Logger
}

func (c *ceremony) run(ctx context.Context) error {
	cfg, err := loadConfig(c.config)
	if err != nil {
		return err
	}
	if err := cfg.validateUnpinned(); err != nil {
		return fmt.Errorf("%s: %w", c.config, err)
	}
	if c.initToken && c.soPINFile == "" {
		return errors.New("--init-token sets the security officer's PIN: name it with --so-pin-file")
	}
	soPIN, err := c.readSOPIN()
	if err != nil {
		return fmt.Errorf("the security officer's PIN: %w", err)
	}
	defer clear(soPIN)
	before := cfg.Token.Pins.pins()
	pins, err := c.initialise(ctx, &cfg, soPIN)
	if err != nil {
		return err
	}
	if err := c.record(before, pins); err != nil {
		return err
	}
	return c.makeDatabase(ctx, &cfg)
}

// readSOPIN reads it once, also where it comes from standard input. nil if
// none was named.
func (c *ceremony) readSOPIN() ([]byte, error) {
	switch c.soPINFile {
	case "":
		return nil, nil
	case "-":
		const longest = 1 << 10
		pin, err := io.ReadAll(io.LimitReader(c.stdin, longest))
		return trimLineEnd(pin), err
	default:
		return readSecret(c.soPINFile, c.log)
	}
}

func (c *ceremony) initialise(ctx context.Context, cfg *config, soPIN []byte) (hsm.Pins, error) {
	if err := cfg.applyEnvironment(); err != nil {
		return hsm.Pins{}, err
	}
	if err := checkModule(cfg.Token.Module); err != nil {
		return hsm.Pins{}, err
	}
	userPIN := func() ([]byte, error) { return readSecret(cfg.Token.UserPINFile, c.log) }
	var officer func() ([]byte, error)
	if soPIN != nil {
		officer = func() ([]byte, error) { return append([]byte(nil), soPIN...), nil }
	}
	if c.initToken && cfg.Token.Pins.Serial == "" {
		serial, err := hsm.InitToken(ctx, cfg.Token.Module, cfg.Token.Label, officer, userPIN, hsm.WithInitArgs(cfg.Token.InitArgs))
		switch {
		case errors.Is(err, hsm.ErrUntrusted): // one of that label is there
			c.say("The token %q is there already; it was not touched.", cfg.Token.Label)
		case err != nil:
			return hsm.Pins{}, err
		default:
			c.say("Initialised the token %q, serial %s.", cfg.Token.Label, serial)
			cfg.Token.Pins.Serial = serial
		}
	}
	profiles, err := cfg.Token.profiles()
	if err != nil {
		return hsm.Pins{}, err
	}
	pins, err := hsm.Init(ctx, hsm.InitConfig{
		Module: cfg.Token.Module, Label: cfg.Token.Label, Pins: cfg.Token.Pins.pins(),
		SOPIN: officer, UserPIN: userPIN, Reseal: c.reseal,
		Profile: cfg.Token.Profile, Profiles: profiles,
		InitArgs: cfg.Token.InitArgs, Accept: cfg.accept(), VendorTrust: cfg.Vault.Trusted == trustByVendor,
	})
	var stop *hsm.MarkError
	if errors.As(err, &stop) {
		c.sayWhatToMark(stop, cfg)
		return hsm.Pins{}, &statusError{status: statusMark, err: fmt.Errorf("%w; nothing is pinned yet", err)}
	}
	if errors.Is(err, hsm.ErrSOPIN) && soPIN == nil {
		return hsm.Pins{}, fmt.Errorf("%w: name a file with it with --so-pin-file; where the vendor's own tool marks keys as trusted write vault: {trusted: %s}, and where there is no CKA_TRUSTED vault: {trusted: %s}",
			err, trustByVendor, trustUnavailable)
	}
	return pins, tokenAdvice(err, cfg)
}

// sayWhatToMark says what a person has to do before init goes on.
func (c *ceremony) sayWhatToMark(stop *hsm.MarkError, cfg *config) {
	for _, object := range stop.Objects {
		made := "waits on the token"
		if object.New {
			made = "was made on the token"
		}
		c.say("A %s %s.\nIt was generated there, was never outside, and is in every way as a vault must be, but for CKA_TRUSTED.", object, made)
	}
	c.say("Mark it with CKA_TRUSTED=true, as the security officer and with the tool of the token's vendor, and nothing else on %q;\n"+
		"then run this command again. It pins the key once that reads as trusted.", cfg.Token.Label)
}

// record writes down what the token holds now.
func (c *ceremony) record(before, pins hsm.Pins) error {
	block, err := pinsBlock(pins, "  ")
	if err != nil {
		return err
	}
	switch {
	case pins == before:
		c.say("The token has all its keys, and %s pins them. Nothing was changed.", c.config)
		return nil
	case c.print:
		c.say("Put this into the section token of %s:\n\n%s", c.config, block)
	default:
		if err := updatePins(c.config, pins); err != nil {
			return fmt.Errorf("the token has its keys, but %s could not be written (%w): put these lines into its section token: %s", c.config, err, block)
		}
		c.say("Wrote token.pins to %s.", c.config)
	}
	c.say("Back up the token now: without its vault key, nothing that customers import can be used again.")
	return nil
}

// makeDatabase makes an empty database where there is none. With --print
// nothing is written on this machine, which may not be the server.
func (c *ceremony) makeDatabase(ctx context.Context, cfg *config) error {
	if !c.print && cfg.Store.Postgres != nil {
		c.say("Make the tables of the database with %q, unless they are there.", "keyferryd migrate")
	}
	if c.print || cfg.Store.SQLite == "" || cfg.hasDatabase() {
		return nil
	}
	db, err := sqlite.Open(ctx, sqlite.Config{Path: cfg.Store.SQLite, Logger: c.log})
	if err != nil {
		return err
	}
	c.say("Made the database %s. It is empty: if there was one before, put that in its place.", cfg.Store.SQLite)
	return db.Close()
}

func (c *ceremony) say(format string, args ...any) {
	_, _ = fmt.Fprintf(c.out, format+"\n", args...)
}

// updatePins rewrites a configuration file with pins in it.
func updatePins(path string, pins hsm.Pins) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	updated, err := withPins(text, pins)
	if err != nil {
		return err
	}
	return writeFile(path, updated, info.Mode().Perm())
}
