package engine

import (
	"context"
	"errors"
	"time"

	"github.com/keyferry/keyferry/hsm"
)

// An open key is used without asking the store, so what other nodes change must
// come to it. While the store's epoch stays the same it does, by Store.Watch.
// In any other epoch the row is read again before the key is used; in none at
// all, while the store cannot tell, that holds for lookAgain. So what one node
// stops, all stop within a second, also one that is cut off from the database:
// it cannot read the row, and so does not use the key.

// lookAgain is for how long a row that was read is believed while changes are
// not reported.
const lookAgain = 400 * time.Millisecond

// elapsed is the time since the engine started, by a clock that nobody sets.
func (e *Engine) elapsed() time.Duration { return time.Since(e.started) }

// freshen makes sure that an open key may be used now. It answers
// hsm.ErrKeyLost if the key has to be opened again.
func (e *Engine) freshen(ctx context.Context, k *openKey) error {
	epoch := e.store.Epoch()
	if epoch != 0 && epoch == k.epoch.Load() {
		return nil
	}
	now := e.elapsed()
	if epoch == 0 && now-time.Duration(k.looked.Load()) < lookAgain {
		return nil
	}
	row, err := e.readRow(ctx, keyRef{id: k.keyID})
	switch {
	case errors.Is(err, KeyNotFound), err == nil && row.Revision != k.revision:
		e.cache.dropOpen(k, roomWait)
		return hsm.ErrKeyLost
	case err != nil:
		return err
	}
	k.looked.Store(int64(now))
	k.epoch.Store(epoch)
	return nil
}
