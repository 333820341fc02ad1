# An image in which `fdistill` is the command.
#   docker build --tag fdistill .                                                                 for CPUs
#   docker build --tag fdistill --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .            for NVIDIA GPUs
#   docker run --rm --volume "$PWD:/work" fdistill distill digits --output runs/first             with --gpus all on a GPU
# The base may be any image of Debian or Ubuntu with, or without, Python 3.10 or newer; one that has torch keeps it. Files in /work
# belong to the user with the number USER_ID: --build-arg USER_ID=$(id -u) makes it yours.
ARG BASE=python:3.12-slim
FROM ${BASE}

ARG USER_ID=1000
# A compiler is needed while the programs run: Triton compiles what starts its kernels, and `--compile` whole blocks.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && if ! command -v python3 >/dev/null; then \
        apt-get install --yes --no-install-recommends python3 python3-dev python3-venv; fi \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --non-unique --uid "${USER_ID}" fdistill \
    && install --directory --owner=fdistill /work

ENV PATH=/opt/fdistill/bin:$PATH PYTHONUNBUFFERED=1
COPY pyproject.toml README.md LICENSE /src/
COPY configs /src/configs
COPY evaluation /src/evaluation
COPY fdistill /src/fdistill
# The base's own packages are seen, so that its torch is not installed a second time.
RUN python3 -m venv --system-site-packages /opt/fdistill \
    && pip install --no-cache-dir "/src[data,lora,text]" \
    && rm -r /src

USER fdistill
WORKDIR /work
ENTRYPOINT ["fdistill"]
CMD ["--help"]
