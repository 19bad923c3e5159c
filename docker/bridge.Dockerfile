# The bridge: `vmibridge` and nothing that it does not need. The context is the root of the checkout:
#
#   docker build -f docker/bridge.Dockerfile -t vmibridge .
#
# It runs as a user without rights, with a read-only root and without a capability.
#
# The stage `builder` is what an image of one's own is made with: pip, which installs into
# /opt/vmibridge, beside vmibridge and what it needs.
ARG BASE=docker.io/library/python:3.13-slim-trixie
FROM ${BASE} AS base

# Versions and hashes of all that is installed are those of the lock, also for what only builds.
FROM base AS locked
# For `strip`.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY requirements.lock docker/locked_install.py ./

FROM locked AS wheel
RUN python locked_install.py requirements.lock /backend hatchling editables
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY vmibridge vmibridge
COPY handlers handlers
COPY guest guest
RUN python -m pip --python=/backend/bin/python wheel --no-deps --no-build-isolation -w /wheels .

# vmibridge in an environment without pip, and a pip that installs there.
FROM locked AS builder
ARG EXTRAS=cli,trio,uvloop,gdb,recording,nats
COPY --from=wheel /wheels /wheels
RUN python locked_install.py requirements.lock /opt/vmibridge "$(ls /wheels/*.whl)[$EXTRAS]"
COPY --chmod=0755 docker/trim_environment.py /usr/local/bin/trim-environment
ENV PIP_PYTHON=/opt/vmibridge/bin/python \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONHASHSEED=0

FROM builder AS environment
RUN trim-environment /opt/vmibridge

# The root of the image. A volume that is first used here has the owner and the mode of these folders.
# QEMU's image has the same group, and a user of its own. Docker's Python comes without the bytecode of
# its own library, which would be made at each start, as the root cannot be written to.
FROM base AS root
ARG SOURCE_DATE_EPOCH
RUN --mount=type=bind,source=docker/harden-root,target=/mnt/harden-root \
    groupadd --gid 10000 vmibridge \
    && useradd --uid 10001 --gid vmibridge --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin vmibridge \
    && install -d -o root -g vmibridge -m 0770 /run/vmibridge \
    && install -d -o vmibridge -g vmibridge -m 0750 /recordings \
    && sh /mnt/harden-root \
    && PYTHONHASHSEED=0 python -m compileall -q -f --invalidation-mode unchecked-hash \
        -x '/(test|tests|idlelib|lib2to3|tkinter|turtledemo|site-packages|dist-packages)/' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

# What is in it, in the words of CycloneDX: Python's packages, Python itself and Debian's packages.
FROM locked AS sbom
RUN python locked_install.py requirements.lock /tool cyclonedx-bom
COPY --from=environment /opt/vmibridge /opt/vmibridge
RUN /tool/bin/cyclonedx-py environment --output-reproducible --of JSON -o python.json \
    /opt/vmibridge/bin/python
COPY docker/image_sbom.py ./
COPY --from=root /var/lib/dpkg/status /etc/os-release ./
ARG VERSION=unknown
ARG SOURCE_DATE_EPOCH
RUN python image_sbom.py vmibridge "$VERSION" --with python.json --python -o vmibridge.json

FROM root
COPY --from=sbom /build/vmibridge.json /usr/share/sbom/vmibridge.json
COPY --from=environment /opt/vmibridge /opt/vmibridge
# Output that fills no disk, and a status that tells a stop from a failure: docs/containers.md.
ENV PATH=/opt/vmibridge/bin:$PATH \
    VMIBRIDGE_OUTCOMES=false \
    VMIBRIDGE_EXIT_ZERO=true \
    VMIBRIDGE_HEALTH_SOCKET=/dev/shm/vmibridge-health.sock
# What differs from build to build is in labels that docker/build_images.py adds.
LABEL org.opencontainers.image.title="vmibridge" \
      org.opencontainers.image.description="Async Python handlers for what a virtual machine asks by one instruction" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.vendor="vmibridge"
USER 10001:10000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s --retries=3 CMD ["vmibridge", "health"]
ENTRYPOINT ["vmibridge"]
CMD ["--help"]
