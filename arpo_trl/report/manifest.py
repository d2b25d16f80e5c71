"""run.json: the run's inputs and status, and what may change when it is resumed."""

import contextlib
import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from itertools import dropwhile, islice
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from accelerate import PartialState
from pydantic import BaseModel, BeforeValidator, JsonValue

from ..data.files import read_dataset
from ..data.messages import Fields, Message
from ..data.pairs import read_sides
from ..data.prepare import PreparedData
from ..data.sources import select_datasets
from ..errors import RecipeError, RowError
from ..machine import installed_versions
from ..processes import on_main_process
from ..recipe.keys import OutputKeys, PredictKeys, Recipe, RolloutKeys, keys
from ..recipe.methods import CANNOT_CHANGE as METHODS_CANNOT_CHANGE
from ..run_folder import MANIFEST, write_json
from ..version import __version__

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
SAMPLED = 100  # rows per dataset, to find out where its tool results are, and which system message and tools it has
SHARED = 0.5
"""The share of the sampled rows that must have a system message, or tools, for `chat` to use them."""
Results = Literal["turn", "inside"]

MAY_CHANGE = frozenset(
    """
    logging_strategy logging_first_step log_level log_level_replica disable_tqdm save_total_limit save_only_model
    eval_steps eval_strategy eval_on_start eval_delay per_device_eval_batch_size load_best_model_at_end
    metric_for_best_model greater_is_better early_stopping_steps do_eval overwrite_cache preflight
    preprocessing_num_workers preprocessing_batch_size tokenized_path dataset_dir max_dropped dataloader_num_workers
    dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers ddp_timeout push_to_hub hub_model_id
    hub_strategy hub_private_repo hub_revision cache_dir gradient_checkpointing use_reentrant_gc activation_offloading
    use_cpu trust_remote_code include_num_input_tokens_seen trackio_space_id trackio_bucket_id trackio_static_space_id
    hub_always_push log_on_each_node eval_on_each_dataset skip_memory_metrics save_on_each_node eval_packing
    """.split()
) | frozenset([*OutputKeys.model_fields, *PredictKeys.model_fields, *RolloutKeys.model_fields])
"""Keys that do not affect the weights, so that they may change when a run is resumed."""
BATCH = ("global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
DEPEND_ON_PROCESSES = """
    streaming packing neat_packing group_by_length dataloader_drop_last neftune_noise_alpha
    moe_aux_loss_coef""".split()
"""Keys with which a step depends on how many processes share it: its rows, their order or random numbers."""

CANNOT_CHANGE = (
    frozenset(
        """
        stage finetuning_type adapter_name_or_path create_new_adapter lora_rank lora_target additional_target use_dora
        optim optim_args optim_target_modules fp16 seed
        """.split()
    )
    | METHODS_CANNOT_CHANGE
)
"""Keys of what a checkpoint contains: its weights, their optimizer's state, the scaler's, and the random states."""
DECIDE_SPEED = (
    "model_name_or_path stage finetuning_type lora_rank quantization_bit bf16 fp16 pure_bf16 optim packing padding_free "
    "per_device_train_batch_size gradient_accumulation_steps disable_gradient_checkpointing"
).split()
"""Keys that an earlier run must share for its speed to be that of this one."""
SCHEDULES_WITH_STATE = ("reduce_lr_on_plateau", "greedy")
"""Schedules whose rate depends on the metrics so far."""
METRIC_KEYS = ("metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps", "eval_delay")


PATHS = frozenset("model_name_or_path adapter_name_or_path ref_model ref_model_adapters template deepspeed".split())
"""Keys with paths that affect the weights. run.json has them as the recipe does, so that a moved project still resumes."""


class Manifest(BaseModel):
    """The content of run.json: all that decides the weights, and the versions that computed them.

    Attributes:
        data: A hash of each dataset's content.
        day: The date that the template writes.
        computed_in: The dtype of the computation, which depends on the CPU; see `bf16`.
        split: How the launch splits the model; see `model/split.py`.
        reference: The reference model of `stage: dpo`: its path, adapters, and a hash of their files.
        results: Whether tool results are separate turns or inside the model's turn; None if there are none.
        system, tools: Those of at least half of the training rows, for `arpo-trl chat` and the model card; None if no
            row has any, or `system_share` or `tools_share`, the share of the most frequent ones, is below half.
        tracker_run: The run's id in its trackers.
    """

    status: Annotated[str, BeforeValidator(str)] = ""
    started: str = ""
    recipe: dict[str, JsonValue]
    data: dict[str, str]
    template_hash: str = ""
    day: date
    audit: dict[str, dict[str, JsonValue]] = {}
    world_size: int = 1
    versions: dict[str, str]
    git_commit: str | None = None
    computed_in: str | None = None
    split: str | None = None
    reference: dict[str, JsonValue] | None = None
    results: Results | None = None
    system: str | None = None
    system_share: float | None = None
    tools: list[dict[str, JsonValue]] | None = None
    tools_share: float | None = None
    tracker_run: str | None = None

    def write(self, output_dir: Path, status: Literal["running", "stopped", "finished"]) -> None:
        """Write run.json with this status."""
        self.status = status
        write_json(output_dir / MANIFEST, self.model_dump(mode="json"))


def describe_run(recipe: Recipe, data: PreparedData) -> Manifest:
    """Return the manifest of a run that starts now."""
    return Manifest(
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        recipe=recipe.resolved(),
        data=data.fingerprints,
        template_hash=data.template.hash,
        day=data.template.day,
        audit=asdict(data.audit)["datasets"],
        world_size=PartialState().num_processes,
        versions={"arpo_trl": __version__, "python": platform.python_version(), **installed_versions(PACKAGES)},
        git_commit=git_commit(),
        **sample_rows(recipe),
    )


def run_day(recipe: Recipe) -> date:
    """Return the day that a dated template writes: that of the run in `output_dir` if it is resumed, else today."""

    def read() -> date:
        resumed = recipe.resume_from_checkpoint
        if recipe.overwrite_output_dir and not resumed:
            return date.today()
        folder = Path(resumed).parent if isinstance(resumed, str) else Path(recipe.output_dir)
        manifest = read_manifest(folder)
        return manifest.day if manifest and manifest.day else date.today()

    return on_main_process(read)


def git_commit() -> str | None:
    """Return the commit of the working directory, or None outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def sample_rows(recipe: Recipe) -> dict[str, Any]:
    """Return where most of the first rows with tool results have them, and the system message and tools of most rows.

    The names are those of the manifest's fields; empty if no row can be read.

    Results are looked for after the first reply: a system prompt or a question may mention the tag.
    """
    inside = turns = 0
    systems, tools = Counter[str](), Counter[str]()
    for messages, listed in _sampled_conversations(recipe):
        systems[messages[0]["content"] if messages[0]["role"] == "system" else ""] += 1
        tools[json.dumps(listed or [], default=str)] += 1
        later = list(dropwhile(lambda message: message["role"] != "assistant", messages))
        with_result = {message["role"] for message in later if "<result>" in message["content"]}
        inside += "assistant" in with_result
        turns += "user" in with_result or any(message["role"] == "tool" for message in later)
    if not systems:
        return {}
    ((system, with_system),), ((shared, with_tools),) = systems.most_common(1), tools.most_common(1)
    system_share, tools_share = with_system / systems.total(), with_tools / tools.total()
    return {
        "results": "inside" if inside > turns else "turn" if turns else None,
        "system": system or None if system_share >= SHARED else None,
        "system_share": system_share,
        "tools": json.loads(shared) or None if tools_share >= SHARED else None,
        "tools_share": tools_share,
    }


def _sampled_conversations(recipe: Recipe) -> Iterator[tuple[list[Message], list[Fields] | None]]:
    """Yield the messages and tools of the first rows of each training dataset, of pairs the chosen side."""
    with contextlib.suppress(RecipeError):  # the rows were encoded elsewhere, without their files here
        for info in select_datasets(recipe):
            if recipe.dataset and info.name not in recipe.dataset:
                continue
            for row in islice(read_dataset(info, recipe.streaming), SAMPLED):
                with contextlib.suppress(RowError):
                    conversation = read_sides(row.value, info, recipe.default_system)[0]
                    yield conversation.messages, conversation.tools


def read_manifest(output_dir: Path) -> Manifest | None:
    """Return the manifest of the run in `output_dir`, or None if it is missing or unreadable."""
    try:
        return Manifest.model_validate_json((output_dir / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None


def find_manifest(model: Path) -> Manifest | None:
    """Return the manifest of the run that wrote a model; a checkpoint's is in the parent folder."""
    return read_manifest(model) or read_manifest(model.parent)


def _setting(manifest: Manifest, key: str) -> object:
    default = keys()[key].default if key in keys() else None
    return manifest.recipe.get(key, cast(JsonValue, default))


def _rows_per_step(manifest: Manifest) -> int | None:
    """Return the rows of a step on all processes; None if the steps also depend on how many processes share them."""
    if any(_setting(manifest, key) for key in DEPEND_ON_PROCESSES):
        return None
    if _setting(manifest, "finetuning_type") == "lora" and _setting(manifest, "lora_dropout"):
        return None
    total, rows, accumulated = (_setting(manifest, key) for key in BATCH)
    if isinstance(total, int):
        return total
    assert isinstance(rows, int) and isinstance(accumulated, int)
    return rows * accumulated * manifest.world_size


def list_changes(earlier: Manifest, now: Manifest) -> list[str]:
    """Return a line for each difference between two manifests that would affect the weights.

    The same rows per step may be shared by another number of processes and batches: gradients differ in rounding only.
    """
    changes = []
    rows, rows_now = _rows_per_step(earlier), _rows_per_step(now)
    same_steps = rows is not None and rows == rows_now
    same_dtype = now.computed_in is not None and earlier.computed_in == now.computed_in
    may_change = {*MAY_CHANGE, *(("bf16", "force_bf16") if same_dtype else ()), *(BATCH if same_steps else ())}
    if _has_schedule_with_state(earlier, now):
        may_change -= {*METRIC_KEYS}
    for key in sorted(earlier.recipe.keys() | now.recipe.keys()):
        before, after = _setting(earlier, key), _setting(now, key)
        if before != after and key not in may_change and not (key in PATHS and _are_same_paths(before, after)):
            changes.append(f"{key}: {_in_yaml(before)} -> {_in_yaml(after)}")
    for name in sorted(earlier.data.keys() | now.data.keys()):
        if earlier.data.get(name) != now.data.get(name):
            changes.append(f"data of {name}: {earlier.data.get(name)} -> {now.data.get(name)}")
    if earlier.template_hash != now.template_hash:
        changes.append(f"template_hash: {earlier.template_hash} -> {now.template_hash}")
    if earlier.computed_in != now.computed_in:
        restored = {"float32": "set bf16: false", "bfloat16": "set bf16: true and force_bf16: true"}
        fix = restored.get(str(earlier.computed_in), "restore it")
        changes.append(f"computed in: {earlier.computed_in} -> {now.computed_in} ({fix})")
    if not _are_same_paths(earlier.reference, now.reference):
        changes.append(f"reference: {_describe_reference(earlier.reference)} -> {_describe_reference(now.reference)}")
    if earlier.world_size != now.world_size and not same_steps:
        fix = f"launch {earlier.world_size}"
        if rows is not None and rows_now is not None:
            fix += f", or keep {rows} rows per step, found {rows_now}"
        changes.append(f"world_size: {earlier.world_size} -> {now.world_size} processes ({fix})")
    return changes


def _are_same_paths(before: object, after: object) -> bool:
    """Return whether two paths, or lists or tables of them, are spellings of one: `./base` and `base`, or a link to it."""
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_are_same_paths(before[name], after[name]) for name in before)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(_are_same_paths, before, after))
    if not isinstance(before, str) or not isinstance(after, str):
        return before == after
    if os.path.normcase(os.path.normpath(before)) == os.path.normcase(os.path.normpath(after)):
        return True
    try:
        return Path(before).samefile(after)
    except (OSError, ValueError):
        return False


def _in_yaml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if value is None or isinstance(value, bool) else repr(value)


def _describe_reference(reference: dict[str, JsonValue] | None) -> str:
    if reference is None:
        return "none"
    adapters = cast(list[str], reference["adapters"])
    return f"{' + '.join([str(reference['path']), *adapters])} ({str(reference['hash'])[:8]})"


def _has_schedule_with_state(*manifests: Manifest) -> bool:
    return any(manifest.recipe.get("lr_scheduler_type") in SCHEDULES_WITH_STATE for manifest in manifests)


def _cannot_change(earlier: Manifest, now: Manifest) -> frozenset[str]:
    if not _has_schedule_with_state(earlier, now):
        return CANNOT_CHANGE
    return CANNOT_CHANGE | {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", *METRIC_KEYS}


def require_same_run(earlier: Manifest | None, now: Manifest, allow_changed_recipe: bool) -> list[str]:
    """Check that a run is resumed with the same recipe, data and number of processes.

    Returns:
        A line for each change that `allow_changed_recipe` permits, and for each library whose version changed.

    Raises:
        RecipeError: something changed that affects the weights, or that a resumed run can't change.
    """
    if earlier is None:
        return [f"{MANIFEST} is missing or unreadable; recipe and data are not compared with those of the earlier run"]
    changes = list_changes(earlier, now)
    fixed = [change for change in changes if change.partition(":")[0] in _cannot_change(earlier, now)]
    if fixed or (changes and not allow_changed_recipe):
        fix = "restore them, set allow_changed_recipe: true to resume anyway, or overwrite_output_dir: true to start over"
        if fixed:
            names = ", ".join(change.partition(":")[0] for change in fixed)
            fix = f"{names}: a checkpoint contains this. Restore it, or set overwrite_output_dir: true to start over"
        listed = fixed if allow_changed_recipe else changes
        raise RecipeError("the run in this folder has different settings:\n  " + "\n  ".join([*listed, fix]))
    versions = [
        f"{name} {before} -> {now.versions.get(name)}"
        for name, before in earlier.versions.items()
        if before != now.versions.get(name)
    ]
    shared = [[manifest.world_size, *(_setting(manifest, key) for key in BATCH)] for manifest in (earlier, now)]
    regrouped = shared[0] != shared[1] and not changes
    return [
        *["resuming with the same rows per step, grouped differently: losses may differ in the last digits"]
        * regrouped,
        *(f"resuming with a changed setting: {change}" for change in changes),
        *(f"resuming with another version, losses may differ in the last digits: {version}" for version in versions),
    ]
