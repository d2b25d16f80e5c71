"""What ends a run before its last step: a signal, or evaluations that no longer get better."""

from __future__ import annotations

import signal
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback


class StopOnSignal(TrainerCallback):
    """SIGTERM and the first Ctrl-C let the step finish, save a checkpoint and stop; the second Ctrl-C stops at once.

    `signum` is the signal that stops the run, or None. With several processes the step at which they stop is agreed
    on, so that no process waits for another's collective.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not earlier: before the first step there is nothing to save, and a signal may stop the process at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signum is None:  # the SIGTERM of a dying launcher may follow the Ctrl-C that killed it
            self.signum = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            signum = torch.tensor(self.signum or 0, device=args.device)
            torch.distributed.all_reduce(signum, op=torch.distributed.ReduceOp.MAX)
            self.signum = int(signum) or None
        if self.signum is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            # Trainer's end would load the best weights, and under save_total_limit 1 delete every other checkpoint.
            args.load_best_model_at_end, args.save_total_limit = False, None

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop and self.signum is not None and state.epoch % 1:
            # Trainer leaves a stopped epoch as one that ended, to be evaluated and saved once more.
            control.should_save = control.should_evaluate = control.should_log = False


class StopEarly(EarlyStoppingCallback):
    """transformers' callback, deaf to the parts of an evaluation that do not hold the watched metric."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)  # type: ignore[no-untyped-call]
