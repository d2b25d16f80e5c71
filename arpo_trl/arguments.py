"""The words after `arpo-trl chat` and `arpo-trl merge`: read, and the folders looked at, before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .data.messages import Fields, to_tools
from .data.strict_json import parse_json
from .errors import RecipeError, RowError
from .generate.run_python import Limits
from .machine import nearest_there

CHAT = """Talk with a trained model; where it calls a tool, go on as ARPO rolls out.

    arpo-trl chat checkpoints/tiny_cpu                                    until an empty line
    arpo-trl chat checkpoints/tiny_cpu --prompt "Who founded Karamont?"   one question
    arpo-trl chat checkpoints/tool_calls_demo --tools tools.json          tools as a row's `tools` has them
    arpo-trl chat checkpoints/tiny_cpu --run-python                       <python> blocks are really run

After a call you type the tool's result. It is given as a turn, or inside the model's turn, as its training data has it.
"""
MERGE = """Write an adapter and its base as one model, for programs that load whole models only.

OUTPUT is a model folder in the base model's dtype, with the adapter's tokenizer and chat template; its configs stop at
the tokenizer's end-of-turn token. The sum is taken in float32 and must predict what the adapter predicts; OUTPUT is
read back.
"""


def chat_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Those of `chat`. Raises RecipeError where the model or a file isn't there."""
    parser = _parser("chat", CHAT)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model folder, or an adapter folder")
    parser.add_argument("--prompt", help="answer this and stop")
    parser.add_argument("--system", help="the system prompt (default: the chat template's own)")
    parser.add_argument("--tools", type=read_tools, metavar="FILE.json", help="the tools that the model is told of")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens between two results at most (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default): always the likeliest token")
    parser.add_argument(
        "--results", choices=("turn", "inside"), help="where results go (default: as in the run's data)"
    )
    parser.add_argument("--run-python", action="store_true", help="run <python> blocks on this machine, as you")
    parser.add_argument("--time-limit", type=float, default=Limits.seconds, help="seconds of a program (20)")
    parser.add_argument("--memory-limit", type=int, default=Limits.megabytes, help="MB of a program (1024)")
    args = parser.parse_args(argv)
    if not (args.max_new_tokens > 0 < args.time_limit and args.memory_limit > 0 <= args.temperature):
        parser.error("--max-new-tokens, --time-limit and --memory-limit have to be above 0, --temperature 0 or more")
    if not (args.model / "tokenizer_config.json").is_file():
        raise RecipeError(f"{args.model}: no model here; give the output_dir of a finished run")
    return args


def read_tools(path: str) -> list[Fields] | None:
    """As training reads a row's `tools`: a list, or the JSON text of one; the template is given the same."""
    try:
        return to_tools(parse_json(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RowError) as error:
        raise RecipeError(f"--tools: {path}: {error}; expected a JSON file with what a row has in `tools`") from None


def merge_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Those of `merge`. Raises RecipeError where a folder is not what it should be."""
    parser = _parser("merge", MERGE)
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the output_dir of a LoRA run")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a folder that is not there yet")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="the base model's if omitted")
    args = parser.parse_args(argv)
    for name in ("adapter_config.json", "tokenizer_config.json"):
        if not (args.adapter / name).is_file():
            raise RecipeError(f"{args.adapter}: no {name} here; give the output_dir of a LoRA run")
    there = nearest_there(args.output)
    if there and (not there.is_dir() or (there == args.output and any(there.iterdir()))):
        raise RecipeError(f"{there}: not an empty folder; give one that is not there yet")
    return args


def _parser(command: str, text: str) -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"arpo-trl {command}", description=text, formatter_class=kind)
