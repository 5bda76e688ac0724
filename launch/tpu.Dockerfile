# docker build -f launch/tpu.Dockerfile -t REGISTRY/vr_jax:tpu .
FROM python:3.12-slim
WORKDIR /vr_jax
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY data_pipes data_pipes
COPY vr_jax vr_jax
RUN pip install --no-cache-dir '.[tpu]'
WORKDIR /work
ENTRYPOINT []
CMD ["vr", "--help"]
