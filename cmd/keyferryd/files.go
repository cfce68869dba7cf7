package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
)

// writeFile replaces a file in one step and durably: whoever reads it, also
// after a crash, reads the old content or the new.
func writeFile(path string, data []byte, mode fs.FileMode) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(data)
	err = errors.Join(err, tmp.Chmod(mode), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp.Name()))
	}
	return syncDir(dir)
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// writeSecret writes a random text to a file of mode 0600. It has 256 bits,
// for the PINs of software tokens are guessed offline.
func writeSecret(path string) error {
	return writeFile(path, []byte(rand.Text()+rand.Text()+"\n"), 0o600)
}

// readSecret reads a PIN or the secret of an access key, without the line end
// that editors leave. The caller wipes it.
//
// A file that others may write is refused: they would choose the secret. One
// that others may read is only warned of, as the secrets of container engines
// are of that kind.
func readSecret(path string, log *slog.Logger) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	mode := info.Mode().Perm()
	if mode&0o022 != 0 {
		return nil, fmt.Errorf("%s can be written by others (mode %04o): chmod 600 it", path, mode)
	}
	if mode&0o044 != 0 {
		log.Warn("a secret can be read by other users of this machine", slog.String("file", path), slog.String("mode", fmt.Sprintf("%04o", mode)))
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	secret := trimLineEnd(data)
	if len(secret) == 0 {
		return nil, fmt.Errorf("%s is empty: put the secret there", path)
	}
	return secret, nil
}

func trimLineEnd(secret []byte) []byte { return bytes.TrimRight(secret, "\r\n") }
