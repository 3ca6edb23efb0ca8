# The trainer: Python, torch and Pylon. For a CPU-only image, ten times smaller:
#   docker build --file images/trainer.Dockerfile --build-arg TORCH_INDEX=<index of torch's CPU wheels> .
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=
# Stores to reach: any of s3, gcs, azure.
ARG EXTRAS=trainer,s3,gcs,azure
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv --without-pip /opt/pylon
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY crds/pylon_api crds/pylon_api
COPY operator/pylon_operator operator/pylon_operator
COPY trainer/pylon_trainer trainer/pylon_trainer
RUN pip --python /opt/pylon/bin/python install --compile ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} ".[${EXTRAS}]"

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="pylon-trainer" \
      org.opencontainers.image.description="The trainer that a PylonJob's pods run" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# A C compiler stays: torch.compile and Triton build small launchers at run time. Nothing else can build here.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python -m pip uninstall --yes pip
COPY --from=build /opt/pylon /opt/pylon
# All that is written goes below the pod's scratch volume, so the root file system may be read-only.
ENV PATH=/opt/pylon/bin:$PATH \
    HOME=/tmp/pylon \
    TRITON_CACHE_DIR=/tmp/pylon/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/pylon/inductor \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN install --directory --owner=65532 --group=65532 /tmp/pylon
USER 65532:65532
WORKDIR /tmp/pylon
CMD ["python", "-m", "pylon_trainer.launcher"]
