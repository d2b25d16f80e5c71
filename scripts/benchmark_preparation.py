"""Time and memory of the preparation of rows, arpo_trl's and TRL's. Called by benchmark.py."""

import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_steps import spread, take_turns, times_trl

# A vocabulary like that of chats: a few thousand words, most of them one to three tokens.
SYLLABLES = (
    "an be con de er fi ga ho in jo ker lo men no or pre qui re st ti un ver wa ex yo za tion ing ed ly".split()
)


def preparation(model: str, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Time the way from a .jsonl file to encoded rows on disk (ours), and from a loaded Dataset to labels (TRL's).

    TRL's time does not include reading the file. Imports and tokenizer are loaded before; neither side may use a cache.
    """
    variants = [("ours", 1), ("trl", 1), ("trl", 2)][: 3 if (os.cpu_count() or 1) > 1 else 2]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows: the rows are still mapped
        path = make_rows(Path(folder), rows)
        ours, trl = our_preparation(path, model), trl_preparation(path, model)
        tokens = set()

        def measure(variant: tuple[str, int]) -> float:
            started = time.perf_counter()
            tokens.add(ours() if variant[0] == "ours" else trl(variant[1]))
            return time.perf_counter() - started

        seconds = take_turns(rounds, variants, measure)
    if len(tokens) > 1:
        raise SystemExit(f"ours and trl made different numbers of tokens, {tokens}; their times can't be compared")
    table = []
    for (variant, workers), times in seconds.items():
        rate = {"rows_per_s": round(rows / statistics.median(times)), "rows": rows, "tokens": max(tokens)}
        ratio = times_trl(times, seconds["trl", workers])
        table.append({"variant": variant, "processes": workers, **spread(times), "times_trl": ratio, **rate})
    return table


def our_preparation(path: Path, model: str) -> Callable[[], int]:
    from arpo_trl.data.prepare import prepare_datasets
    from arpo_trl.data.tokenizer import load_template
    from arpo_trl.recipe import Recipe

    recipe = Recipe(
        model_name_or_path=model,
        dataset=["rows"],
        dataset_dir=str(path.parent),
        cutoff_len=1 << 20,
        overwrite_cache=True,
        output_dir=str(path.parent / "out"),
    )
    template = load_template(recipe)
    return lambda: prepare_datasets(recipe, template).audit.datasets["rows"].tokens


def trl_preparation(path: Path, model: str) -> Callable[[int], int]:
    import datasets
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    args = SFTConfig(output_dir=str(path.parent / "trl"), assistant_only_loss=True, max_length=None, bf16=False)
    trainer = SFTTrainer(
        Qwen2ForCausalLM(config), args, train_dataset=rows.select(range(2)), processing_class=tokenizer
    )

    def prepare(workers: int) -> int:
        args.dataset_num_proc = workers if workers > 1 else None
        prepared = trainer._prepare_dataset(rows, tokenizer, args, False, None, "train")
        return sum(len(ids) for ids in prepared.with_format("numpy")["input_ids"])

    return prepare


def memory(model: str, rows: list[int]) -> list[dict[str, Any]]:
    """Measure the peak resident memory of preparing N rows; 10 rows show the share of the imports."""
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for count in [10, *rows]:
            path = make_rows(Path(folder), count)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak = pool.apply(_peak, (path, model))
            figures = {"file_mib": path.stat().st_size >> 20, "peak_mib": peak >> 20, "seconds": round(seconds, 1)}
            table.append({"rows": count, **figures})
    return table


def _peak(path: Path, model: str) -> tuple[float, int]:
    """Return the seconds of a preparation and this process's peak memory in bytes."""
    began = time.perf_counter()
    our_preparation(path, model)()
    seconds = time.perf_counter() - began
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return seconds, psutil.Process().memory_info().peak_wset
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make_rows(folder: Path, count: int) -> Path:
    """Write `count` rows of 1 to 4 exchanges, about 1,500 tokens each; the count is the seed."""
    chance = random.Random(count)
    words = ["".join(chance.choices(SYLLABLES, k=chance.choice((1, 1, 2, 2, 3)))) for _ in range(4000)]

    def text(length: int) -> str:
        return " ".join(chance.choices(words, k=length)) + chance.choice((".", "?", "!\n\n"))

    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            exchanges = chance.randint(1, 4)
            messages = []
            for _ in range(exchanges):
                messages.append({"role": "user", "content": text(chance.randint(20, 200))})
                messages.append({"role": "assistant", "content": text(chance.randint(100, 400))})
            file.write(json.dumps({"messages": messages}) + "\n")
    registry = {"rows": {"file_name": "rows.jsonl", "formatting": "openai"}}
    (folder / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return path


if __name__ == "__main__":
    print("usage: python scripts/benchmark.py preparation, which calls this file", file=sys.stderr)
    sys.exit(2)
