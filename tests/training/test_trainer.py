"""The loss is the loss: ours, plain PyTorch's and TRL's are the same numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from arpo_trl.errors import RunFailed
from arpo_trl.model import token_scores
from arpo_trl.model.methods.chosen import trainer_kwargs
from arpo_trl.model.token_scores import score_tokens
from arpo_trl.training.loss import mask_repeated_rows
from arpo_trl.training.trainer import ArpoTrainer

STEPS = 20
TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Rows of 5 to 60 tokens, two spans of which are trained."""
    rng = random.Random(0)
    made = []
    for number in range(100):
        length = rng.randrange(5, 60)
        ids = [rng.randrange(300, 330) for _ in range(length)]
        labels = [token if 3 <= i < length // 2 or i > length - 3 else -100 for i, token in enumerate(ids)]
        made.append({"input_ids": ids, "labels": labels, "source": f"rows.jsonl:{number + 1}"})
    return Dataset.from_list(made)


def config(folder: Path, **changes: Any) -> SFTConfig:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
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


def make(folder: Path, tiny_model: Path, rows: Dataset, cls: type[SFTTrainer] = ArpoTrainer, **changes: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    extra = {name: changes.pop(name) for name in ("objective", "reference") if name in changes}
    return cls(
        model=model,
        args=config(folder, **changes),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        **extra,
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def cross_entropy(logits: Tensor, targets: Tensor, at_start: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="none")


def eaft(logits: Tensor, targets: Tensor, at_start: Tensor, alpha: float) -> Tensor:
    """Cross-entropy times (the entropy of the 20 likeliest tokens / 3) ** alpha."""
    entropy = Categorical(logits=logits.detach().sort(descending=True).values[:, :20]).entropy()
    return cross_entropy(logits, targets, at_start) * (entropy / 3) ** alpha


def asft(logits: Tensor, targets: Tensor, at_start: Tensor, alpha: float) -> Tensor:
    """Cross-entropy times p, and alpha times the divergence from the model at the start."""
    nll = cross_entropy(logits, targets, at_start)
    divergence = kl_divergence(Categorical(logits=at_start), Categorical(logits=logits))
    return nll * (-nll).exp().detach() + alpha * divergence


def hand_written_losses(
    tiny_model: Path, rows: Dataset, accumulation: int, token_loss: TokenLoss = cross_entropy
) -> Iterator[float]:
    """AdamW, cosine with warm-up, clipping at 1.0, the mean of a loss over all labelled tokens of a step."""
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    size, position = 2 * accumulation, 0
    for _ in range(STEPS):
        batch = [rows[i] for i in range(position, min(position + size, len(rows)))]
        position = position + size if position + size < len(rows) else 0
        total = sum(label != -100 for row in batch for label in row["labels"][1:])
        loss = torch.zeros(())
        for row in batch:
            ids, targets = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            logits, mask = model(ids).logits[0, :-1], targets != -100
            with torch.no_grad():
                at_start = start(ids).logits[0, :-1]
            loss = loss + token_loss(logits[mask], targets[mask], at_start[mask]).sum() / total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_every_loss_equals_a_hand_written_loop(
    accumulation: int, tmp_path: Path, tiny_model: Path, rows: Dataset
) -> None:
    expected = list(hand_written_losses(tiny_model, rows, accumulation))
    found = losses(make(tmp_path, tiny_model, rows, gradient_accumulation_steps=accumulation))
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found == pytest.approx(expected, abs=1e-4)
    assert sum(expected[10:]) < sum(expected[:10]) - 0.1  # it trains


@pytest.mark.parametrize("tile", [512, 16])
@pytest.mark.parametrize(
    ("keys", "token_loss"),
    [
        ({"use_eaft_loss": True}, partial(eaft, alpha=1.0)),
        ({"use_eaft_loss": True, "eaft_alpha": 0.5}, partial(eaft, alpha=0.5)),
        ({"use_asft_loss": True}, partial(asft, alpha=0.1)),
        ({"use_asft_loss": True, "asft_alpha": 2.0}, partial(asft, alpha=2.0)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_losses_that_trl_lacks_equal_a_hand_written_loop(
    keys: dict[str, Any],
    token_loss: TokenLoss,
    tile: int,
    tmp_path: Path,
    tiny_model: Path,
    rows: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_scores, "TILE_POSITIONS", tile)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.get_output_embeddings().weight.data *= 8  # surer than a new model, whose every entropy is about ln 20
    certain = tmp_path / "model"
    model.save_pretrained(certain)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(certain)
    own = trainer_kwargs(small_run.make_recipe(tmp_path, certain, **keys), model, config(tmp_path))
    trainer = make(tmp_path, certain, rows, gradient_accumulation_steps=2, **own)
    expected = list(hand_written_losses(certain, rows, 2, token_loss))
    assert losses(trainer) == pytest.approx(expected, abs=1e-4)
    assert abs(sum(expected) - sum(hand_written_losses(certain, rows, 2))) > STEPS / 4


def test_losses_accuracy_and_entropy_equal_those_of_trl(tmp_path: Path, tiny_model: Path, rows: Dataset) -> None:
    ours, theirs = (make(tmp_path, tiny_model, rows, cls) for cls in (ArpoTrainer, SFTTrainer))
    losses(ours), losses(theirs)
    for a, b in zip(ours.state.log_history[:STEPS], theirs.state.log_history[:STEPS], strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "grad_norm", "num_tokens"):
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), (name, a["step"])


def test_tiles_change_neither_the_loss_nor_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(37, 16), torch.randint(0, 50, (37,))
    results = []
    for size in (64, 8):
        monkeypatch.setattr(token_scores, "TILE_POSITIONS", size)
        head = torch.nn.Linear(16, 50, bias=False)
        torch.nn.init.constant_(head.weight, 0.0)
        head.weight.data += torch.linspace(-1, 1, 50 * 16).view(50, 16)
        states = hidden.clone().requires_grad_()
        log_probs, entropy, top1 = score_tokens(states, labels, head)
        log_probs.sum().backward()
        results.append([log_probs, entropy, top1, states.grad, head.weight.grad])
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(whole, tiled)


def test_a_batch_without_labels_trains_to_a_finite_zero(tmp_path: Path, tiny_model: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [300, 301, 302], "labels": [-100] * 3, "source": "a:1"}] * 4)
    assert losses(make(tmp_path, tiny_model, rows, max_steps=2)) == [0.0, 0.0]


def test_a_nan_stops_the_run_at_its_step_and_names_the_rows(tmp_path: Path, tiny_model: Path, rows: Dataset) -> None:
    trainer = make(tmp_path, tiny_model, rows, save_strategy="steps", save_steps=1)
    forward, calls = trainer.model.forward, 0

    def forward_with_nan(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        output = forward(*args, **kwargs)
        if calls == 3:
            output.log_probs = output.log_probs * float("nan")
        return output

    trainer.model.forward = forward_with_nan
    with pytest.raises(RunFailed, match=r"step 3: the loss is nan.*rows\.jsonl:5, rows\.jsonl:6\."):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


# --- rows that do not divide evenly among processes ---


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(
    ("rows", "size", "processes"), [(5, 2, 2), (6, 2, 2), (7, 2, 3), (9, 4, 2), (3, 1, 2), (5, 4, 4)]
)
def test_each_row_is_trained_once_with_any_number_of_processes(
    rows: int, size: int, processes: int, padding_free: bool
) -> None:
    """The batches that accelerate deals out, collated as TRL does: a row of n + 1 tokens has n labels of its number."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    sampler = BatchSampler(SequentialSampler(range(rows)), size, drop_last=False)
    found: list[int] = []
    for process in range(processes):
        *full, last = BatchSamplerShard(sampler, processes, process)
        batches = [
            collate([{"input_ids": [i + 1] * (i + 2), "labels": [-100, *[i + 1] * (i + 1)]} for i in batch])
            for batch in (*full, last)
        ]
        if remainder := rows % (size * processes):
            mask_repeated_rows(batches[-1], remainder - process * size, packed=False)
        found += [label for batch in batches for label in batch["labels"].flatten().tolist() if label != -100]
    assert sorted(found) == sorted(i + 1 for i in range(rows) for _ in range(i + 1))


def test_a_packed_batch_is_masked_only_if_all_its_rows_are_repeated() -> None:
    for new, left in ((0, 0), (1, 4)):
        batch = {"labels": torch.ones(1, 4, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 0, 1]])}
        mask_repeated_rows(batch, new, packed=True)
        assert int((batch["labels"] != -100).sum()) == left


@pytest.mark.parametrize("shares_rows", [False, True])
def test_processes_that_share_rows_mask_and_drop_nothing(
    shares_rows: bool, rows: Dataset, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two, at the end of an epoch of 6 rows, 2 a batch: alone it repeats rows, under context parallelism
    it has the second half of each."""
    trainer = make(tmp_path, tiny_model, rows.select(range(6)))
    assert trainer.shares_rows is False
    trainer.shares_rows = shares_rows
    batch = trainer.data_collator([rows[0], rows[1]])
    labelled = int((batch["labels"] != -100).sum())
    with monkeypatch.context() as second:
        second.setattr(SFTConfig, "world_size", 2)
        second.setattr(SFTConfig, "process_index", 1)
        second.setattr(type(trainer.accelerator.gradient_state), "end_of_dataloader", True)
        trainer._without_repeated_rows(batch)
    assert int((batch["labels"] != -100).sum()) == (labelled if shares_rows else 0)
    monkeypatch.setattr(trainer.accelerator, "gather_for_metrics", lambda tensor: tensor[:1])
    two = rows.select(range(2))
    metrics = trainer.evaluation_loop(trainer.get_eval_dataloader(two), "two rows", prediction_loss_only=True).metrics
    first = sum(label != -100 for label in rows[0]["labels"])
    assert int(trainer._eval_sums[3]) == (labelled if shares_rows else first) and metrics["eval_loss"] > 0
