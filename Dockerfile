# docker build -t cde-server .                                     torch with CUDA, as the package index has it
# docker build -t cde-server --build-arg TORCH_INDEX=<URL> .       URL: PyTorch's index of CPU wheels, a much smaller image
FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/venv
ENV PATH="/opt/venv/bin:$PATH" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# torch first, in a layer of its own: it is large and seldom changes.
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
COPY config/requirements-builtin.txt config/requirements-vocabulary.txt config/vocabulary.py config/
RUN pip install --no-deps --require-hashes -r config/requirements-builtin.txt
# Token ids, LangChain's default, need tiktoken's cl100k_base. Where it is not to be had, this warns and the server answers them 400.
RUN mkdir /opt/tiktoken && { python config/vocabulary.py /opt/tiktoken || true; }
COPY pyproject.toml README.md ./
COPY app app
RUN pip install '.[postgres]'

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home --home-dir /home/cde cde && mkdir /data && chown cde /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=cde /opt/tiktoken /opt/tiktoken
ENV PATH="/opt/venv/bin:$PATH" PYTHONUNBUFFERED=1 HF_HOME=/data/hub TIKTOKEN_CACHE_DIR=/opt/tiktoken \
    CDE__DATA_DIR=/data CDE__SERVER__HOST=0.0.0.0
USER cde
WORKDIR /home/cde
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["cde-server"]
CMD ["serve"]
