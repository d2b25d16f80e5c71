"""The tokenizer and chat template of a run, as they are trained with and saved with the model."""

import copy
import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..errors import in_one_line, reason
from ..recipe.keys import Recipe
from ..recipe.llamafactory import SHIPPED, TOKENIZERS_OWN, check_template_name
from .labels import Tokenize, Tokens
from .template import Template
from .template_probe import ChatTemplate, find_template, set_thinking_default, writes_system


def load_template(recipe: Recipe, day: date | None = None) -> Template:
    """Load the model's tokenizer with the recipe's chat template, and find the template to train with.

    The end-of-turn token becomes the tokenizer's eos token. A dated template writes `day`, or today.

    Raises:
        RecipeError: the model or the template can't be loaded, or no reply ends with a special token.
    """
    tokenizer = _load_tokenizer(recipe)
    if recipe.mask_spans and not tokenizer.is_fast:
        raise recipe.error("mask_spans", "not supported without a fast tokenizer (tokenizer.json); remove the key")
    tokenizer.chat_template = _read_template(recipe, tokenizer)
    last_reasoning_only = (recipe.mask_history or recipe.stage == "dpo") and not recipe.preserve_thinking
    stops = _read_stops(recipe, tokenizer)
    find = partial(find_template, tokenizer, day, recipe.enable_thinking, last_reasoning_only, stops)
    template = find()
    if template.end_of_turn is None:
        raise recipe.error("template", _explain_no_end(recipe, template))
    if recipe.default_system == "" and recipe.template not in SHIPPED and writes_system(template):
        problem = "an empty one is not supported by this chat template, which always writes a system turn"
        raise recipe.error("default_system", f"{problem}; set template to a shipped name (--help template)")
    tokenizer.chat_template = set_thinking_default(template)
    if tokenizer.eos_token != template.end_of_turn:
        tokenizer.eos_token = template.end_of_turn
        template = find()  # Templates write the eos token.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return template


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the recipe trains with and saves: with its chat template, and the end of turn as eos token.

    Raises:
        RecipeError: as `load_template`.
    """
    return load_template(recipe).tokenizer


def _load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    name = recipe.model_name_or_path
    load: Callable[..., PreTrainedTokenizerBase] = partial(
        AutoTokenizer.from_pretrained,
        name,
        revision=recipe.model_revision,
        cache_dir=recipe.cache_dir,
        use_fast=recipe.use_fast_tokenizer,
    )
    try:
        try:  # A model's own code only runs if transformers doesn't support the model.
            return load(trust_remote_code=False)
        except ValueError:
            if not recipe.trust_remote_code:
                raise
            return load(trust_remote_code=True)
    except Exception as error:  # tokenizers raises Exception itself for a file that it can't read
        problem = (
            "no tokenizer could be loaded" if Path(name).is_dir() else "no such folder, and not loaded from the Hub"
        )
        raise recipe.error("model_name_or_path", f"{name}: {problem} ({in_one_line(error)})") from None


def _read_stops(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the tokens at which the base stops, which the trained model's generation config keeps."""
    name, cache_dir = recipe.model_name_or_path, recipe.cache_dir
    try:
        ends = GenerationConfig.from_pretrained(name, cache_dir=cache_dir, revision=recipe.model_revision).eos_token_id
    except (OSError, ValueError, TypeError):
        return ()  # no such file, or not for this release; config.json is read with the model
    ids = ends if isinstance(ends, list) else [ends]
    return tuple(str(tokenizer.convert_ids_to_tokens(end)) for end in ids if end is not None and end < len(tokenizer))


def _read_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    template = recipe.template
    if template in SHIPPED:
        return shipped_template(template, with_default_system=recipe.default_system != "")
    if template is None or template in TOKENIZERS_OWN:
        own: ChatTemplate | None = tokenizer.chat_template
        if own:
            return own
        missing = f"{template} selects the tokenizer's chat template, but it has none"
        if template is None:
            missing = "not set, but the tokenizer has no chat template"
        raise recipe.error(
            "template",
            f"{missing}; set it to a shipped name (--help template) such as default, or to a .jinja file",
        )
    if problem := check_template_name(template):
        raise recipe.error("template", problem)
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise recipe.error("template", f"{template}: cannot be read ({reason(error)})") from None


def _explain_no_end(recipe: Recipe, template: Template) -> str:
    if recipe.template in SHIPPED:
        return (
            f"{recipe.template} ends replies with {template.after_reply.strip()!r}, which is not a token of this "
            "tokenizer; set template: default, or add the token as docs/reference/templates.md shows"
        )
    return (
        f"{recipe.template or 'the template of the tokenizer'} does not end replies with a special token, so the model "
        "can't learn to stop; set template: default"
    )


def shipped_template(name: str, with_default_system: bool = True) -> str:
    """Return the Jinja of a template shipped under one of LLaMA-Factory's names: TRL's file, or a composed one.

    A composed template sets the pieces that templates/names.toml has for the name, followed by its tools_*.jinja and
    frame.jinja. Of TRL's files only Qwen2.5's writes LLaMA-Factory's text; others (llama3.jinja, qwen3_instruct_2507.jinja)
    strip messages, or write tools differently.

    Raises:
        KeyError: nothing is shipped under this name.
    """
    if name == "qwen" and not with_default_system:
        name = "qwen3_nothink"  # the same text, without a default system message
    if name == "qwen":
        trl = find_spec("trl")  # importing it takes seconds
        return Path(str(trl and trl.origin)).with_name("chat_templates").joinpath("qwen2_5.jinja").read_text("utf-8")
    folder = files("arpo_trl.data").joinpath("templates")
    table = tomllib.loads(folder.joinpath("names.toml").read_text(encoding="utf-8"))
    pieces = table[name]
    while other := pieces.pop("like", None):
        pieces = table[other] | pieces
    if "turn" in pieces:
        start, end = pieces.pop("turn")
        system, user, header = (start.replace("{role}", role) for role in ("system", "user", "assistant"))
        pieces = {"system": [system, end], "user": [user, end], "header": header, "reply": ["", end]} | pieces
    default = {"begin": "", "default_system": "", "result_join": "", "system_inside": False, "tools": "react"}
    default |= {"system": ["", ""], "reply": ["", "{eos}"], "reasoning": ["<think>\n", "\n</think>\n\n"]}
    pieces = default | {"has_reasoning": "reasoning" in pieces} | pieces
    pieces = {"result": pieces["user"], "call": pieces["reply"]} | pieces
    if not with_default_system:
        pieces["default_system"] = ""
    lines = []
    for key, value in pieces.items():
        if isinstance(value, list):
            lines.append(f"{{%- set {key}_start, {key}_end = {_to_jinja(value[0])}, {_to_jinja(value[1])} %}}\n")
        elif key != "tools":
            lines.append(f"{{%- set {key} = {_to_jinja(value)} %}}\n")
    parts = (f"tools_{pieces['tools']}.jinja", "frame.jinja")
    return "".join([*lines, *(folder.joinpath(part).read_text(encoding="utf-8") for part in parts)])


def _to_jinja(piece: str | bool) -> str:
    text = json.dumps(piece, ensure_ascii=False)
    return text.replace("{bos}", '" ~ bos_token ~ "').replace("{eos}", '" ~ eos_token ~ "')


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """Return the text of token ids, exactly: without the spaces that transformers would remove before punctuation."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    )


def make_tokenize(tokenizer: PreTrainedTokenizerBase, with_offsets: bool = False) -> Tokenize:
    """Make a function: texts -> tokens, without added special tokens. Fast tokenizers encode all texts in parallel.

    SentencePiece tokenizers (Llama 2, Mistral, Phi-3) put a space before each text. A text that continues another
    (`before`) gets the tokens that it has after that text, without the space.

    Args:
        with_offsets: Also return the characters of each token; needs a fast tokenizer.
    """
    alone = _tokenize_alone(tokenizer, with_offsets)
    letter, line, after = (tokens.ids for tokens in alone(["a", "\n", "\na"]))
    if letter == after[len(line) :]:  # adds no space
        return lambda texts, before=(): alone(texts)
    added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)

    def continued(texts: list[str], before: Sequence[str] = ()) -> Iterator[Tokens]:
        # The text before is represented by the special token at its end (a space may follow), or by a newline.
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

    return continued


def _tokenize_alone(tokenizer: PreTrainedTokenizerBase, with_offsets: bool) -> Callable[[list[str]], Iterable[Tokens]]:
    if not tokenizer.is_fast:
        return lambda texts: map(Tokens, tokenizer(texts, add_special_tokens=False)["input_ids"])
    backend = tokenizer.backend_tokenizer
    if with_offsets:
        # Replace the post-processor, which only adds special tokens: RoBERTa's kind leaves a space out of its token's
        # characters (tokenizers: `ByteLevel(trim_offsets=True)`).
        backend = copy.deepcopy(backend)
        backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    backend.no_truncation()
    backend.no_padding()

    def alone(texts: list[str]) -> Iterator[Tokens]:
        if with_offsets:
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            return (Tokens(encoding.ids, encoding.offsets) for encoding in encodings)
        return (Tokens(encoding.ids) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))

    return alone
