# For the CPU, or for CUDA:
#   docker build --tag tmass .
#   docker build --tag tmass --build-arg TORCH_INDEX=https://pypi.org/simple .
# The folder it is started in becomes /workspace. Its data/ is read, and runs/ is written there, by your own user:
#   docker run --rm --shm-size 8g --user "$(id -u):$(id -g)" --volume "$PWD:/workspace" tmass tmass-train
# CUDA needs --gpus all besides. --shm-size: the loader's workers hand over batches in shared memory, of which Docker
# gives a container 64 MiB. With too little, training ends with one sentence that says so; --workers 0 needs none.
FROM python:3.11-slim

# Where torch comes from: its CPU build, or PyPI, whose build is for CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /opt/tmass
COPY requirements.txt requirements-search.txt ./
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -r requirements.txt -r requirements-search.txt

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

# Weights that are downloaded, such as CLIP's, go to /workspace/.cache. The user of --user has no name of its own.
ENV HOME=/workspace USER=tmass
WORKDIR /workspace
CMD ["tmass-train", "--help"]
