"""SIGTERM and Ctrl-C: the run finishes the step in progress, saves a checkpoint and stops.

train.py turns this into its last lines and the exit code, 128 + the signal's number.
"""

import contextlib
import signal
import sys

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..report.console import say


class Stopped(Exception):
    """A signal ends the run. Raised after a save, or during an evaluation."""


class StopOnSignal(TrainerCallback):
    """On SIGTERM or the first Ctrl-C, saves a checkpoint after the step or evaluation batch in progress, and stops.

    The second Ctrl-C stops at once. `signum` is the signal that stops the run, or None. Several processes stop at the
    same step or batch, so that none waits for another. After the last step only an evaluation is stopped, and only once
    that step is saved.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.saved_step, self.training = -1, False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        # Not earlier: before training there is nothing to save, and a signal may stop the process at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if sys.platform == "win32":  # Ctrl-Break, and a console being closed
            signal.signal(signal.SIGBREAK, self._on_signal)
        self.saved_step, self.training = state.global_step, True

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signum is None:  # a launcher killed by Ctrl-C may send a SIGTERM after it
            self.signum = number
            with contextlib.suppress(RuntimeError):  # the signal may have interrupted a print
                say(f"{signal.Signals(number).name}: stopping after this step or evaluation batch")

    def restore_default_handlers(self) -> None:
        """Let signals end the process at once again, once the model is saved."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.platform == "win32":
            signal.signal(signal.SIGBREAK, signal.SIG_DFL)

    def _signalled(self, args: TrainingArguments) -> bool:
        """Return whether any process has received a signal, the same on all processes."""
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
