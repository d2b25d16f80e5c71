"""The tokenizer and its chat template: which one renders, where a turn ends, and the gate before the first step.

`load_tokenizer` gives the tokenizer that is saved with the model: its chat template is the one inference needs. Training
may have to render with another: a template that writes earlier turns differently once later ones follow (Qwen3 strips
its thinking) can't be learnt from as it stands; TRL has a training form of the common ones.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DatasetError, RecipeError, RowError
from ..recipe.keys import Recipe
from .labels import IGNORED, EncodingConfig, Template, encode, to_segments
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


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the recipe's template, whose end-of-turn token becomes the eos token.

    Raises:
        RecipeError: if the model or the template isn't there, or no reply ends in a token of its own.
    """
    from transformers import AutoTokenizer

    name = recipe.model_name_or_path
    local = re.match(r"[./~]|[A-Za-z]:", name) or name.count("/") > 1 or Path(name).exists()
    if local and not Path(name).is_dir():
        raise RecipeError(f"model_name_or_path: {name}: no such folder")
    load = partial(
        AutoTokenizer.from_pretrained,
        name,
        revision=recipe.model_revision,
        cache_dir=recipe.cache_dir,
        use_fast=recipe.use_fast_tokenizer,
    )
    try:
        try:  # Code that comes with a model runs only where transformers has none for it.
            tokenizer: PreTrainedTokenizerBase = load(trust_remote_code=False)
        except ValueError:
            if not recipe.trust_remote_code:
                raise
            tokenizer = load(trust_remote_code=True)
    except Exception as error:  # tokenizers raises Exception itself for a file that it can't read
        reason = " ".join(str(error).split())[:300]
        where = (
            "no tokenizer could be loaded from it" if Path(name).is_dir() else "no such folder, nor given by the hub"
        )
        raise RecipeError(f"model_name_or_path: {name}: {where} ({reason})") from None
    tokenizer.chat_template = _read_template(recipe.template, tokenizer)
    end_of_turn = find_template(tokenizer).end_of_turn
    if end_of_turn is None:
        raise RecipeError(
            f"template: {recipe.template or 'the one of the tokenizer'} ends no reply with a special token, so the model "
            "could not learn to stop; use another template"
        )
    tokenizer.eos_token = end_of_turn
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_template(template: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    shipped = {
        file.name.removesuffix(".jinja"): file for file in files("arpo_trl.data").joinpath("templates").iterdir()
    }
    ways_out = f"omit it for the tokenizer's own, name a shipped one ({', '.join(sorted(shipped))}) or a .jinja file"
    if template is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise RecipeError(f"template: omitted, and the tokenizer has no chat template; {ways_out}")
        return str(own)
    if template in shipped:
        return shipped[template].read_text(encoding="utf-8")
    path = Path(template)
    if path.suffix != ".jinja":
        raise RecipeError(f"template: {template}: no such template; {ways_out}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"template: {template}: cannot be read ({error})") from None


def find_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template to render with in training: the tokenizer's own, or TRL's training form if that one rewrites turns.

    Raises:
        RecipeError: if it can't be rendered at all.
    """
    own = _describe(Template(tokenizer, str(tokenizer.chat_template)))
    if not _faults(own):
        return own
    from trl.chat_template_utils import get_training_chat_template

    try:
        jinja = get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows no training form of it
        return own
    form = _describe(replace(own, jinja=jinja or own.jinja, epilogue=""))
    return form if _faults(form) < _faults(own) else own


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
    after: list[int] = tokenizer(answered.rpartition(REPLY["content"])[2], add_special_tokens=False)["input_ids"]
    return replace(
        template,
        generation_prompt=with_prompt[len(without.removesuffix(epilogue)) :],
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


def check_parity(conversation: Conversation, template: Template, config: EncodingConfig, place: str) -> None:
    """The gate before the first step, for one row: segments joined are the conversation, and the labels are its replies.

    Checked on what the tokens decode to: all of them against the conversation rendered and tokenised at once, each
    trained run for its end-of-turn token, and the rest for the text of every message that is not to be learnt.

    Raises:
        DatasetError: naming the row and what differs.
        RowError: if the row can't be rendered.
    """
    tokenizer = template.tokenizer

    def refuse(reason: str) -> DatasetError:
        return DatasetError(f"{place}: the gate before training stopped here: {reason}; use another template")

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    config, tokenize = replace(config, cutoff_len=sys.maxsize), make_tokenize(tokenizer)
    segments = to_segments(conversation, template)
    messages = conversation.messages[: conversation.replies[-1] + 1]
    context, reply, whole = tokenize(
        [segments[0].text, segments[1].text, template.render(messages, conversation.tools, False)]
    )
    if decode(context + reply) != decode(context) + decode(reply):
        raise refuse("the tokenizer writes a reply after its context otherwise than alone, as with a space before it")
    if tokenizer.eos_token != template.end_of_turn:
        raise refuse(f"a turn does not end in the eos token {tokenizer.eos_token!r}")
    (example,) = encode([segments], tokenize, config)
    if decode(example.input_ids) != decode(whole):
        raise refuse("the encoded text is not what the chat template renders")
    if config.train_on_prompt:
        return
    runs = [list(run) for trained, run in groupby(example.labels, lambda label: label != IGNORED) if trained]
    if any(tokenizer.eos_token_id not in run for run in runs):
        raise refuse(f"a reply is trained without its end-of-turn token {tokenizer.eos_token!r}")
    masked = decode([token for token, label in zip(example.input_ids, example.labels) if label == IGNORED])
    for message in messages:
        (text,) = tokenize([message["content"].strip()])
        if message["role"] != "assistant" and decode(text) not in masked:
            raise refuse(f"a message from {message['role']} is not wholly masked")


def make_tokenize(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], Iterable[list[int]]]:
    """Texts -> token ids, without special tokens added; the Rust tokenizer takes all texts at once, in parallel."""
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))
