package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	instanceQuery = `SELECT name FROM instance WHERE one = 1`
	nextBootQuery = `UPDATE instance SET boot = boot + 1 WHERE one = 1 RETURNING boot`
)

func (s *Store) readInstance(ctx context.Context) (name string, err error) {
	err = s.read(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		err := c.QueryRow(ctx, instanceQuery).Scan(&name)
		if errors.Is(err, pgx.ErrNoRows) {
			return fmt.Errorf("%w: table instance has lost its row", errRow)
		}
		return err
	})
	return name, err
}

// Instance implements store.Store.
func (s *Store) Instance(ctx context.Context) (string, error) {
	return s.instance, ctx.Err()
}

// NextBoot implements store.Store.
func (s *Store) NextBoot(ctx context.Context) (uint64, error) {
	var boot int64
	err := s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		return c.QueryRow(ctx, nextBootQuery).Scan(&boot)
	})
	if err != nil {
		return 0, err
	}
	return uint64(boot), nil
}
