# QEMU 11.1 of Debian's backports, with the plugin beside it. The context is the root of the checkout:
#
#   docker build -f docker/qemu.Dockerfile -t vmibridge-qemu .
#
# Its arguments are QEMU's. The plugin is /usr/lib/vmibridge/plugin.so. It needs no network, no
# capability, and no root that can be written to.
ARG BASE=docker.io/library/debian:trixie-slim
FROM ${BASE} AS base

FROM base AS plugin
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY vmibridge/backends/qemu/plugin/plugin ./
RUN gcc -shared -fPIC -O2 -std=c11 -Wall -Wextra -fvisibility=hidden -Werror -o plugin.so ./*.c

FROM base AS root
# The archive, by default that of the base image. Each layer is cleaned by itself: the next one would only
# hide what differs from build to build.
ARG DEBIAN=
RUN --mount=type=bind,source=docker/harden-root,target=/mnt/harden-root \
    archive="${DEBIAN:-$(sed -n '/^URIs:/{s/^URIs: *//p;q}' /etc/apt/sources.list.d/debian.sources)}" \
    && echo "deb $archive trixie-backports main" > /etc/apt/sources.list.d/backports.list \
    && apt-get update \
    && apt-get install -y --no-install-recommends -t trixie-backports "qemu-system-x86=1:11.1*" \
    && rm -rf /var/lib/apt/lists/* \
    && sh /mnt/harden-root
ARG SOURCE_DATE_EPOCH
RUN --mount=type=bind,source=docker/harden-root,target=/mnt/harden-root \
    groupadd --gid 10000 vmibridge \
    && useradd --uid 10002 --gid vmibridge --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin qemu \
    && install -d -o root -g vmibridge -m 0770 /run/vmibridge \
    && install -d -o qemu -g vmibridge -m 0750 /disks \
    && sh /mnt/harden-root

# What is in it, in the words of CycloneDX.
FROM base AS sbom
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY docker/image_sbom.py ./
COPY --from=root /var/lib/dpkg/status /etc/os-release ./
ARG VERSION=unknown
ARG SOURCE_DATE_EPOCH
RUN python3 image_sbom.py vmibridge-qemu "$VERSION" --also vmibridge-plugin -o vmibridge-qemu.json

FROM root
COPY --from=sbom /build/vmibridge-qemu.json /usr/share/sbom/vmibridge-qemu.json
COPY --chmod=0755 docker/qemu-entrypoint /usr/local/bin/qemu-entrypoint
COPY --from=plugin /build/plugin.so /usr/lib/vmibridge/plugin.so
# What differs from build to build is in labels that docker/build_images.py adds.
LABEL org.opencontainers.image.title="vmibridge-qemu" \
      org.opencontainers.image.description="QEMU 11.1 for x86 with the plugin of vmibridge" \
      org.opencontainers.image.licenses="GPL-2.0-or-later AND MIT" \
      org.opencontainers.image.vendor="vmibridge"
USER 10002:10000
ENTRYPOINT ["qemu-entrypoint"]
CMD ["--version"]
