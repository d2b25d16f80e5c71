"""Time and memory of runs of one recipe file, arpo_trl's and LLaMA-Factory's. Called by benchmark.py.

LLaMA-Factory pins other versions of the same libraries, so it needs its own venv:

    python -m venv lf && lf/bin/pip install torch==2.13.0
    lf/bin/pip install --no-deps llamafactory==0.9.5
    lf/bin/pip install transformers==5.6.0 trl==0.24.0 accelerate==1.11.0 datasets==4.0.0 peft==0.18.1 ...

and, on a machine without torchaudio, an empty module of that name. Both run the same file and are measured from outside:
when each line of trainer_log.jsonl appears, and the peak memory of the process or, with an NVIDIA GPU, of the GPU (other
users of the GPU would be counted, too).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmark_steps import ROOT, SHAPES, VOCABULARY, spread, take_turns

RECIPE = """
model_name_or_path: {folder}/model
stage: {stage}
do_train: true
finetuning_type: {finetuning_type}
dataset_dir: {root}/recipes
dataset: {dataset}
template: qwen
cutoff_len: {cutoff}
overwrite_cache: true
output_dir: {folder}/run
overwrite_output_dir: true
logging_steps: 1
save_strategy: 'no'
per_device_train_batch_size: {batch}
gradient_accumulation_steps: 1
learning_rate: 7.0e-6
max_steps: {steps}
disable_shuffling: true
bf16: {bf16}
report_to: none
"""


DATASETS = {"sft": "arpo_sft_toy", "dpo": "arpo_dpo_toy_inside"}
"""By stage. LLaMA-Factory drops the rows of arpo_dpo_toy, whose sides are lists of turns."""


def compare(
    python: Path, model: str, rounds: int, shape: str | None, steps: int, **settings: object
) -> list[dict[str, Any]]:
    """Measure launch to first step, seconds per step and peak memory of both, and the largest difference of their losses.

    Args:
        python: The Python of LLaMA-Factory's venv.
        model: A folder with a tokenizer; `shape` adds random weights of that shape.
        rounds: Runs of each, alternating.
        shape: A name of SHAPES, or None for the weights in `model`.
        steps: Timed steps, after one warm-up step.
        **settings: Of RECIPE: stage, finetuning_type, batch (rows or pairs per step), cutoff (maximum tokens of a
            row) and bf16.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shape is None:
            shutil.copytree(model, folder / "model")
        else:
            _make_model(model, shape, folder / "model")
        places = {"folder": folder.as_posix(), "root": ROOT.as_posix()}
        recipe = folder / "recipe.yaml"
        text = RECIPE.format(**places, **settings, dataset=DATASETS[str(settings["stage"])], steps=steps + 1)
        recipe.write_text(text + "use_cpu: true\n" * (not _has_gpu()), encoding="utf-8")
        commands = {
            "llamafactory": [str(python), "-c", "from llamafactory.cli import main; main()", "train", str(recipe)],
            "ours": [sys.executable, "-m", "arpo_trl", str(recipe)],
        }
        found = take_turns(rounds, list(commands), lambda name: _run(name, commands[name], folder / "run"))
    theirs = found["llamafactory"]
    table = []
    for name, runs in found.items():
        seconds = [s for run in runs for s in run["seconds"]]
        pairs = zip(runs[0]["losses"], theirs[0]["losses"], strict=True)
        table.append(
            {
                "variant": name,
                **spread(seconds),
                "times_lf": _times(theirs, runs, "seconds"),
                "first_step_s": round(statistics.median(run["first_step"] for run in runs), 2),
                "times_lf_start": _times(theirs, runs, "first_step"),
                "peak_gb": round(statistics.median(run["peak_gb"] for run in runs), 2),
                "times_lf_memory": _times(theirs, runs, "peak_gb"),
                "losses": " ".join(f"{loss:.4f}" for loss in runs[0]["losses"][:3]),
                "largest_loss_difference": float(f"{max(abs(a - b) for a, b in pairs):.1e}"),
            }
        )
    return table


def _times(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], figure: str) -> float:
    """Return the median of LLaMA-Factory's figures divided by the median of ours."""
    medians: list[float] = []
    for runs in (theirs, ours):
        values = [value for run in runs for value in (run[figure] if figure == "seconds" else [run[figure]])]
        medians.append(statistics.median(values))
    return round(medians[0] / medians[1], 2)


def _run(name: str, command: list[str], run: Path) -> dict[str, Any]:
    """Run once: seconds from launch to the first line of the log, seconds of each later step, losses, peak memory."""
    shutil.rmtree(run, ignore_errors=True)
    log = run / "trainer_log.jsonl"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "USE_V1": "0"}
    environment.pop("PYTHONPATH", None)
    began = time.perf_counter()
    arrived: list[float] = []
    with tempfile.TemporaryFile() as shown, _watch_gpu() as gpu_peak_gb:
        process = subprocess.Popen(command, stdout=shown, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if log.exists():
                lines_seen = log.read_bytes().count(b"\n")
                arrived += [time.perf_counter() - began] * (lines_seen - len(arrived))
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        shown.seek(0)
        if process.returncode:
            raise SystemExit(f"{name}: ended with {process.returncode}: {shown.read().decode()[-2000:].strip()}")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    times = arrived[: len(losses)]
    return {
        "first_step": times[0],
        "seconds": [after - before for before, after in itertools.pairwise(times)],
        "losses": losses,
        "peak_gb": gpu_peak_gb() or ended[2].ru_maxrss * 1024 / 1e9,  # Linux: KiB
    }


@contextlib.contextmanager
def _watch_gpu() -> Iterator[Callable[[], float | None]]:
    """Yield a function that returns the GPU's peak memory so far in GB, sampled ten times a second; None without a GPU."""
    if not _has_gpu():
        yield lambda: None
        return
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
    with tempfile.NamedTemporaryFile("w+") as file, subprocess.Popen(query, stdout=file) as watch:
        try:
            yield lambda: max(map(int, Path(file.name).read_text().split()), default=0) * 2**20 / 1e9
        finally:
            watch.terminate()


def _make_model(tokenizer: str, shape: str, folder: Path) -> None:
    """Save random weights of a shape, with Qwen2.5's vocabulary, and the tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, **SHAPES[shape],
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    # the name that transformers 5.6 reads
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"rope_theta": 1e6}), encoding="utf-8")


def _has_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()
