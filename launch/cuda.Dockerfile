# docker build -f launch/cuda.Dockerfile -t REGISTRY/vr_jax:cuda .
# The CUDA libraries come as wheels with jax; of the host only its driver is used.
FROM python:3.12-slim
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
WORKDIR /vr_jax
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY data_pipes data_pipes
COPY vr_jax vr_jax
RUN pip install --no-cache-dir '.[cuda]'
WORKDIR /work
ENTRYPOINT []
CMD ["vr", "--help"]
