"""The estimated parts of a step's memory equal what the model, its optimizer and autograd allocate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer

from arpo_trl.model import memory
from arpo_trl.model.memory import Memory, describe_memory, estimate_memory, model_shape
from arpo_trl.model.methods.asft import frozen_copy
from arpo_trl.model.model import load_model
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.model.split import Split
from arpo_trl.recipe import read_recipe
from arpo_trl.recipe.keys import Recipe
from arpo_trl.training.checkpoints import checkpoint_bytes

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROWS = Dataset.from_list([{"input_ids": [5] * n, "labels": [-100] * 10 + [5] * (n - 10)} for n in (20, 80, 60, 30)])


def recipe(folder: Path, model: Path, *lines: str) -> Recipe:
    path = folder / "r.yaml"
    keys = f"model_name_or_path: {model}\noutput_dir: {folder}/out\ndo_train: true\ndataset: a\n"
    path.write_text(f"{keys}per_device_train_batch_size: 2\n", encoding="utf-8")
    return read_recipe(path, ["finetuning_type=full", *lines] if "finetuning_type=lora" not in lines else lines)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_checkpoint_bytes_count_weights_and_optimizer_state(optim: str, tmp_path: Path, tiny_model: Path) -> None:
    args = to_sft_config(recipe(tmp_path, tiny_model, f"optim={optim}"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = cls(model.parameters(), **kwargs)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    state = sum(x.nbytes for one in optimizer.state.values() for x in one.values() if torch.is_tensor(x))
    weights = sum(p.nbytes for p in model.parameters())
    assert checkpoint_bytes(model, args, Split("DDP")) == pytest.approx(weights + state, rel=0.05)
    args.save_only_model = True
    assert checkpoint_bytes(model, args, Split("DDP")) == weights


@pytest.mark.parametrize(
    "lines",
    [[], ["finetuning_type=lora"], ["finetuning_type=freeze"], ["bf16=true"], ["bf16=true", "finetuning_type=lora"]],
    ids=" ".join,
)
def test_the_estimated_parts_equal_those_of_the_loaded_model(
    lines: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    given = recipe(tmp_path, tiny_model, "gradient_checkpointing=false", *lines)
    args = to_sft_config(given)
    found = estimate_memory(given, args, model_shape(given), ROWS)
    assert found is not None
    model: Any = load_model(given)[0]
    parameters = list(model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    assert found.weights == sum(p.nbytes for p in parameters)
    head = 0 if lines and "finetuning" in lines[-1] else 1088 * 64 * 4  # its gradient; it is the embedding too
    assert (found.gradients, found.optimizer) == (trained + head, 2 * trained)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16)):
        backbone = model.base_model.model.model if given.finetuning_type == "lora" else model.model
        tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
        saved, _ = memory._saved_by_autograd(backbone, tensors, 2, 80)
    assert found.activations == pytest.approx(saved, rel=0.02)  # fake tensors have no hidden padding
    half = args.bf16
    assert found.logits == 120 * 1088 * (14 if half else 12) + (2 * 1088 * 64 if half else 0) + head


@pytest.mark.parametrize("lines", [[], ["bf16=true"], ["bf16=true", "finetuning_type=lora"]], ids=" ".join)
def test_the_reference_model_of_asft_counts(lines: list[str], tmp_path: Path, tiny_model: Path) -> None:
    given = recipe(tmp_path, tiny_model, "use_asft_loss=true", *lines)
    args = to_sft_config(given)
    model, _ = load_model(given)
    reference = frozen_copy(model, args)
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16 if args.bf16 else torch.float32}
    found = estimate_memory(given, args, model_shape(given), ROWS)
    assert found
    sizes = [sum(p.nbytes for p in one.parameters()) for one in (model, reference)]
    assert [found.weights, found.reference] == sizes


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_of_a_quantized_base_are_packed(bits: int, tmp_path: Path, tiny_model: Path) -> None:
    """Except the scales of its blocks: 3% of a 4-bit layer, at any model size."""
    pytest.importorskip("bitsandbytes")
    given = recipe(tmp_path, tiny_model, "finetuning_type=lora", f"quantization_bit={bits}")
    found = estimate_memory(given, to_sft_config(given), model_shape(given), ROWS)
    model: Any = load_model(given)[0]
    assert found is not None and found.weights == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("lines", "shape"),
    [
        ([], (2, 80, 120)),
        (["padding_free=true"], (1, 140, 120)),
        (["packing=true", "cutoff_len=100"], (1, 200, 120)),
        (["per_device_train_batch_size=8"], (4, 80, 150)),
    ],
)
def test_the_batch_is_the_largest_that_the_sampler_can_draw(
    lines: list[str], shape: tuple[int, int, int], tmp_path: Path, tiny_model: Path
) -> None:
    given = recipe(tmp_path, tiny_model, *lines)
    assert memory._largest_batch(given, to_sft_config(given), ROWS) == shape


@pytest.mark.parametrize(("optim", "moments"), [("adamw_torch", 2), ("adafactor", 0), ("adamw_8bit", 0.5), ("sgd", 0)])
def test_the_optimizer_state_depends_on_the_optimizer(
    optim: str, moments: float, tmp_path: Path, tiny_model: Path
) -> None:
    given = recipe(tmp_path, tiny_model, f"optim={optim}")
    found = estimate_memory(given, to_sft_config(given), model_shape(given), ROWS)
    assert found and found.optimizer == moments * found.weights


def test_checkpointing_keeps_one_layer_and_the_hidden_states_of_each(tmp_path: Path, tiny_model: Path) -> None:
    kept, recomputed = (
        estimate_memory(given, to_sft_config(given), model_shape(given), ROWS)
        for given in (recipe(tmp_path, tiny_model, f"gradient_checkpointing={on}") for on in ("false", "true"))
    )
    assert kept and recomputed
    assert recomputed.activations == 2 * (2 * 80 * 64 * 4) + kept.activations // 2


def test_the_smallest_gpu_that_fits_is_named() -> None:
    memory = Memory(2_000_000_000, 2_000_000_000, 4_000_000_000, 3_000_000_000, 1_000_000_000)
    assert memory.peak == 10_000_000_000
    parts = "about 10.0 GB peak (parts, not all at once: weights 2.0, gradients 2.0, optimizer 4.0, activations 3.0, logits 1.0); "
    assert describe_memory(memory, None) == f"{parts}fits a 16 GB GPU"
    assert describe_memory(memory, 10_500_000_000) == f"{parts}does not fit this 10 GB GPU"
    assert describe_memory(memory._replace(optimizer=90_000_000_000), None).endswith("does not fit an 80 GB GPU")


MEASURED = """
import json, re, sys
from pathlib import Path
from datasets import Dataset
from transformers import AutoTokenizer
from arpo_trl.recipe import read_recipe
from arpo_trl.model.adapters import keep_adapter_in_float32
from arpo_trl.model.memory import estimate_memory, model_shape
from arpo_trl.model.model import load_model
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.model.split import Split
from arpo_trl.training.trainer import ArpoTrainer

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

recipe, length = read_recipe(sys.argv[1]), int(sys.argv[2])
args = to_sft_config(recipe)
ids = [[5 + (7 * i + j) % 900 for j in range(length)] for i in range(8)]
rows = Dataset.from_list([{"input_ids": row, "labels": [-100] * (length // 2) + row[length // 2 :]} for row in ids])
found = estimate_memory(recipe, args, model_shape(recipe), rows)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = status("VmRSS")
model, _ = load_model(recipe)
trainer = ArpoTrainer(
    model=model,
    args=args,
    train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(recipe.model_name_or_path),
)
keep_adapter_in_float32(model)
trainer.train()
print(json.dumps([found.peak, status("VmHWM") - before, found._asdict()]))
"""


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers of 512 and a vocabulary of 32,000: 187 MB of float32 weights."""
    folder = tmp_path_factory.mktemp("larger") / "model"
    architectures.make_model("qwen2", folder)
    shape: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    config = Qwen2Config(**shape, num_key_value_heads=2, vocab_size=32000, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("lines", "length"),
    [
        ([], 64),
        ([], 512),
        (["gradient_checkpointing=false"], 512),
        (["gradient_checkpointing=false", "bf16=true"], 512),
        (["finetuning_type=lora"], 512),
        (["optim=adafactor"], 512),
    ],
)
def test_the_estimate_is_within_15_percent_of_a_measured_peak(
    lines: list[str], length: int, tmp_path: Path, larger_model: Path
) -> None:
    keys = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True}
    keys |= {"model_name_or_path": str(larger_model), "output_dir": str(tmp_path), "do_train": True, "dataset": "a"}
    keys |= {"finetuning_type": "full"} | dict(line.split("=") for line in lines)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys).replace("'", ""), encoding="utf-8")
    # Freed tensors go back to the system at once, or glibc's own gaps would be measured.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "r.yaml"), str(length)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    estimated, measured, parts = json.loads(done.stdout.splitlines()[-1])
    print(lines, length, {name: size // 10**6 for name, size in parts.items()}, estimated // 10**6, measured // 10**6)
    assert estimated == pytest.approx(measured, rel=0.15)
