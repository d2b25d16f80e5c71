"""The chat template in training: which one renders, and what it writes around a reply.

A tokenizer's own template can't always be trained with: one that writes earlier turns differently once later ones
follow (Qwen3 strips its thinking) can't be learnt from as it stands; TRL has a training form of the common ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from dataclasses import dataclass, replace
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..errors import RecipeError, RowError
from ..recipe.keys import Recipe
from ..run_folder import read_json
from .labels import to_segments
from .messages import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASK: Message = {"role": "user", "content": "a question"}
REPLY: Message = {"role": "assistant", "content": "an answer"}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "a word"}}}
PROBES = (
    [ASK, REPLY, ASK, REPLY],
    [ASK, {**REPLY, "content": "<think>\na thought\n</think>\n\nan answer"}, ASK, REPLY],
    [ASK, {**REPLY, "tool_calls": [CALL]}, {"role": "tool", "content": "found"}, REPLY, ASK, REPLY],
)


@dataclass(frozen=True)
class Template:
    """How rows are rendered for training; `find_template` finds it. `jinja` may be TRL's training form.

    `tool_jinja` renders rows with tools where the tokenizer has a template for them (`tool_use`), as transformers does.

    `day` is the date that it writes where it asks for today's (`strftime_now`).
    `generation_prompt` opens a reply; `after_reply` is what follows its text, and `end_of_turn` the first special token there.
    `epilogue` is what the template writes after whatever does not go on, and no row needs.
    """

    tokenizer: PreTrainedTokenizerBase
    jinja: str
    day: date
    tool_jinja: str | None = None
    generation_prompt: str = ""
    after_reply: str = ""
    end_of_turn: str | None = None
    epilogue: str = ""

    @property
    def hash(self) -> str:
        """Of all that decides its text beside the rows: the Jinja, its date in it, and the special tokens it may write."""
        parts = [self.jinja, self.tool_jinja, self.tokenizer.special_tokens_map]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def render(self, messages: list[Message], tools: Any, prompt: bool) -> str:
        """The template's text for these messages, with the generation prompt after it or not.

        Raises:
            RowError: if the template refuses them.
        """
        jinja = self.tool_jinja if tools and self.tool_jinja else self.jinja
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=jinja, add_generation_prompt=prompt, tokenize=False
                )
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise RowError(f"the template refuses it: {error}") from None
        return text if prompt else text.removesuffix(self.epilogue)


def find_template(tokenizer: PreTrainedTokenizerBase, day: date | None = None) -> Template:
    """The template to render with in training: the tokenizer's own, or TRL's training form if that one rewrites turns.

    Args:
        day: The date that a dated template writes; today's if omitted.

    Raises:
        RecipeError: if it can't be rendered at all.
    """
    given: str | dict[str, str] = tokenizer.chat_template
    named = given if isinstance(given, dict) else {"default": given}
    if "default" not in named:
        raise RecipeError(f"template: the tokenizer has templates named {', '.join(named)} and none named default")
    day = day or date.today()
    tool_jinja = named.get("tool_use")
    own = _describe(Template(tokenizer, _dated(named["default"], day), day, tool_jinja and _dated(tool_jinja, day)))
    if not _faults(own):
        return own
    from trl.chat_template_utils import get_training_chat_template

    try:
        jinja = get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows no training form of it
        return own
    form = _describe(replace(own, jinja=_dated(jinja, day) if jinja else own.jinja, epilogue=""))
    return form if _faults(form) < _faults(own) else own


def template_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Template:
    """`find_template` for a recipe: what it writes is the same for a run and its resume, on all processes.

    Raises:
        RecipeError: as `find_template`.
    """
    from ..processes import on_main_process

    return find_template(tokenizer, on_main_process(lambda: _day(recipe)))


def _day(recipe: Recipe) -> date:
    """The day on which the run in `output_dir` began, if it goes on; else today."""
    resumed, folder = recipe.resume_from_checkpoint, Path(recipe.output_dir)
    if recipe.overwrite_output_dir and not resumed:
        return date.today()
    manifest = read_json((Path(resumed).parent if isinstance(resumed, str) else folder) / "run.json")
    try:
        return date.fromisoformat(manifest["day"])
    except (KeyError, TypeError, ValueError):
        return date.today()


def _dated(jinja: str, day: date) -> str:
    """The template with this day in place of today. transformers 5 hands a template data alone, and no clock of ours."""
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: json.dumps(day.strftime(call[2])), jinja)


def _describe(template: Template) -> Template:
    """What it writes around a reply, found by rendering."""
    tokenizer = template.tokenizer
    eos = str(tokenizer.eos_token or "\0")
    try:
        with_prompt, without = template.render([ASK], None, True), template.render([ASK], None, False)
        answered = template.render([ASK, REPLY], None, False)
    except RowError as error:
        raise RecipeError(f"template: cannot be rendered ({error})") from None
    # Phi-3 ends whatever does not go on with the eos token. No reply ends in it, so no row needs it.
    epilogue = eos if not with_prompt.startswith(without) and without.endswith(eos) else ""
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    after_reply = answered.rpartition(REPLY["content"])[2]
    after: list[int] = tokenizer(after_reply, add_special_tokens=False)["input_ids"]
    return replace(
        template,
        generation_prompt=with_prompt[len(without.removesuffix(epilogue)) :],
        after_reply=after_reply,
        end_of_turn=next((special[token] for token in after if token in special), None),
        epilogue=epilogue,
    )


def _faults(template: Template) -> int:
    """How many probes can be rendered but not cut into segments."""
    faults = 0
    for messages in PROBES:
        try:
            template.render(messages, None, False)
        except RowError:
            continue
        try:
            to_segments(Conversation(messages), template)
        except RowError:
            faults += 1
    return faults


def shipped_template(name: str) -> str:
    """The Jinja text of a template that is shipped under one of LLaMA-Factory's names: qwen.jinja, or one put together.

    The pieces that templates/names.toml has for the name stand in front, then the file of their tools, then frame.jinja.
    TRL's own files (qwen3_instruct_2507.jinja, llama3.jinja) differ from LLaMA-Factory's text for rows with tools.

    Raises:
        KeyError: if nothing is shipped under that name.
    """
    folder = files("arpo_trl.data").joinpath("templates")
    if name == "qwen":
        return folder.joinpath("qwen.jinja").read_text(encoding="utf-8")
    table = tomllib.loads(folder.joinpath("names.toml").read_text(encoding="utf-8"))
    pieces = table[name]
    pieces = table.get(pieces.get("like"), {}) | pieces
    default = {"begin": "", "default_system": "", "result_join": "", "system_inside": False}
    default |= {"thought": ["<think>\n", "\n</think>\n\n"], "reasons": "thought" in pieces}
    default |= {"result": pieces["user"], "call": pieces["reply"]}
    lines = []
    for key, value in (default | pieces).items():
        if isinstance(value, list):
            lines.append(f"{{%- set {key}_start, {key}_end = {_expression(value[0])}, {_expression(value[1])} %}}\n")
        elif key not in ("like", "tools"):
            lines.append(f"{{%- set {key} = {_expression(value)} %}}\n")
    parts = (f"tools_{pieces['tools']}.jinja", "frame.jinja")
    return "".join([*lines, *(folder.joinpath(part).read_text(encoding="utf-8") for part in parts)])


def _expression(piece: str | bool) -> str:
    """A piece as Jinja writes it."""
    text = json.dumps(piece, ensure_ascii=False)
    return text.replace("{bos}", '" ~ bos_token ~ "').replace("{eos}", '" ~ eos_token ~ "')
