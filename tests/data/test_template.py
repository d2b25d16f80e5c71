"""Templates by LLaMA-Factory's names: each shipped one writes and trains the same text, every other name is known."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from arpo_trl.data.labels import EncodingConfig, carry_loss, to_segments
from arpo_trl.data.messages import Conversation
from arpo_trl.data.template import find_template, shipped_template, template_of
from arpo_trl.data.tokenizer import check_parity, load_tokenizer
from arpo_trl.errors import RecipeError
from arpo_trl.recipe import Recipe, read_recipe
from arpo_trl.recipe.template_names import MULTIMODAL, SHIPPED, THE_TOKENIZERS_OWN, check_template_name

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "templates.json").read_text(encoding="utf-8"))
OWN = (
    "{% for m in messages %}<own>{{ m.role }} {{ m.content }}</own>{% endfor %}"
    "{% if add_generation_prompt %}<own>assistant {% endif %}"
)


def make_tokenizer(*special: str, chat_template: Any = OWN) -> PreTrainedTokenizerBase:
    """Every byte is a token; bos and eos are <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict.fromkeys(["<s>", "</s>", "<own>", "</own>", *special])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in names])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made


def recipe(model: Path, **keys: Any) -> Recipe:
    return Recipe(model_name_or_path=str(model), **({"output_dir": "unused"} | keys))


def conversation(name: str) -> Conversation:
    """LLaMA-Factory's form of a conversation in ours."""
    given = GOLDEN["conversations"][name]
    messages = [{"role": "system", "content": given["system"]}] if given["system"] else []
    for message in given["messages"]:
        if message["role"] == "function":
            call = {"type": "function", "function": json.loads(message["content"])}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            messages.append({**message, "role": {"observation": "tool"}.get(message["role"], message["role"])})
    tools = json.loads(given["tools"]) if given["tools"] else None
    return Conversation(messages, tools and [{"type": "function", "function": tool} for tool in tools])


def pairs(name: str, golden: list[list[str]]) -> list[str]:
    """The golden pairs as segments, with this tokenizer's tokens and the day's date."""
    texts = [text.replace("{bos}", "<s>").replace("{eos}", "</s>") for pair in golden for text in pair]
    return [re.sub("25 Nov 2026", f"{date.today():%d %b %Y}", text) for text in texts]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_template_writes_and_trains_what_llama_factory_does(name: str, tmp_path: Path) -> None:
    golden = GOLDEN["templates"][name]
    ends = set(re.findall(r"<[^<>\s]+>", golden["conversations"]["one turn"][-1][1])) | {golden["eos"]} - {"{eos}"}
    make_tokenizer(*sorted(ends - {"<think>", "</think>"}), chat_template=OWN).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(recipe(tmp_path, template=name))
    template = find_template(tokenizer)
    for kind, expected in golden["conversations"].items():
        segments = to_segments(conversation(kind), template)
        assert [segment.text for segment in segments] == pairs(kind, expected), kind
        assert carry_loss(segments, EncodingConfig(1 << 20)) == [False, True] * len(expected)
        check_parity(conversation(kind), template, EncodingConfig(1 << 20), kind)


def test_every_name_of_llama_factorys_is_shipped_or_means_the_tokenizers_own(tmp_path: Path) -> None:
    table = tomllib.loads(files("arpo_trl.data").joinpath("templates/names.toml").read_text(encoding="utf-8"))
    assert table.keys() | {"qwen"} == SHIPPED
    assert GOLDEN["templates"].keys() == SHIPPED
    assert not SHIPPED & THE_TOKENIZERS_OWN and not MULTIMODAL & (SHIPPED | THE_TOKENIZERS_OWN)
    make_tokenizer().save_pretrained(tmp_path)
    for name in GOLDEN["names"]:
        assert check_template_name(name) is None
        if name not in SHIPPED:
            assert name in THE_TOKENIZERS_OWN
            assert load_tokenizer(recipe(tmp_path, template=name)).chat_template == OWN


LINES = "model_name_or_path: m\noutput_dir: out\ndo_train: true\ndataset: a\ntemplate: "


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "qwn3",
            "line 5  template: there is no template 'qwn3'; the nearest is qwen3; expected one of LLaMA-Factory's",
        ),
        (
            "qwen2_vl",
            "line 5  template: qwen2_vl is a template for images, sound or video, which are not trained here;",
        ),
    ],
)
def test_a_wrong_name_is_answered_with_its_line(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(LINES + name, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        read_recipe(tmp_path / "r.yaml")
    assert message in str(error.value)


def test_a_name_that_is_not_shipped_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(LINES + "glm4", encoding="utf-8")
    line = f"{tmp_path / 'r.yaml'}: template: glm4 is not shipped; the tokenizer's own template is used instead"
    assert line in read_recipe(tmp_path / "r.yaml").notices


def test_text_is_not_trimmed() -> None:
    spaced = [{"role": "user", "content": " Q \n"}, {"role": "assistant", "content": "\n\nA  "}]
    for name in sorted(SHIPPED):
        rendered = make_tokenizer().apply_chat_template(spaced, chat_template=shipped_template(name), tokenize=False)
        assert " Q \n" in rendered and "\n\nA  " in rendered, name


def test_a_tools_parameters_are_described_as_llama_factory_does() -> None:
    parameters = {
        "kind": {"type": "string", "enum": ["a", "b"]},
        "all": {"type": "array", "items": {"type": "integer"}},
    }
    tool = {"name": "f", "parameters": {"type": "object", "properties": parameters, "required": ["kind"]}}
    rendered = str(
        make_tokenizer().apply_chat_template(
            [{"role": "user", "content": "Q"}], [tool], chat_template=shipped_template("default"), tokenize=False
        )
    )
    assert (
        "> Tool Name: f\nTool Description: \nTool Args:\n  - kind (string, required): , should be one of [a, b]\n"
        "  - all (array): , where each item should be integer\n\nUse the following"
    ) in rendered


def test_rows_with_tools_are_rendered_with_the_template_for_them_and_all_are_saved(tmp_path: Path) -> None:
    tool_use = "{% if tools %}<own>{{ tools | tojson }}</own>{% endif %}" + OWN
    make_tokenizer(chat_template={"default": OWN, "tool_use": tool_use, "rag": OWN}).save_pretrained(
        tmp_path / "model"
    )
    tokenizer = load_tokenizer(recipe(tmp_path / "model"))
    template = find_template(tokenizer)
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    plain, with_tools = to_segments(Conversation(chat), template), to_segments(Conversation(chat, tools), template)
    assert plain[0].text == "<own>user Q</own><own>assistant "
    assert with_tools[0].text == f"<own>{json.dumps(tools)}</own>" + plain[0].text
    tokenizer.save_pretrained(tmp_path / "out")
    saved = load_tokenizer(recipe(tmp_path / "out")).chat_template
    assert saved == {"default": OWN, "tool_use": tool_use, "rag": OWN}


DATED = "<own>Today is {{ strftime_now('%d %b %Y') }}.</own>" + OWN


def test_a_dated_template_writes_the_day_of_the_run_when_it_is_resumed(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=DATED)
    going_on = recipe(tmp_path, output_dir=str(tmp_path))
    ask = [{"role": "user", "content": "Q"}]
    assert f"{date.today():%d %b %Y}" in template_of(going_on, tokenizer).render(ask, None, True)
    (tmp_path / "run.json").write_text('{"day": "2026-02-03"}', encoding="utf-8")
    earlier = template_of(going_on, tokenizer)
    assert "<own>Today is 03 Feb 2026.</own>" in earlier.render(ask, None, True)
    by_name = recipe(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert template_of(by_name, tokenizer).hash == earlier.hash
    over = recipe(tmp_path, output_dir=str(tmp_path), overwrite_output_dir=True)
    assert template_of(over, tokenizer).day == date.today()


def test_the_hash_holds_what_the_template_writes_beside_the_row() -> None:
    """The cache's key: another bos token or another day gives other tokens, where the template writes them."""
    first, second = date(2026, 2, 3), date(2026, 2, 4)
    dated, plain = make_tokenizer(chat_template=DATED), make_tokenizer()
    assert find_template(dated, first).hash != find_template(dated, second).hash
    assert find_template(plain, first).hash == find_template(plain, second).hash
    before = find_template(plain, first).hash
    plain.bos_token = "<own>"
    assert find_template(plain, first).hash != before
