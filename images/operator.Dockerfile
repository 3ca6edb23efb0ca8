# The operator: Python, Pylon and what `pylon operator` needs. No torch, no compiler, no pip.
# Build from the project's root: docker build --file images/operator.Dockerfile .
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv --without-pip /opt/pylon
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY crds/pylon_api crds/pylon_api
COPY operator/pylon_operator operator/pylon_operator
COPY trainer/pylon_trainer trainer/pylon_trainer
# Compiled here, because the root file system is read-only where it runs.
RUN pip --python /opt/pylon/bin/python install --compile ".[operator]"

FROM ${BASE}
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="pylon-operator" \
      org.opencontainers.image.description="The operator of PylonJobs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN python -m pip uninstall --yes pip && rm -rf /root/.cache
COPY --from=build /opt/pylon /opt/pylon
ENV PATH=/opt/pylon/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["pylon"]
CMD ["operator"]
