"""The x axis of Weights & Biases and Trackio: the step of training.

transformers' callbacks log without a step (5.24), so that both count calls: an evaluation at step 8 stands at 4, and an
offline run that is resumed starts again at 0, over its first half.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from transformers import Trainer, TrainerState
from transformers.integrations.integration_utils import TrackioCallback, WandbCallback, rewrite_logs

AT_THE_END = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def log_by_step(trainer: Trainer) -> None:
    """Replace the two callbacks, where the trainer has them."""
    for theirs, ours in ((WandbCallback, _WandbBySteps), (TrackioCallback, _TrackioBySteps)):
        if trainer.pop_callback(theirs):
            trainer.add_callback(ours)


def _figures(logs: dict[str, float], state: TrainerState) -> dict[str, float]:
    figures: dict[str, float] = rewrite_logs({name: value for name, value in logs.items() if name not in AT_THE_END})
    return figures | {"train/global_step": state.global_step}


class _WandbBySteps(WandbCallback):
    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:  # type: ignore[override]
        if self._wandb.run is not None and (logs := kwargs["logs"]):  # none but on the main process
            self._wandb.run.summary.update({name: logs[name] for name in AT_THE_END & logs.keys()})
            self._wandb.log(_figures(logs, state), step=state.global_step)


class _TrackioBySteps(TrackioCallback):
    def setup(self, *args: object, **kwargs: object) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # a command that lacks TRACKIO_DIR; `start_trackers` says it
            super().setup(*args, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:  # type: ignore[override]
        if state.is_world_process_zero and (logs := kwargs["logs"]):
            self._trackio.log(_figures(logs, state), step=state.global_step)
