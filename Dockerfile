# arpo_trl for NVIDIA GPUs. The host needs the driver and the NVIDIA Container Toolkit:
#     docker build -t arpo_trl .
#     docker run --rm --gpus all --ipc=host -v "$PWD:/work" -v ~/.cache/huggingface:/root/.cache/huggingface arpo_trl \
#         accelerate launch -q --config_file accelerate_configs/single_gpu.yaml -m arpo_trl recipes/qwen_toy.yaml
# AMD: build with --build-arg TORCH_INDEX=... (the ROCm index of https://pytorch.org/get-started/locally) and run with
# --device=/dev/kfd --device=/dev/dri instead of --gpus. Ascend: start FROM a CANN image and install torch_npu, too.
FROM python:3.11-slim
ARG TORCH_INDEX=https://pypi.org/simple
RUN apt-get update && apt-get install -y --no-install-recommends gcc git libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /opt/arpo_trl
WORKDIR /opt/arpo_trl
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt '.[wandb,quantization]'
WORKDIR /work
CMD ["arpo-trl", "--env"]
