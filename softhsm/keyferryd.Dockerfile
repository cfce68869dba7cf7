# keyferryd on a token of the SoftHSM2 of softhsm/build.sh, for development and
# tests: whoever can read the volume of the token and a PIN has every key on it.
#
# It runs as an ordinary user and writes to its volumes alone, so that the rest
# of it can be read-only:
#
#   /etc/keyferry               keyferryd.yaml and nodes.yaml; written by "init" alone
#   /var/lib/keyferry/tokens    the token
#   /var/lib/keyferry/database  the database
#   /run/secrets                user-pin, access-key-secret
#   /run/officer                so-pin, for "init" alone
#   /run/database               password, of a PostgreSQL
#
# The context holds the programs keyferryd and keyferry and libsofthsm2.so,
# built in softhsm/Dockerfile against these very libraries, keyferryd.yaml and
# keyferryd-nodes.yaml.
FROM debian:bookworm-slim

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libssl3 libstdc++6 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /var/lib/keyferry keyferry \
 && install -d -o keyferry -g keyferry -m 0700 /etc/keyferry /run/secrets /run/officer /run/database \
      /var/lib/keyferry /var/lib/keyferry/tokens /var/lib/keyferry/database \
 && printf '%s\n' 'directories.tokendir = /var/lib/keyferry/tokens' 'objectstore.backend = file' 'log.level = ERROR' >/etc/softhsm2.conf

COPY keyferryd keyferry /usr/local/bin/
COPY libsofthsm2.so /usr/local/lib/softhsm/
COPY --chown=keyferry:keyferry keyferryd.yaml /etc/keyferry/
COPY --chown=keyferry:keyferry keyferryd-nodes.yaml /etc/keyferry/nodes.yaml

USER keyferry
WORKDIR /var/lib/keyferry
VOLUME /etc/keyferry /var/lib/keyferry/tokens /var/lib/keyferry/database
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s CMD ["keyferryd", "health", "--config", "/etc/keyferry/keyferryd.yaml"]
ENTRYPOINT ["keyferryd"]
CMD ["serve", "--config", "/etc/keyferry/keyferryd.yaml"]
