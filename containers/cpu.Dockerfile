# The stages on CPUs: docker build --file containers/cpu.Dockerfile --tag recgpt-torchrec:cpu .
#
# Python packages are those of requirements-cpu.lock without what only development needs. torch must be its CPU build:
# where the package index offers the CUDA build first, add --build-arg PIP_INDEX_URL=<PyTorch's CPU index>
# --build-arg PIP_EXTRA_INDEX_URL=<the index of everything else>. Pin the base too: --build-arg BASE=debian@sha256:...
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements-cpu.lock containers/development.txt ./
# Headers and tests of torch, Arrow and pandas are left out: nothing is compiled in the image.
RUN grep --invert-match --file=development.txt requirements-cpu.lock > run.lock \
    && python3 -m venv /opt/recgpt \
    && /opt/recgpt/bin/pip install --no-compile --no-deps --requirement run.lock \
    && for folder in torch/include torch/share torch/test pyarrow/include pyarrow/tests pandas/tests; do \
        rm -rf /opt/recgpt/lib/python3*/site-packages/"${folder}"; \
    done
COPY pyproject.toml README.md torchx_components.py ./
COPY recgpt_torchrec recgpt_torchrec
# The user of the image writes no byte code, and pip would compile ten times as much as is used: importing each stage
# compiles what it needs.
RUN /opt/recgpt/bin/pip install --no-compile --no-deps --no-build-isolation . \
    && /opt/recgpt/bin/pip uninstall --yes pip \
    && for stage in prepare pretrain generate_prompts prompt_tune evaluate export index retrieve launch.node; do \
        /opt/recgpt/bin/python -m "recgpt_torchrec.${stage}" --help > /dev/null || exit 1; \
    done \
    && /opt/recgpt/bin/python -c 'import duckdb, faiss, fbgemm_gpu, pyarrow.parquet, tensorboard, torchrec, torchx'

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /usr/share/doc /usr/share/man \
    && useradd --uid 10001 --create-home recgpt
COPY --from=build /opt/recgpt /opt/recgpt
ENV PATH=/opt/recgpt/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /home/recgpt
# docker run IMAGE pretrain --help; a job runs `python -m recgpt_torchrec.launch.node ...` instead.
ENTRYPOINT ["python", "-m", "recgpt_torchrec"]
CMD ["--help"]
