"""Time of training steps, ours beside TRL's, on whatever device is there. Called by benchmark.py.

Each measurement is a process of its own, so that peak memory is its own too; the variants take turns, round by round.
All train the same random-weight Qwen2 on the same rows in the same order with the same tokens and labels: TRL's own
mask would train one newline more a turn, and the losses could not be compared.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 151_936  # Qwen2.5's, padded
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "trl": {},
    "ours": {},
    "ours, padding-free": {"padding_free": True},
    "ours, packed": {"packing": True},
    "ours, no checkpointing": {"activation_checkpointing": False},
    "ours, padding-free, no checkpointing": {"padding_free": True, "activation_checkpointing": False},
    "ours, compiled": {"torch_compile": True},
}


def steps(variants: list[str], rounds: int, shape: str, **measurement: Any) -> list[dict[str, Any]]:
    """Median seconds a step, tokens/s and peak memory of each variant; ratios are to the first.

    Args:
        variants: Names of VARIANTS.
        rounds: Processes for each of them.
        shape: A name of SHAPES.
        **measurement: What else `_measure` takes.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in variants:
            found[name].append(_in_own_process(variant=name, shape=shape, **measurement))
            print(f"  {name}: {found[name][-1]['seconds']}", file=sys.stderr, flush=True)
    table = []
    for name, runs in found.items():
        seconds = statistics.median(s for run in runs for s in run["seconds"])
        rate = statistics.median(t / s for run in runs for t, s in zip(run["tokens"], run["seconds"], strict=True))
        peak = statistics.median(run["peak_gb"] for run in runs)
        losses = [abs(a - b) for a, b in zip(runs[0]["losses"], found[variants[0]][0]["losses"], strict=False)]
        table.append(
            {
                "variant": name,
                "shape": shape,
                "device": runs[0]["device"],
                "s_per_step": round(seconds, 3),
                "tokens_per_s": round(rate, 1),
                "peak_gb": round(peak, 2),
                "largest_loss_difference": float(f"{max(losses):.1e}") if "packed" not in name else None,
            }
        )
    for line in table:
        line["times_first"] = round(line["tokens_per_s"] / table[0]["tokens_per_s"], 2)
    return table


def scaling(lengths: list[int], batches: list[int], picture: Path | None, **measurement: Any) -> list[dict[str, Any]]:
    """Seconds a step against length (batch 1) and against batch (512 tokens).

    `exponent` is that of the growth since the size before: 1 is linear, 2 quadratic.
    """
    points = [("length", n, 1, n) for n in lengths] + [("batch", n, n, 512) for n in batches]
    table: list[dict[str, Any]] = []
    for axis, size, batch, cutoff in points:
        run = _in_own_process(variant="ours", batch=batch, cutoff=cutoff, full=True, **measurement)
        seconds = statistics.median(run["seconds"])
        line = {"axis": axis, "size": size, "s_per_step": round(seconds, 3), "peak_gb": round(run["peak_gb"], 2)}
        before = table[-1] if table and table[-1]["axis"] == axis else line
        growth = math.log(seconds / before["s_per_step"]), math.log(size / before["size"])
        table.append(line | {"exponent": round(growth[0] / growth[1], 2) if growth[1] else None})
    if picture:
        _draw(table, picture)
    return table


def startup(rounds: int) -> list[dict[str, Any]]:
    """Seconds from launch to the end of the first step: ours, and a 30-line TRL script on the same data and model."""
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(folder)
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(_STARTUP_RECIPE.format(root=ROOT, folder=folder), encoding="utf-8")
        script = Path(folder) / "plain_trl.py"
        script.write_text(_PLAIN_TRL.format(root=ROOT, folder=folder), encoding="utf-8")
        commands = {"plain TRL": [sys.executable, script], "ours": [sys.executable, "-m", "arpo_trl", recipe]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                began = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
                seconds[name].append(time.perf_counter() - began)
    first = statistics.median(seconds["plain TRL"])
    return [
        {"who": name, "seconds": round(statistics.median(s), 2), "ratio": round(statistics.median(s) / first, 2)}
        for name, s in seconds.items()
    ]


_STARTUP_RECIPE = """
model_name_or_path: {folder}/model
do_train: true
finetuning_type: full
dataset_dir: {root}/recipes
dataset: arpo_sft_toy
cutoff_len: 512
output_dir: {folder}/ours
overwrite_output_dir: true
overwrite_cache: true
per_device_train_batch_size: 2
max_steps: 1
save_strategy: 'no'
logging_steps: 1
"""

_PLAIN_TRL = """
import itertools
import json
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

ROLES = {{"human": "user", "gpt": "assistant"}}
rows = []
for line in open("{root}/recipes/data/arpo_sft_toy.jsonl", encoding="utf-8"):
    row = json.loads(line)
    turns = [{{"role": ROLES[t["from"]], "content": t["value"]}} for t in row["conversations"]]
    rows.append({{"messages": [{{"role": "system", "content": row["system"]}}, *turns]}})
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained("{folder}/model", dtype="float32"),
    processing_class=AutoTokenizer.from_pretrained("{folder}/model"),
    train_dataset=Dataset.from_list(rows),
    args=SFTConfig(
        output_dir="{folder}/trl",
        max_length=512,
        assistant_only_loss=True,
        per_device_train_batch_size=2,
        max_steps=1,
        save_strategy="no",
        logging_steps=1,
        bf16=False,
        report_to="none",
    ),
)
trainer.train()
trainer.save_model()
"""


def _draw(table: list[dict[str, Any]], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (axis, unit) in enumerate((("length", "tokens, batch 1"), ("batch", "rows of 512 tokens")), 1):
        some = [line for line in table if line["axis"] == axis]
        axes = figure.add_subplot(1, 2, place, xlabel=f"{axis} ({unit})", ylabel="seconds a step")
        axes.loglog([p["size"] for p in some], [p["s_per_step"] for p in some], "o-")
        if len(some) > 1:
            axes.set_title(f"{axis}: at the end ~ size^{some[-1]['exponent']}")
        axes.grid(True, which="both", alpha=0.3)
    figure.savefig(picture)


def _in_own_process(**measurement: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, json.dumps(measurement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{measurement}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(
    model: str, variant: str, shape: str, count: int, batch: int, cutoff: int, bf16: bool, full: bool = False
) -> dict[str, Any]:
    """`count` steps after one that warms up, in this process. `full`: every row is cut from one long text."""
    import torch
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from arpo_trl.trainer import ArpoTrainer
    from arpo_trl.trainer_log import peak_memory

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)
            tokens.append(trainer._total_train_tokens)

    tokenizer, rows = _toy_rows(model, cutoff, full, batch * (count + 1))
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    config = Qwen2Config(
        vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, **SHAPES[shape],
    )  # fmt: skip
    settings: dict[str, Any] = {
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "activation_checkpointing": True,
        "train_sampling_strategy": "sequential",
        **VARIANTS[variant],
    }
    if settings.get("packing"):
        settings |= {"max_length": cutoff, "dataset_kwargs": None, "per_device_train_batch_size": 1}
    with tempfile.TemporaryDirectory() as folder:
        defaults = {"per_device_train_batch_size": batch, "learning_rate": 7e-6, "max_steps": count + 1}
        args = SFTConfig(
            output_dir=folder, use_cpu=not gpu, bf16=bf16, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, **(defaults | settings),
        )  # fmt: skip
        seconds: list[float] = []
        tokens: list[int] = []
        trainer = (SFTTrainer if variant == "trl" else ArpoTrainer)(
            model=Qwen2ForCausalLM(config),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Stopwatch()],
        )
        trainer.train()
    return {
        "seconds": [round(s, 4) for s in seconds[1:]],
        "tokens": [b - a for a, b in itertools.pairwise(tokens)],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_gb": peak_memory() / 1e9,
        "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
    }


def _toy_rows(model: str, cutoff: int, full: bool, count: int) -> tuple[Any, list[dict[str, Any]]]:
    """The first `count` toy rows, cut at `cutoff`; `full`: cut from all of them laid end to end, each of `cutoff`."""
    from arpo_trl.dataset import prepare_datasets
    from arpo_trl.recipe import Recipe
    from arpo_trl.template import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            model_name_or_path=model,
            dataset=["arpo_sft_toy"],
            dataset_dir=str(ROOT / "recipes"),
            cutoff_len=1 << 20 if full else cutoff,
            output_dir=folder,
            tokenized_path=f"{folder}/encoded",
        )
        tokenizer = load_tokenizer(recipe)
        train = prepare_datasets(recipe, tokenizer).train
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in train]
    if full:
        whole = {name: [token for row in rows for token in row[name]] for name in ("input_ids", "labels")}
        starts = [i * cutoff % (len(whole["labels"]) - cutoff) for i in range(count)]
        rows = [{name: tokens[start : start + cutoff] for name, tokens in whole.items()} for start in starts]
    return tokenizer, rows[:count]


def make_tiny_model(folder: str) -> Path:
    """A model folder whose tokenizer serves where no real one is given."""
    path = Path(folder) / "model"
    subprocess.run([sys.executable, ROOT / "scripts/make_tiny_model.py", path], check=True, capture_output=True)
    return path


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
