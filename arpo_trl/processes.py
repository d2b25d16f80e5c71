"""What several processes of one run do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .errors import RecipeError

T = TypeVar("T")


def leave_together() -> None:
    """Let no process go before the main one has written its last file: launchers kill the rest when one has left."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def on_main_process(decide: Callable[[], T]) -> T:
    """The main process's answer on every process, its `RecipeError` too: only one may touch the run's folder."""
    answers: list[T | RecipeError | None] = [None]
    if PartialState().is_main_process:
        try:
            answers = [decide()]
        except RecipeError as error:
            answers = [error]
    if PartialState().num_processes > 1:
        broadcast_object_list(answers)
    (answer,) = answers
    if isinstance(answer, RecipeError):
        raise answer
    return cast(T, answer)
