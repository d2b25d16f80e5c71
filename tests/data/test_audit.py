"""Each row is counted with what became of it, and listed unless it is intact."""

import json
import re
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import small_run
from bench import GOOD, Bench, numbered, row
from datasets import Dataset

from arpo_trl.data import prepare as dataset
from arpo_trl.data.audit import Counts, advise_cutoff
from arpo_trl.errors import DatasetError, RecipeError
from arpo_trl.recipe import Recipe
from arpo_trl.training.check import check
from arpo_trl.training.train import train


def test_more_dropped_rows_than_max_dropped_stop_the_run_with_the_first_reasons(bench: Bench) -> None:
    path = bench.add("d", (GOOD + b"\n") * 9 + b"{\n")
    with pytest.raises(DatasetError) as error:
        bench.prepare()
    (listed,) = bench.folder.glob("cache/arpo_trl/*/*/row_audit.jsonl")
    assert len(listed.read_text().splitlines()) == 1 and not (bench.folder / "out").exists()
    assert str(error.value).splitlines() == [
        f"d: 1 of 10 rows dropped, more than max_dropped (5%); all are listed in {listed}; the first:",
        f"  {path}:10: not JSON (Expecting property name enclosed in double quotes at column 2): '{{'",
    ]
    assert bench.prepare(max_dropped=0.1).audit.datasets["d"].dropped == 1
    with pytest.raises(DatasetError):
        bench.prepare(max_dropped=0)


def test_a_dataset_of_broken_rows_stops_the_run_for_any_max_dropped(bench: Bench) -> None:
    bench.add("d", b"{\n")
    with pytest.raises(DatasetError, match="1 of 1 rows dropped"):
        bench.prepare(max_dropped=1)


def test_the_audit_counts_every_outcome(bench: Bench) -> None:
    long = " ".join(["word"] * 400)
    two = row(reply="A")["conversations"]
    bench.add("d", [row(), row(reply=long), {"conversations": [*two, *row(long, "B")["conversations"]]}, row(long), 3])
    data = bench.prepare(max_dropped=0.5, cutoff_len=128)
    counts = data.audit.datasets["d"]
    assert (counts.intact, counts.shortened, counts.lost_answer, counts.dropped, counts.rows) == (1, 1, 1, 2, 5)
    assert counts.tokens == sum(len(ids) for ids in data.train["input_ids"])
    assert [finding["outcome"] for finding in bench.findings()] == ["shortened", "lost_answer", "dropped", "dropped"]
    assert bench.findings()[0]["reason"].endswith("tokens past the cutoff of 128")
    assert bench.findings()[3]["excerpt"] == "3"


def test_turns_after_the_last_reply_are_accounted_for(bench: Bench) -> None:
    more = [{"from": "human", "value": "R"}, {"from": "human", "value": "S"}]
    short, long = row(), row(reply="word " * 400)
    bench.add("d", [{"conversations": one["conversations"] + more} for one in (short, long)])
    data = bench.prepare(cutoff_len=128)
    counts = data.audit.datasets["d"]
    assert (counts.intact, counts.shortened) == (0, 2)
    assert bench.findings()[0]["reason"] == "2 turns after the last reply"
    assert re.fullmatch(
        r"2 turns after the last reply and \d+ tokens past the cutoff of 128", bench.findings()[1]["reason"]
    )


def test_a_row_with_all_replies_masked_is_dropped_with_that_reason(bench: Bench) -> None:
    """Also where it is cut, or only its last reply would be trained."""
    long, two = row("word " * 400), row()
    long["conversations"][1]["loss"] = False
    two["conversations"] = [*two["conversations"], *row()["conversations"]]
    two["conversations"][3]["loss"] = False
    bench.add("d", [row(), long, two])
    bench.prepare(max_dropped=0.7, mask_history=True, cutoff_len=128)
    assert [one["reason"] for one in bench.findings()] == ["no trained token: the last reply has loss: false"] * 2
    bench.prepare(max_dropped=0.7, cutoff_len=128)
    assert [one["reason"] for one in bench.findings()] == ["no trained token: every reply has loss: false"]


def test_a_reply_without_its_end_of_turn_is_dropped_in_any_row(bench: Bench) -> None:
    """Behind the rows that the gate looks at, too."""
    own = bench.tokenizer.chat_template
    try:
        bench.tokenizer.chat_template = str(own).replace(
            "message.content + '<|im_end|>'",
            "message.content + ('' if message.content == 'endless' else '<|im_end|>')",
        )
        assert bench.tokenizer.chat_template != own
        path = bench.add("d", [*numbered(40), row(reply="endless")])
        assert len(bench.prepare().train) == 40
    finally:
        bench.tokenizer.chat_template = own
    (finding,) = bench.findings()
    assert finding["place"] == f"{path}:41"
    assert finding["reason"] == "the chat template ends reply 1 without an end-of-turn token; use another template"


def test_nothing_is_written_into_output_dir_before_a_run_starts(chat_recipe: Recipe) -> None:
    """Not by --check, and not by a start that is refused."""
    kept = Path(chat_recipe.output_dir) / "row_audit.jsonl"
    kept.parent.mkdir()
    kept.write_text("of an earlier run")
    check(chat_recipe)
    with pytest.raises(DatasetError, match="1 of 11 rows dropped"):
        train(chat_recipe.model_copy(update={"max_dropped": 0.0}))
    assert kept.read_text() == "of an earlier run"
    evaluated = {"do_train": False, "do_eval": True, "dataset": [], "eval_dataset": ["d"]}
    assert train(chat_recipe.model_copy(update=evaluated)).exit_code == 0
    assert json.loads(kept.read_text())["outcome"] == "dropped"


def test_a_rejected_resume_keeps_the_list_of_rows(tmp_path: Path, tiny_model: Path) -> None:
    folder = small_run.run(tmp_path, tiny_model, cutoff_len=80)
    before = (folder / "row_audit.jsonl").read_text()
    assert "past the cutoff of 80" in before
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(manifest | {"status": "stopped"}))
    with pytest.raises(RecipeError, match="cutoff_len: 80 -> 70"):
        small_run.run(tmp_path, tiny_model, cutoff_len=70, overwrite_cache=True)
    assert (folder / "row_audit.jsonl").read_text() == before


def test_check_prints_the_list_of_rows_that_were_not_kept(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    check(chat_recipe)
    start = "shortened and dropped rows are listed in "
    (line,) = (line.strip() for line in capsys.readouterr().out.splitlines() if start in line)
    assert json.loads(Path(line.removeprefix(start)).read_text())["place"].endswith("d.jsonl:11")
    check(chat_recipe.model_copy(update={"max_samples": 10}))
    assert start not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_row_with_a_date_can_be_dropped(suffix: str, bench: Bench) -> None:
    strange: dict[str, Any] = {"on": datetime(2026, 1, 2), "raw": b"\xff", "price": Decimal("1.5")}
    bench.add("d", [row(**strange), row(**strange) | {"conversations": []}], suffix)
    assert len(bench.prepare(max_dropped=0.5).train) == 1
    assert bench.findings()[0]["excerpt"].startswith('{"conversations": [], "on": "datetime.datetime(2026, 1, 2, ')


# Columns that the registry names

ALPACA = {"instruction": "Q", "input": "I", "output": "A"}


def test_a_named_column_missing_in_all_rows_is_an_error(bench: Bench) -> None:
    bench.add("d", [ALPACA] * 3, formatting="alpaca", columns={"query": "inputt", "system": "sys_promt"})
    with pytest.raises(DatasetError) as error:
        bench.prepare()
    assert str(error.value).splitlines() == [
        f"{bench.folder / 'dataset_info.json'}: d.columns.{key}: column {column!r} is missing in 3 of 3 rows "
        "(found input, instruction, output); fix the name, or remove the key from columns"
        for key, column in (("query", "inputt"), ("system", "sys_promt"))
    ]


def test_rows_in_another_format_are_an_error_that_explains_the_fix(bench: Bench) -> None:
    """`formatting` left out means alpaca, and `columns` left out its names; so it is under --preview."""
    bench.add("d", [row()] * 3, formatting="alpaca", columns={}, tags={})
    with pytest.raises(DatasetError) as error:
        bench.prepare()
    assert str(error.value).splitlines()[0] == (
        f"{bench.folder / 'dataset_info.json'}: d.columns.response: column 'output' is missing in 3 of 3 rows "
        "(found conversations); set columns, or formatting"
    )


@pytest.mark.parametrize("formatting", ["sharegpt", "alpaca"])
def test_rows_in_openai_form_registered_otherwise_are_an_error_whose_fix_works(formatting: str, bench: Bench) -> None:
    rows = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}] * 3
    columns = {"messages": "conversations"} if formatting == "sharegpt" else {}
    bench.add("d", rows, formatting=formatting, columns=columns, tags={})
    fix = 'if the rows are in OpenAI form, set "formatting": "openai" and remove columns'
    with pytest.raises(DatasetError) as error:
        bench.prepare()
    assert str(error.value).splitlines()[0].endswith(f"is missing in 3 of 3 rows (found messages); {fix}")
    bench.add("d", rows, formatting="openai", columns={}, tags={})
    assert len(bench.prepare().train) == 3


def test_a_named_column_may_be_missing_in_some_rows(bench: Bench) -> None:
    """An Arrow file's column is there even if it is null in every row."""
    bench.add("d", [*numbered(2), row(sys="S"), row()], columns={"system": "sys"})
    assert len(bench.prepare(preprocessing_batch_size=1).train) == 4
    bench.add("e", [row(sys=None)] * 2, ".parquet", columns={"system": "sys"})
    assert len(bench.prepare(dataset=["e"]).train) == 2


def test_few_first_rows_are_not_checked_for_missing_columns(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("d", [*numbered(5), row(sys="S")], columns={"system": "sys"})
    assert len(bench.prepare(max_samples=3).train) == 3
    monkeypatch.setattr(dataset, "ROWS_BEFORE_CHECK", 4)
    with pytest.raises(DatasetError, match=r"columns.system: column 'sys' is missing in 4 of 4 rows"):
        bench.prepare(max_samples=4)


def test_a_missing_column_of_a_stream_is_an_error_once_it_is_checked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("d", [*numbered(6), row(sys="S")], columns={"system": "sys"})
    keys: dict[str, Any] = {"streaming": True, "disable_shuffling": True, "preprocessing_batch_size": 1}
    assert len(list(bench.prepare(**keys).train)) == 7
    monkeypatch.setattr(dataset, "ROWS_BEFORE_CHECK", 3)
    with pytest.raises(DatasetError, match=r"columns.system: column 'sys' is missing in 3 of 3 rows"):
        list(bench.prepare(**keys).train)


def test_masked_spans_and_ignored_fields_are_counted(bench: Bench) -> None:
    one, two = row(reply="a <result>7</result> b"), row(reply="<result>8</result>")
    one["id"], one["conversations"][1]["score\x1b"] = 1, 2
    bench.add("d", [one, two, row(id=3)])
    data = bench.prepare(mask_spans=["result", "observation"], max_dropped=0.5)
    counts = data.audit.datasets["d"]
    assert counts.dropped == 1 and "every reply has loss: false or is masked by mask_spans" in counts.first[0]
    assert data.audit.lines()[1:] == [
        f"d: mask_spans: {counts.notes['masked tokens']['']} tokens masked",
        "d: ignored column `id` (2 rows)",
        "d: mask_spans: result: 1 match",
        "d: ignored message key `score\\x1b` (1 message)",
        "mask_spans: observation: no match in any row",
    ]
    trained = [[label for label in labels if label != -100] for labels in data.train["labels"]]
    assert bench.tokenizer.decode(trained[0]) == "a b<|im_end|>\n"  # " <" is one token


@pytest.mark.parametrize(
    ("reply", "mask_spans", "noticed"),
    [
        ("<python>1</python><result>1</result><answer>1</answer>", [], True),
        ("<python>1</python><result>1</result><answer>1</answer>", ["result"], False),
        ("<python>1</python><result>1</result><answer>1</answer>", ["answer"], True),
        ("I write <result> for a result.", [], False),
        ("4", [], False),  # the result is in the question, which is not trained on
    ],
)
def test_a_trained_tool_result_is_noticed_with_the_key_that_masks_it(
    bench: Bench, reply: str, mask_spans: list[str], noticed: bool
) -> None:
    bench.add("d", [row("hi <result>4</result>", reply), row("hi", "hello")])
    lines = bench.prepare(mask_spans=mask_spans).audit.lines()
    notice = (
        "d: 1 row has <result> inside a trained reply: tool results are trained on (to mask them: mask_spans: result)"
    )
    assert (notice in lines) == noticed and len(
        [line for line in lines if "inside a trained reply" in line]
    ) == noticed


@pytest.mark.parametrize("outcome", ["lost_answer", "shortened"])
def test_many_truncated_rows_are_reported_with_the_cutoff_that_keeps_most(outcome: str) -> None:
    """19 of 20 rows fit 640 tokens whole; a tenth may still be cut, and dropped rows do not count.

    A whole trajectory in one reply is shortened, and loses its answer as well.
    """
    counts: Any = Counts
    lengths, cut = [100] * 17 + [512] * 3 + [0], [0] * 17 + [100, 128, 900] + [0]
    rows = Dataset.from_dict({"input_ids": [[0] * n for n in lengths], "cut": cut})
    (line,) = advise_cutoff("mine", rows, counts(intact=17, dropped=1, **{outcome: 3}), 512)
    assert line == ("mine: 15% of rows are truncated at cutoff_len 512; 640 keeps 95% intact (1.1x tokens)")
    rows = rows.map(lambda row: {"cut": row["cut"] % 900})
    assert list(advise_cutoff("mine", rows, counts(intact=18, dropped=1, **{outcome: 2}), 512)) == []


@pytest.mark.parametrize("formatting", ["sharegpt", "alpaca"])
def test_an_ignored_column_is_reported_with_the_setting_that_reads_it(formatting: str, bench: Bench) -> None:
    """LLaMA-Factory passes over it, too. The line is tried."""
    one = ALPACA | {"history": [["P", "R"]]} if formatting == "alpaca" else row(tools='[{"name": "f"}]')
    bench.add("d", [one | {"system": "S"}], formatting=formatting)
    data = bench.prepare(cutoff_len=4096)
    first = f"d: ignored column `{'history' if formatting == 'alpaca' else 'tools'}` (1 row); to read it, set "
    (line,) = (line for line in data.audit.lines() if line.startswith(first))
    assert any("column `system` (1 row); to read it" in line for line in data.audit.lines())
    named = json.loads("{" + line.removeprefix(first).removesuffix(" in dataset_info.json") + "}")
    bench.register("d", file_name="d.jsonl", formatting=formatting, **named)
    again = bench.prepare(cutoff_len=4096)
    assert [line for line in again.audit.lines() if line.startswith(first)] == []
    assert len(again.train["input_ids"][0]) > len(data.train["input_ids"][0])


@pytest.mark.parametrize("way_out", [{"cutoff_len": 256}, {"truncation_mode": "llamafactory"}], ids=str)
def test_a_prompt_past_the_cutoff_is_reported_with_fixes_that_work(way_out: dict[str, Any], bench: Bench) -> None:
    bench.add("d", [row("Q " * 60)])
    with pytest.raises(DatasetError, match=r"past cutoff_len 50; raise it, or set truncation_mode: llamafactory$"):
        bench.prepare(cutoff_len=50)
    assert len(bench.prepare(**{"cutoff_len": 50, **way_out}).train) == 1
