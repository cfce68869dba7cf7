# PostgreSQL for softhsm/compose.nodes.yaml, for tests: Debian's, which the image
# of softhsm/Dockerfile has already. It writes to /var/lib/keyferry/postgres and
# /tmp alone, and reads its password from /run/database/password when it makes
# the database.
FROM keyferry-test

USER root
RUN install -d -o keyferry -g keyferry -m 0700 /run/database /var/lib/keyferry /var/lib/keyferry/postgres
ENV PATH=/usr/lib/postgresql/15/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PGDATA=/var/lib/keyferry/postgres/data
# The database is made next to its place and then moved there: whole or not at all.
RUN printf '%s\n' '#!/bin/sh -eu' \
      'if [ ! -d "$PGDATA" ]; then' \
      '  rm -rf "$PGDATA.new"' \
      '  initdb -D "$PGDATA.new" -U keyferry -A scram-sha-256 --pwfile=/run/database/password -E UTF8 --locale=C.UTF-8 --no-instructions' \
      '  echo "host all all samenet scram-sha-256" >>"$PGDATA.new/pg_hba.conf"' \
      '  echo "CREATE DATABASE keyferry" | postgres --single -D "$PGDATA.new" postgres' \
      '  mv "$PGDATA.new" "$PGDATA"' \
      'fi' \
      'exec postgres -c listen_addresses="*" -c unix_socket_directories=/tmp "$@"' >/usr/local/bin/serve-postgres \
 && chmod 0755 /usr/local/bin/serve-postgres

USER keyferry
WORKDIR /var/lib/keyferry
VOLUME /var/lib/keyferry/postgres
EXPOSE 5432
STOPSIGNAL SIGINT
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["pg_isready", "-q", "-h", "127.0.0.1", "-U", "keyferry"]
ENTRYPOINT ["serve-postgres"]
