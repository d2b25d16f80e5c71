"""What several processes of one run do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .errors import RecipeError


def leave_together() -> None:
    """Let no process go before the main one has written its last file: launchers kill the rest when one has left."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def on_main_process(decide: Callable[[], Any]) -> Any:
    """The main process's answer on every process, its `RecipeError` too: only one may touch the run's folder."""
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = decide()
        except RecipeError as error:
            answer[1] = error
    if PartialState().num_processes > 1:
        answer = broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
