"""stage: dpo. The loss is the loss: ours, a hand-written loop's, and TRL's are the same numbers."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_run
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_pairs import write_pairs
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig

from arpo_trl.errors import RecipeError, RunFailed
from arpo_trl.recipe import Recipe
from arpo_trl.run_folder import read_lines
from arpo_trl.training import preference, preflight, reference
from arpo_trl.training.preference import score_pairs
from arpo_trl.training.reference import make_preference
from arpo_trl.training.trainer import ArpoTrainer

ROOT = Path(__file__).parents[2]
STEPS = 6
EVALUATED = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
TIMES = {"elapsed_time", "remaining_time", "elapsed_seconds", "tokens_per_second", "trained_tokens_per_second"}
MEASURED = TIMES | EVALUATED | {"peak_memory_gb"}
LOSSES: list[dict[str, Any]] = [
    {"pref_loss": "sigmoid"},
    {"pref_loss": "sigmoid", "dpo_label_smoothing": 0.2, "pref_beta": 0.3},
    {"pref_loss": "sigmoid", "pref_ftx": 0.5, "ld_alpha": 0.3},
    {"pref_loss": "hinge", "pref_beta": 0.5},
    {"pref_loss": "ipo"},
    {"pref_loss": "ipo", "ld_alpha": 0.5, "pref_ftx": 0.2},
    {"pref_loss": "orpo"},
    {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 1.0},
]


def make_pairs(count: int, seed: int = 0) -> Dataset:
    """Pairs of 8 to 40 tokens a side, whose later half carries loss."""
    rng, made = random.Random(seed), []
    for number in range(count):
        ids, labels, lengths = [], [], []
        prompt = [rng.randrange(300, 330) for _ in range(rng.randrange(3, 12))]
        for _ in range(2):
            side = [rng.randrange(300, 330) for _ in range(rng.randrange(5, 28))]
            ids += prompt + side
            labels += [-100] * len(prompt) + side
            lengths.append(len(prompt) + len(side))
        made.append({"input_ids": ids, "labels": labels, "source": f"d.jsonl:{number + 1}", "seq_lengths": lengths})
    return Dataset.from_list(made)


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return make_pairs(24)


def recipe_of(**keys: Any) -> Recipe:
    return Recipe(model_name_or_path="unused", output_dir="unused", stage="dpo", do_train=True, **keys)


def config(folder: Path, **changes: Any) -> SFTConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "disable_tqdm": True,
        "activation_checkpointing": True,
    }
    return SFTConfig(**values | changes)


def make(folder: Path, tiny_model: Path, pairs: Dataset, keys: dict[str, Any], **changes: Any) -> ArpoTrainer:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    args = config(folder, **changes)
    return ArpoTrainer(
        model=model,
        args=args,
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        preference=make_preference(recipe_of(finetuning_type="full", **keys), args, model),
    )


def logged(trainer: ArpoTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- oracles ---


def side_log_probs(model: Any, ids: list[int], labels: list[int]) -> Tensor:
    log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return torch.stack([log_probs[at, label] for at, label in enumerate(labels[1:]) if label != -100])


def pair_loss(model: Any, start: Any, pair: dict[str, Any], r: Recipe) -> Tensor:
    """One pair's loss, from its papers' formulas."""
    at = pair["seq_lengths"][0]
    sides = [(pair["input_ids"][part], pair["labels"][part]) for part in (slice(at), slice(at, None))]
    tokens = [side_log_probs(model, *side) for side in sides]
    with torch.no_grad():
        fixed = [side_log_probs(start, *side) for side in sides]
    short = min(map(len, tokens))
    alpha = 1.0 if r.ld_alpha is None else r.ld_alpha
    c, w = (t[:short].sum() + alpha * t[short:].sum() for t in tokens)
    ref_c, ref_w = (t.sum() for t in fixed)
    if r.pref_loss in ("ipo", "orpo", "simpo"):
        c, w = c / len(tokens[0]), w / len(tokens[1])
        ref_c, ref_w = ref_c / len(fixed[0]), ref_w / len(fixed[1])
    b, m = r.pref_beta, (c - w) - (ref_c - ref_w)
    e = r.dpo_label_smoothing
    loss = {
        "sigmoid": lambda: -(1 - e) * logsigmoid(b * m) - e * logsigmoid(-b * m),
        "hinge": lambda: torch.relu(1 - b * m),
        "ipo": lambda: (m - 1 / (2 * b)) ** 2,
        "orpo": lambda: -c - b * logsigmoid((c - w) - ((1 - c.exp()).log() - (1 - w.exp()).log())),
        "simpo": lambda: -logsigmoid(b * (c - w) - r.simpo_gamma),
    }[r.pref_loss]()
    return loss - r.pref_ftx * tokens[0].mean()


def hand_written(tiny_model: Path, pairs: Dataset, recipe: Recipe, accumulation: int) -> Iterator[float]:
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    size, position = 2 * accumulation, 0
    for _ in range(STEPS):
        batch = [pairs[i] for i in range(position, min(position + size, len(pairs)))]
        position = position + size if position + size < len(pairs) else 0
        loss = torch.stack([pair_loss(model, start, pair, recipe) for pair in batch]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.parametrize("keys", LOSSES, ids=lambda keys: "-".join(map(str, keys.values())))
def test_every_loss_is_that_of_a_hand_written_loop(
    keys: dict[str, Any], tmp_path: Path, tiny_model: Path, pairs: Dataset
) -> None:
    trainer = make(tmp_path, tiny_model, pairs, keys)
    trainer.train()
    assert logged(trainer) == pytest.approx(list(hand_written(tiny_model, pairs, recipe_of(**keys), 1)), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"padding_free": True}], ids=["padded", "padding-free"])
def test_every_pair_of_an_update_weighs_the_same(
    changes: dict[str, Any], tmp_path: Path, tiny_model: Path, pairs: Dataset
) -> None:
    """15 pairs in batches of 2, four to an update: the last update has seven pairs, and its last batch one."""
    some, keys = pairs.select(range(15)), {"pref_ftx": 0.3}
    trainer = make(tmp_path, tiny_model, some, keys, gradient_accumulation_steps=4, **changes)
    trainer.train()
    assert logged(trainer) == pytest.approx(list(hand_written(tiny_model, some, recipe_of(**keys), 4)), rel=1e-5)
    accuracies = logged(trainer, "rewards/accuracies")
    assert [accuracy * (8, 7)[step % 2] % 1 for step, accuracy in enumerate(accuracies)] == pytest.approx(
        [0] * STEPS, abs=1e-5
    )


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_trls_trainer_has_the_same_loss(loss: str, tmp_path: Path, tiny_model: Path, pairs: Dataset) -> None:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Encoded(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    def to_trl(pair: dict[str, Any]) -> dict[str, Any]:
        at, prompt = pair["seq_lengths"][0], pair["labels"].index(next(x for x in pair["labels"] if x != -100))
        ids = pair["input_ids"]
        return {"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:at], "rejected_ids": ids[at + prompt :]}

    kept = {
        "output_dir",
        "use_cpu",
        "bf16",
        "max_steps",
        "per_device_train_batch_size",
        "learning_rate",
        "disable_tqdm",
    }
    kept |= {"lr_scheduler_type", "logging_steps", "save_strategy", "report_to", "train_sampling_strategy"}
    values = {name: getattr(config(tmp_path), name) for name in kept}
    args = DPOConfig(loss_type=[loss], beta=0.2, max_length=None, activation_checkpointing=True, **values)
    theirs = Encoded(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=args,
        train_dataset=pairs.map(to_trl, remove_columns=pairs.column_names),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    theirs.train()
    trainer = make(tmp_path, tiny_model, pairs, {"pref_loss": loss, "pref_beta": 0.2})
    trainer.train()
    assert logged(trainer) == pytest.approx([x["loss"] for x in theirs.state.log_history if "loss" in x], rel=1e-4)
    for name in ("rewards/chosen", "rewards/margins") if loss != "ipo" else ():  # TRL's are sums there
        expected = [x[name] for x in theirs.state.log_history if name in x]
        assert logged(trainer, name) == pytest.approx(expected, abs=2e-5)


def test_orpo_has_a_gradient_for_a_memorized_side() -> None:
    """log1p(-exp(x)), LLaMA-Factory's form, has a NaN gradient at x = 0."""
    log_probs = torch.zeros(2, 3, requires_grad=True)
    scores = score_pairs(log_probs, torch.ones(2, 3, dtype=torch.bool), None, recipe_of(pref_loss="orpo"))
    scores.loss.sum().backward()
    assert log_probs.grad is not None and log_probs.grad.isfinite().all()
    naive = torch.zeros(1, requires_grad=True)
    torch.log1p(-torch.exp(naive)).mul(0).backward()
    assert naive.grad is not None and naive.grad.isnan().all()


def test_a_tie_is_no_hit_and_metrics_are_rewards() -> None:
    log_probs, mask = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    scores = score_pairs(log_probs, mask, torch.tensor([-3.0, -3.0]), recipe_of(pref_beta=0.5))
    values = {name: float(value) for name, value in scores.metrics.items()}
    assert values["rewards/accuracies"] == 0 and values["rewards/margins"] == 0
    assert (values["logps/chosen"], values["logps/rejected"]) == (-3.0, -3.0)
    means = score_pairs(log_probs, mask, None, recipe_of(pref_loss="simpo", pref_beta=2.0)).metrics
    assert float(means["rewards/chosen"]) == -3.0 and float(means["logps/chosen"]) == -1.5


def test_repeated_pairs_give_a_differentiable_zero(tmp_path: Path, tiny_model: Path, pairs: Dataset) -> None:
    trainer = make(tmp_path, tiny_model, pairs, {"pref_loss": "orpo"})
    batch = trainer.data_collator([pairs[0], pairs[1]])
    batch["labels"][:] = -100
    trainer.model.train()
    loss = trainer._compare(trainer.preference, trainer.model, batch, torch.tensor(0))  # type: ignore[arg-type]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


# --- references ---


def first_loss(trainer: ArpoTrainer, pair: dict[str, Any]) -> tuple[float, Tensor, Tensor]:
    """The sigmoid loss of a pair in training, and the sums of the policy and of the reference."""
    batch = trainer.data_collator([pair])
    model, held = trainer.model, trainer.preference
    assert held
    model.train()
    wrapped = trainer.accelerator.prepare_model(model, evaluation_mode=True) if trainer.args.bf16 else model
    with torch.no_grad():
        fixed = held.sum_reference(wrapped, batch, trainer.accelerator)
        output = wrapped(**batch, use_cache=False, fused_lm_head=True)
        log_probs, mask = preference.split_rows(output, batch)
    scores = score_pairs(log_probs, mask, fixed, held.recipe)
    return float(scores.loss[0]), (log_probs * mask).sum(-1), fixed


def test_a_frozen_copy_gives_the_policys_own_bits_under_autocast(
    tmp_path: Path, tiny_model: Path, pairs: Dataset
) -> None:
    trainer = make(tmp_path, tiny_model, pairs, {}, bf16=True)
    assert trainer.preference
    model = trainer.preference.reference
    assert model is not None and not any(p.requires_grad for p in model.parameters())
    dtypes = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters()}
    assert dtypes["q_proj"] == torch.bfloat16 and dtypes["embed_tokens"] == dtypes["norm"] == torch.float32
    loss, policy, fixed = first_loss(trainer, pairs[0])
    assert torch.equal(policy, fixed)
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    model.bfloat16()  # what LLaMA-Factory does
    assert not torch.equal(*first_loss(trainer, pairs[0])[1:])


def lora(tiny_model: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(target_modules="all-linear", lora_dropout=0.5, **changes))


def test_lora_compares_with_the_adapter_switched_off(tmp_path: Path, tiny_model: Path, pairs: Dataset) -> None:
    model, args = lora(tiny_model), config(tmp_path)
    held = make_preference(recipe_of(finetuning_type="lora"), args, model)
    trainer = ArpoTrainer(
        model=model, args=args, train_dataset=pairs, processing_class=AutoTokenizer.from_pretrained(tiny_model),
        preference=held,
    )  # fmt: skip
    assert held and held.reference is None
    assert first_loss(trainer, pairs[0])[0] == pytest.approx(math.log(2), abs=1e-6)  # lora_dropout is off
    before = first_loss(trainer, pairs[0])[2]
    trainer.train()
    loss, policy, fixed = first_loss(trainer, pairs[0])
    assert torch.equal(before, fixed)
    assert not torch.allclose(policy, fixed)
    assert loss < math.log(2)


def run_pairs(folder: Path, model: Path, **changes: Any) -> Path:
    """A run over 10 pairs that prefer letters to digits."""
    data = write_pairs(folder / "data")
    keys = {"stage": "dpo", "dataset": "pairs", "dataset_dir": str(data), "tokenized_path": str(folder / "tokenized")}
    path = small_run.write_recipe(folder, model, **{**keys, **changes})
    return small_run.run_recipe(path)


def figures(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_lines(folder / "trainer_log.jsonl")]


@pytest.fixture(scope="module")
def sft_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter that changes the model."""
    folder = tmp_path_factory.mktemp("adapter") / "sft"
    lora(tiny_model).save_pretrained(folder)
    weights = small_run.read_weights(folder / "adapter_model.safetensors")
    save_file(
        {name: w + 0.02 if "lora_B" in name else w for name, w in weights.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


@small_run.QUIET
def test_a_trained_adapter_is_compared_with_the_bare_base_and_the_run_reports_it(
    tmp_path: Path, tiny_model: Path, sft_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"finetuning_type": "lora", "adapter_name_or_path": str(sft_adapter), "max_steps": 1, "save_strategy": "no"}
    folder = run_pairs(tmp_path, tiny_model, **keys)
    printed = capsys.readouterr().out
    assert f"without {sft_adapter}, as in LLaMA-Factory" in printed
    assert "policy and reference are different models" in printed
    assert abs(read_lines(folder / "trainer_log.jsonl")[0]["loss"] - math.log(2)) > 1e-4
    run = json.loads((folder / "run.json").read_text())
    assert run["reference"]["path"] == str(tiny_model) and run["reference"]["adapters"] == []


@small_run.QUIET
def test_the_sft_model_as_the_reference_in_two_ways(tmp_path: Path, tiny_model: Path, sft_adapter: Path) -> None:
    """A frozen second adapter of the same base, which no checkpoint holds; and create_new_adapter."""
    keys = {"finetuning_type": "lora", "adapter_name_or_path": str(sft_adapter), "max_steps": 2}
    second = {"ref_model": str(tiny_model), "ref_model_adapters": str(sft_adapter)}
    folder = run_pairs(tmp_path / "a", tiny_model, **keys, **second)
    log = read_lines(folder / "trainer_log.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[1]["loss"] != log[0]["loss"]
    assert not list(folder.rglob("reference")) and list(folder.glob("checkpoint-2/adapter_model.safetensors"))
    weights = load_file(folder / "adapter_model.safetensors")
    assert not torch.equal(*(load_file(p / "adapter_model.safetensors")[min(weights)] for p in (folder, sft_adapter)))
    merged = run_pairs(tmp_path / "b", tiny_model, **keys, create_new_adapter=True)
    assert read_lines(merged / "trainer_log.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_another_ref_model_is_a_second_model(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = small_run.read_weights(other / "model.safetensors")
    save_file({name: w * 0.9 for name, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    folder = run_pairs(tmp_path, tiny_model, ref_model=str(other), max_steps=1, save_strategy="no")
    assert "policy and reference are different models" in capsys.readouterr().out
    assert abs(read_lines(folder / "trainer_log.jsonl")[0]["loss"] - math.log(2)) > 1e-4


@small_run.QUIET
@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
def test_precomputed_log_probabilities_give_the_same_run(
    tmp_path: Path, tiny_model: Path, finetuning_type: str
) -> None:
    keys = {"finetuning_type": finetuning_type, "val_size": 3, "do_eval": True, "per_device_train_batch_size": 1}
    plain = run_pairs(tmp_path / "a", tiny_model, **keys)
    stored = run_pairs(tmp_path / "b", tiny_model, **keys, precompute_ref_log_probs=True)
    for before, after in zip(figures(plain), figures(stored), strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            if isinstance(value, float):
                assert after[name] == pytest.approx(value, abs=2e-4), name
        if "loss" in before:  # batches of one pair have the same shape in both
            assert after == before
    with np.load(stored / "reference_log_probs.npz") as opened:
        file = {name: opened[name] for name in opened.files}
    assert file["sums"].shape == (10, 2)


def test_a_changed_reference_rejects_the_resume(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    folder = run_pairs(tmp_path, model, max_steps=2, save_steps=1)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "status": "stopped"}))
    shutil.rmtree(folder / "checkpoint-2")
    weights = small_run.read_weights(model / "model.safetensors")
    save_file({name: w * 0.9 for name, w in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"reference: \S+ \(\w{8}\) -> \S+ \(\w{8}\)"):
        run_pairs(tmp_path, model, max_steps=2, save_steps=1)


# --- the ln 2 check, and a NaN ---


def test_a_reference_that_is_not_the_policy_stops_the_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze = reference._freeze

    def spoiled(model: Any, args: Any) -> Any:
        return freeze(model, args).bfloat16()

    monkeypatch.setattr(reference, "_freeze", spoiled)
    with pytest.raises(
        RecipeError, match=r"expected loss 0.693147 before step 1, found 0.\d+: the reference does not compute"
    ):
        run_pairs(tmp_path, tiny_model)


def test_dropout_that_stays_on_stops_the_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "attention_dropout": 0.3}))
    run_pairs(tmp_path / "off", model, max_steps=1, save_strategy="no")
    monkeypatch.setattr(reference, "disable_dropout", lambda model: None)
    with pytest.raises(RecipeError, match="the model gives different results for the same batch"):
        run_pairs(tmp_path / "on", model, max_steps=1, save_strategy="no")


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", 0.6931), ("hinge", 1.0), ("ipo", 25.0)])
def test_the_first_pair_is_checked_before_step_1(
    loss: str, expected: float, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"ld_alpha": 0.5, "pref_ftx": 1.0, "max_steps": 1, "save_strategy": "no"}
    run_pairs(tmp_path, tiny_model, pref_loss=loss, **keys)
    assert (
        f"reference  first pair: loss {expected:.4f}, as expected when policy and reference are identical"
        in capsys.readouterr().out
    )


@small_run.QUIET
def test_dora_starts_near_ln_2(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_pairs(tmp_path, tiny_model, finetuning_type="lora", use_dora=True, max_steps=1, save_strategy="no", bf16=True)
    assert "as expected when policy and reference are identical" in capsys.readouterr().out


def test_a_nan_names_the_pair(tmp_path: Path, tiny_model: Path, pairs: Dataset) -> None:
    for number, changes in enumerate(({}, {"padding_free": True})):
        trainer = make(tmp_path / str(number), tiny_model, pairs, {"pref_loss": "orpo"}, **changes)
        embedding: Any = trainer.model.get_input_embeddings()
        with torch.no_grad():
            embedding.weight[pairs[1]["input_ids"][-1]] = torch.nan
        with pytest.raises(RunFailed, match=r"the loss is nan; .* Rows in its batch: d.jsonl:1, d.jsonl:2\."):
            trainer.train()


# --- what a run leaves ---


def test_a_run_logs_evaluates_and_plots(tmp_path: Path, tiny_model: Path) -> None:
    keys = {
        "val_size": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "plot_loss": True,
        "load_best_model_at_end": True,
    }
    keys |= {"metric_for_best_model": "rewards/accuracies", "per_device_eval_batch_size": 2, "learning_rate": 5e-3}
    folder = run_pairs(tmp_path, tiny_model, **keys)
    assert {"training_loss.png", "training_rewards_accuracies.png"} <= {path.name for path in folder.iterdir()}
    steps = [line for line in read_lines(folder / "trainer_log.jsonl") if "loss" in line]
    evals = [line for line in read_lines(folder / "trainer_log.jsonl") if "eval_loss" in line]
    assert steps[0]["accuracy"] == steps[0]["rewards/accuracies"] == 0 and steps[-1]["accuracy"] == 1
    state = json.loads((folder / "trainer_state.json").read_text())
    names = {
        f"{kind}/{name}"
        for kind, name in [
            ("rewards", "chosen"),
            ("rewards", "rejected"),
            ("rewards", "margins"),
            ("logps", "chosen"),
            ("logps", "rejected"),
        ]
    }
    assert names | {"rewards/accuracies"} <= state["log_history"][0].keys()
    assert {f"eval_{name}" for name in names} <= evals[0].keys() and "eval_perplexity" not in evals[0]
    assert evals[-1]["eval_rewards/accuracies"] * 3 % 1 == pytest.approx(0)
    assert state["best_metric"] == max(line["eval_rewards/accuracies"] for line in evals)


def test_an_evaluation_is_the_mean_over_pairs(tmp_path: Path, tiny_model: Path, pairs: Dataset) -> None:
    some = pairs.select(range(5))
    found = []
    for size, changes in ((1, {}), (2, {}), (5, {"padding_free": True})):
        trainer = make(tmp_path, tiny_model, pairs, {"pref_loss": "orpo"}, per_device_eval_batch_size=size, **changes)
        found.append(trainer.evaluate(some))
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack([pair_loss(start, start, pair, recipe_of(pref_loss="orpo")) for pair in some]).mean()
    assert [one["eval_loss"] for one in found] == pytest.approx([float(expected)] * 3, abs=1e-5)
    assert {"eval_sft_loss", "eval_odds_ratio_loss"} <= found[0].keys()


def test_an_evaluation_without_training_needs_and_uses_a_ref_model(tmp_path: Path, tiny_model: Path) -> None:
    keys = {"do_train": False, "do_eval": True, "dataset": [], "eval_dataset": "pairs"}
    with pytest.raises(RecipeError, match="ref_model: required to evaluate without training"):
        run_pairs(tmp_path, tiny_model, **keys)
    folder = run_pairs(tmp_path, tiny_model, **keys, ref_model=str(tiny_model))
    assert json.loads((folder / "eval_results.json").read_text())["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_soft_capped_model_trains_with_its_cap(tmp_path: Path, tiny_model: Path, pairs: Dataset) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1100, "query_pre_attn_scalar": 16}
    torch.manual_seed(0)
    folder = tmp_path / "gemma"
    model = Gemma2ForCausalLM(
        Gemma2Config(**sizes, final_logit_softcapping=0.5, attn_logit_softcapping=5.0, pad_token_id=0)
    )
    model.save_pretrained(folder)
    args, keys = config(tmp_path, max_steps=2), {"pref_loss": "simpo", "pref_beta": 2.0}
    trainer = ArpoTrainer(
        model=model, args=args, train_dataset=pairs, processing_class=AutoTokenizer.from_pretrained(tiny_model),
        preference=make_preference(recipe_of(finetuning_type="full", **keys), args, model),
    )  # fmt: skip
    trainer.train()
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack([pair_loss(start, start, pairs[i], recipe_of(**keys)) for i in range(2)]).mean()
    assert logged(trainer)[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_mixture_of_experts_adds_the_balancing_loss_of_the_policys_pass(
    tmp_path: Path, tiny_model: Path, pairs: Dataset
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 1100, "pad_token_id": 0}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    torch.manual_seed(0)
    folder = tmp_path / "moe"
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    model.save_pretrained(folder)
    args = config(tmp_path, max_steps=1, router_aux_loss_coef=0.5, gradient_accumulation_steps=2)
    trainer = ArpoTrainer(
        model=model, args=args, train_dataset=pairs, processing_class=AutoTokenizer.from_pretrained(tiny_model),
        preference=make_preference(recipe_of(finetuning_type="full"), args, model),
    )  # fmt: skip
    trainer.train()
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    aux = []
    for first in (0, 2):
        batch = trainer.data_collator([pairs[first], pairs[first + 1]])
        with torch.no_grad():
            aux.append(float(start(**batch, output_router_logits=True).aux_loss))
    assert logged(trainer, "aux_loss") == pytest.approx([sum(aux) / 2], abs=1e-5)
    assert logged(trainer) == pytest.approx([math.log(2) + 0.5 * sum(aux) / 2], abs=1e-5)


@pytest.mark.slow
@small_run.QUIET
def test_a_frozen_second_adapter_on_a_4_bit_base(
    tmp_path: Path, tiny_model: Path, sft_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    keys = {"finetuning_type": "lora", "adapter_name_or_path": str(sft_adapter), "quantization_bit": 4, "max_steps": 2}
    second = {"ref_model": str(tiny_model), "ref_model_adapters": str(sft_adapter)}
    folder = run_pairs(tmp_path / "a", tiny_model, **keys, **second)
    log = read_lines(folder / "trainer_log.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[1]["loss"] < log[0]["loss"]
    assert "a second adapter of the model" in capsys.readouterr().out and not list(folder.rglob("reference"))
    run_pairs(tmp_path / "b", tiny_model, **keys)
    assert "To compare with it, set ref_model and ref_model_adapters" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="compare with it unmerged: create_new_adapter: false, ref_model: "):
        run_pairs(tmp_path / "c", tiny_model, **keys, create_new_adapter=True)


def test_the_reference_counts_in_the_memory_of_a_full_run(tiny_model: Path, pairs: Dataset, tmp_path: Path) -> None:
    from arpo_trl.model.memory import Memory, describe_memory, estimate_memory, longest_batch, model_shape

    def memory_of(**keys: Any) -> Memory:
        recipe = recipe_of(**keys).model_copy(update={"model_name_or_path": str(tiny_model)})
        memory = estimate_memory(recipe, config(tmp_path), model_shape(recipe), pairs)
        assert memory is not None
        return memory

    full, lora = memory_of(finetuning_type="full"), memory_of(finetuning_type="lora")
    assert (
        full.reference == full.weights
        and full.reference + memory_of(finetuning_type="full", precompute_ref_log_probs=True).peak == full.peak
    )
    assert lora.reference == memory_of(finetuning_type="full", pref_loss="orpo").reference == 0
    assert f"reference {full.reference / 1e6:.1f})" in describe_memory(full, None)
    assert "reference" not in describe_memory(lora, None)
    batch, _ = longest_batch(pairs, 2, padded_pairs=True)
    assert max(max(row["seq_lengths"]) for row in batch) == max(max(sides) for sides in pairs["seq_lengths"])


@pytest.mark.parametrize(
    ("name", "keys"), [("sigmoid", {}), ("orpo", {"pref_loss": "orpo"}), ("ftx", {"pref_ftx": 0.5})]
)
def test_losses_are_those_that_llamafactory_logged(
    name: str, keys: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze = reference._freeze
    monkeypatch.setattr(reference, "_freeze", lambda model, args: freeze(model.bfloat16(), args))  # as theirs
    monkeypatch.setattr(preflight, "_tolerance", lambda recipe: 0.1)  # which this check rejects
    rows = {
        "dataset_dir": str(ROOT / "recipes"),
        "dataset": "arpo_dpo_toy_inside",
        "max_samples": 40,
        "cutoff_len": 512,
    }
    steps = {
        "learning_rate": 5e-4,
        "num_train_epochs": 1,
        "max_steps": -1,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
    }
    settings = {"stage": "dpo", "truncation_mode": "llamafactory", "save_strategy": "no", **rows, **steps, **keys}
    run = small_run.run_recipe(small_run.write_recipe(tmp_path, tiny_model, **settings))
    losses = [line["loss"] for line in read_lines(run / "trainer_log.jsonl") if "loss" in line]
    theirs = json.loads((ROOT / "tests" / "golden" / "pairs" / "losses.json").read_text(encoding="utf-8"))
    assert losses == pytest.approx(theirs[name], abs=1e-5 if name == "orpo" else 5e-4)  # bfloat16
