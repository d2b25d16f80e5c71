"""The chat template in training: right labels or a refusal, whatever template a tokenizer comes with."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from arpo_trl.data.encode import check_parity
from arpo_trl.data.labels import IGNORED, ExampleConfig, mask_replies, to_examples, trained_segments
from arpo_trl.data.messages import Conversation
from arpo_trl.data.segments import to_segments
from arpo_trl.data.template_probe import find_template
from arpo_trl.data.tokenizer import load_template, make_tokenize, shipped_template
from arpo_trl.errors import DatasetError, RecipeError, RowError
from arpo_trl.recipe import Recipe

CONFIG = ExampleConfig(1 << 20)
SPECIAL = (
    "<|im_start|> <|im_end|> <|endoftext|> <bos> <eos> <start_of_turn> <end_of_turn> <|begin_of_text|> <|eot_id|> "
    "<|start_header_id|> <|end_header_id|> <|end|> <|user|> <|assistant|> <|system|> <s> </s>"
).split()
S = {"role": "system", "content": "S"}
Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
R, B = {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}
THOUGHT = {"role": "assistant", "content": "<think>\nT\n</think>\n\nA"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SPEAKS_AND_CALLS = {**CALLS, "content": "I add."}
FOUND = {"role": "tool", "content": "1"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def make_tokenizer(template: str, bos: str | None = None, eos: str = "<|endoftext|>") -> PreTrainedTokenizerBase:
    """Every byte is a token; TRL's file of that name is the chat template (or `template` is one)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    made.chat_template = file.read_text(encoding="utf-8") if "{" not in template else template
    return made


FAMILIES: dict[str, tuple[str | None, str, str]] = {  # bos, eos, the end of turn that we expect
    "qwen2_5": (None, "<|im_end|>", "<|im_end|>\n"),
    "qwen3": (None, "<|im_end|>", "<|im_end|>\n"),
    "llama3_1": ("<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<eos>", "<end_of_turn>\n"),
    "phi3": ("<s>", "<|endoftext|>", "<|end|>\n"),
}
NO_THOUGHT = (
    "<think>\n\n</think>\n\n"  # Qwen3 writes it before a reply without one, so it is generated, so it is trained
)
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
LLAMA_CALL = '{"name": "add", "parameters": {"a": 1}}'

# conversation -> family -> what is trained before each end of turn, or the start of the reason it is refused for
EXPECTED: dict[str, tuple[list[Any], Any, dict[str, list[str] | str]]] = {
    "two exchanges": (
        [Q, A, R, B],
        None,
        {name: ["A", "B"] for name in FAMILIES} | {"qwen3": [NO_THOUGHT + "A", NO_THOUGHT + "B"]},
    ),
    "a system message": (
        [S, Q, A],
        None,
        {name: ["A"] for name in FAMILIES}
        | {"qwen3": [NO_THOUGHT + "A"], "gemma": "the chat template raised an error: System role not supported"},
    ),
    "thoughts in every turn": (
        [Q, THOUGHT, R, THOUGHT],
        None,
        {name: [THOUGHT["content"]] * 2 for name in FAMILIES},
    ),
    "the assistant begins": (
        [A, Q, B],
        None,
        {name: ["A", "B"] for name in FAMILIES}
        | {
            "qwen3": [NO_THOUGHT + "A", NO_THOUGHT + "B"],
            "gemma": "the chat template raised an error: Conversation roles must",
        },
    ),
    "a call": (
        [Q, CALLS, FOUND, A],
        TOOLS,
        {
            "qwen2_5": [QWEN_CALL, "A"],
            "qwen3": [NO_THOUGHT + QWEN_CALL, NO_THOUGHT + "A"],
            "llama3_1": [LLAMA_CALL, "A"],
            "gemma": "the chat template raised an error: Conversation roles must",
            "phi3": "the chat template leaves out the tool 'add'; use another template",
        },
    ),
    "text beside a call": (
        [Q, SPEAKS_AND_CALLS, FOUND, A],
        None,
        {
            "qwen2_5": ["I add.\n" + QWEN_CALL, "A"],
            "qwen3": [NO_THOUGHT + "I add.\n" + QWEN_CALL, NO_THOUGHT + "A"],
            "llama3_1": "the chat template drops this text of the assistant turn: 'I add.'",
            "gemma": "the chat template raised an error: Conversation roles must",
            "phi3": "the chat template drops this text of the assistant turn: 'add'",
        },
    ),
    "two users in a row": (
        [Q, R, A],
        None,
        {name: ["A"] for name in FAMILIES}
        | {"qwen3": [NO_THOUGHT + "A"], "gemma": "the chat template raised an error: Conversation roles must"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", EXPECTED)
def test_labels_are_right_or_the_row_is_an_error(family: str, kind: str) -> None:
    bos, eos, end = FAMILIES[family]
    messages, tools, expected = EXPECTED[kind]
    tokenizer = make_tokenizer(family, bos, eos)
    template = find_template(tokenizer)
    assert template.end_of_turn == end.strip()
    conversation = Conversation(messages, tools)
    wanted = expected[family]
    if isinstance(wanted, str):
        with pytest.raises(RowError) as error:
            to_segments(conversation, template)
        assert str(error.value).startswith(wanted)
        return
    segments = to_segments(conversation, template)
    trained = [segment.text for segment, carries in zip(segments, trained_segments(segments, CONFIG)) if carries]
    assert trained == [text + end for text in wanted]
    tokenizer.eos_token = end.strip()
    check_parity(conversation, find_template(tokenizer), CONFIG, "row")


def test_a_template_that_rewrites_turns_is_rendered_in_its_training_form() -> None:
    """The tokenizer keeps the form that inference needs."""
    tokenizer = make_tokenizer("qwen3")
    own = tokenizer.chat_template
    assert find_template(tokenizer).jinja != own
    assert tokenizer.chat_template == own
    other = make_tokenizer("qwen2_5")
    assert find_template(other).jinja == other.chat_template


def test_a_rewriting_template_without_a_training_form_drops_rows() -> None:
    strips = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content | upper }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = find_template(make_tokenizer(strips))
    small = {"role": "assistant", "content": "small"}
    with pytest.raises(RowError, match="the chat template rewrites an earlier turn once later ones follow"):
        to_segments(Conversation([Q, small, R, B]), template)


def test_a_reply_follows_the_complete_generation_prompt_though_the_template_leaves_out_its_end() -> None:
    thinks = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    template = find_template(make_tokenizer(thinks))
    asked = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n"
    plain, thought = (to_segments(Conversation([Q, reply]), template) for reply in (A, THOUGHT))
    assert [segment.text for segment in plain] == [asked, "\n</think>\n\nA<|im_end|>\n"]
    assert [segment.text for segment in thought] == [asked, "T\n</think>\n\nA<|im_end|>\n"]


def test_a_generation_prompt_unrelated_to_the_reply_is_an_error() -> None:
    other = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    with pytest.raises(
        RowError, match="with this chat template, the text before this reply is not the generation prompt of inference"
    ):
        to_segments(Conversation([Q, A]), find_template(make_tokenizer(other)))


def test_a_span_is_found_up_to_the_end_of_a_reply_whose_end_of_turn_is_context() -> None:
    """gpt-oss writes another token there than the one with which the model stops."""
    ends_twice = (
        "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}"
        "{{ '</s>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
    )
    template = find_template(make_tokenizer(ends_twice))
    result = {"role": "assistant", "content": "<result>7</result>"}
    _, first, _, last = mask_replies(to_segments(Conversation([Q, result, R, result]), template), template, ["result"])
    assert (first.text, last.text) == ("<result>7</result>", "<result>7</result></s>")
    assert first.masked and last.masked and first.spans == last.spans


# The parity check


def test_the_parity_check_rejects_an_eos_other_than_the_end_of_turn() -> None:
    tokenizer = make_tokenizer("qwen2_5", eos="<|endoftext|>")
    with pytest.raises(DatasetError) as error:
        check_parity(Conversation([Q, A]), find_template(tokenizer), CONFIG, "a.json:7")
    assert str(error.value) == ("a.json:7: turns do not end with the eos token '<|endoftext|>'; use another template")


def sentencepiece_tokenizer(scheme: str) -> PreTrainedTokenizerBase:
    """Of Llama 2's and Mistral's kind, which write a space before a text: as transformers 5 builds it, or its old file."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no token goes on from one word to the next
    texts = ["USER: What is four? ASSISTANT: Four it is.", "[INST] Say nine [/INST] Nine it is."] * 9
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False) if scheme != "prepend" else None
    )
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("name", ["mistral", "vicuna", "llama2", "default", "zephyr"])
@pytest.mark.parametrize("scheme", ["first", "always", "prepend"])
def test_a_tokenizer_that_writes_a_space_before_a_text_gives_the_tokens_of_the_whole(scheme: str, name: str) -> None:
    """Of each piece alone they would be other ones: a space that the model does not see when it is used."""
    tokenizer = sentencepiece_tokenizer(scheme)
    tokenizer.chat_template = shipped_template(name)
    template = find_template(tokenizer)
    row = Conversation([{**Q, "content": "What is four?"}, {**A, "content": "Four it is."}, R, B])
    check_parity(row, template, CONFIG, "row")
    segments = mask_replies(to_segments(row, template), template, [" it"])
    (example,) = to_examples([segments], make_tokenize(tokenizer, with_offsets=True), CONFIG)
    whole = tokenizer("".join(segment.text for segment in segments), add_special_tokens=False)["input_ids"]
    assert example.input_ids == whole
    trained = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(trained).replace("\n", "").replace(" ", "") == "Fouris.</s>B</s>"


def test_the_parity_check_rejects_a_tokenizer_that_strips_each_text() -> None:
    tokenizer = make_tokenizer("qwen2_5", eos="<|im_end|>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()  # type: ignore[attr-defined]
    shown = Conversation([Q, {**A, "content": " A"}])
    with pytest.raises(DatasetError, match="the encoded text differs from the rendered chat template"):
        check_parity(shown, find_template(tokenizer), CONFIG, "row")


def test_the_parity_check_rejects_a_tokenizer_that_joins_segments_differently() -> None:
    """What is stripped shows between a prompt and its reply where no special token parts them."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %} User: {{ m.content }} Bot: {% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    check_parity(Conversation([Q, A, R, B]), find_template(tokenizer), CONFIG, "row")
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match=r"row: the encoded text differs from the rendered chat template;"):
        check_parity(Conversation([Q, A, R, B]), find_template(tokenizer), CONFIG, "row")


def test_the_parity_check_rejects_an_end_of_turn_that_is_not_a_token_after_a_word() -> None:
    tokenizer = make_tokenizer("qwen2_5", eos="<|im_end|>")
    end = AddedToken("<|im_end|>", special=True, single_word=True)
    tokenizer.backend_tokenizer.add_special_tokens([end])  # type: ignore[attr-defined]
    template = find_template(tokenizer)
    assert template.end_of_turn == "<|im_end|>"
    with pytest.raises(DatasetError, match=r"a reply is trained without its end-of-turn token '<\|im_end\|>'"):
        check_parity(Conversation([Q, A]), template, CONFIG, "row")


def test_the_parity_check_rejects_a_message_missing_from_the_masked_tokens() -> None:
    spaced = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ ' ' if m.role == 'assistant' }}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(spaced, eos="<|im_end|>")
    check_parity(Conversation([S, Q, A]), find_template(tokenizer), CONFIG, "row")
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("x")  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match="a system message is not fully masked"):
        check_parity(Conversation([S, Q, A]), find_template(tokenizer), CONFIG, "row")
    everything = replace(CONFIG, train_on_prompt=True)
    check_parity(Conversation([S, Q, A]), find_template(tokenizer), everything, "row")


def test_a_reply_without_an_end_of_turn_is_an_error_unless_it_is_masked() -> None:
    calls = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = find_template(make_tokenizer(calls))
    messages = [Q, CALLS, FOUND, A]
    with pytest.raises(
        RowError, match="the chat template ends reply 1 without an end-of-turn token; use another template"
    ):
        to_segments(Conversation(messages), template)
    masked = [Q, {**CALLS, "trained": False}, FOUND, A]
    assert [segment.masked for segment in to_segments(Conversation(masked), template)] == [False, True, False, False]


def test_a_template_travels_to_another_process() -> None:
    for family, (bos, eos, _) in FAMILIES.items():
        template = find_template(make_tokenizer(family, bos, eos))
        there = pickle.loads(pickle.dumps(template))
        assert there.render([Q, A], None, False) == template.render([Q, A], None, False)


# load_template


def recipe(model: Path, **keys: Any) -> Recipe:
    return Recipe(model_name_or_path=str(model), output_dir="unused", **keys)


def test_the_end_of_turn_becomes_the_eos_token_and_padding_is_set(tmp_path: Path) -> None:
    make_tokenizer("gemma", "<bos>", "<eos>").save_pretrained(tmp_path)
    tokenizer = load_template(recipe(tmp_path)).tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end_of_turn>", "<end_of_turn>")


def test_a_shipped_template_and_a_file_replace_the_tokenizers_own(tmp_path: Path) -> None:
    make_tokenizer("gemma", "<bos>", "<eos>").save_pretrained(tmp_path)
    tokenizer = load_template(recipe(tmp_path, template="qwen")).tokenizer
    assert tokenizer.eos_token == "<|im_end|>"
    assert "You are Qwen" in str(tokenizer.apply_chat_template([Q], tokenize=False))
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}é{{ m.content }}</s>{% endfor %}", encoding="utf-8")
    assert load_template(recipe(tmp_path, template=str(file))).tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"template": "no.jinja"},
            "template: no.jinja: cannot be read (No such file or directory)",
        ),
        (
            {},
            "template: not set, but the tokenizer has no chat template; set it to a shipped name (--help template) such as "
            "default, or to a .jinja file",
        ),
        (
            {"template": "glm4"},
            "template: glm4 selects the tokenizer's chat template, but it has none; set it to a shipped name "
            "(--help template) such as default, or to a .jinja file",
        ),
        (
            {"template": "granite3"},
            "template: granite3 ends replies with '<|end_of_text|>', which is not a token of this tokenizer; set "
            "template: default, or add the token as docs/reference/templates.md shows",
        ),
    ],
)
def test_a_missing_template_is_one_line(keys: dict[str, str], message: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("gemma")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RecipeError) as error:
        load_template(recipe(tmp_path, **keys))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not end replies with a special token"),
        ("{{ raise_exception('no') }}", "template: cannot be rendered: the chat template raised an error: no"),
        ("{% for %}", "template: cannot be rendered: the chat template raised an error: "),
    ],
)
def test_a_template_that_cannot_teach_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    make_tokenizer("gemma").save_pretrained(tmp_path)
    (tmp_path / "t.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_template(recipe(tmp_path, template=str(tmp_path / "t.jinja")))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizers_code_does_not_run_where_transformers_has_its_own(tmp_path: Path) -> None:
    make_tokenizer("qwen2_5").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "Qwen2Tokenizer", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass", encoding="utf-8")
    load_template(recipe(tmp_path, trust_remote_code=True))
    assert not (tmp_path / "ran").exists()


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    for name in (tmp_path / "none", Path("a/b"), Path("./a/b"), Path("a/b/c")):
        with pytest.raises(RecipeError) as error:
            load_template(recipe(name))
        assert str(error.value).startswith(
            f"model_name_or_path: {name}: no such folder, and not loaded from the Hub ("
        )
        assert "\n" not in str(error.value)
    for content in (None, "{", "{}"):
        if content:
            (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
            (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
        with pytest.raises(RecipeError, match="no tokenizer could be loaded") as error:
            load_template(recipe(tmp_path))
        assert "\n" not in str(error.value)


def test_mask_spans_need_a_tokenizer_that_knows_the_characters_of_its_tokens(tmp_path: Path) -> None:
    slow = ByT5Tokenizer(extra_ids=0, eos_token="</s>")
    slow.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    slow.save_pretrained(tmp_path)
    assert not load_template(recipe(tmp_path)).tokenizer.is_fast
    with pytest.raises(RecipeError) as error:
        load_template(recipe(tmp_path, mask_spans=["result"]))
    assert str(error.value) == ("mask_spans: not supported without a fast tokenizer (tokenizer.json); remove the key")
