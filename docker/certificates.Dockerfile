# Makes certificates for an agent and a server, and ends. The context is the root of the checkout.
ARG BASE=docker.io/library/debian:trixie-slim
FROM ${BASE}
LABEL org.opencontainers.image.title="vmibridge-certificates" \
      org.opencontainers.image.description="Makes certificates for an agent and a server of vmibridge" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.vendor="vmibridge"
RUN --mount=type=bind,source=docker/harden-root,target=/mnt/harden-root \
    apt-get update \
    && apt-get install -y --no-install-recommends "openssl=3.5*" \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10001 -g 10000 -m 0700 /agent /server \
    && sh /mnt/harden-root
COPY --chmod=0755 docker/make-certificates /usr/local/bin/make-certificates
USER 10001:10000
ENTRYPOINT ["make-certificates"]
CMD ["agent", "server"]
