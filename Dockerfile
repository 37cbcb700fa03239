# An image with everything that scripts/setup.sh installs.
#
#   docker build -t dft .
#   docker build -t dft --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .
#   docker run --rm -v "$PWD/data:/data" -v "$PWD/runs:/app/runs" dft python train_dft.py --help
#   docker run --rm --gpus all --shm-size 16g -v "$PWD/data:/data" -v "$PWD/runs:/app/runs" dft scripts/train.sh
#
# BASE is a Debian or Ubuntu image with Python 3.11 or newer. For GPUs, use the CUDA version that torch is built for; a
# "devel" image has nvcc, with which DeepSpeed compiles its operators. PIP_EXTRA_INDEX_URL can name a package index
# with the CPU build of torch, which is gigabytes smaller (see the start page of pytorch.org).
ARG BASE=debian:12-slim
FROM ${BASE}

# g++, ninja-build and python3-dev are for the operators that DeepSpeed compiles when they are first used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates g++ ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# The set-up needs only these files, so a change of the code does not install the packages again.
COPY requirements*.txt ./
COPY scripts/setup.sh scripts/environment.sh scripts/check_requirements.py scripts/flash_attn_wheel.py scripts/
ARG PIP_EXTRA_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1
RUN bash scripts/setup.sh

# There is no GPU during a build, so the set-up leaves out flash-attn. nvcc shows that the image is for GPUs.
RUN if command -v nvcc; then \
        pin=$(.venv/bin/python scripts/check_requirements.py requirements-gpu.txt); \
        url=$(.venv/bin/python scripts/flash_attn_wheel.py "${pin#*==}") \
        && .venv/bin/pip install "$url" \
        && .venv/bin/python -c 'import flash_attn' \
        || { .venv/bin/pip uninstall -y flash-attn; echo "no wheel of $pin: attention uses torch's sdpa"; }; \
    fi

COPY . .
ENV VIRTUAL_ENV=/app/.venv PATH=/app/.venv/bin:$PATH
CMD ["python", "train_dft.py", "--env"]
