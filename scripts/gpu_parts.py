"""The measurements of gpu_report.py, one function per part. On a CPU each has a tiny model and short rows."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_steps
import make_tiny_model
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from arpo_trl.machine import peak_memory
from arpo_trl.model.memory import estimate_memory, model_shape
from arpo_trl.model.model import load_model
from arpo_trl.recipe import read_recipe
from arpo_trl.report.console import silence_libraries
from arpo_trl.run_folder import read_lines
from arpo_trl.training.requirements import check_before_torch
from arpo_trl.training.setup import check_after_torch, load_rows
from arpo_trl.training.train import make_trainer, train

Figures = dict[str, Any]
VOCABULARY = benchmark_steps.VOCABULARY
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "0.5B": benchmark_steps.SHAPES["0.5b"],
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
STEPS = 10
WARM_UP = 2  # steps that are not timed
TOP = 10


class Skipped(Exception):
    """The reason why a part can't run here."""


def run(name: str, device: str, out: Path) -> Figures:
    """Run a part and return its figures. Models and rows are made in `out`, and used by later parts."""
    silence_libraries()
    if device == "cuda" and not torch.cuda.is_available():
        raise Skipped("torch finds no GPU")
    bench = Bench(device, out)
    if match := re.fullmatch(r"(full|LoRA) (.*), ([\d,]+) tokens", name):
        kind, size, length = match[1].lower(), match[2], int(match[3].replace(",", ""))
        return bench.compare_with_float32(bench.size(size), finetuning_type=kind, cutoff_len=bench.length(length))
    return OTHER_PARTS[name](bench)


class Bench:
    """Models, rows and recipes of one device."""

    def __init__(self, device: str, out: Path) -> None:
        self.device, self.out, self.on_gpu = device, out, device == "cuda"

    def size(self, name: str) -> str:
        return name if self.on_gpu else "tiny"

    def length(self, tokens: int) -> int:
        return tokens if self.on_gpu else tokens // 16

    def model(self, size: str) -> Path:
        """Return the folder of a model with random weights, a tiny tokenizer and Qwen2.5's vocabulary."""
        folder = self.out / "models" / size
        if not (folder / "tokenizer_config.json").exists():
            tokenizer = make_tiny_model.train_tokenizer(make_tiny_model.TOY_DATA, rows=50, vocab_size=2048)
            shape: Figures = {"num_key_value_heads": 2, "tie_word_embeddings": size != "7B"} | SIZES[size]
            torch.manual_seed(0)
            with torch.device(self.device):
                config = Qwen2Config(
                    vocab_size=VOCABULARY if self.on_gpu else 2112,
                    max_position_embeddings=32768,
                    eos_token_id=tokenizer.token_to_id("<|im_end|>"),
                    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
                    **shape,
                )
                torch.set_default_dtype(torch.bfloat16)
                model = Qwen2ForCausalLM(config)
                torch.set_default_dtype(torch.float32)
            make_tiny_model.save(tokenizer, model.cpu(), folder)  # tokenizer_config.json last
            del model
            if self.on_gpu:
                torch.cuda.empty_cache()
        return folder

    def data(self, length: int) -> Path:
        """Return a folder with `rows`, each of more than `length` tokens, `short` ones of unlike lengths, and `pairs`."""
        folder = self.out / "data" / str(length)
        if not folder.exists():
            folder.mkdir(parents=True)
            texts = [" ".join(str(n * row % 997) for n in range(length)) for row in range(1, 25)]
            rows = [{"instruction": f"Count by {row}.", "output": text} for row, text in enumerate(texts)]
            short = [row | {"output": row["output"][: 2 * length // (1 + n % 4)]} for n, row in enumerate(rows)]
            pairs = [
                {
                    "instruction": row["instruction"],
                    "chosen": text[: length // 2],
                    "rejected": text[length // 2 : length],
                }
                for row, text in zip(rows, texts)
            ]
            for name, values in {"rows": rows, "short": short, "pairs": pairs}.items():
                (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
            info: dict[str, Any] = {name: {"file_name": f"{name}.json"} for name in ("rows", "short")}
            info["pairs"] = {"file_name": "pairs.json", "ranking": True}
            (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        return folder

    def recipe(self, size: str, **keys: Any) -> Path:
        """Write a recipe for the model of this size. Return its file."""
        length = keys.get("cutoff_len", self.length(1024))
        values = {
            "model_name_or_path": str(self.model(size)),
            "do_train": True,
            "dataset": "rows",
            "dataset_dir": str(self.data(length)),
            "template": "qwen",
            "cutoff_len": length,
            "output_dir": str(self.out / "run"),
            "overwrite_output_dir": True,
            "per_device_train_batch_size": 1,
            "max_steps": STEPS if self.on_gpu else 4,
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": True,
            "plot_loss": False,
            "report_to": "none",
            "use_cpu": not self.on_gpu,
            "max_dropped": 1.0,
        }
        path = self.out / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | keys), encoding="utf-8")
        return path

    def steps(self, size: str, callback: TrainerCallback | None = None, **keys: Any) -> Figures:
        """Train some steps. Return seconds per step, tokens/s, the measured and the estimated peak, and the losses."""
        recipe = check_before_torch(read_recipe(self.recipe(size, **keys)))
        args = check_after_torch(recipe)
        data = load_rows(recipe, args)
        assert isinstance(data.train, Dataset)
        estimate = estimate_memory(recipe, args, model_shape(recipe), data.train)
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model, _ = load_model(recipe)
        trainer = make_trainer(recipe, args, model, data)
        watch = Stopwatch()
        trainer.add_callback(watch)
        if callback:
            trainer.add_callback(callback)
        trainer.train()
        seconds = watch.seconds[WARM_UP:] or watch.seconds
        rows: Any = trainer.train_dataset  # packed rows, if they are
        tokens = statistics.mean(map(len, rows["input_ids"])) * args.per_device_train_batch_size
        return {
            "s/step": round(statistics.median(seconds), 4),
            "tokens/s": round(tokens / statistics.median(seconds)),
            "peak GB": round(peak_memory() / 1e9, 2),
            "estimated GB": round(estimate.peak / 1e9, 2) if estimate else None,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }

    def compare_with_float32(self, size: str, **keys: Any) -> Figures:
        """Measure steps in bf16, and compare their losses with those of float32."""
        half = self.steps(size, bf16=True, force_bf16=not self.on_gpu, **keys)
        full = self.steps(size, **keys)
        return shorten(half) | {
            "largest loss difference to float32": largest_difference(half["losses"], full["losses"]),
            "s/step in float32": full["s/step"],
        }

    def compare(self, size: str, keys: dict[str, Any], **changes: Any) -> Figures:
        """Measure steps with `keys`, and the same with `changes`."""
        before, after = self.steps(size, **keys), self.steps(size, **keys | changes)
        return (
            shorten(after)
            | {f"{name} without": before[name] for name in ("s/step", "tokens/s", "peak GB")}
            | {
                "first loss": after["losses"][0],
                "first loss without": before["losses"][0],
            }
        )


class Stopwatch(TrainerCallback):
    """Times each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.began)


def now() -> float:
    """Return the time, once the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def shorten(figures: Figures) -> Figures:
    losses = figures["losses"]
    return {k: v for k, v in figures.items() if k != "losses"} | {"loss": f"{losses[0]:.4f} -> {losses[-1]:.4f}"}


def largest_difference(left: list[float], right: list[float]) -> float:
    return float(f"{max(abs(a - b) for a, b in zip(left, right, strict=True)):.2g}")


def describe_device(bench: Bench) -> Figures:
    """Return the device, and the speed of a matrix product."""
    dtype, size = (torch.bfloat16, 8192) if bench.on_gpu else (torch.float32, 512)
    matrix = torch.randn(size, size, device=bench.device, dtype=dtype)
    times = []
    for _ in range(6):
        began = now()
        matrix @ matrix
        times.append(now() - began)
    figures: Figures = {"TFLOP/s of a matrix product": round(2 * size**3 / min(times) / 1e12, 1)}
    if bench.on_gpu:
        device = torch.cuda.get_device_properties(0)
        figures |= {"GPU": device.name, "GB": round(device.total_memory / 1e9, 1), "CUDA": torch.version.cuda}
        figures["compute capability"] = f"{device.major}.{device.minor}"
    return figures


def resume_after_kill(bench: Bench) -> Figures:
    """Kill a run with SIGKILL after its checkpoint, resume it, and compare it with an uninterrupted run."""
    steps = 40 if bench.on_gpu else 16
    size = bench.size("0.5B")
    keys: Figures = {"finetuning_type": "lora", "cutoff_len": bench.length(1024), "max_steps": steps}
    keys |= {"save_strategy": "steps", "save_steps": steps // 2, "bf16": bench.on_gpu, "preflight": bench.on_gpu}
    keys |= {"full_determinism": bench.on_gpu, "lora_dropout": 0.1}
    uninterrupted, resumed = bench.out / "uninterrupted", bench.out / f"resumed-{os.getpid()}"
    assert train(bench.recipe(size, output_dir=str(uninterrupted), **keys)).exit_code == 0
    recipe = bench.recipe(size, output_dir=str(resumed), **keys | {"overwrite_output_dir": False})
    process = subprocess.Popen([sys.executable, "-m", "arpo_trl", str(recipe)], stdout=subprocess.DEVNULL)
    while process.poll() is None and len(read_lines(resumed / "trainer_log.jsonl")) < steps // 2 + 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    killed_at = len(read_lines(resumed / "trainer_log.jsonl"))
    if not steps // 2 <= killed_at < steps:
        raise RuntimeError(f"expected a run killed after step {steps // 2} of {steps}, found {killed_at} steps")
    assert train(recipe).exit_code == 0
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (uninterrupted, resumed))
    losses = [
        [line["loss"] for line in read_lines(folder / "trainer_log.jsonl") if "loss" in line]
        for folder in (uninterrupted, resumed)
    ]
    difference = max(float((left[name].float() - right[name].float()).abs().max()) for name in left)
    return {
        "killed at step": killed_at,
        "weights bit for bit": all(torch.equal(left[name], right[name]) for name in left),
        "largest weight difference": difference,
        "losses equal": losses[0] == losses[1],
    }


def compare_with_trl(bench: Bench) -> Figures:
    """Return seconds per step and memory of TRL and arpo_trl, on the same rows."""
    shape: Figures = (
        {"shape": "0.5b", "batch": 2, "cutoff": 1024} if bench.on_gpu else {"shape": "tiny", "batch": 1, "cutoff": 64}
    )
    table = benchmark_steps.steps(
        ["trl", "ours"], 1, model=str(bench.model(bench.size("0.5B"))), count=8 if bench.on_gpu else 2, bf16=bench.on_gpu,
        full=True, dataset="arpo_sft_toy", **shape,
    )  # fmt: skip
    trl, ours = table
    return {
        "s/step": ours["seconds"],
        "s/step of TRL": trl["seconds"],
        "times TRL": ours["times_trl"],
        "peak GB": ours["peak_gb"],
        "peak GB of TRL": trl["peak_gb"],
        "largest loss difference": ours["largest_loss_difference"],
    }


def list_kernels(bench: Bench) -> Figures:
    """Return the kernels that take most of a step of the 0.5B model, with their share."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]

    class Profiled(TrainerCallback):
        def __init__(self) -> None:
            self.profile = profile(activities=activities)

        def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP:
                self.profile.start()

        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP + 1:
                self.profile.stop()

    profiled = Profiled()
    keys: Figures = {
        "finetuning_type": "full",
        "cutoff_len": bench.length(1024),
        "bf16": bench.on_gpu,
        "max_steps": WARM_UP + 2,
    }
    bench.steps(bench.size("0.5B"), callback=profiled, **keys)
    attribute = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    times = {event.key: float(getattr(event, attribute)) for event in profiled.profile.key_averages()}
    top = sorted(times, key=lambda name: -times[name])[:TOP]
    return {name[:60]: f"{times[name] / sum(times.values()):.1%}" for name in top}


def run_gpu_tests(bench: Bench) -> Figures:
    """Return the counts of `pytest -m gpu`, and the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", "tests/training/test_gpu.py"]
    done = subprocess.run(command, cwd=benchmark_steps.ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-20_000:])
    lines = done.stdout.splitlines() or [done.stderr[-300:]]
    failed = [line.partition(" ")[2][:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"pytest": lines[-1].strip("= "), **({"failed": failed} if failed else {})}


def join_rows(key: str) -> Callable[[Bench], Figures]:
    """Return the part of padding_free or packing: rows of unlike lengths, in batches of 8."""

    def measure(bench: Bench) -> Figures:
        keys: Figures = {
            "finetuning_type": "full",
            "dataset": "short",
            "per_device_train_batch_size": 8,
            "bf16": bench.on_gpu,
        }
        return bench.compare(bench.size("0.5B"), keys, **{key: True})

    return measure


def train_quantized(bench: Bench) -> Figures:
    require("bitsandbytes")
    keys: Figures = {"finetuning_type": "lora", "quantization_bit": 4, "bf16": bench.on_gpu}
    return shorten(bench.steps(bench.size("0.5B"), **keys))


def train_pairs(bench: Bench) -> Figures:
    """Return the figures of DPO; its first loss is ln 2."""
    keys: Figures = {
        "stage": "dpo",
        "dataset": "pairs",
        "finetuning_type": "full",
        "bf16": bench.on_gpu,
        "learning_rate": 1e-6,
    }
    figures = bench.steps(bench.size("0.5B"), **keys)
    return shorten(figures) | {"first loss": figures["losses"][0]}


def use_flash_attention(bench: Bench) -> Figures:
    require("flash_attn")
    keys: Figures = {"finetuning_type": "full", "bf16": True, "cutoff_len": bench.length(8192)}
    return bench.compare(bench.size("0.5B"), keys, flash_attn="fa2")


def use_liger(bench: Bench) -> Figures:
    require("liger_kernel")
    return bench.compare(bench.size("0.5B"), {"finetuning_type": "full", "bf16": True}, enable_liger_kernel=True)


def roll_out(bench: Bench) -> Figures:
    """Return the speed of rollouts; the random model calls no tools."""
    count, tokens = (64, 256) if bench.on_gpu else (2, 8)
    folder = bench.out / "rollouts" / str(os.getpid())
    keys: Figures = {
        "do_train": False,
        "eval_dataset": "short",
        "max_samples": count,
        "num_generations": 4,
        "output_dir": str(folder),
    }
    keys |= {"dataset": None, "max_new_tokens": tokens, "per_device_eval_batch_size": 4 * count, "bf16": bench.on_gpu}
    recipe = bench.recipe(bench.size("0.5B"), **keys)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "arpo_trl", "rollout", str(recipe)], check=True)
    seconds = time.monotonic() - began
    lines = (folder / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    return {"trajectories": len(lines), "seconds with the start": round(seconds, 1), "new tokens at most": tokens}


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is not installed")


OTHER_PARTS: dict[str, Callable[[Bench], Figures]] = {
    "device": describe_device,
    "killed and resumed": resume_after_kill,
    "compared with TRL": compare_with_trl,
    "kernels": list_kernels,
    "pytest -m gpu": run_gpu_tests,
    "padding_free": join_rows("padding_free"),
    "packing": join_rows("packing"),
    "QLoRA 0.5B": train_quantized,
    "DPO 0.5B": train_pairs,
    "flash attention": use_flash_attention,
    "liger": use_liger,
    "rollouts": roll_out,
}
