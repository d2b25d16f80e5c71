"""Generate replies on held-out rows, each after its true context, and score them.

Contexts are taken from the encoded rows: a run of labels is a reply, and everything before it is its context, including
the teacher's earlier turns and tool results. So prompts have exactly the tokens of training.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..data.labels import IGNORED
from ..data.prepare import PreparedData, prepare_datasets
from ..data.tokenizer import decode
from ..errors import RunFailed
from ..machine import is_out_of_memory
from ..model.model import end_tokens, through_end
from ..model.weights import Model
from ..recipe.keys import Recipe
from ..report.console import say
from ..run_folder import save_metrics, to_lines
from ..terminal import progress
from .scores import Reply, describe_scores, score_replies
from .tags import CALL_ENDS

SHOWN = 2000  # characters of each text in a tracker's table


@dataclass(frozen=True)
class Prompt:
    """A context and the reply expected after it, in token ids. `label` ends with its end-of-turn token.

    `ends_turn`: False where a masked span, such as a tool's result, follows inside the same turn; the model then
    generates up to the end of its call.
    """

    context: list[int]
    label: list[int]
    ends_turn: bool
    source: str
    dataset: str


@dataclass(frozen=True)
class Prediction(Reply):
    """The model's reply to a prompt: the texts to score and the generated token ids."""

    prompt: Prompt
    ids: list[int]


def find_prompts(rows: Dataset, dataset: str, end_tokens: Collection[int]) -> tuple[list[Prompt], int]:
    """Return a prompt for each trained reply of the encoded rows, and the number of replies that the cutoff truncated."""
    prompts: list[Prompt] = []
    cut = 0
    for row in rows:
        ids, end = row["input_ids"], 0
        for is_reply, run in groupby(row["labels"], lambda label: label != IGNORED):
            start, end = end, end + len(list(run))
            label = row["labels"][start:end]
            last = next((at for at, token in enumerate(label) if token in end_tokens), None)
            if not is_reply or not start:
                continue
            if last is None and end == len(ids):
                cut += 1
            else:
                label = label if last is None else label[: last + 1]
                prompts.append(Prompt(ids[:start], label, last is not None, row["source"], dataset))
    return prompts, cut


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    batch_size: int,
    seed: int,
    after_batch: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """Return the token ids of each reply, in the order of the prompts, on every process.

    Batches group prompts of similar length, longest first, and don't depend on the number of processes: padding can
    change the last digits of a row's logits. The random state and the model's mode are restored.

    Args:
        model: The full model, not split across processes.
        config: Includes the model's end-of-turn and padding tokens.
        after_batch: Called after each batch, equally often on every process.
    """
    state = PartialState()
    order = sorted(range(len(prompts)), key=lambda at: (prompts[at].ends_turn, -len(prompts[at].context)))
    batches = [
        group[start : start + batch_size]
        for group in (list(group) for _, group in groupby(order, lambda at: prompts[at].ends_turn))
        for start in range(0, len(group), batch_size)
    ]
    replies: list[tuple[int, list[int]]] = []
    was_training = model.training
    model.eval()
    gpus = [state.device.index or 0] if state.device.type == "cuda" else []
    steps = -(-len(batches) // state.num_processes) * config.max_new_tokens
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=gpus),
            progress("generating", steps, state.is_main_process) as advance,
        ):
            for first in range(0, len(batches), state.num_processes):
                number = first + state.process_index
                if number < len(batches):
                    torch.manual_seed(seed + number)
                    batch = [prompts[at] for at in batches[number]]
                    written = _generate_batch(model, batch, tokenizer, config, advance)
                    replies += zip(batches[number], written, strict=True)
                after_batch()
    finally:
        model.train(was_training)
    if state.num_processes > 1:
        replies = gather_object(replies)
    return [ids for _, ids in sorted(replies)]


class _EachToken(StoppingCriteria):
    """Advances a progress bar after each token, and stops nothing."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self.advance = advance

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.advance(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate_batch(
    model: Model,
    batch: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    advance: Callable[[float], None],
) -> list[list[int]]:
    # Inside a turn, no end-of-turn follows a call: the program that runs the tool stops the model there.
    if not batch[0].ends_turn:
        config = GenerationConfig(**config.to_dict() | {"stop_strings": CALL_ENDS})
    contexts = [prompt.context for prompt in batch]
    each_token = StoppingCriteriaList([_EachToken(advance)])
    settings = "per_device_eval_batch_size (same replies up to rounding), max_new_tokens or cutoff_len"
    output = continue_rows(model, contexts, config, settings, tokenizer=tokenizer, stopping_criteria=each_token)
    written = output[:, max(map(len, contexts)) :]
    advance(config.max_new_tokens - written.shape[1])  # the replies ended earlier
    return [through_end(row, config.eos_token_id) for row in written.tolist()]


def continue_rows(
    model: Model, rows: Sequence[Sequence[int]], config: GenerationConfig, settings: str, **hooks: Any
) -> Any:
    """Continue rows of ids as one batch, padded on the left. `hooks`: further arguments of transformers' `generate`.

    Raises:
        RunFailed: the device is out of memory; the error names the `settings` to lower.
    """
    tensors = [torch.tensor(row) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids, mask = pad(tensors, padding_value=config.pad_token_id or 0), pad(list(map(torch.ones_like, tensors)))
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    try:
        return cast(GenerationMixin, model).generate(**inputs, generation_config=config, **hooks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunFailed(
            f"out of memory on {model.device} while generating {len(rows)} replies at a time. Lower {settings}"
        ) from error


def generation_config(model: Model, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> GenerationConfig:
    """Return these settings over neutral defaults; without them `generate` would use those of the model's own file."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0, "max_length": None}
    ends = {"eos_token_id": end_tokens(model, tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(**neutral | ends | {"use_cache": True} | settings)


def predict_replies(
    recipe: Recipe,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    after_batch: Callable[[], object] = lambda: None,
) -> list[Prediction]:
    """Return the model's replies in the order of the prompts. `after_batch`: see `generate`."""
    sampling = {"temperature": recipe.temperature, "top_p": recipe.top_p, "top_k": recipe.top_k}
    config = generation_config(
        model,
        tokenizer,
        max_new_tokens=recipe.max_new_tokens,
        do_sample=bool(recipe.do_sample),
        **(sampling if recipe.do_sample else {}),
        num_beams=recipe.num_beams,
        repetition_penalty=recipe.repetition_penalty,
        length_penalty=recipe.length_penalty,
    )
    batch_size = recipe.per_device_eval_batch_size or recipe.per_device_train_batch_size
    written = generate(model, prompts, tokenizer, config, batch_size, recipe.seed, after_batch)
    return [
        _to_prediction(prompt, ids, tokenizer, config.eos_token_id)
        for prompt, ids in zip(prompts, written, strict=True)
    ]


def _to_prediction(
    prompt: Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase, ends: Collection[int]
) -> Prediction:
    """Decode reply and label up to the end of the turn, with special tokens, which some templates use for calls."""
    stopped = bool(ids) and ids[-1] in ends
    text = decode(tokenizer, ids[: len(ids) - stopped])
    if not prompt.ends_turn and (stops := [at + len(end) for end in CALL_ENDS if (at := text.find(end)) >= 0]):
        text, stopped = text[: min(stops)], True
    label = decode(tokenizer, prompt.label[: len(prompt.label) - prompt.ends_turn])
    return Prediction(text, label, stopped, len(ids), len(prompt.label), prompt, ids)


# --- predictions of a run ---


def eval_prompts(recipe: Recipe, model: Model, data: PreparedData, most: int | None = None) -> list[Prompt]:
    """Return the prompts of all evaluation datasets, of at most `most` rows each.

    Rows whose labels also cover prompts are encoded again.
    """
    if recipe.train_on_prompt or recipe.truncation_mode != "keep_start":
        changes = {"train_on_prompt": False, "truncation_mode": "keep_start", "tokenized_path": None}
        data = prepare_datasets(recipe.model_copy(update=changes), data.template)
    ends = end_tokens(model, data.template.tokenizer)
    prompts: list[Prompt] = []
    for name, rows in data.eval.items():
        first = rows if most is None else rows.select(range(min(most, len(rows))))
        complete, cut = find_prompts(first, name, ends)
        prompts += complete
        if cut:
            turns = "1 turn exceeds" if cut == 1 else f"{cut:,} turns exceed"
            say(f"predict  {name}: {turns} cutoff_len {recipe.cutoff_len}, skipped")
    if not prompts:
        raise recipe.error("do_predict", f"no reply ends within cutoff_len {recipe.cutoff_len}. Raise cutoff_len")
    return prompts


def predict(recipe: Recipe, model: Model, data: PreparedData) -> None:
    """Write generated_predictions.jsonl (LLaMA-Factory's prompt, predict and label, plus source) and predict_results.json."""
    prompts, tokenizer = eval_prompts(recipe, model, data), data.template.tokenizer
    began = time.monotonic()
    predictions = predict_replies(recipe, model, tokenizer, prompts)
    seconds = time.monotonic() - began
    if not PartialState().is_main_process:
        return
    output_dir = Path(recipe.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = to_lines(to_line(prediction, tokenizer, recipe.skip_special_tokens) for prediction in predictions)
    path = output_dir / "generated_predictions.jsonl"
    path.write_text(lines, encoding="utf-8", errors="backslashreplace")
    scores = score_replies(predictions)
    results = {f"predict_{name}": value for name, value in scores.items()}
    results |= {"predict_runtime": seconds, "predict_samples_per_second": len(predictions) / seconds}
    if recipe.eval_on_each_dataset:
        for name in data.eval:
            part = [prediction for prediction in predictions if prediction.prompt.dataset == name]
            results |= {f"predict_{name}_{score}": value for score, value in score_replies(part).items()}
    save_metrics(output_dir, "predict", results)
    rows = len({(prediction.prompt.dataset, prediction.prompt.source) for prediction in predictions})
    say(f"predict  replies to {len(predictions):,} turns of {rows:,} row{'s' * (rows != 1)}, see {path}")
    for line in describe_scores({"right": scores}):
        say(f"         {line}")


def to_line(prediction: Prediction, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> dict[str, str]:
    """Return a line of generated_predictions.jsonl."""
    return {
        "prompt": decode(tokenizer, prediction.prompt.context),
        "predict": decode(tokenizer, prediction.ids, skip_special_tokens),
        "label": decode(tokenizer, prediction.prompt.label, skip_special_tokens),
        "source": prediction.prompt.source,
    }
