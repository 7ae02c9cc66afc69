# The aggregator: no torch, no compiler, not root, a root file system that may be read-only.
#
#   docker build -f docker/aggregator.Dockerfile -t fedgrpc-aggregator .
#   docker run -p 50051:50051 -v fedgrpc:/var/lib/fedgrpc fedgrpc-aggregator --task fedgrpc.tasks.digits
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

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/fedgrpc fedgrpc \
    && install -d -o fedgrpc -g fedgrpc -m 0750 /var/lib/fedgrpc
COPY --from=dependencies /opt/fedgrpc /opt/fedgrpc
COPY --from=app /opt/app /opt/app
ENV PATH=/opt/app/bin:/opt/fedgrpc/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FEDGRPC_AGGREGATOR_ADDRESS=0.0.0.0:50051 \
    FEDGRPC_AGGREGATOR_DATA_DIR=/var/lib/fedgrpc \
    FEDGRPC_HEALTH_ADDRESS=unix:/var/lib/fedgrpc/identity/operator.sock
USER 10001:10001
WORKDIR /var/lib/fedgrpc
VOLUME /var/lib/fedgrpc
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["fedgrpc", "health"]
ENTRYPOINT ["fedgrpc"]
CMD ["aggregator"]
