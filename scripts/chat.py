"""Talks to a trained model and shows where it would call a tool.

    python scripts/chat.py checkpoints/tiny_cpu                                  # until an empty line
    python scripts/chat.py checkpoints/tiny_cpu --prompt "Who founded Karamont?"   # one reply

No tool is run. After a call, the line that you type next is given to the model as the tool's result.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

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


def reply_to(
    messages: list[dict[str, str]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
) -> str:
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
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
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default): always the likeliest token")
    args = parser.parse_args(argv)
    if not (args.model / "tokenizer_config.json").is_file():
        raise SystemExit(f"{args.model}: no model here; give the output_dir of a finished run")

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    messages = [{"role": "system", "content": args.system}] if args.system else []
    call = None
    while text := args.prompt or ask(f"result of <{call[0]}>: " if call else "you: "):
        messages.append(as_result(call[0], text) if call else {"role": "user", "content": text})
        reply = reply_to(messages, model, tokenizer, args.max_new_tokens, args.temperature)
        messages.append({"role": "assistant", "content": reply})
        call = find_call(reply)
        if call:
            print(f"[{call[0]} would be called here with: {call[1]}]")
        if args.prompt:
            break


if __name__ == "__main__":
    main()
