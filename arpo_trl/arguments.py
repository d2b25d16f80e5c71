"""Arguments of `arpo-trl chat`, `merge`, `select` and `check-serving`, parsed and checked before torch is imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .data.messages import Fields, to_tools
from .data.strict_json import parse_json
from .errors import RecipeError, RowError, reason
from .generate.sandbox import Limits
from .machine import nearest_existing_parent

DTYPES = ("bfloat16", "float16", "float32")
CHAT = """Chat with a trained model. When it calls a tool, you type the tool's result.

    arpo-trl chat checkpoints/tiny_cpu                                    until an empty line
    arpo-trl chat checkpoints/tiny_cpu --prompt "Who founded Karamont?"   one question
    arpo-trl chat checkpoints/tool_calls_demo --tools tools.json          with tools, as in a row's tools column
    arpo-trl chat checkpoints/tiny_cpu --run-python                       run <python> blocks

A result is inserted as a turn or inside the model's turn, as in the model's training data.
"""
SELECT = """Select SFT rows and preference pairs from the trajectories of `arpo-trl rollout`.

Writes selected.jsonl, pairs.jsonl and dataset_info.json into FOLDER, which is then a dataset_dir with the datasets
`selected` and `pairs`.
"""
MERGE = """Merge an adapter into its base model, for programs that only load complete models.

OUTPUT is a model folder in the base model's dtype with the adapter's tokenizer and chat template. Its configs stop at
the tokenizer's end-of-turn token. Weights are added in float32; OUTPUT is read back and must predict what the adapter
predicts.
"""
CHECK_SERVING = """Compare a running server with a trained model: prompts, end of turn, replies and tool calls.

    arpo-trl check-serving checkpoints/tiny_cpu --url http://localhost:8000
    arpo-trl check-serving checkpoints/tiny_cpu --url http://localhost:8000 --rows 8 --json report.json

Each difference is one line with its cause and its fix; the exit code is 1 if there is any. The rows are those that the run kept
in serving_check.jsonl, built-in conversations for other models. docs/serving.md has the start commands of servers.
"""


def chat_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `chat`. Raises RecipeError if the model or a file is missing."""
    parser = _parser("chat", CHAT)
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder or adapter folder")
    parser.add_argument("--prompt", help="answer one prompt and exit")
    parser.add_argument("--system", help="system message (default: the training rows'; '': none)")
    parser.add_argument(
        "--tools",
        type=read_tools,
        metavar="FILE.json",
        help="tools to offer (default: the training rows'; none: none)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="max tokens between two results (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature (0: greedy)")
    parser.add_argument("--results", choices=("turn", "inside"), help="where results go (default: as in training)")
    parser.add_argument("--run-python", action="store_true", help="run <python> blocks on this machine, as you")
    parser.add_argument("--time-limit", type=float, default=Limits.seconds, help="seconds per program (20)")
    parser.add_argument("--memory-limit", type=int, default=Limits.megabytes, help="MB per program (1024)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in the model's files")
    args = parser.parse_args(argv)
    if not (args.max_new_tokens > 0 < args.time_limit and args.memory_limit > 0 <= args.temperature):
        parser.error("--max-new-tokens, --time-limit and --memory-limit must be > 0, --temperature >= 0")
    _require_model(args.model)
    return args


def read_tools(path: str) -> list[Fields] | None:
    """Read tools as training reads a row's `tools`: a list, or the JSON text of a list. `none`: no tools."""
    if path == "none":
        return []
    try:
        return to_tools(parse_json(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RowError) as error:
        raise RecipeError(
            f"--tools: {path}: {reason(error)}. Use a JSON file with the content of a row's `tools`"
        ) from None


def merge_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `merge`. Raises RecipeError if a folder is not what it should be."""
    parser = _parser("merge", MERGE)
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="output_dir of a LoRA run")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to create")
    parser.add_argument("--dtype", choices=DTYPES, help="of all tensors (default: the base model's)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code in the model's files")
    args = parser.parse_args(argv)
    for name in ("adapter_config.json", "tokenizer_config.json"):
        if not (args.adapter / name).is_file():
            raise RecipeError(f"{args.adapter}: {name} is missing. Use the output_dir of a LoRA run")
    existing = nearest_existing_parent(args.output)
    if existing and (not existing.is_dir() or (existing == args.output and any(existing.iterdir()))):
        raise RecipeError(f"{existing}: exists and is not an empty folder. Choose another one")
    return args


def select_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `select`."""
    parser = _parser("select", SELECT)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output_dir of a finished rollout")
    for name, text in (("max-per-question", "selected trajectories"), ("max-pairs-per-question", "preference pairs")):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{text} per question (1)")
    args = parser.parse_args(argv)
    if min(args.max_per_question, args.max_pairs_per_question) < 0:
        parser.error("--max-per-question and --max-pairs-per-question must be >= 0")
    return args


def check_serving_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `check-serving`. Raises RecipeError if the model is missing."""
    parser = _parser("check-serving", CHECK_SERVING)
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder or adapter folder")
    parser.add_argument("--url", required=True, help="the server's, such as http://localhost:8000")
    parser.add_argument("--rows", type=int, default=32, help="rows to compare (32)")
    parser.add_argument("--served-model", metavar="NAME", help="its name on a server of several models")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the server's weights (default: the folder's, then the others)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    args = parser.parse_args(argv)
    if args.rows < 1:
        parser.error("--rows must be > 0")
    _require_model(args.model)
    return args


def _require_model(folder: Path) -> None:
    if not (folder / "tokenizer_config.json").is_file():
        raise RecipeError(f"{str(folder)!r} is not a model folder. Use the output_dir of a finished run")


def _parser(command: str, text: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"arpo-trl {command}", description=text, formatter_class=formatter)
