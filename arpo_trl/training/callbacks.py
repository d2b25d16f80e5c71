"""The trainer's small callbacks: generated replies, early stopping, trackers, saves, and what precedes step 1."""

import contextlib
import io
from collections.abc import Callable
from typing import Any, cast

from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TrackioCallback, WandbCallback, rewrite_logs

from ..data.prepare import PreparedData
from ..data.tokenizer import decode
from ..generate.predict import SHOWN, Prediction, eval_prompts, predict_replies
from ..generate.scores import SCORES, describe_scores, score_replies
from ..recipe.keys import Recipe
from ..report.trackers import log_samples


class BeforeFirstStep(TrainerCallback):
    """Calls `act` between the other callbacks' `on_train_begin` and the first step. Add it last."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        self.act()


class StopEarly(TrainerCallback):
    """Stops after `patience` evaluations in a row that are no better than the best one (`early_stopping_steps`).

    Unlike transformers' EarlyStoppingCallback it counts in the run's log, which checkpoints contain: a resumed run
    continues the count, and one that was killed after it had stopped takes no further step.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        # Without the evaluation before the first step, as transformers counts.
        values = [entry[name] for entry in state.log_history if name in entry and entry["step"]]
        best = max if args.greater_is_better else min
        if values and len(values) - 1 - values.index(best(values)) >= self.patience:
            control.should_training_stop = True

    on_train_begin = on_evaluate


class SaveAfterEpochEnd(TrainerCallback):
    """Saves the last step of an epoch after the epoch's log line and evaluation, which a resume would not repeat.

    Add it after all callbacks that request a save.
    """

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        at_epoch_end = state.epoch % 1 == 0 or state.global_step >= state.max_steps
        if at_epoch_end and "epoch" in (args.eval_strategy, args.logging_strategy):
            self.requested, control.should_save = control.should_save, False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        control.should_save, self.requested = control.should_save or self.requested, False


# --- predict_during_eval ---


class PredictOnEvaluate(TrainerCallback):
    """Generates and scores the replies of a few held-out rows at each evaluation (`predict_during_eval`).

    Scores are metrics of the evaluation, `eval_predict_<score>`, with the replies as a table in W&B and Trackio. The
    steps after it draw the same random numbers as without it.
    """

    def __init__(self, recipe: Recipe, trainer: Trainer, data: PreparedData) -> None:
        self.recipe, self.trainer = recipe, trainer
        self.tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.prompts = eval_prompts(recipe, model, data, -(-(recipe.predict_during_eval or 0) // len(data.eval)))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if "eval_loss" not in metrics:
            return  # one of several datasets
        trainer = self.trainer

        def after_batch() -> None:
            trainer.callback_handler.on_prediction_step(args, state, control)  # a signal stops the run there

        model = trainer.accelerator.unwrap_model(trainer.model)
        predictions = predict_replies(self.recipe, model, self.tokenizer, self.prompts, after_batch)
        scores = {f"eval_predict_{name}": value for name, value in score_replies(predictions).items()}
        metrics.update(scores)
        trainer.log(scores)
        if state.is_world_process_zero:
            samples = [_to_sample(prediction, self.tokenizer) for prediction in predictions]
            log_samples(args.report_to or [], state.global_step, samples)


def _to_sample(prediction: Prediction, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return a row of a tracker's table: the reply, its label, and the scores in which it is wrong."""
    wrong = [name for name, score in SCORES.items() if score(prediction) is False]
    return {
        "source": prediction.prompt.source,
        "context": decode(tokenizer, prediction.prompt.context)[-SHOWN:],
        "predict": prediction.predict[:SHOWN],
        "label": prediction.label[:SHOWN],
        "wrong": ", ".join(wrong),
    }


def compare_evaluations(state: TrainerState, load_best: bool) -> list[str]:
    """Return a table of the first evaluation's scores and the final weights', if these are two evaluations."""
    scored = {entry["step"]: entry for entry in state.log_history if "eval_predict_replies" in entry}
    last = state.best_global_step if load_best and state.best_global_step in scored else max(scored, default=None)
    if last is None or last == min(scored):
        return []
    columns = {}
    for step in (min(scored), last):
        scores = {name.removeprefix("eval_predict_"): value for name, value in scored[step].items()}
        columns[f"step {step}"] = scores
    return describe_scores(columns)


# --- trackers ---

AT_THE_END = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def log_by_step(trainer: Trainer) -> None:
    """Make the training step the x axis of Weights & Biases and Trackio.

    transformers' callbacks log without a step (5.24), so both count calls: an evaluation at step 8 is at 4, and an
    offline run that is resumed starts again at 0, over its first half.
    """
    for theirs, ours in ((WandbCallback, _WandbBySteps), (TrackioCallback, _TrackioBySteps)):
        if trainer.pop_callback(theirs):
            trainer.add_callback(ours)


def _figures(logs: dict[str, float], state: TrainerState) -> dict[str, float]:
    figures: dict[str, float] = rewrite_logs({name: value for name, value in logs.items() if name not in AT_THE_END})
    return figures | {"train/global_step": state.global_step}


class _WandbBySteps(WandbCallback):
    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:  # type: ignore[override]
        if self._wandb.run is not None and (logs := kwargs["logs"]):  # None on all processes but the main one
            self._wandb.run.summary.update({name: logs[name] for name in AT_THE_END & logs.keys()})
            self._wandb.log(_figures(logs, state), step=state.global_step)


class _TrackioBySteps(TrackioCallback):
    def setup(self, *args: object, **kwargs: object) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # a command without TRACKIO_DIR; start_trackers prints it
            super().setup(*args, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:  # type: ignore[override]
        if state.is_world_process_zero and (logs := kwargs["logs"]):
            self._trackio.log(_figures(logs, state), step=state.global_step)
