"""Starts and ends the runs of the trackers in `report_to`; TRL's trainer sends the metrics.

Each tracker writes into output_dir, unless the user's environment variable names another place. A resumed run continues
the tracker's run, whose id is in run.json.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import in_one_line
from ..shell import quote_command
from .console import say

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig

    from ..recipe.keys import Recipe
    from .manifest import Manifest

WANDB_FIXES = "run `wandb login`, set WANDB_MODE=offline, or set report_to: none"
WANDB_CONFIG = {"recipe", "audit", "versions", "git_commit", "world_size"}


def missing_trackers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield key and problem of the trackers in `report_to` that are not installed or lack a login. Imports no torch."""
    for tracker in recipe.report_to:
        package = {"azure_ml": "azureml", "flyte": "flytekit"}.get(tracker, tracker)
        if tracker != "all" and importlib.util.find_spec(package) is None:
            by_key = tracker == "swanlab" and recipe.use_swanlab
            key, off = ("use_swanlab", "false") if by_key else ("report_to", "none")
            yield key, f"{tracker} is not installed; pip install {package}, or set {key}: {off}"
        elif tracker == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
            import wandb

            try:
                if not wandb.login(prompt=False):
                    yield "report_to", f"not logged in to wandb; {WANDB_FIXES}"
            except wandb.Error as error:  # a wrong key, or no server
                yield "report_to", f"wandb login failed ({in_one_line(error)}); {WANDB_FIXES}"


def start_trackers(recipe: Recipe, args: SFTConfig, manifest: Manifest, earlier: Manifest | None) -> None:
    """Prepare the trackers of `args.report_to`, on the main process, before the model is loaded.

    Adds the id of the run, or that of the `earlier` one which is resumed, to the manifest; may set `args.run_name`.

    Raises:
        RecipeError: Weights & Biases can't start a run.
    """
    if recipe.use_swanlab:
        os.environ.setdefault("SWANLAB_PROJECT", recipe.swanlab_project)
        os.environ.setdefault("SWANLAB_MODE", recipe.swanlab_mode)
        os.environ.setdefault("SWANLAB_LOG_DIR", recipe.swanlab_logdir or str(Path(recipe.output_dir) / "swanlog"))
        if recipe.swanlab_workspace:
            os.environ.setdefault("SWANLAB_WORKSPACE", recipe.swanlab_workspace)
    trackers = set(args.report_to or []) & {"wandb", "tensorboard", "trackio"}
    if not trackers:
        return
    run_id = manifest.tracker_run = (earlier and earlier.tracker_run) or secrets.token_hex(4)
    output_dir = Path(recipe.output_dir).resolve()
    name = recipe.run_name or output_dir.name
    if "tensorboard" in trackers:
        # A folder per run: else a resumed run would be a second curve, and one started over would continue the first.
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output_dir / "runs" / f"{name}-{run_id}"))
    if "trackio" in trackers:
        folder = os.environ.setdefault("TRACKIO_DIR", str(output_dir / "trackio"))
        args.run_name = f"{name}-{run_id}"  # Trackio resumes by name
        show = quote_command(["trackio", "show", "--project", args.project], TRACKIO_DIR=folder)
        say(f"trackio  {show}")
    if "wandb" in trackers:
        _start_wandb(recipe, args, output_dir, name, manifest)


def _start_wandb(recipe: Recipe, args: SFTConfig, output_dir: Path, name: str, manifest: Manifest) -> None:
    """Start or resume the run, which transformers' callback then uses."""
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ.setdefault(variable, str(output_dir / "wandb"))
    import wandb

    try:
        wandb.init(
            project=recipe.project or os.environ.get("WANDB_PROJECT", args.project),
            name=name,
            id=manifest.tracker_run,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", output_dir),
            config=manifest.model_dump(include=WANDB_CONFIG),
        )
    except wandb.Error as error:
        problem = f"wandb could not start a run ({in_one_line(error)}); {WANDB_FIXES}"
        raise recipe.error("report_to", problem) from error


def continue_curves(callbacks: Iterable[object], step: int) -> None:
    """Have TensorBoard forget what was logged after the checkpoint of `step`: a resumed run logs these steps again.

    transformers' callback opens its writer without purge_step (5.24, integration_utils.py#L606).
    """
    from transformers.integrations.integration_utils import TensorBoardCallback

    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            writer: Any = functools.partial(callback._SummaryWriter, purge_step=step + 1)
            callback._SummaryWriter = writer


def log_samples(trackers: Collection[str], step: int, rows: list[dict[str, str]]) -> None:
    """Log generated replies, a dictionary per row, as a table to the trackers that have tables."""
    import pandas

    table = pandas.DataFrame(rows)
    if "wandb" in trackers:
        import wandb

        wandb.log({"eval/samples": wandb.Table(dataframe=table)}, step=step)
    if "trackio" in trackers:
        import trackio

        trackio.log({"eval/samples": trackio.Table(dataframe=table)}, step=step)


def finish_trackers(args: SFTConfig, output_dir: Path) -> None:
    """Upload the plot and the model card to Weights & Biases and end its run."""
    if "wandb" not in (args.report_to or []):
        return
    import wandb

    if wandb.run is None:  # not the main process
        return
    plot, card = output_dir / "training_loss.png", output_dir / "README.md"
    if plot.exists():
        wandb.run.log({"training_loss": wandb.Image(str(plot))})
    if card.exists():
        # A copy: wandb.save alone would leave a link, which breaks if the folder moves.
        copy = shutil.copy(card, wandb.run.dir)
        wandb.run.save(copy, base_path=wandb.run.dir, policy="now")
    wandb.finish()
