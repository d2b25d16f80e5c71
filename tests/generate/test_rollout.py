"""`arpo-trl rollout` and `select`: a tiny model that learned to call python, real programs, real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from small_rollout import FORMS, SUMS, SYSTEM, without_seconds
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from arpo_trl.__main__ import main
from arpo_trl.generate.engines import Request, Sampling, TransformersEngine, load_for_generation
from arpo_trl.generate.rollout_scores import (
    describe,
    paired_difference,
    pass_at_1,
    pass_at_k,
    summarize,
)
from arpo_trl.generate.selection import pair_up, usable
from arpo_trl.run_folder import read_lines

pytestmark = small_run.QUIET


@pytest.fixture(scope="module", params=list(FORMS))
def trained(request: pytest.FixtureRequest, train_once: Callable[[str], Path]) -> Path:
    """A folder with rows in one form, recipe.yaml, and in run/ a tiny model that has learned them by heart."""
    return train_once(request.param)


def rollout(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    assert main(["rollout", str(folder / "recipe.yaml"), *overrides]) == 0
    out = [folder / "run", *(Path(word.partition("=")[2]) for word in overrides if word.startswith("output_dir="))][-1]
    return read_lines(out / "rollouts.jsonl")


def copy_run(trained: Path, tmp_path: Path) -> list[str]:
    """Return overrides that roll the trained model out into another folder."""
    return ["do_train=false", f"model_name_or_path={trained / 'run'}", f"output_dir={tmp_path / 'out'}"]


def test_a_training_recipe_rolls_out_its_final_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = rollout(trained, "num_generations=1")
    printed = capsys.readouterr().out
    form = "inside" if "inside" in str(trained) else "tools" if "tools" in str(trained) else "turns"
    count = 2 if form == "tools" else len(SUMS)
    assert [line["number"] for line in lines] == list(range(count))
    right = [line for line in lines if line["right"]]
    assert len(right) >= count - 1, [line["conversations"] for line in lines]
    for line in right:
        [call] = line["calls"]
        assert (call["tool"], call["error"], call["result"]) == ("python", "", line["answer"])
        assert (line["end"], line["well_formed"], line["predicted"]) == ("stop", True, line["answer"])
        expected = json.loads((trained / "sums.json").read_text(encoding="utf-8"))[line["number"]]["conversations"]
        assert line["conversations"] == expected
        assert line["encoding"] == "same"
    figures = json.loads((trained / "run" / "rollout_results.json").read_text(encoding="utf-8"))
    assert figures["rollout_pass@1"] == len(right) / len(lines) and figures["rollout_tool_calls"] >= len(right) / count
    places = {"inside": "inside the reply", "turns": "as user turns", "tools": "as tool messages after tool_calls"}
    assert f"results  {places[form]}" in printed and "python: 20 s" in printed and "pass@1" in printed
    assert (trained / "run" / "rollout.log").is_file() and not (trained / "run" / "selected.jsonl").exists()
    assert main(["rollout", str(trained / "recipe.yaml"), "num_generations=1"]) == 0
    assert "is complete" in capsys.readouterr().out


def test_batching_and_the_number_of_samples_change_nothing(turns: Path, tmp_path: Path) -> None:
    batched = rollout(turns, *copy_run(turns, tmp_path / "a"), "num_generations=4", "per_device_eval_batch_size=24")
    single = rollout(turns, *copy_run(turns, tmp_path / "b"), "num_generations=4", "per_device_eval_batch_size=1")
    fewer = rollout(turns, *copy_run(turns, tmp_path / "c"), "num_generations=2", "per_device_eval_batch_size=5")
    other = rollout(
        turns, *copy_run(turns, tmp_path / "d"), "num_generations=4", "per_device_eval_batch_size=24", "seed=7"
    )
    assert without_seconds(batched) == without_seconds(single)
    assert without_seconds(fewer) == [line for line in without_seconds(batched) if line["sample"] < 2]
    assert without_seconds(other) != without_seconds(batched)
    sampled = {(line["number"], json.dumps(line["conversations"])) for line in batched}
    assert len(sampled) > len({number for number, _ in sampled})  # a question has different samples


def test_a_killed_rollout_resumes_to_the_same_file(
    turns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["num_generations=6", "per_device_eval_batch_size=4", "temperature=1.5"]
    expected = rollout(turns, *copy_run(turns, tmp_path / "a"), *overrides)
    there = copy_run(turns, tmp_path / "b")
    command = [sys.executable, "-m", "arpo_trl", "rollout", str(turns / "recipe.yaml"), *there, *overrides]
    part = tmp_path / "b" / "out" / "rollouts-part-0.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while (
        (not part.is_file() or part.read_text(encoding="utf-8").count("\n") < 8)
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    saved = read_lines(part)
    assert 8 <= len(saved) < len(expected)
    part.write_text(part.read_text(encoding="utf-8").rstrip("\n")[:-10], encoding="utf-8")  # a cut line
    capsys.readouterr()
    assert without_seconds(rollout(turns, *there, *overrides)) == without_seconds(expected)
    assert f"{len(saved) - 4:,} trajectories of this process are complete" in capsys.readouterr().out
    assert not part.exists()
    changed = rollout(turns, *there, *overrides, "seed=1")
    assert without_seconds(changed) != without_seconds(expected)
    assert "renamed rollouts.jsonl to .old, because the settings differ" in capsys.readouterr().out


def test_two_processes_roll_out_what_one_does(turns: Path, tmp_path: Path) -> None:
    expected = rollout(turns, *copy_run(turns, tmp_path / "a"), "num_generations=2", "per_device_eval_batch_size=2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "arpo_trl", "rollout"]
    command = [
        *launch,
        str(turns / "recipe.yaml"),
        *copy_run(turns, tmp_path / "b"),
        "num_generations=2",
        "per_device_eval_batch_size=2",
    ]
    subprocess.run(
        command, env=os.environ | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, timeout=300, check=True
    )
    assert without_seconds(read_lines(tmp_path / "b" / "out" / "rollouts.jsonl")) == without_seconds(expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["eval_dataset=null"],
            "rollout_on: eval, but the recipe has no eval rows. Set eval_dataset, val_size or rollout_on: train",
        ),
        (["output_dir={tmp}/none"], "has no final model. Train it first, or set do_train=false"),
        (['tools={"search": "no-such-program"}'], "tools: search: no such command"),
        (["tools=search"], "'search' has no command"),
        (["server_url=http://127.0.0.1:9/v1"], "no answer"),
    ],
)
def test_what_is_missing_is_named(
    turns: Path,
    overrides: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("arpo_trl.generate.server.WAIT_SECONDS", 0.0)
    words = [word.format(tmp=tmp_path) if "{tmp}" in word else word for word in overrides]
    assert main(["rollout", str(turns / "recipe.yaml"), *words]) in (1, 2)
    captured = capsys.readouterr().err
    assert message in captured and "Traceback" not in captured


def test_a_judge_scores_and_its_failures_are_no_wrong_answers(turns: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import json, sys\nabout = json.load(sys.stdin)\nassert about['trajectory'][-1]['role'] == 'assistant'\n"
        "if about['question'] == 'sum 2 3': sys.exit('no judge')\nprint('score', 0.75 if about['answer'] == '3' else 0.25)",
        encoding="utf-8",
    )
    lines = rollout(turns, *copy_run(turns, tmp_path), "num_generations=1", f"judge={sys.executable} {judge}")
    assert [(line["score"], line["right"]) for line in lines[:3]] == [(0.75, True), (None, False), (0.25, False)]
    assert lines[1]["end"] == "environment"
    figures = json.loads((tmp_path / "out" / "rollout_results.json").read_text(encoding="utf-8"))
    assert figures["rollout_failed"] == 1 and figures["rollout_pass@1"] == pytest.approx(1 / 5)


def test_an_answer_column_and_questions_without_a_reply(
    turns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"q": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "sum 1 2"}], "gold": 3},
        {"q": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "sum 2 3"}], "gold": None},
        {"q": "broken", "gold": 1},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    info = {"q": {"file_name": "q.jsonl", "formatting": "openai", "columns": {"messages": "q", "answer": "gold"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    lines = rollout(
        turns,
        *copy_run(turns, tmp_path),
        f"dataset_dir={tmp_path}",
        "eval_dataset=q",
        "dataset=null",
        "num_generations=1",
    )
    assert [(line["answer"], line["score"]) for line in lines] == [("3", 1.0), (None, None)]
    assert [message["role"] for message in lines[0]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    printed = capsys.readouterr().out
    assert "q: rows that can't be read: 1" in printed and "q: questions without a reference answer: 1" in printed


def test_tools_that_the_rows_offer_and_the_recipe_lacks_are_named(
    tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = json.dumps({"search": f'"{Path(sys.executable).as_posix()}" -c pass'})
    keys = [*copy_run(tools, tmp_path), "num_generations=1", "max_new_tokens=4", f"tools={search}"]
    rollout(tools, *keys)
    assert (
        "2 questions offer the tool python, and the recipe has no command for it: calls to it will fail"
        in capsys.readouterr().out
    )


def test_val_size_gives_the_rows_that_training_held_out(turns: Path, tmp_path: Path) -> None:
    keys = [
        *copy_run(turns, tmp_path / "a"),
        "eval_dataset=null",
        "val_size=2",
        "num_generations=1",
        "max_new_tokens=4",
    ]
    held_out = {line["source"] for line in rollout(turns, *keys)}
    trained_on = {line["source"] for line in rollout(turns, *keys, f"output_dir={tmp_path / 'b'}", "rollout_on=train")}
    assert len(held_out) == 2 and len(trained_on) == 4 and not held_out & trained_on


# --- selection ---


def test_selected_rows_and_pairs_are_rows_to_train_on(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [
        *copy_run(trained, tmp_path),
        "eval_dataset=null",
        "rollout_on=train",
        "num_generations=6",
        f"temperature={0.7 if 'tools' in str(trained) else 1.3}",
    ]
    lines = rollout(trained, *keys)
    printed = capsys.readouterr().out
    assert "selected" in printed and "pairs" in printed
    out = tmp_path / "out"
    selected = read_lines(out / "selected.jsonl")
    assert selected and len({row["source"] for row in selected}) == len(selected)
    sources = {(line["source"], line["sample"]): line for line in lines}
    for row in selected:
        line = sources[row["source"], row["sample"]]
        assert (
            line["right"]
            and row["conversations"] == line["conversations"]
            and row["scores"]["calls"] == len(line["calls"])
        )
    trained_again = small_run.run(
        tmp_path / "again",
        trained / "run",
        dataset="selected",
        dataset_dir=str(out),
        tokenized_path=None,
        plot_loss=False,
        max_steps=1,
    )
    log = (trained_again / "training.log").read_text(encoding="utf-8")
    assert f"selected: {len(selected)} rows: {len(selected)} intact" in log
    assert "ignored" not in log
    assert main(["select", str(out), "--max-per-question", "3", "--max-pairs-per-question", "5"]) == 0
    assert len(read_lines(out / "selected.jsonl")) >= len(selected)
    pairs = read_lines(out / "pairs.jsonl")
    if not pairs and "tools" in str(trained):
        return  # two questions, and all of their trajectories may be right
    assert pairs
    keys = {"stage": "dpo", "dataset": "pairs", "dataset_dir": str(out), "learning_rate": 1e-5, "mask_spans": None}
    preferred = small_run.run(
        tmp_path / "dpo", trained / "run", **keys, tokenized_path=None, plot_loss=False, max_steps=1
    )
    log = (preferred / "training.log").read_text(encoding="utf-8")
    assert f"pairs: {len(pairs)} rows: {len(pairs)} intact" in log and "first pair: loss 0.6931" in log
    for pair in pairs:
        assert pair["conversations"][-1]["from"] == "human"
        chosen, rejected = (sources[pair["source"], sample] for sample in pair["sample"])
        sides = [side if isinstance(side, list) else [side] for side in (pair["chosen"], pair["rejected"])]
        assert [pair["conversations"] + side for side in sides] == [chosen["conversations"], rejected["conversations"]]
        assert chosen["right"] and (not rejected["right"] or len(chosen["calls"]) < len(rejected["calls"]))


def test_held_out_questions_are_not_selected(turns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollout(turns, *copy_run(turns, tmp_path), "num_generations=1", "max_new_tokens=4")
    capsys.readouterr()
    assert main(["select", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        "its rows answer held-out questions, which must not be trained on. Roll out again with rollout_on: train"
        in error
        and error.count("\n") == 1
    )
    assert not list((tmp_path / "out").glob("[sp]*ed.jsonl")) and not (tmp_path / "out" / "dataset_info.json").exists()
    assert main(["select", str(tmp_path)]) == 2


def test_questions_to_train_on_that_equal_a_held_out_one_are_skipped(
    turns: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((turns / "sums.json").read_text(encoding="utf-8"))
    (tmp_path / "some.json").write_text(json.dumps(rows[:2]), encoding="utf-8")
    (tmp_path / "sums.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "conversations", "system": "system"}
    info = {
        name: {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": columns} for name in ("sums", "some")
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    keys = [
        f"dataset_dir={tmp_path}",
        "eval_dataset=some",
        "rollout_on=train",
        "num_generations=1",
        "max_new_tokens=4",
    ]
    assert len(rollout(turns, *copy_run(turns, tmp_path), *keys)) == 4
    assert "2 questions skipped: they equal a held-out question" in capsys.readouterr().out


def line(sample: int, right: bool, calls: int = 1, tokens: int = 10, **changes: Any) -> dict[str, Any]:
    call = {"tool": "python", "error": ""}
    base = {
        "dataset": "d",
        "source": "f:1",
        "sample": sample,
        "score": float(right),
        "right": right,
        "well_formed": True,
        "end": "stop",
    }
    base |= {
        "tokens": tokens,
        "calls": [call] * calls,
        "formatting": "sharegpt",
        "prompt_messages": 1,
        "predicted": "1",
        "encoding": "same",
    }
    return base | {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"{sample}"}]} | changes


def test_pairs_are_right_against_wrong_then_fewer_calls_against_more() -> None:
    lines = [
        line(0, True, calls=3),
        line(1, False),
        line(2, True, calls=1),
        line(3, False, calls=2),
        line(4, False, end="max_new_tokens"),
        line(5, True, well_formed=False),
        line(6, True, calls=1, tokens=5) | {"conversations": line(2, True)["conversations"]},
        line(7, False, end="environment", score=None),
    ]
    group = usable(lines)
    assert sorted(one["sample"] for one in group) == [0, 1, 2, 3, 5]
    pairs = [(chosen["sample"], rejected["sample"]) for chosen, rejected in pair_up(group)]
    assert pairs == [(2, 1), (0, 3), (2, 3), (0, 1), (2, 0)]


# --- scores ---


@pytest.mark.parametrize(
    ("n", "right", "k", "expected"), [(8, 0, 4, 0), (8, 8, 4, 1), (4, 1, 2, 0.5), (5, 2, 2, 0.7), (3, 2, 2, 1)]
)
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one(n: int, right: int, k: int, expected: float) -> None:
    assert pass_at_k(n, right, k) == pytest.approx(expected)


def test_the_interval_is_over_questions_not_samples() -> None:
    half = [[True] * 8] * 50 + [[False] * 8] * 50
    center, low, high = pass_at_1(half)
    assert (center, high - low) == (0.5, pytest.approx(2 * 1.96 * 0.5 / 99**0.5))  # as of 100 observations, not 800
    for value in (True, False):
        center, low, high = pass_at_1([[value] * 8] * 50)
        assert center == value and high - low == pytest.approx(0.0714, abs=1e-3)


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    before = {f"q{n}": float(n % 2) for n in range(100)}
    after = before | {"q0": 1.0, "q2": 1.0, "q4": 1.0, "q6": 1.0}
    center, low, high = paired_difference(before, after)
    assert center == pytest.approx(0.04) and 0 < low < center < high < 0.08


def test_failures_of_the_environment_are_neither_right_nor_wrong() -> None:
    lines = [line(0, True), line(1, False), line(2, False, end="environment", score=None)]
    figures = summarize(lines)
    assert (figures["pass@1"], figures["pass@2"], figures["failed"], figures["trajectories"]) == (0.5, 1.0, 1, 3)
    unscored = summarize([line(0, False, score=None)])
    assert "pass@1" not in unscored and unscored["scored_questions"] == 0
    assert any("pass@1" in row and "50.0%" in row for row in describe({"d": figures}))


# --- the engine ---

FAMILIES = {
    "full": ("qwen2", {}),
    "sliding window": ("mistral", {"sliding_window": 4}),
    "full and sliding": (
        "gemma3_text",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
    ),
    "hybrid": ("lfm2", {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None}),
    "mamba": (
        "mamba2",
        {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8},
    ),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_padded_batch_writes_what_each_prompt_gets_alone_or_is_not_batched(family: str, tiny_tokenizer: Any) -> None:
    kind, changes = FAMILIES[family]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=len(tiny_tokenizer), intermediate_size=96, **sizes | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    engine = TransformersEngine(model, tiny_tokenizer, Sampling(seed=3))
    texts = ["a", "What is the median of 350, 141 and 4?", "towns " * 20]
    requests = [Request(tiny_tokenizer(text).input_ids, 12, f"{at}") for at, text in enumerate(texts)]
    if engine.padding_error(requests[0].ids, requests[2].ids) > engine.padding_tolerance:
        pytest.skip(f"{family} is not batched")
    together = engine.generate(requests)
    assert together == [engine.generate([request])[0] for request in requests]
    assert together == list(reversed(engine.generate(requests[::-1])))


def test_sampling_follows_the_softmax(tiny_model: Path) -> None:
    """Gumbel noise and a maximum draw from the distribution: 2,000 first tokens against the model's probabilities."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), load_for_generation(tiny_model)
    engine = TransformersEngine(model, tokenizer, Sampling(temperature=0.2, top_k=5))
    ids = tokenizer("What is").input_ids
    logits = model(torch.tensor([ids])).logits[0, -1] / 0.2
    values, tokens = logits.topk(5)
    expected = dict(zip(tokens.tolist(), values.softmax(0).tolist(), strict=True))
    drawn = [reply[0] for reply in engine.generate([Request(ids, 1, f"{number}") for number in range(2000)])]
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        assert drawn.count(token) / 2000 == pytest.approx(probability, abs=0.04)


def test_bf16_generates_under_autocast_and_keeps_the_weights(tiny_model: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), load_for_generation(tiny_model)
    dtypes: set[torch.dtype] = set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    request = Request(tokenizer("What is").input_ids, 2, "0")
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        dtypes.clear()
        TransformersEngine(model, tokenizer, Sampling(), bf16).generate([request])
        assert dtypes == {dtype}
    assert model.lm_head.weight.dtype == torch.float32
