package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"

	"github.com/keyferry/keyferry/hsm"
)

// validate returns everything that keeps a configuration from being served.
func (c *config) validate() error {
	err := c.validateUnpinned()
	if c.Token.Pins.Serial == "" || c.Token.Pins.VaultAES.IsZero() || c.Token.Pins.MACKey.IsZero() {
		err = errors.Join(err, errors.New(`token.pins: serial, vault_aes or mac_key is missing: run "keyferryd init", which writes them`))
	}
	return err
}

// validateUnpinned leaves out the pins, for those who are to make them.
func (c *config) validateUnpinned() error {
	errs := []error{c.validateToken(), c.validateListen(), c.Store.validate(), c.validateMetrics()}
	if len(c.AccessKeys) == 0 {
		errs = append(errs, errors.New("access_keys is empty: nobody could sign a request"))
	}
	seen := map[string]bool{}
	for i, key := range c.AccessKeys {
		if key.ID == "" || key.SecretFile == "" {
			errs = append(errs, fmt.Errorf("access_keys[%d] needs id and secret_file", i))
		}
		if seen[key.ID] {
			errs = append(errs, fmt.Errorf("access_keys: %q is there twice", key.ID))
		}
		seen[key.ID] = true
	}
	for name, value := range map[string]string{"region": c.Region, "account": c.Account} {
		if strings.ContainsAny(value, ":/ \t\r\n") {
			errs = append(errs, fmt.Errorf("%s is part of ARNs: take the colon, slash or space out of it", name))
		}
	}
	for _, spec := range c.Pairs.Specs {
		if !slices.Contains([]hsm.PairSpec{hsm.RSA2048, hsm.RSA3072, hsm.RSA4096, hsm.ECSM2}, spec) {
			errs = append(errs, fmt.Errorf("wrapping_pairs.specs: %q is not one of RSA_2048, RSA_3072, RSA_4096, EC_SM2", spec))
		}
	}
	for name, value := range map[string]int{
		"token.sessions": c.Token.Sessions, "wrapping_pairs.ready": c.Pairs.Ready, "wrapping_pairs.outstanding": c.Pairs.Outstanding,
		"resident.limit": c.Resident.Limit,
	} {
		if value < 0 {
			errs = append(errs, fmt.Errorf("%s is negative", name))
		}
	}
	if !slices.Contains([]string{"", hsm.Sealed.String(), hsm.Resident.String()}, c.Custody) {
		errs = append(errs, fmt.Errorf("custody: %q is neither sealed nor resident", c.Custody))
	}
	if c.Resident.Only && c.custody() != hsm.Resident {
		errs = append(errs, errors.New("resident.only needs custody: resident"))
	}
	if _, err := c.Log.level(); err != nil {
		errs = append(errs, err)
	}
	if !slices.Contains([]string{"", "text", "json"}, c.Log.Format) {
		errs = append(errs, fmt.Errorf("log.format: %q is neither text nor json", c.Log.Format))
	}
	return errors.Join(errs...)
}

// validateToken returns what is missing to find the token and log in.
func (c *config) validateToken() error {
	var errs []error
	for name, value := range map[string]string{
		"token.module": c.Token.Module, "token.label": c.Token.Label, "token.user_pin_file": c.Token.UserPINFile,
	} {
		if value == "" {
			errs = append(errs, fmt.Errorf("%s is missing", name))
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	for _, e := range c.Token.Accept {
		switch {
		case e == hsm.TrustedUnavailable:
			errs = append(errs, fmt.Errorf("token.accept: %q is written as vault: {trusted: %s}", e, trustUnavailable))
		case !slices.Contains(hsm.Exceptions(), e):
			errs = append(errs, fmt.Errorf("token.accept: there is no exception %q, but %q", e, hsm.Exceptions()))
		}
	}
	if !slices.Contains([]string{"", trustByVendor, trustUnavailable}, c.Vault.Trusted) {
		errs = append(errs, fmt.Errorf("vault.trusted: %q is neither %s nor %s", c.Vault.Trusted, trustByVendor, trustUnavailable))
	}
	return errors.Join(errs...)
}

func (c *config) validateListen() error {
	host, _, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return errors.New("listen must be host:port, such as 127.0.0.1:8443")
	}
	if c.TLS != nil {
		if c.TLS.CertFile == "" || c.TLS.KeyFile == "" {
			return errors.New("tls needs cert_file and key_file")
		}
		return nil
	}
	if !isLoopback(host) && !c.AllowPlainHTTP {
		return fmt.Errorf("listen: %q is not loopback: set tls, or allow_plain_http if TLS ends in front of this server", host)
	}
	return nil
}

func (c *config) validateMetrics() error {
	if c.Metrics.Listen == "" {
		return nil
	}
	if _, _, err := net.SplitHostPort(c.Metrics.Listen); err != nil {
		return errors.New("metrics.listen must be host:port, such as 127.0.0.1:9464")
	}
	if _, port, _ := net.SplitHostPort(c.Listen); c.Metrics.Listen == c.Listen && port != "0" {
		return errors.New("metrics.listen is the address of the API: choose another port")
	}
	return nil
}

// isLoopback is for hosts as they are written in a configuration: a name is
// taken for what it says, and none but localhost says loopback.
func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (l logConfig) level() (slog.Level, error) {
	var level slog.Level
	if l.Level == "" {
		return slog.LevelInfo, nil
	}
	if err := level.UnmarshalText([]byte(l.Level)); err != nil {
		return 0, fmt.Errorf("log.level: %q is not one of debug, info, warn, error", l.Level)
	}
	return level, nil
}
