"""Talks to a trained model and shows where it would call a tool.

    python scripts/chat.py checkpoints/tiny_cpu                                  # until an empty line
    python scripts/chat.py checkpoints/tiny_cpu --prompt "Who founded Karamont?"   # one reply
    python scripts/chat.py checkpoints/tool_calls_demo --tools tools.json        # tools as a row's `tools` has them

No tool is run. After a call, the line that you type next is given to the model as the tool's result.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from arpo_trl.data.messages import to_tools
from arpo_trl.errors import RowError

CALL = re.compile(r"<(python|search|tool_call)>(.*?)</\1>", re.DOTALL)


def find_call(reply: str) -> tuple[str, str] | None:
    """The tag and the text of the tool call that a reply ends with, if it does."""
    calls = list(CALL.finditer(reply))
    if not calls or reply[calls[-1].end() :].strip():
        return None
    return calls[-1][1], calls[-1][2].strip()


def as_result(tag: str, text: str) -> dict[str, str]:
    """A tool's output as the next message: ARPO's form is a user turn, Qwen's a tool turn."""
    if tag == "tool_call":
        return {"role": "tool", "content": text}
    return {"role": "user", "content": f"<result>\n{text}\n</result>"}


def read_tools(path: Path) -> list[dict[str, Any]] | None:
    """As training reads a row's `tools`: a list, or the JSON text of one; the template is given the same."""
    try:
        return to_tools(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RowError) as error:
        raise SystemExit(f"--tools: {path}: {error}; expected a JSON file with what a row has in `tools`") from None


def reply_to(
    messages: list[dict[str, str]],
    tools: list[dict[str, Any]] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
) -> str:
    inputs = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        output = model.generate(
            **inputs.to(model.device),
            **sampling,
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    reply: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return reply


def ask(prompt: str) -> str:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder, or an adapter folder")
    parser.add_argument("--prompt", help="answer this and stop")
    parser.add_argument("--system", help="the system prompt (default: the chat template's own)")
    parser.add_argument("--tools", type=Path, metavar="FILE.json", help="the tools that the model is told of")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens of a reply at most (512)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default): always the likeliest token")
    args = parser.parse_args(argv)
    if not (args.model / "tokenizer_config.json").is_file():
        raise SystemExit(f"{args.model}: no model here; give the output_dir of a finished run")
    tools = read_tools(args.tools) if args.tools else None

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    except (OSError, ValueError) as error:  # no weights yet, or an adapter whose base is elsewhere
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(
            f"{args.model}: can't be loaded ({reason}); give the output_dir of a finished run, from the folder where it "
            "was started"
        ) from None
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    messages = [{"role": "system", "content": args.system}] if args.system else []
    call = None
    while text := args.prompt or ask(f"result of <{call[0]}>: " if call else "you: "):
        messages.append(as_result(call[0], text) if call else {"role": "user", "content": text})
        reply = reply_to(messages, tools, model, tokenizer, args.max_new_tokens, args.temperature)
        messages.append({"role": "assistant", "content": reply})
        call = find_call(reply)
        if call:
            print(f"[{call[0]} would be called here with: {call[1]}]")
        if args.prompt:
            break


if __name__ == "__main__":
    main()
