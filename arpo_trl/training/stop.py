"""What SIGTERM and Ctrl-C do: the step in progress is finished and saved, then the run stops.

Its exit code, 128 + the signal's number, and its last lines are train.py's.
"""

from __future__ import annotations

import contextlib
import signal
import sys

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..report.console import say


class Stopped(Exception):
    """A signal ends the run: raised after a save, or in an evaluation."""


class StopOnSignal(TrainerCallback):
    """SIGTERM and the first Ctrl-C save a checkpoint after the step, or the batch of an evaluation, in progress.

    The second Ctrl-C stops at once. `signum` is the signal that stops the run, or None. Several processes stop at the
    same step or batch, so that none waits for another. After the last step only an evaluation is stopped, and only once
    that step is saved.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.saved_step, self.training = -1, False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        # Not earlier: before the first step there is nothing to save, and a signal may stop the process at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if sys.platform == "win32":  # Ctrl-Break, and a console that is closed
            signal.signal(signal.SIGBREAK, self._on_signal)
        self.saved_step, self.training = state.global_step, True

    def _on_signal(self, number: int, frame: object) -> None:
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

    def _signalled(self, args: TrainingArguments) -> bool:
        """Whether a signal has reached any process: the same answer on all."""
        if args.world_size > 1:
            signum = torch.tensor(self.signum or 0, device=args.device)
            torch.distributed.all_reduce(signum, op=torch.distributed.ReduceOp.MAX)
            self.signum = int(signum) or None
        return self.signum is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._signalled(args) and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.saved_step = state.global_step
        if self._signalled(args) and state.global_step < state.max_steps:
            raise Stopped

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        if self._signalled(args) and (self.training or self.saved_step == state.global_step):
            raise Stopped

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.training = False
