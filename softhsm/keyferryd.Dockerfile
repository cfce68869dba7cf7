# keyferryd on a SoftHSM2 token, for development and tests: whoever can read
# the volume of the token and a PIN has every key on it.
#
# It runs as an ordinary user and writes to its volumes alone, so that the rest
# of it can be read-only:
#
#   /etc/keyferry      keyferryd.yaml; written by "init" alone
#   /var/lib/keyferry  the token and the database
#   /run/secrets       user-pin, access-key-secret; for "init" so-pin too
#
# The context holds the programs keyferryd and keyferry, built in
# softhsm/Dockerfile against this very C library, and keyferryd.yaml.
FROM debian:bookworm-slim

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libsofthsm2 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /var/lib/keyferry keyferry \
 && install -d -o keyferry -g keyferry -m 0700 /etc/keyferry /var/lib/keyferry /var/lib/keyferry/tokens \
 && printf '%s\n' 'directories.tokendir = /var/lib/keyferry/tokens' 'objectstore.backend = file' 'log.level = ERROR' >/etc/softhsm/softhsm2.conf \
 && chmod 0755 /etc/softhsm && chmod 0644 /etc/softhsm/softhsm2.conf

COPY keyferryd keyferry /usr/local/bin/
COPY --chown=keyferry:keyferry keyferryd.yaml /etc/keyferry/

USER keyferry
WORKDIR /var/lib/keyferry
VOLUME /etc/keyferry /var/lib/keyferry
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s CMD ["keyferryd", "health", "--config", "/etc/keyferry/keyferryd.yaml"]
ENTRYPOINT ["keyferryd"]
CMD ["serve", "--config", "/etc/keyferry/keyferryd.yaml"]
