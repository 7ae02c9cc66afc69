# A worker for a Jetson with JetPack 6: NVIDIA's build of torch for its GPU, used when the container gets one.
# Build it on the device, or on any machine for linux/arm64:
#
#   docker build -f docker/worker-jetson.Dockerfile -t fedgrpc-worker-jetson .
#   docker run --runtime nvidia -v "$PWD/data:/data:ro" -v fedgrpc:/var/lib/fedgrpc fedgrpc-worker-jetson worker \
#     --aggregator HOST:50051 --name jetson-1 --task fedgrpc.tasks.fashion_mnist --data /data
#
# The tag goes with the JetPack: 25.02-py3-igpu with 6.2, 24.12-py3-igpu with 6.1. It must bring Python 3.11 or newer;
# the images for JetPack 4 and 5 (nvcr.io/nvidia/l4t-pytorch:r32..., r35...) bring 3.6 and 3.8, too old for fedgrpc:
# such a device runs worker.Dockerfile, on its CPU.
ARG JETPACK_TAG=25.02-py3-igpu
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:${JETPACK_TAG}

FROM ${BASE_IMAGE}
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# The base pins its own packages for every pip; those go into this image's environment only where they are missing.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_CONSTRAINT=
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fedgrpc fedgrpc
# What the base has stays as it is: torch, and the numpy that it was built with.
RUN python3 -m venv --system-site-packages --without-pip /opt/fedgrpc \
    && grep -vE '^(torch|numpy|scipy|setuptools)==' constraints.txt > pins.txt \
    && python3 -m pip --python /opt/fedgrpc/bin/python install --constraint pins.txt . safetensors \
    && /opt/fedgrpc/bin/python -c 'import torch, numpy, fedgrpc.worker.process; torch.from_numpy(numpy.zeros(1))' \
    && rm -rf /build/* \
    && useradd --uid 10001 --user-group --groups video --no-create-home --home-dir /var/lib/fedgrpc fedgrpc \
    && install -d -o fedgrpc -g fedgrpc -m 0750 /var/lib/fedgrpc
ENV PATH=/opt/fedgrpc/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONPATH=/tasks \
    FEDGRPC_WORKER_STATE_DIR=/var/lib/fedgrpc \
    FEDGRPC_WORKER_SERVE_ADDRESS=127.0.0.1:50052 \
    FEDGRPC_HEALTH_ADDRESS=127.0.0.1:50052
USER 10001:10001
WORKDIR /var/lib/fedgrpc
VOLUME /var/lib/fedgrpc
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 CMD ["fedgrpc", "health"]
ENTRYPOINT ["fedgrpc"]
CMD ["worker"]
