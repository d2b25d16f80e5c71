"""Ranking rows: the shapes that people have, what becomes of them, their tokens and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compare_golden
import pytest
from bench import Bench

from arpo_trl.data.encode import Encoder, encode_rows
from arpo_trl.data.files import Row
from arpo_trl.data.labels import IGNORED
from arpo_trl.data.pairs import to_pair
from arpo_trl.data.registry import DatasetInfo
from arpo_trl.data.sources import select_datasets
from arpo_trl.data.template import Template
from arpo_trl.data.tokenizer import load_template
from arpo_trl.errors import DatasetError, RowError
from arpo_trl.recipe import Recipe

GOLDEN = Path(__file__).parents[1] / "golden"
PAIR_KEYS = {"chosen": "chosen", "rejected": "rejected"}
CALL = {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'}
RESULT = {"from": "observation", "value": "two"}


def info_of(formatting: str = "sharegpt", **entry: Any) -> DatasetInfo:
    return DatasetInfo.read(
        "d", Path("dataset_info.json"), {"file_name": "d", "formatting": formatting, "ranking": True, **entry}
    )


ALPACA = info_of("alpaca")
SHAREGPT = info_of()
OPENAI = info_of("openai")
TRL = info_of("alpaca", columns={"prompt": "prompt", **PAIR_KEYS})


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def texts(row: dict[str, Any], info: DatasetInfo) -> tuple[list[str], list[str], list[str]]:
    """The prompt and both sides, a string for each message."""
    chosen, rejected = to_pair(row, info)
    written = [
        [f"{one['role'][0]}:{one['content'] or 'call'}" for one in side.messages] for side in (chosen, rejected)
    ]
    at = chosen.prompt or 0
    assert written[0][:at] == written[1][:at]
    assert rejected.prompt == at
    return written[0][:at], written[0][at:], written[1][at:]


# --- shapes ---

SHAPES: list[tuple[str, DatasetInfo, dict[str, Any], tuple[list[str], list[str], list[str]]]] = [
    (
        "alpaca",
        ALPACA,
        {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
        (["u:a\nb"], ["a:c"], ["a:d"]),
    ),
    (
        "alpaca with history and system",
        info_of("alpaca", columns={"prompt": "q", "history": "h", "system": "s", **PAIR_KEYS}),
        {"q": "a", "h": [["x", "y"]], "s": "be", "chosen": "c", "rejected": "d"},
        (["s:be", "u:x", "a:y", "u:a"], ["a:c"], ["a:d"]),
    ),
    (
        "sharegpt",
        SHAREGPT,
        {"conversations": [human("a")], "chosen": gpt("c"), "rejected": gpt("d")},
        (["u:a"], ["a:c"], ["a:d"]),
    ),
    (
        "openai",
        OPENAI,
        {"messages": [user("a")], "chosen": reply("c"), "rejected": reply("d")},
        (["u:a"], ["a:c"], ["a:d"]),
    ),
    (
        "a string for a side",
        SHAREGPT,
        {"conversations": [human("a")], "chosen": "c", "rejected": "d"},
        (["u:a"], ["a:c"], ["a:d"]),
    ),
    (
        "a list of turns",
        SHAREGPT,
        {"conversations": [human("a")], "chosen": [CALL, RESULT, gpt("c")], "rejected": [gpt("d")]},
        (["u:a"], ["a:call", "t:two", "a:c"], ["a:d"]),
    ),
    (
        "an observation before the sides",
        SHAREGPT,
        {"conversations": [human("a"), CALL, RESULT], "chosen": gpt("c"), "rejected": gpt("d")},
        (["u:a", "a:call", "t:two"], ["a:c"], ["a:d"]),
    ),
    (
        "complete conversations",
        OPENAI,
        {
            "chosen": [user("a"), reply("b"), user("c"), reply("d")],
            "rejected": [user("a"), reply("b"), user("c"), reply("e")],
        },
        (["u:a", "a:b", "u:c"], ["a:d"], ["a:e"]),
    ),
    (
        "complete conversations, and the prompt as text",
        TRL,
        {"prompt": "a", "chosen": [user("a"), reply("b")], "rejected": [user("a"), reply("c")], "score": 1.5},
        (["u:a"], ["a:b"], ["a:c"]),
    ),
    (
        "complete conversations, and messages that repeat the chosen side",
        OPENAI,
        {"messages": [user("a"), reply("b")], "chosen": [user("a"), reply("b")], "rejected": [user("a"), reply("c")]},
        (["u:a"], ["a:b"], ["a:c"]),
    ),
    (
        "complete conversations that begin with a system message",
        OPENAI,
        {
            "chosen": [{"role": "system", "content": "be"}, user("a"), reply("b")],
            "rejected": [{"role": "system", "content": "be"}, user("a"), reply("c")],
        },
        (["s:be", "u:a"], ["a:b"], ["a:c"]),
    ),
    ("TRL's text", TRL, {"prompt": "a", "chosen": "b", "rejected": "c"}, (["u:a"], ["a:b"], ["a:c"])),
    (
        "TRL's messages",
        TRL,
        {"prompt": [user("a")], "chosen": [reply("b")], "rejected": [reply("c")]},
        (["u:a"], ["a:b"], ["a:c"]),
    ),
    (
        "TRL's messages in a sharegpt entry",
        info_of(columns={"messages": "prompt", **PAIR_KEYS}),
        {"prompt": [user("a")], "chosen": [reply("b")], "rejected": [reply("c")]},
        (["u:a"], ["a:b"], ["a:c"]),
    ),
    ("a list of answers", ALPACA, {"instruction": "a", "output": ["b", "c", "d"]}, (["u:a"], ["a:b"], ["a:c"])),
    (
        "a list of answers in a named column",
        info_of("alpaca", columns={"prompt": "q", "response": "answers"}),
        {"q": "a", "answers": ["b", "c"]},
        (["u:a"], ["a:b"], ["a:c"]),
    ),
]


@pytest.mark.parametrize(
    ("info", "row", "expected"), [shape[1:] for shape in SHAPES], ids=[shape[0] for shape in SHAPES]
)
def test_a_row_in_any_shape_becomes_a_pair(info: DatasetInfo, row: dict[str, Any], expected: object) -> None:
    assert texts(row, info) == expected


PROBLEMS: list[tuple[str, DatasetInfo, dict[str, Any], str]] = [
    ("null", ALPACA, {"instruction": "a", "chosen": "b", "rejected": None}, "not a pair: rejected is null"),
    ("empty", ALPACA, {"instruction": "a", "chosen": " ", "rejected": "b"}, "not a pair: chosen is empty"),
    (
        "an empty turn",
        SHAREGPT,
        {"conversations": [human("a")], "chosen": gpt(""), "rejected": gpt("b")},
        "not a pair: chosen is empty",
    ),
    (
        "no side",
        ALPACA,
        {"instruction": "a"},
        "not a pair: expected the columns 'chosen' and 'rejected', or a list of answers in 'output'; name the row's columns in dataset_info.json",
    ),
    (
        "one answer",
        ALPACA,
        {"instruction": "a", "output": ["b"]},
        "not a pair: output has 1 answer, expected at least 2",
    ),
    ("no prompt", ALPACA, {"instruction": "", "chosen": "a", "rejected": "b"}, "not a pair: the row has no prompt"),
    (
        "an answered prompt",
        SHAREGPT,
        {"conversations": [human("a"), gpt("b")], "chosen": gpt("c"), "rejected": gpt("d")},
        "not a pair: the prompt ends with a turn of 'assistant', expected 'user' or 'observation'",
    ),
    (
        "nothing in common",
        OPENAI,
        {"chosen": [user("a"), reply("b")], "rejected": [user("c"), reply("d")]},
        "not a pair: chosen and rejected have no prompt in common",
    ),
    (
        "two system messages",
        OPENAI,
        {
            "chosen": [{"role": "system", "content": "be"}, user("a"), reply("b")],
            "rejected": [{"role": "system", "content": "do"}, user("a"), reply("c")],
        },
        "not a pair: the system messages of prompt, chosen and rejected differ",
    ),
    (
        "a prompt of another conversation",
        OPENAI,
        {"messages": [user("z")], "chosen": [user("a"), reply("b")], "rejected": [user("a"), reply("c")]},
        "not a pair: chosen and rejected must both start with the prompt",
    ),
    (
        "a side that begins with a result",
        SHAREGPT,
        {"conversations": [human("a")], "chosen": [RESULT, gpt("b")], "rejected": gpt("c")},
        "not a pair: after the prompt, chosen starts with a turn of 'tool', expected 'assistant'",
    ),
]


@pytest.mark.parametrize(("info", "row", "problem"), [one[1:] for one in PROBLEMS], ids=[one[0] for one in PROBLEMS])
def test_a_row_without_a_pair_says_why(info: DatasetInfo, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowError) as raised:
        to_pair(row, info)
    assert str(raised.value) == problem


# --- the registry ---


def test_the_stage_and_the_kind_of_rows_must_agree(bench: Bench) -> None:
    bench.register("pairs", file_name="p.jsonl", ranking=True)
    bench.register("rows", file_name="r.jsonl")
    with pytest.raises(
        DatasetError, match=r"pairs.ranking: preference pairs are not supported in stage: sft; set stage: dpo"
    ):
        select_datasets(bench.recipe(dataset=["pairs"]))
    with pytest.raises(DatasetError, match=r"rows: not declared as preference pairs, which stage: dpo needs"):
        select_datasets(bench.recipe(dataset=["rows"], stage="dpo"))
    assert [info.name for info in select_datasets(bench.recipe(dataset=["pairs"], stage="dpo"))] == ["pairs"]


def test_ranking_as_a_string() -> None:
    assert info_of(ranking="true").ranking
    assert info_of(ranking="false").findings("mistake") == [
        "dataset_info.json: d.ranking: expected true or false, found the text 'false', which LLaMA-Factory reads as true"
    ]
    assert info_of(columns={"chosen": "c"}).findings("mistake") == [
        "dataset_info.json: d.columns: expected chosen and rejected, found only chosen"
    ]


# --- tokens and labels ---


@pytest.mark.parametrize(("kind", "cutoff_len"), [("plain", 8192), ("cut", 512)])
def test_tokens_and_labels_are_llama_factorys(kind: str, cutoff_len: int) -> None:
    keys: dict[str, Any] = {"template": "qwen", "cutoff_len": cutoff_len, "truncation_mode": "llamafactory"}
    recipe = Recipe(model_name_or_path=str(GOLDEN / "tokenizer"), output_dir="unused", stage="dpo", **keys)
    assert compare_golden.compare(GOLDEN / "pairs" / kind, GOLDEN / "data", recipe) == (4, 4)


def encode(row: dict[str, Any], info: DatasetInfo = SHAREGPT, **keys: Any) -> tuple[Any, Template]:
    values: dict[str, Any] = {"template": "qwen", "cutoff_len": 4096} | keys
    recipe = Recipe(model_name_or_path=str(GOLDEN / "tokenizer"), output_dir="unused", stage="dpo", **values)
    template = load_template(recipe)
    (encoded,) = encode_rows([Row("d.jsonl:1", row)], Encoder(info, recipe, template))
    return encoded, template


def sides(row: dict[str, Any], info: DatasetInfo = SHAREGPT, **keys: Any) -> list[tuple[str, str]]:
    """The context up to the first trained token, and the trained text, of each side."""
    encoded, template = encode(row, info, **keys)
    assert encoded["outcome"] == "intact", encoded["reason"]
    found, start = [], 0
    for length in encoded["seq_lengths"]:
        ids, labels = (encoded[name][start : start + length] for name in ("input_ids", "labels"))
        first = next(at for at, label in enumerate(labels) if label != IGNORED)
        trained = [label for label in labels if label != IGNORED]
        found.append((str(template.tokenizer.decode(ids[:first])), str(template.tokenizer.decode(trained))))
        start += length
    assert start == len(encoded["input_ids"])
    return found


def test_results_and_mask_spans_are_masked_on_both_sides() -> None:
    row = {
        "conversations": [human("a")],
        "chosen": [CALL, RESULT, gpt("x <result>y</result> z")],
        "rejected": [gpt("v <result>u</result> w")],
    }
    (_, chosen), (_, rejected) = sides(row, mask_spans=["result"])
    assert "add" in chosen and "two" not in chosen and "y" not in chosen.split("</tool_call>")[1]
    assert rejected in ("v w<|im_end|>\n", "v  w<|im_end|>\n")


THOUGHT = "<think>\nhm\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"
ASKED = [human("a"), gpt(THOUGHT + "b"), human("c")]


@pytest.mark.parametrize(
    ("enable_thinking", "bare", "with_thought"),
    [(True, ("", EMPTY + "d"), THOUGHT + "e"), (None, (EMPTY, "d"), THOUGHT + "e"), (False, (EMPTY, "d"), "e")],
)
def test_reasoning_follows_llama_factorys_one_turn_rule(
    enable_thinking: bool | None, bare: tuple[str, str], with_thought: str
) -> None:
    """The empty block goes to the prompt by the chosen side; the prompt's replies lose their reasoning."""
    row = {"conversations": ASKED, "chosen": gpt("d"), "rejected": gpt(THOUGHT + "e")}
    (context, chosen), (other_context, rejected) = sides(row, template="qwen3", enable_thinking=enable_thinking)
    assert chosen == bare[1] + "<|im_end|>\n"
    assert rejected == with_thought + "<|im_end|>\n"
    assert context == other_context
    assert context.endswith("<|im_start|>assistant\n" + bare[0])
    assert "hm" not in context and context.count("<think>") == bool(bare[0])
    # and the other way round: the block of the rejected side is left out
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    (context, chosen), (_, rejected) = sides(swapped, template="qwen3", enable_thinking=enable_thinking)
    assert chosen == with_thought + "<|im_end|>\n"
    assert rejected == bare[1] + "<|im_end|>\n"
    assert context.endswith("<|im_start|>assistant\n" + (EMPTY if enable_thinking is False else ""))


def test_preserve_thinking_keeps_the_reasoning_of_the_prompt() -> None:
    row = {"conversations": ASKED, "chosen": gpt("d"), "rejected": gpt("e")}
    for enable_thinking in (True, None, False):
        ((context, _), _) = sides(row, template="qwen3", preserve_thinking=True, enable_thinking=enable_thinking)
        assert context.count(THOUGHT + "b") == 1


def test_turns_inside_a_side_keep_their_reasoning() -> None:
    row = {
        "conversations": [human("a")],
        "chosen": [{"from": "function_call", "value": THOUGHT + CALL["value"]}, RESULT, gpt("c")],
        "rejected": [CALL, RESULT, gpt("d")],
    }
    (_, chosen), (_, rejected) = sides(row, template="qwen3")
    assert chosen.startswith(THOUGHT) and chosen.count("<think>") == 2  # the last reply has the empty block
    assert chosen.endswith(EMPTY + "c<|im_end|>\n")
    assert rejected.count("<think>") == 1 and rejected.endswith(EMPTY + "d<|im_end|>\n")


# --- the cut, and the audit ---


LONG = {"conversations": [human("a b c")], "chosen": gpt("d " * 40), "rejected": gpt("e " * 60)}


def test_the_default_cut_keeps_the_prompt_and_a_prefix_of_each_side() -> None:
    complete, _ = encode(LONG)
    cut, _ = encode(LONG, cutoff_len=60)
    assert cut["outcome"] == "shortened"
    assert cut["seq_lengths"] == [60, 60]
    first, second = complete["seq_lengths"]
    assert list(cut["input_ids"][:60]) == list(complete["input_ids"][:60])
    assert list(cut["input_ids"][60:]) == list(complete["input_ids"][first : first + 60])
    assert cut["cut"] == first + second - 120
    assert {note["name"]: note["count"] for note in cut["notes"]} == {"sides without their end": 2}


def test_the_start_report_counts_pairs_that_lost_their_generation_prompt(bench: Bench) -> None:
    row = {"conversations": [human("a " * 60)], "chosen": gpt("d " * 60), "rejected": gpt("e " * 60)}
    bench.add("d", [row], ranking=True)
    data = bench.prepare(stage="dpo", template="qwen", cutoff_len=80, truncation_mode="llamafactory")
    assert "d: truncated: 1 pairs without the generation prompt" in data.audit.lines()


DROPPED = [
    ("equal sides", {"chosen": gpt("b"), "rejected": gpt("b")}, {}, "not a pair: chosen and rejected are identical"),
    (
        "equal after the cut",
        {"chosen": gpt("b " * 60 + "c"), "rejected": gpt("b " * 60 + "d")},
        {"cutoff_len": 60},
        "not a pair: chosen and rejected are identical once cut at cutoff_len (60)",
    ),
    (
        "a prompt that fills the cutoff",
        {"chosen": gpt("b"), "rejected": gpt("c")},
        {"cutoff_len": 20},
        "the prompt alone has ",
    ),
    (
        "a side without a trained token",
        {"chosen": gpt("<result>x</result>"), "rejected": gpt("c")},
        {"mask_spans": ["result"]},
        "no trained token: every reply of 'chosen' has loss: false or is masked by mask_spans",
    ),
    (
        "a side whose trained part is cut",
        {"chosen": gpt("<result>" + "x " * 60 + "</result> y"), "rejected": gpt("c")},
        {"mask_spans": ["result"], "cutoff_len": 60},
        "no trained token of chosen is left at cutoff_len 60; raise cutoff_len",
    ),
    (
        "a side that is not to be trained",
        {"chosen": gpt("b"), "rejected": {**gpt("c"), "loss": False}},
        {},
        "no trained token: every reply of 'rejected' has loss: false",
    ),
]


@pytest.mark.parametrize(("row", "keys", "reason"), [one[1:] for one in DROPPED], ids=[one[0] for one in DROPPED])
def test_a_pair_that_teaches_nothing_is_audited(bench: Bench, row: Any, keys: Any, reason: str) -> None:
    good = {"conversations": [human("a")], "chosen": gpt("x"), "rejected": gpt("y")}
    bench.add("d", [good, {"conversations": [human("a b")], **row}], ranking=True)
    encoded, _ = encode({"conversations": [human("a b")], **row}, **keys)
    assert encoded["outcome"] == "dropped"
    assert encoded["reason"] == reason or (reason.endswith(" ") and encoded["reason"].startswith(reason))
    if keys.get("cutoff_len") == 20:  # neither row fits
        return
    data = bench.prepare(**({"cutoff_len": 256} | keys), stage="dpo", template="qwen", max_dropped=1.0)
    assert len(data.train) == 1
    (finding,) = [one for one in bench.findings() if one["place"].endswith("d.jsonl:2")]
    assert finding["outcome"] == "dropped" and finding["reason"].startswith(reason)


def test_every_other_answer_is_paired_with_the_first_on_request(bench: Bench) -> None:
    bench.add("d", [{"instruction": "a", "output": ["b", "c", "d"]}], ranking=True, formatting="alpaca")
    assert len(bench.prepare(stage="dpo", template="qwen").train) == 1
    pairs = bench.prepare(stage="dpo", template="qwen", pair_all_answers=True).train
    assert bench.replies(pairs) == ["b<|im_end|>\nc<|im_end|>\n", "b<|im_end|>\nd<|im_end|>\n"]
    assert list(pairs["source"]) == [str(bench.folder / "d.jsonl:1")] * 2


def test_pairs_are_held_out_and_several_entries_read_one_file(bench: Bench) -> None:
    rows = [{"q": f"q{n}", "good": f"g{n}", "bad": f"b{n}", "worse": f"w{n}"} for n in range(10)]
    bench.add(
        "d", rows, ranking=True, formatting="alpaca", columns={"prompt": "q", "chosen": "good", "rejected": "bad"}
    )
    bench.register(
        "e",
        file_name="d.jsonl",
        ranking=True,
        formatting="alpaca",
        columns={"prompt": "q", "chosen": "good", "rejected": "worse"},
    )
    data = bench.prepare(stage="dpo", template="qwen", val_size=4)
    assert (len(data.train), len(data.eval["validation"])) == (16, 4)
    assert data.train.column_names == ["input_ids", "labels", "source", "seq_lengths"]
    assert any("w1" in reply for reply in bench.replies(data.train) + bench.replies(data.eval["validation"]))


def test_pairs_that_llama_factory_saved(bench: Bench) -> None:
    from datasets import Dataset, DatasetDict

    sides: dict[str, list[Any]] = {"chosen_input_ids": [[1, 2, 3]], "chosen_labels": [[IGNORED, 2, 3]]}
    sides |= {"rejected_input_ids": [[1, 4]], "rejected_labels": [[IGNORED, 4]], "images": [None]}
    DatasetDict({"train": Dataset.from_dict(sides)}).save_to_disk(str(bench.folder / "saved"))
    bench.register("d", file_name="d.jsonl", ranking=True)
    (pair,) = bench.prepare(stage="dpo", template="qwen", tokenized_path=str(bench.folder / "saved")).train
    assert (pair["input_ids"], pair["labels"]) == ([1, 2, 3, 1, 4], [IGNORED, 2, 3, IGNORED, 4])
    assert pair["seq_lengths"] == [3, 2]
    with pytest.raises(DatasetError, match="missing columns in train: input_ids, labels"):
        bench.prepare(template="qwen", tokenized_path=str(bench.folder / "saved"))
