package sqlite

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// lockFile takes the lock that keeps every other process, and every other
// Store of this one, away from the database at path: the engine caches rows
// that nobody else may then change. The kernel gives the lock back when the
// process ends, however it ends; the empty file stays.
func lockFile(path string) (*os.File, error) {
	name := path + ".lock"
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("sqlite: cannot make the lock file of the database: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("sqlite: database %s is in use already (%s is locked): "+
				"one process at a time can use it, so stop the other one first or choose another path", path, name)
		}
		return nil, fmt.Errorf("sqlite: cannot lock %s: %w", name, err)
	}
	return f, nil
}
