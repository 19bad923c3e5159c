# Makes certificates for an agent and a server, and ends. The context is the root of the checkout.
FROM docker.io/library/debian:trixie-slim
LABEL org.opencontainers.image.title="vmibridge-certificates" \
      org.opencontainers.image.description="Makes certificates for an agent and a server of vmibridge" \
      org.opencontainers.image.licenses="MIT"
RUN apt-get update \
    && apt-get install -y --no-install-recommends "openssl=3.5*" \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10001 -g 10000 -m 0700 /agent /server
COPY --chmod=0755 docker/make-certificates /usr/local/bin/make-certificates
USER 10001:10000
ENTRYPOINT ["make-certificates"]
CMD ["agent", "server"]
