# A worker without torch, for a learning task in NumPy on a small device. The task is a Python file mounted below /tasks.
#
#   docker build -f docker/worker-lite.Dockerfile -t fedgrpc-worker-lite .
#   docker run -v "$PWD/examples:/tasks:ro" -v fedgrpc:/var/lib/fedgrpc fedgrpc-worker-lite worker \
#     --aggregator HOST:50051 --name pi-1 --task bring_your_own_numpy --data /usr/share/fedgrpc/digits.npz
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS dependencies
# pip's own configuration and these arguments say where packages come from; neither reaches the last stage.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# The README is what pyproject.toml names, and changes too often to be in the way of what is installed below.
RUN python -m venv --without-pip /opt/fedgrpc && touch README.md
COPY pyproject.toml constraints.txt LICENSE docker/requirements.txt ./
# What fedgrpc depends on makes a layer of its own, which a change of the code leaves as it is. Files with other hashes
# than those of requirements.txt (make lock) are refused.
# Of the packages go their tests, numpy's f2py, and the one of zstandard's two backends that needs cffi.
RUN python -m pip --python /opt/fedgrpc/bin/python install --no-compile --no-deps --require-hashes -r requirements.txt \
    && site=$(/opt/fedgrpc/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && find "$site" -depth -type d -name tests -exec rm -rf {} + \
    && rm -rf "$site"/numpy/f2py "$site"/zstandard/_cffi*.so \
    && /opt/fedgrpc/bin/python -m compileall -q --invalidation-mode unchecked-hash "$site" \
    && echo /opt/app > "$site"/app.pth

FROM dependencies AS app
COPY fedgrpc fedgrpc
RUN python -m pip --python /opt/fedgrpc/bin/python install --no-deps --no-compile --target /opt/app . \
    && /opt/fedgrpc/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/app

FROM dependencies AS scikit-learn
RUN python -m pip install --no-deps --no-compile --constraint constraints.txt --target /opt/scikit-learn scikit-learn

FROM app AS digits
# scikit-learn's digits as one small file, so that a worker can be tried out without any data.
# Copied, not mounted: podman 4 cannot mount a stage that comes from its cache.
COPY --from=scikit-learn /opt/scikit-learn /opt/scikit-learn
RUN PYTHONPATH=/opt/scikit-learn /opt/fedgrpc/bin/python -m fedgrpc.datasets.shares digits \
        --parts 1 --partition iid --to /usr/share/fedgrpc \
    && mv /usr/share/fedgrpc/part-1-of-1.npz /usr/share/fedgrpc/digits.npz

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/fedgrpc fedgrpc \
    && install -d -o fedgrpc -g fedgrpc -m 0750 /var/lib/fedgrpc
COPY --from=dependencies /opt/fedgrpc /opt/fedgrpc
COPY --from=digits /usr/share/fedgrpc /usr/share/fedgrpc
COPY --from=app /opt/app /opt/app
ENV PATH=/opt/app/bin:/opt/fedgrpc/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONPATH=/tasks \
    FEDGRPC_WORKER_STATE_DIR=/var/lib/fedgrpc \
    FEDGRPC_WORKER_SERVE_ADDRESS=127.0.0.1:50052 \
    FEDGRPC_HEALTH_ADDRESS=127.0.0.1:50052
USER 10001:10001
WORKDIR /var/lib/fedgrpc
VOLUME /var/lib/fedgrpc
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 CMD ["fedgrpc", "health"]
ENTRYPOINT ["fedgrpc"]
CMD ["worker"]
