"""`early_stopping_steps`: evaluations that no longer get better end a run before its last step."""

from __future__ import annotations

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopEarly(TrainerCallback):
    """Stops after `patience` evaluations in a row that are no better than the best one.

    As transformers' EarlyStoppingCallback, but counted in the run's log, which a checkpoint holds: a resumed run goes
    on counting, and one that was killed after it had stopped takes no further step.
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
