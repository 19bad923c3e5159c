# QEMU 11.1 of Debian's backports, with the plugin beside it. The context is the root of the checkout:
#
#   docker build -f docker/qemu.Dockerfile -t vmibridge-qemu .
#
# Its arguments are QEMU's. The plugin is /usr/lib/vmibridge/plugin.so. It needs no network, no
# capability, and no root that can be written to.
FROM docker.io/library/debian:trixie-slim AS base

FROM base AS plugin
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY vmibridge/backends/qemu/plugin/plugin ./
RUN gcc -shared -fPIC -O2 -std=c11 -Wall -Wextra -fvisibility=hidden -Werror -o plugin.so ./*.c

FROM base
# The archive, by default that of the base image.
ARG DEBIAN=
RUN archive="${DEBIAN:-$(sed -n '/^URIs:/{s/^URIs: *//p;q}' /etc/apt/sources.list.d/debian.sources)}" \
    && echo "deb $archive trixie-backports main" > /etc/apt/sources.list.d/backports.list \
    && apt-get update \
    && apt-get install -y --no-install-recommends -t trixie-backports "qemu-system-x86=1:11.1*" \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10000 vmibridge \
    && useradd --uid 10002 --gid vmibridge --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin qemu \
    && install -d -o root -g vmibridge -m 0770 /run/vmibridge \
    && install -d -o qemu -g vmibridge -m 0750 /disks
COPY --chmod=0755 docker/qemu-entrypoint /usr/local/bin/qemu-entrypoint
COPY --from=plugin /build/plugin.so /usr/lib/vmibridge/plugin.so
# Last: each build has others.
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vmibridge-qemu" \
      org.opencontainers.image.description="QEMU 11.1 for x86 with the plugin of vmibridge" \
      org.opencontainers.image.licenses="GPL-2.0-or-later AND MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="docker.io/library/debian:trixie-slim"
USER 10002:10000
ENTRYPOINT ["qemu-entrypoint"]
CMD ["--version"]
