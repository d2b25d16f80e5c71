"""The tokenizer that is saved with the model, and the parity check before the first step.

Its chat template is the one inference needs; `template.py` finds the one to train with.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers.processors import TemplateProcessing

from ..errors import DatasetError, in_one_line
from ..recipe.keys import Recipe
from ..recipe.llamafactory import SHIPPED, TOKENIZERS_OWN, check_template_name
from .labels import IGNORED, ExampleConfig, Tokenize, Tokens, carry_loss, to_examples
from .messages import Conversation
from .segments import is_written, to_segments
from .shipped_templates import shipped_template
from .template import ChatTemplate, Template, find_template, without_thought_by_default

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the recipe's template, whose end-of-turn token becomes the eos token.

    Raises:
        RecipeError: if the model or the template isn't there, or no reply ends in a token of its own.
    """
    tokenizer = _load(recipe)
    if recipe.mask_spans and not tokenizer.is_fast:
        raise recipe.error(
            "mask_spans", "needs a fast tokenizer (tokenizer.json), and this model has none; remove the key"
        )
    tokenizer.chat_template = _read_template(recipe, tokenizer)
    template = find_template(tokenizer)
    if template.end_of_turn is None:
        raise recipe.error("template", _why_no_end(recipe, template))
    if template.thinks:
        without_thought = recipe.enable_thinking is False
        tokenizer.chat_template = without_thought_by_default(tokenizer.chat_template, without_thought)
    tokenizer.eos_token = template.end_of_turn
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(recipe: Recipe) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = recipe.model_name_or_path
    load: Callable[..., PreTrainedTokenizerBase] = partial(
        AutoTokenizer.from_pretrained,
        name,
        revision=recipe.model_revision,
        cache_dir=recipe.cache_dir,
        use_fast=recipe.use_fast_tokenizer,
    )
    try:
        try:  # Code that comes with a model runs only where transformers has none for it.
            return load(trust_remote_code=False)
        except ValueError:
            if not recipe.trust_remote_code:
                raise
            return load(trust_remote_code=True)
    except Exception as error:  # tokenizers raises Exception itself for a file that it can't read
        found = (
            "no tokenizer could be loaded from it" if Path(name).is_dir() else "no such folder, nor given by the hub"
        )
        raise recipe.error("model_name_or_path", f"{name}: {found} ({in_one_line(error)})") from None


def _read_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    template = recipe.template
    if template in SHIPPED:
        return shipped_template(template)
    if template is None or template in TOKENIZERS_OWN:
        own: ChatTemplate | None = tokenizer.chat_template
        if own:
            return own
        found = "omitted" if template is None else f"{template} means the tokenizer's own"
        raise recipe.error(
            "template",
            f"{found}, and the tokenizer has no chat template; write template: default or another of those that "
            "--help template calls shipped, or the path of a .jinja file",
        )
    if problem := check_template_name(template):
        raise recipe.error("template", problem)
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise recipe.error("template", f"{template}: cannot be read ({error})") from None


def _why_no_end(recipe: Recipe, template: Template) -> str:
    if recipe.template in SHIPPED:
        return (
            f"{recipe.template} ends a reply with {template.after_reply.strip()!r}, which is no token of this "
            "tokenizer; write one that ends it with the tokenizer's own eos token (template: default), or add the token "
            "to the tokenizer and the model with the commands in docs/reference/templates.md"
        )
    return (
        f"{recipe.template or 'the one of the tokenizer'} ends no reply with a special token, so the model could not "
        "learn to stop; write template: default, which ends it with the tokenizer's eos token, or another template"
    )


def check_parity(conversation: Conversation, template: Template, config: ExampleConfig, location: str) -> None:
    """The check before the first step, for one row: segments joined are the conversation, and the labels are its replies.

    Checked on what the tokens decode to: all of them against the conversation rendered and tokenised at once, each
    trained run for its end-of-turn token, and the rest for the text of every message that is not to be learnt.

    Raises:
        DatasetError: naming the row and what differs.
        RowError: if the row can't be rendered.
    """
    tokenizer = template.tokenizer

    def refuse(reason: str) -> DatasetError:
        return DatasetError(f"{location}: the parity check before training failed: {reason}; use another template")

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    config, tokenize = replace(config, cutoff_len=sys.maxsize), make_tokenize(tokenizer)
    segments = to_segments(conversation, template)
    messages = conversation.messages[: conversation.replies[-1] + 1]
    (whole,) = tokenize([template.render(messages, conversation.tools, False)])
    if tokenizer.eos_token != template.end_of_turn:
        raise refuse(f"a turn does not end in the eos token {tokenizer.eos_token!r}")
    (example,) = to_examples([segments], tokenize, config)
    if decode(example.input_ids) != decode(whole.ids):
        raise refuse("the encoded text is not what the chat template renders")
    if config.train_on_prompt:
        return
    runs = [list(run) for trained, run in groupby(example.labels, lambda label: label != IGNORED) if trained]
    ends = {tokenizer.convert_tokens_to_ids(end) for end in template.turn_ends}
    trained = [segment for segment, carries in zip(segments, carry_loss(segments, config)) if carries]
    if sum(not ends.isdisjoint(run) for run in runs) < sum(template.ends(segment.text) for segment in trained):
        raise refuse(f"a reply is trained without its end-of-turn token {tokenizer.eos_token!r}")
    masked = decode([token for token, label in zip(example.input_ids, example.labels) if label == IGNORED])
    for message in messages:
        (text,) = tokenize([message["content"].strip()])
        if message["role"] != "assistant" and not is_written(decode(text.ids).strip(), masked):
            raise refuse(f"a message from {message['role']} is not wholly masked")


def make_tokenize(tokenizer: PreTrainedTokenizerBase, with_offsets: bool = False) -> Tokenize:
    """A function: texts -> tokens, without special tokens added; the Rust tokenizer takes all texts at once, in parallel.

    Tokenizers of SentencePiece's kind (Llama 2, Mistral, Phi-3) write a space before each text. For a text that goes on
    from another (`before`) the tokens are those it has after that one, where no space is written.
    `with_offsets`: the characters of each token are found, too, which a slow tokenizer can't do.
    """
    alone = _make_alone(tokenizer, with_offsets)
    one, line, after = (tokens.ids for tokens in alone(["a", "\n", "\na"]))
    if one == after[len(line) :]:  # It writes no space.
        return lambda texts, before=(): alone(texts)
    added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)

    def going_on(texts: list[str], before: Sequence[str] = ()) -> Iterator[Tokens]:
        # In place of the text before stands the special token that it ends in (a space may follow), or a newline.
        anchors = [next(filter(text.endswith, added), "\n") if text else "" for text in before] or [""] * len(texts)
        different = list(set(anchors))
        known = {anchor: tokens.ids for anchor, tokens in zip(different, alone(different))}
        joined = alone([anchor + text for anchor, text in zip(anchors, texts, strict=True)])
        for anchor, text, tokens in zip(anchors, texts, joined):
            done = known[anchor]
            if tokens.ids[: len(done)] == done:
                characters = tokens.offsets[len(done) :]
                offsets = [(max(start - len(anchor), 0), end - len(anchor)) for start, end in characters]
                yield Tokens(tokens.ids[len(done) :], offsets)
            else:
                yield from alone([text])

    return going_on


def _make_alone(tokenizer: PreTrainedTokenizerBase, with_offsets: bool) -> Callable[[list[str]], Iterable[Tokens]]:
    if not tokenizer.is_fast:
        return lambda texts: map(Tokens, tokenizer(texts, add_special_tokens=False)["input_ids"])
    backend = tokenizer.backend_tokenizer
    if with_offsets:
        # Its post-processor, which only adds special tokens, goes: RoBERTa's kind leaves a space out of its token's
        # characters (tokenizers: `ByteLevel(trim_offsets=True)`).
        backend = copy.deepcopy(backend)
        backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    backend.no_truncation()
    backend.no_padding()

    def alone(texts: list[str]) -> Iterator[Tokens]:
        if with_offsets:
            found = backend.encode_batch(texts, add_special_tokens=False)
            return (Tokens(encoding.ids, encoding.offsets) for encoding in found)
        return (Tokens(encoding.ids) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))

    return alone
