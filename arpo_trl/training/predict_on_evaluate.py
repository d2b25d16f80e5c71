"""`predict_during_eval`: replies generated and scored at each evaluation."""

from __future__ import annotations

from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..generate.predict import SHOWN, Prediction, decode, eval_prompts, predict_replies
from ..generate.scores import SCORES, describe_scores, score_replies
from ..recipe.keys import Recipe
from ..report.trackers import log_samples
from .trainer import ArpoTrainer


class PredictOnEvaluate(TrainerCallback):
    """Generates and scores the replies of a few held-out rows at each evaluation (`predict_during_eval`).

    Scores are metrics of the evaluation, `eval_predict_<score>`, with the replies as a table in W&B and Trackio. Steps
    after it are as if it had not been: random states, and, added before the log's callback, also their time.
    """

    def __init__(self, recipe: Recipe, trainer: ArpoTrainer, eval_rows: dict[str, Dataset]) -> None:
        self.recipe, self.trainer = recipe, trainer
        self.tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        each = -(-(recipe.predict_during_eval or 0) // len(eval_rows))
        rows = {name: part.select(range(min(each, len(part)))) for name, part in eval_rows.items()}
        self.prompts = eval_prompts(recipe, self.tokenizer, trainer.accelerator.unwrap_model(trainer.model), rows)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if "eval_loss" not in metrics:
            return  # a part of an evaluation
        trainer = self.trainer

        def after_batch() -> None:
            trainer.callback_handler.on_prediction_step(args, state, control)  # a signal stops the run there

        model = trainer.accelerator.unwrap_model(trainer.model)
        predictions = predict_replies(self.recipe, model, self.tokenizer, self.prompts, after_batch)
        scores = score_replies(predictions)
        found = {f"eval_predict_{name}": value for name, value in scores.items()}
        metrics.update(found)
        trainer.log(found)
        if state.is_world_process_zero:
            log_samples(
                args.report_to or [], state.global_step, [to_sample(one, self.tokenizer) for one in predictions]
            )


def to_sample(one: Prediction, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """A row of a tracker's table: the reply, its label, and the scores in which it is wrong."""
    wrong = [name for name, score in SCORES.items() if score(one) is False]
    texts = {"context": decode(tokenizer, one.prompt.context)[-SHOWN:], "predict": one.predict[:SHOWN]}
    return {"source": one.prompt.source} | texts | {"label": one.label[:SHOWN], "wrong": ", ".join(wrong)}


def compare_evaluations(state: TrainerState, load_best: bool) -> list[str]:
    """A table of the scores at the first evaluation and at that of the final weights, if there are two."""
    found = {entry["step"]: entry for entry in state.log_history if "eval_predict_replies" in entry}
    last = state.best_global_step if load_best and state.best_global_step in found else max(found, default=None)
    if last is None or last == min(found):
        return []
    columns = {}
    for step in (min(found), last):
        scores = {name.removeprefix("eval_predict_"): value for name, value in found[step].items()}
        columns[f"step {step}"] = scores
    return describe_scores(columns)
