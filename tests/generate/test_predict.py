"""Each trained reply is generated after the exact tokens of training, in batches that change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import small_run
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, GenerationConfig

from arpo_trl.data.labels import IGNORED
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.errors import RecipeError, RunFailed
from arpo_trl.generate import predict as predict_module
from arpo_trl.generate.predict import Prompt, find_prompts, generate
from arpo_trl.recipe import read_recipe
from arpo_trl.run_folder import read_lines
from arpo_trl.training.train import train

pytestmark = small_run.QUIET
TOY = {
    "dataset_dir": str(Path(__file__).parents[2] / "recipes"),
    "dataset": None,
    "eval_dataset": "arpo_sft_toy",
    "tokenized_path": None,
    "cutoff_len": 512,
    "max_samples": 5,
    "do_train": False,
    "do_predict": True,
    "per_device_eval_batch_size": 3,
    "max_new_tokens": 12,
}
END = 9  # ends a turn in the literal rows below


def row(*pieces: tuple[list[int], bool]) -> dict[str, Any]:
    """An encoded row of pieces, each trained or not."""
    ids = [token for piece, _ in pieces for token in piece]
    labels = [token if trained else IGNORED for piece, trained in pieces for token in piece]
    return {"input_ids": ids, "labels": labels, "source": "d.json:7"}


def test_each_reply_is_generated_after_everything_before_it() -> None:
    found, cut = find_prompts(
        [row(([1, 2], False), ([3, END, 8], True), ([4], False), ([5, 6, END], True))], "d", {END}
    )
    assert found == [
        Prompt([1, 2], [3, END], True, "d.json:7", "d"),
        Prompt([1, 2, 3, END, 8, 4], [5, 6, END], True, "d.json:7", "d"),
    ]
    assert cut == 0


def test_a_truncated_reply_is_skipped_and_counted() -> None:
    assert find_prompts([row(([1], False), ([3, 4], True))], "d", {END}) == ([], 1)


def test_a_masked_result_inside_a_turn_splits_the_reply() -> None:
    found, cut = find_prompts([row(([1], False), ([3, 4], True), ([5, 5], False), ([6, END], True))], "d", {END})
    assert [(one.context, one.label, one.ends_turn) for one in found] == [
        ([1], [3, 4], False),
        ([1, 3, 4, 5, 5], [6, END], True),
    ]
    assert cut == 0


@pytest.fixture(scope="module")
def predicted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy rows, predicted in batches of three: the recipe that ran, and what it left."""
    folder = tmp_path_factory.mktemp("predicted")
    small_run.run(folder, tiny_model, **TOY)
    return folder


def lines_of(folder: Path) -> list[dict[str, str]]:
    text = (folder / "run" / "generated_predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_padded_batch_gives_what_transformers_gives_for_each_context_alone(
    predicted: Path, tiny_model: Path
) -> None:
    recipe = read_recipe(predicted / "recipe.yaml")
    data = prepare_datasets(recipe, load_template(recipe))
    tokenizer, [rows] = data.template.tokenizer, data.eval.values()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    lines = iter(lines_of(predicted))
    for one in rows:
        starts = [
            at
            for at, (before, label) in enumerate(zip([IGNORED, *one["labels"]], one["labels"]))
            if before == IGNORED != label
        ]
        for start in starts:
            if tokenizer.eos_token_id not in one["input_ids"][start:]:
                continue  # cut
            context = torch.tensor([one["input_ids"][:start]])
            output = model.generate(
                context, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(context)
            )
            line = next(lines)
            assert line["prompt"] == tokenizer.decode(context[0])
            assert line["predict"] == tokenizer.decode(output[0, start:], skip_special_tokens=True)
            assert line["source"] == one["source"]
            reply = one["input_ids"][start:]
            reply = reply[: reply.index(tokenizer.eos_token_id)]
            assert line["label"] == tokenizer.decode(reply, skip_special_tokens=True)
    assert next(lines, None) is None


def test_the_results_say_how_many_replies_each_score_is_of(predicted: Path) -> None:
    results = json.loads((predicted / "run" / "predict_results.json").read_text(encoding="utf-8"))
    assert results["predict_replies"] == results["predict_stopped_of"] == len(lines_of(predicted)) > 5
    assert results["predict_tokens"] == 12 and results["predict_stopped"] == 0  # untrained
    everything = json.loads((predicted / "run" / "all_results.json").read_text(encoding="utf-8"))
    assert everything == results
    assert "stopped" in (predicted / "run" / "training.log").read_text(encoding="utf-8")


def test_after_training_the_saved_model_is_what_predicts_and_a_signal_ends_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = []

    def recorded(*args: Any) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        predict_module.predict(*args)

    monkeypatch.setattr("arpo_trl.training.train.predict", recorded)
    changes = {"eval_dataset": "greetings", "do_predict": True, "max_new_tokens": 8, "per_device_eval_batch_size": 2}
    changes |= {"learning_rate": 1e-2, "max_steps": 30, "dataset": "greetings"}
    trained = small_run.run(tmp_path / "a", tiny_model, **changes)
    small_run.run(tmp_path / "b", trained, **changes, do_train=False)
    after, later = ([line | {"source": ""} for line in lines_of(tmp_path / folder)] for folder in "ab")
    assert after == later
    assert handlers == [signal.SIG_DFL]
    assert [line["label"] for line in after] == [f"hi {name}" for name in "Ada Bob Cy Di Ed".split()]
    assert len({line["predict"] for line in after}) > 1
    results = json.loads((trained / "all_results.json").read_text(encoding="utf-8"))
    assert results["predict_replies"] == 5 and "train_loss" in results


def test_labels_that_cover_the_prompts_are_not_taken_for_replies(tiny_model: Path, tmp_path: Path) -> None:
    keys = {"eval_dataset": "greetings", "dataset": None, "do_train": False, "do_predict": True, "max_new_tokens": 2}
    small_run.run(tmp_path, tiny_model, **keys, train_on_prompt=True)
    assert lines_of(tmp_path)[0]["label"] == "hi Ada"
    assert lines_of(tmp_path)[0]["prompt"].endswith("greet Ada<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def model_and_prompts(tiny_model: Path) -> tuple[Any, Any, list[Prompt]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["hi", "what is it", "a", "tell me of the towns", "so"]
    prompts = [Prompt(tokenizer(text).input_ids, [1], True, "s", "d") for text in texts]
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), tokenizer, prompts


def config_of(tokenizer: Any, **changes: Any) -> GenerationConfig:
    ids = {"eos_token_id": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(max_new_tokens=6, **ids, **changes)


def test_a_sampled_reply_depends_on_the_seed_alone_and_leaves_the_random_state(model_and_prompts: Any) -> None:
    model, tokenizer, prompts = model_and_prompts
    config = config_of(tokenizer, do_sample=True, temperature=2.0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model.train()
    first = generate(model, prompts, tokenizer, config, 2, seed=3)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert generate(model, prompts, tokenizer, config, 2, seed=3) == first
    assert generate(model, prompts, tokenizer, config, 2, seed=4) != first


def test_a_call_inside_a_turn_ends_the_reply(model_and_prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untrained model would go on: what it writes is made to hold the end of a call."""
    model, tokenizer, prompts = model_and_prompts
    inside = [Prompt(prompts[3].context, [1], False, "s", "d")]
    config = config_of(
        tokenizer, suppress_tokens=prompts[3].context
    )  # which it would repeat, and join with the prompt
    [free] = generate(model, inside, tokenizer, config, 2, seed=0)
    written = tokenizer.decode(free)
    call_ends = [tokenizer.decode(free[:3])]
    monkeypatch.setattr(predict_module, "CALL_ENDS", call_ends)
    [ids] = generate(model, inside, tokenizer, config, 2, seed=0)
    assert ids == free[:3]
    reply = predict_module._to_prediction(inside[0], ids, tokenizer, {tokenizer.eos_token_id})
    assert reply.stopped and written.startswith(reply.predict) and reply.predict.endswith(call_ends[0])


def test_out_of_memory_names_the_settings_to_lower(model_and_prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, prompts = model_and_prompts
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: torch.empty(10**15))
    with pytest.raises(RunFailed, match=r"while generating 2 replies at a time\. Lower per_device_eval_batch_size"):
        generate(model, prompts, tokenizer, config_of(tokenizer), 2, seed=0)


@pytest.mark.slow
def test_two_processes_predict_what_one_predicts(predicted: Path, tiny_model: Path, tmp_path: Path) -> None:
    recipe = small_run.write_recipe(tmp_path, tiny_model, **{k: v for k, v in TOY.items() if v is not None})
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "arpo_trl", str(recipe)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(launch, env=env, capture_output=True, text=True, timeout=300, check=True)
    assert lines_of(tmp_path) == lines_of(predicted)


def test_a_dataset_without_a_complete_reply_is_reported(tiny_model: Path, tmp_path: Path) -> None:
    question = [{"role": "user", "content": "count to 24"}]
    prompt = AutoTokenizer.from_pretrained(tiny_model).apply_chat_template(question, add_generation_prompt=True)
    keys = {"dataset": None, "eval_dataset": "counting", "do_train": False, "do_predict": True}
    cutoff = len(cast(BatchEncoding, prompt)["input_ids"]) + 1
    recipe = small_run.make_recipe(tmp_path, tiny_model, **keys, cutoff_len=cutoff)
    with pytest.raises(RecipeError, match=r"do_predict: no reply ends within cutoff_len \d+\. Raise cutoff_len"):
        train(recipe)


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps that predict three of five held-out rows before the first step and at every second one."""
    pytest.importorskip("wandb")
    return small_run.run(tmp_path_factory.mktemp("watched"), tiny_model, **WATCHED)


WATCHED = {
    "eval_dataset": "greetings",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "do_eval": True,
    "predict_during_eval": 3,
    "max_new_tokens": 5,
    "do_sample": True,  # which draws random numbers
    "metric_for_best_model": "predict_tokens",
    "load_best_model_at_end": True,
    "report_to": "wandb",
}


def scores_in(log: Path) -> dict[int, dict[str, float]]:
    lines = [line for line in read_lines(log) if "eval_predict_replies" in line]
    return {
        line["current_steps"]: {name: value for name, value in line.items() if name.startswith("eval_predict")}
        for line in lines
    }


def test_an_evaluation_predicts_some_held_out_rows_and_its_scores_are_metrics(watched: Path) -> None:
    found = scores_in(watched / "trainer_log.jsonl")
    assert list(found) == [0, 2, 4]
    assert {scores["eval_predict_replies"] for scores in found.values()} == {3}
    state = json.loads((watched / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_metric"] == max(scores["eval_predict_tokens"] for at, scores in found.items() if at)
    log = (watched / "training.log").read_text(encoding="utf-8")
    assert "stopped 0 of 3" in log and f"step 0  step {state['best_global_step']}\n" in log


def test_wandb_has_the_replies_as_a_table(watched: Path) -> None:
    tables = sorted(watched.glob("wandb/offline-run-*/files/media/table/eval/samples_*.table.json"))
    assert [path.name.split("_")[1] for path in tables] == ["0", "2", "4"]
    table = json.loads(tables[0].read_text(encoding="utf-8"))
    assert table["columns"] == ["source", "context", "predict", "label", "wrong"]
    assert [row[3] for row in table["data"]] == ["hi Ada", "hi Bob", "hi Cy"]


def test_the_steps_are_as_if_nothing_had_been_predicted(watched: Path, tiny_model: Path, tmp_path: Path) -> None:
    plain = small_run.run(tmp_path, tiny_model, **WATCHED | {"predict_during_eval": None, "report_to": "none",
        "metric_for_best_model": "loss", "load_best_model_at_end": False})  # fmt: skip
    figures = ("loss", "grad_norm", "lr", "eval_loss", "trained_tokens")
    expected, found = (
        [
            {name: line.get(name) for name in figures}
            for line in read_lines(folder / "trainer_log.jsonl")
            if "eval_predict_replies" not in line
        ]
        for folder in (plain, watched)
    )
    assert found == expected
    for name in ("model.safetensors", "rng_state.pth"):
        assert same_file(plain / "checkpoint-4" / name, watched / "checkpoint-4" / name)


def same_file(a: Path, b: Path) -> bool:
    if a.suffix == ".safetensors":
        return a.read_bytes() == b.read_bytes()
    first, second = (torch.load(path, weights_only=False) for path in (a, b))
    return torch.equal(first["cpu"], second["cpu"]) and first["python"] == second["python"]


def test_a_resumed_run_predicts_and_trains_the_same(watched: Path, tiny_model: Path, tmp_path: Path) -> None:
    changes = WATCHED | {"report_to": "none", "resume_from_checkpoint": str(watched / "checkpoint-2")}
    resumed = small_run.run(tmp_path, tiny_model, **changes)
    assert scores_in(resumed / "trainer_log.jsonl")[4] == scores_in(watched / "trainer_log.jsonl")[4]
    assert same_file(resumed / "checkpoint-4" / "model.safetensors", watched / "checkpoint-4" / "model.safetensors")


@pytest.mark.slow  # 5 s alone, and needs trackio
def test_trackio_has_the_replies_as_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    script = (
        "import trackio; from arpo_trl.report.trackers import log_samples\n"
        "trackio.init(project='p', name='r'); log_samples(['trackio'], 3, [{'label': 'hi Ada'}]); trackio.finish()"
    )
    env = os.environ | {"TRACKIO_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=120, capture_output=True)
    assert any(b"hi Ada" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_one_turn_trajectory_with_masked_results_is_generated_call_by_call(tiny_model: Path, tmp_path: Path) -> None:
    reply = "<think>a</think><python>1</python> <result>\n1\n</result><answer>\\boxed{1}</answer>"
    (tmp_path / "d.json").write_text(json.dumps([{"instruction": "q", "output": reply}]), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.json"}}', encoding="utf-8")
    keys = {"dataset": None, "eval_dataset": "d", "dataset_dir": str(tmp_path), "do_train": False, "do_predict": True}
    run = small_run.run(tmp_path, tiny_model, **keys, tokenized_path=None, max_new_tokens=2, mask_spans="result")
    lines = [json.loads(line) for line in (run / "generated_predictions.jsonl").read_text("utf-8").splitlines()]
    assert [line["label"] for line in lines] == ["<think>a</think><python>1</python>", "<answer>\\boxed{1}</answer>"]
    assert lines[1]["prompt"].endswith("assistant\n<think>a</think><python>1</python> <result>\n1\n</result>")
