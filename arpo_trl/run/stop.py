"""What ends a run before its last step: a signal, or evaluations that no longer get better."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Any

import torch
from transformers import TrainerCallback

from ..report.console import say
from .trainer import ArpoTrainer, Stopped


class StopOnSignal(TrainerCallback):
    """SIGTERM and the first Ctrl-C save a checkpoint after the step, or the batch of an evaluation, in progress.

    The second Ctrl-C stops at once. `signum` is the signal that stops the run, or None. Several processes stop at the
    same step or batch, so that none waits for another. After the last step only an evaluation is stopped, and only once
    that step is saved.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.saved_step, self.training = -1, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not earlier: before the first step there is nothing to save, and a signal may stop the process at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if sys.platform == "win32":  # Ctrl-Break, and a console that is closed
            signal.signal(signal.SIGBREAK, self._on_signal)
        self.saved_step, self.training = state.global_step, True

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signum is None:  # the SIGTERM of a dying launcher may follow the Ctrl-C that killed it
            self.signum = number
            with contextlib.suppress(RuntimeError):  # the signal may have come while a line was printed
                say(f"{signal.Signals(number).name}: stopping after this step or evaluation batch")

    def restore_default_handlers(self) -> None:
        """Leave signals to Python: they end the process at once. For what follows once the model is saved."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _signalled(self, args: Any) -> bool:
        """Whether a signal has reached any process: the same answer on all."""
        if args.world_size > 1:
            signum = torch.tensor(self.signum or 0, device=args.device)
            torch.distributed.all_reduce(signum, op=torch.distributed.ReduceOp.MAX)
            self.signum = int(signum) or None
        return self.signum is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._signalled(args) and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_step = state.global_step
        if self._signalled(args) and state.global_step < state.max_steps:
            raise Stopped

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._signalled(args) and (self.training or self.saved_step == state.global_step):
            raise Stopped

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = False


class StopEarly(TrainerCallback):
    """Stops after `patience` evaluations in a row that are no better than the best one.

    As transformers' EarlyStoppingCallback, but counted in the run's log, which a checkpoint holds: a resumed run goes
    on counting, and one that was killed after it had stopped takes no further step.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_if_no_better(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop_if_no_better(args, state, control)

    def _stop_if_no_better(self, args: Any, state: Any, control: Any) -> None:
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        # Without the evaluation before the first step, as transformers counts.
        values = [entry[name] for entry in state.log_history if name in entry and entry["step"]]
        if (
            values
            and len(values) - 1 - values.index((max if args.greater_is_better else min)(values)) >= self.patience
        ):
            control.should_training_stop = True


class SaveAfterEpochEnd(TrainerCallback):
    """Saves the last step of an epoch after what the epoch's end logs and evaluates: a resume would not do that again.

    Add it after all callbacks that ask for a save.
    """

    def __init__(self) -> None:
        self.wanted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        at_epoch_end = state.epoch % 1 == 0 or state.global_step >= state.max_steps
        if at_epoch_end and "epoch" in (args.eval_strategy, args.logging_strategy):
            self.wanted, control.should_save = control.should_save, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save, self.wanted = control.should_save or self.wanted, False


class ResumeEvaluation(TrainerCallback):
    """Takes the evaluation that a signal had stopped, before the next step. Add it last: the log must have begun."""

    def __init__(self, trainer: ArpoTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.evaluate_pending()
