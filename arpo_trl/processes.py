"""Coordination of the processes of a run."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .errors import RecipeError

T = TypeVar("T")


def join_processes(timeout: timedelta) -> None:
    """Connect to the other processes of the launcher. Must precede any other use of `PartialState`."""
    PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)


def leave_together() -> None:
    """Wait until the main process has written its last file: launchers kill the others when one exits."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def on_main_process(decide: Callable[[], T]) -> T:
    """Call `decide` on the main process, and return its result (or raise its `RecipeError`) on all of them."""
    result: T | RecipeError | None = None
    if PartialState().is_main_process:
        try:
            result = decide()
        except RecipeError as error:
            result = error
    if PartialState().num_processes > 1:
        (result,) = broadcast_object_list([result])
    if isinstance(result, RecipeError):
        raise result
    return cast(T, result)
