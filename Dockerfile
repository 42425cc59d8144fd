# cecompile on top of an image that brings torch, which is kept as it is.
#
# Jetson AGX Orin, JetPack 6, on the device itself (the default):
#   DOCKER_BUILDKIT=0 docker build -t cecompile .
# A PC or server with an NVIDIA GPU:
#   docker build -t cecompile --build-arg BASE_IMAGE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-devel .
# Untested: JetPack 7.2, whose Orin takes the images of other arm64 machines: a tag nvcr.io/nvidia/pytorch:YY.MM-py3.
# The base has to bring a C++ compiler beside torch: Inductor and Triton need one when they compile.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3-igpu

FROM ${BASE_IMAGE} AS wheel
# The base's own list of constraints (PIP_CONSTRAINT, in NVIDIA's images) pins libraries that have to be newer here.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_CONSTRAINT=""
COPY pyproject.toml README.md LICENSE /source/
COPY cecompile /source/cecompile
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM ${BASE_IMAGE}
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_CONSTRAINT="" \
    TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas \
    CECOMPILE_CACHE=/cache
COPY scripts/keep_installed.py scripts/image.txt scripts/entrypoint.sh /source/
COPY --from=wheel /wheels /wheels
# Bytecode is compiled now: the user of the image may not write it later.
RUN python3 /source/keep_installed.py /source/image.txt >/source/kept.txt \
    && python3 -m pip install --no-cache-dir --compile --constraint /source/kept.txt \
    "$(echo /wheels/cecompile-*.whl)[report]"

# A Jetson's GPU is for the group video. To write to a directory of yours, build with --build-arg USER_ID=$(id -u).
ARG USER_ID=1000
RUN useradd --create-home --non-unique --uid "${USER_ID}" --groups video cecompile \
    && mkdir -m 0700 /cache \
    && mkdir /model /work \
    && chown cecompile: /cache /work
# By name: the groups of a number are those of the base's user of that number, where there is one.
# hadolint ignore=DL3066
USER cecompile
WORKDIR /work
# Everything but torch has to import. torch may ask for the driver's libraries, which a build need not have; what doctor
# says of it is shown. What the GPU can do is asked on the device.
RUN cecompile --version \
    && python3 -c "import datasets, google.protobuf, matplotlib, numpy, pyarrow, reportlab, sentencepiece, tokenizers" \
    && (cecompile doctor || echo "doctor could not run here: run it on the device")
VOLUME ["/cache", "/model"]
ENTRYPOINT ["/source/entrypoint.sh"]
CMD ["doctor"]
