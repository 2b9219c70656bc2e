# The stages on NVIDIA GPUs: docker build --file containers/cuda.Dockerfile --tag recgpt-torchrec:cuda .
#
# CUDA's libraries come as Python packages with torch; of the machine only the driver is needed, with NVIDIA's container
# runtime. pyproject.toml pins torch, torchrec and fbgemm-gpu, torch pins CUDA's packages and triton, and
# requirements-cpu.lock all others. Pin the base too: --build-arg BASE=debian@sha256:...
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
COPY requirements-cpu.lock containers/development.txt pyproject.toml README.md torchx_components.py ./
COPY recgpt_torchrec recgpt_torchrec
RUN echo '^fbgemm-gpu-cpu==' >> development.txt \
    && grep --invert-match --file=development.txt requirements-cpu.lock > run.lock \
    && python3 -m venv /opt/recgpt \
    && /opt/recgpt/bin/pip install --no-compile --constraint run.lock . \
    && /opt/recgpt/bin/pip uninstall --yes pip \
    && for stage in prepare pretrain generate_prompts prompt_tune evaluate export index retrieve launch.node; do \
        /opt/recgpt/bin/python -m "recgpt_torchrec.${stage}" --help > /dev/null || exit 1; \
    done \
    && /opt/recgpt/bin/python -c 'import torch; assert torch.version.cuda, "this is the CPU build of torch"' \
    && /opt/recgpt/bin/python -c 'import duckdb, faiss, pyarrow.parquet, tensorboard, torchrec, torchx'

FROM ${BASE}
# gcc is for Triton, which compiles a launcher of its kernels at the first step. RDMA needs the libraries of the adapters.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev libibverbs1 ibverbs-providers python3-dev \
    && rm -rf /var/lib/apt/lists/* /usr/share/doc /usr/share/man \
    && useradd --uid 10001 --create-home recgpt
COPY --from=build /opt/recgpt /opt/recgpt
ENV PATH=/opt/recgpt/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /home/recgpt
ENTRYPOINT ["python", "-m", "recgpt_torchrec"]
CMD ["--help"]
