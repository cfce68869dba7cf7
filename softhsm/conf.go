package softhsm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// ConfEnv names the environment variable in which SoftHSM2 looks for its
// configuration file at C_Initialize, and only then: one process has one
// configuration.
const ConfEnv = "SOFTHSM2_CONF"

// maxConfPath is the longest directory that fits SoftHSM2's buffer for a line
// of its configuration (1,024 bytes) together with the option's name.
const maxConfPath = 960

// WriteConf makes dir, which must exist, the home of SoftHSM2 tokens: it
// writes dir/softhsm2.conf, makes dir/tokens, both for their owner alone, and
// answers the path of the former, to be put into ConfEnv before the module is
// loaded. Done again it leaves the tokens alone, and a directory that was
// moved works again.
func WriteConf(dir string) (conf string, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("softhsm: %w", err)
	}
	// SoftHSM2's configuration knows no quotes: it cuts a line at # and =,
	// and trims what is left.
	if strings.ContainsAny(dir, "#=\r\n") || len(dir) > maxConfPath {
		return "", fmt.Errorf("softhsm: SoftHSM2 cannot be told of the directory %q: choose a shorter one without #, = and line breaks", dir)
	}
	tokens := filepath.Join(dir, "tokens")
	if err := os.Mkdir(tokens, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("softhsm: %w", err)
	}
	text := "# Written by Keyferry at every start.\n" +
		"directories.tokendir = " + tokens + "\n" +
		"objectstore.backend = file\n" +
		"log.level = ERROR\n"
	conf = filepath.Join(dir, "softhsm2.conf")
	if err := replaceFile(conf, []byte(text)); err != nil {
		return "", fmt.Errorf("softhsm: %w", err)
	}
	return conf, nil
}

// replaceFile writes a file of mode 0600 in one step, so that a SoftHSM2 that
// starts at this moment in another process reads a whole file, old or new.
func replaceFile(path string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(data)
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return nil
}
