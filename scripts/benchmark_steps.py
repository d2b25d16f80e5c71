"""Time of training steps, arpo_trl's and TRL's, on this machine's device. Called by benchmark.py.

Each measurement has its own process, so that peak memory is not shared; the variants take turns, round by round. All
train the same random-weight Qwen2 on the same rows in the same order with the same tokens and labels: TRL's own mask
would train on one more newline per turn, and the losses could not be compared.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

Name = TypeVar("Name")
Figure = TypeVar("Figure")
ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 151_936  # Qwen2.5's, padded
INSIDE = "arpo_sft_toy_inside"  # one-turn rows with masked results, as in recipes/qwen_toy_inside.yaml
SHAPES: dict[str, dict[str, Any]] = {
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


def steps(variants: list[str], rounds: int, **measurement: Any) -> list[dict[str, Any]]:
    """Measure seconds per step, tokens/s and peak memory of each variant.

    `times_trl` and the loss difference need steps with the same tokens as TRL's; of packed rows, compare tokens/s.

    Args:
        variants: Names of VARIANTS.
        rounds: Processes per variant.
        **measurement: The other arguments of `_measure`.
    """
    found = take_turns(rounds, variants, lambda name: _in_own_process(variant=name, **measurement))
    table = []
    for name, runs in found.items():
        seconds = [s for run in runs for s in run["seconds"]]
        rates = [t / s for run in runs for t, s in zip(run["tokens"], run["seconds"], strict=True)]
        trl = found.get("trl", [])
        same = bool(trl) and runs[0]["tokens"] == trl[0]["tokens"]
        differences = [abs(a - b) for a, b in zip(runs[0]["losses"], trl[0]["losses"], strict=True)] if same else []
        table.append(
            {
                "variant": name,
                "shape": measurement["shape"],
                "device": runs[0]["device"],
                **spread(seconds),
                "times_trl": times_trl(seconds, [s for run in trl for s in run["seconds"]]) if same else None,
                "tokens_per_s": round(statistics.median(rates), 1),
                "peak_gb": round(statistics.median(run["peak_gb"] for run in runs), 2),
                "largest_loss_difference": float(f"{max(differences):.1e}") if same else None,
            }
        )
    return table


def scaling(lengths: list[int], batches: list[int], rounds: int, **measurement: Any) -> list[dict[str, Any]]:
    """Measure seconds per step by length (batch 1) and by batch size (512 tokens).

    `exponent` is the growth since the previous size: 1 is linear, 2 quadratic.
    """
    points = [*(("length", n) for n in lengths), *(("batch", n) for n in batches)]

    def measure(point: tuple[str, int]) -> dict[str, Any]:
        axis, size = point
        rows = {"batch": 1, "cutoff": size} if axis == "length" else {"batch": size, "cutoff": 512}
        return _in_own_process(variant="ours", full=True, **rows, **measurement)

    table: list[dict[str, Any]] = []
    before: tuple[str, int, float] | None = None
    for (axis, size), runs in take_turns(rounds, points, measure).items():
        seconds = [s for run in runs for s in run["seconds"]]
        median, exponent = statistics.median(seconds), None
        if before and before[0] == axis and before[1] != size:
            exponent = round(math.log(median / before[2]) / math.log(size / before[1]), 2)
        peak = round(statistics.median(run["peak_gb"] for run in runs), 2)
        table.append({"axis": axis, "size": size, **spread(seconds), "exponent": exponent, "peak_gb": peak})
        before = axis, size, median
    return table


def startup(rounds: int) -> list[dict[str, Any]]:
    """Measure seconds from launch to the end of a one-step run: arpo_trl, and a 30-line TRL script on the same data."""
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(folder)
        places = {"root": ROOT.as_posix(), "folder": Path(folder).as_posix()}
        recipe, script = Path(folder) / "recipe.yaml", Path(folder) / "plain_trl.py"
        recipe.write_text(_STARTUP_RECIPE.format(**places), encoding="utf-8")
        script.write_text(_PLAIN_TRL.format(**places), encoding="utf-8")
        commands: dict[str, list[object]] = {"trl": [script], "ours": ["-m", "arpo_trl", recipe]}

        def measure(variant: str) -> float:
            began = time.perf_counter()
            _run_python(variant, *commands[variant])
            return time.perf_counter() - began

        seconds = take_turns(rounds, list(commands), measure)
    return [{"variant": name, **spread(s), "times_trl": times_trl(s, seconds["trl"])} for name, s in seconds.items()]


def take_turns(rounds: int, names: list[Name], measure: Callable[[Name], Figure]) -> dict[Name, list[Figure]]:
    """Measure each name once per round, so that other load on the machine affects all of them."""
    found: dict[Name, list[Figure]] = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name in found:
            shown = name if isinstance(name, str) else " ".join(map(str, cast("tuple[object, ...]", name)))
            print(f"  round {number} of {rounds}: {shown}", file=sys.stderr, flush=True)
            found[name].append(measure(name))
    return found


def spread(seconds: list[float]) -> dict[str, float]:
    """Return the median, minimum and maximum in seconds."""
    figures = {"seconds": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {name: float(f"{figure:.4g}") for name, figure in figures.items()}


def times_trl(seconds: list[float], trl: list[float]) -> float:
    return round(statistics.median(trl) / statistics.median(seconds), 2)


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


def draw(table: list[dict[str, Any]], picture: Path) -> None:
    """Plot the table of `scaling`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (axis, unit) in enumerate((("length", "tokens, batch 1"), ("batch", "rows of 512 tokens")), 1):
        some = [line for line in table if line["axis"] == axis]
        axes = figure.add_subplot(1, 2, place, xlabel=f"{axis} ({unit})", ylabel="seconds per step")
        axes.loglog([p["size"] for p in some], [p["seconds"] for p in some], "o-")
        axes.set_xticks([p["size"] for p in some], [f"{p['size']:,}" for p in some])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True, which="both", alpha=0.3)
    figure.savefig(picture)


def _in_own_process(**measurement: Any) -> dict[str, Any]:
    shown = _run_python(measurement["variant"], __file__, json.dumps(measurement))
    result: dict[str, Any] = json.loads(shown.splitlines()[-1])
    return result


def _run_python(variant: str, *arguments: Any) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, encoding="utf-8", check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{variant}: ended with exit code {done.returncode}: {done.stderr[-2000:].strip()}")
    return done.stdout


def _measure(
    model: str,
    variant: str,
    shape: str,
    count: int,
    batch: int,
    cutoff: int,
    bf16: bool,
    full: bool = False,
    dataset: str = "arpo_sft_toy",
) -> dict[str, Any]:
    """Time `count` steps in this process, after one warm-up step. `full`: every row has `cutoff` tokens."""
    import torch
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from arpo_trl.machine import peak_memory
    from arpo_trl.training.trainer import ArpoTrainer

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)
            tokens.append(trainer._total_train_tokens)

    tokenizer, rows = _toy_rows(model, dataset, cutoff, full, batch * (count + 1))
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


def _toy_rows(model: str, dataset: str, cutoff: int, full: bool, count: int) -> tuple[Any, list[dict[str, Any]]]:
    """Return the first `count` toy rows, cut at `cutoff`; `full`: slices of `cutoff` tokens from the concatenated rows."""
    from arpo_trl.data.prepare import prepare_datasets
    from arpo_trl.data.tokenizer import load_template
    from arpo_trl.recipe import Recipe

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows: the rows are still mapped
        recipe = Recipe(
            model_name_or_path=model,
            dataset=[dataset],
            mask_spans=["result"] if dataset == INSIDE else [],
            dataset_dir=str(ROOT / "recipes"),
            cutoff_len=1 << 20 if full else cutoff,
            output_dir=folder,
            tokenized_path=f"{folder}/encoded",
        )
        template = load_template(recipe)
        train = prepare_datasets(recipe, template).train
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in train]
    if full:
        joined = {name: [token for row in rows for token in row[name]] for name in ("input_ids", "labels")}
        starts = [i * cutoff % (len(joined["labels"]) - cutoff) for i in range(count)]
        rows = [{name: tokens[start : start + cutoff] for name, tokens in joined.items()} for start in starts]
    return template.tokenizer, rows[:count]


def make_tiny_model(folder: str) -> Path:
    """Make a model folder, for runs without --model."""
    path = Path(folder) / "model"
    _run_python("the tiny model", ROOT / "scripts" / "make_tiny_model.py", path)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("{"):
        print("usage: python scripts/benchmark.py steps, which calls this file", file=sys.stderr)
        sys.exit(2)
    measurement = json.loads(sys.argv[1])
    if Path(measurement["model"]).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    from arpo_trl.errors import RecipeError
    from arpo_trl.report.console import silence_libraries

    silence_libraries()
    try:
        print(json.dumps(_measure(**measurement)))
    except RecipeError as error:
        sys.exit(str(error))
