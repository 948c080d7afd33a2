# Two images from one file; docs/deployment.md has the details.
#   docker build --target cpu --build-arg TORCH_INDEX=<URL of PyTorch's index of CPU wheels> -t cde-server:0.1.0-cpu .
#   docker build --target cuda -t cde-server:0.1.0-cuda .
# With weights inside: --build-arg MODEL=jxm/cde-small-v2 --build-arg REVISION=a7e5882ad52c27ea2831fc8258f24379c25cb459
# By digest: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:<the digest your registry shows>
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG MODEL=""

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Without pip: nothing can be installed into what runs.
RUN python -m venv --without-pip /opt/venv
# torch first, in a layer of its own: it is large and seldom changes. Without TORCH_INDEX it is what pip's index has: on Linux, CUDA.
# Its headers and its own tests are of no use here.
ARG TORCH_INDEX=""
# hadolint ignore=DL3013
RUN pip --python /opt/venv install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0 \
    && rm -r /opt/venv/lib/python3*/site-packages/torch/include /opt/venv/lib/python3*/site-packages/torch/test
COPY config/requirements-builtin.txt config/requirements-vocabulary.txt config/vocabulary.py config/weights.py config/
RUN pip --python /opt/venv install --no-deps --require-hashes -r config/requirements-builtin.txt
# Token ids, LangChain's default, need tiktoken's cl100k_base. Where it is not to be had, this warns and the server answers them 400.
RUN mkdir /opt/tiktoken && { python config/vocabulary.py /opt/tiktoken || true; }
COPY pyproject.toml README.md ./
COPY app app
# hadolint ignore=DL3013
RUN pip --python /opt/venv install '.[postgres,otel]'

# The weights, where a build argument names them: downloaded, loaded once, and from then on read without a network.
FROM build AS weights
ARG MODEL
ARG REVISION=""
ARG HF_ENDPOINT=https://huggingface.co
RUN --mount=type=secret,id=hf_token HF_TOKEN_PATH=/run/secrets/hf_token HF_HOME=/opt/weights/hub \
    /opt/venv/bin/python config/weights.py /opt/weights "$MODEL" "$REVISION"

FROM ${PYTHON_IMAGE} AS runtime
ARG MODEL
ARG PYTHON_IMAGE
ARG GIT_COMMIT=""
LABEL org.opencontainers.image.title="cde-server" \
    org.opencontainers.image.description="Contextual document embeddings behind OpenAI's embeddings API" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.revision="${GIT_COMMIT}" \
    org.opencontainers.image.base.name="${PYTHON_IMAGE}"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data cde && mkdir /data && chown 10001:10001 /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/tiktoken /opt/tiktoken
COPY --from=weights /opt/weights /opt/weights
# Everything that is written goes to /data, and temporary files to /tmp: the rest may be read-only.
ARG BAKED=${MODEL:+/opt/weights}
# hadolint ignore=DL3064
ENV PATH="/opt/venv/bin:$PATH" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TIKTOKEN_CACHE_DIR=/opt/tiktoken \
    HF_HOME=${BAKED:-/data}/hub HF_HUB_OFFLINE=${MODEL:+1} \
    CDE_CONFIG=/opt/weights/cde-server.toml CDE__DATA_DIR=/data CDE__SERVER__HOST=0.0.0.0
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["cde-server"]
CMD ["serve"]

FROM runtime AS cuda
RUN ["python", "-c", "import torch; assert torch.version.cuda, 'This torch has no CUDA: leave TORCH_INDEX out, or name an index of CUDA wheels'"]
# Triton compiles its launcher at the first start, and keeps it and its kernels beside the data. Without a compiler it is left out.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && gcc -fsyntax-only -I "$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')" -include Python.h -x c /dev/null
USER 10001:10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility TRITON_CACHE_DIR=/data/triton

# Last, so that it is what is built where no target is named.
FROM runtime AS cpu
