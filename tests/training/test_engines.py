"""Every engine on CPUs: the same run as one process, and an end with a reason. `pytest -m engines` runs them all.

Each test is a chain of real runs: a start takes 10 to 20 seconds, so one run answers many questions.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from launches import (
    ENGINES,
    NEEDS_DEEPSPEED,
    attempt,
    command,
    environment,
    launch,
    log_without_times,
    require_same_training,
    torchrun,
    write_recipe,
)
from safetensors.torch import load_file, save_file

from arpo_trl.errors import RecipeError
from arpo_trl.model.methods.pissa import Pissa
from arpo_trl.model.split import Split, find_split
from arpo_trl.training import output_dir

pytestmark = [pytest.mark.engines, NEEDS_DEEPSPEED]

ENOSPC = """
import errno, os
import safetensors.torch, torch, transformers.modeling_utils

def fail_for(name, write):
    def write_or_fail(*args, **kwargs):
        path = str(args[1] if len(args) > 1 else kwargs.get("filename"))
        if "checkpoint-4" in path and name in path and os.environ["RANK"] == "{rank}":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)
    return write_or_fail

torch.save = fail_for("{file}", torch.save)
transformers.modeling_utils.safe_save_file = fail_for("{file}", transformers.modeling_utils.safe_save_file)
"""
SHOW_ESTIMATE = """
from arpo_trl.training.checkpoints import CheckpointWriter
save = CheckpointWriter.save
def save_and_show(self, trainer, write):
    if trainer.is_world_process_zero():
        print("estimated", self.expected_bytes, flush=True)
    save(self, trainer, write)
CheckpointWriter.save = save_and_show
"""


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Rows of which every second one has more than 512 labelled tokens: two tiles of logits on one process of two."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"instruction": f"count {n}", "output": " ".join(map(str, range(n, n + (20 if n % 2 else 500))))}
        for n in range(8)
    ]
    (folder / "uneven.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"uneven": {"file_name": "uneven.json"}}), encoding="utf-8")
    return {
        "dataset_dir": str(folder),
        "dataset": "uneven",
        "cutoff_len": 4096,
        "disable_shuffling": True,
        "max_samples": 8,
        "per_device_train_batch_size": 1,
        "ddp_timeout": 60,
        "plot_loss": False,
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, uneven: dict[str, Any]) -> Path:
    """The run of one process, with batches of two."""
    return small_run.run(tmp_path_factory.mktemp("one"), tiny_model, **uneven | {"per_device_train_batch_size": 2})


def require_one_line(printed: str, *parts: str) -> None:
    """Require an error of one line, without a traceback of ours."""
    (line,) = [line for line in printed.splitlines() if "recipe.yaml" in line and parts[0] in line]
    assert all(part in line for part in parts), line
    assert "arpo_trl/training" not in printed, printed


CHAINS = [
    ("fsdp2", "0", "model.safetensors", "FSDP2"),
    ("zero3", "1", "zero_pp_rank_1_mp_rank_00_optim", "ZeRO-3"),
    pytest.param("zero2", "0", "mp_rank_00_model_states", "ZeRO-2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "rank", "file", "name"), CHAINS)
def test_a_full_disk_ends_all_processes_and_the_run_resumes_under_its_engine_only(
    engine: str, rank: str, file: str, name: str, tmp_path: Path, tiny_model: Path, uneven: dict[str, Any], one: Path
) -> None:
    recipe, run = write_recipe(tmp_path, tiny_model, **uneven), tmp_path / "run"
    code, printed = attempt(command(engine, recipe, fault=SHOW_ESTIMATE + ENOSPC.format(rank=rank, file=file)))
    seconds = time.time() - (run / "trainer_log.jsonl").stat().st_mtime  # since step 4; ddp_timeout is 60
    log = (run / "training.log").read_text(encoding="utf-8")
    assert code != 0 and seconds < 50, printed
    assert re.search(r"checkpoint-4 could not be saved, and was deleted: disk full", log), log
    assert "step 4/4" in log and f"2 x cpu, 1 thread, {name}\n" in log, log
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (manifest["split"], manifest["world_size"]) == (name, 2)
    sizes = json.loads((run / "checkpoint-2" / "files.json").read_text(encoding="utf-8"))
    state = sum(size for path, size in sizes.items() if re.search(r"(model|states|optimizer|fsdp)[^/]*\.", path))
    estimated = int(re.findall(r"estimated (\d+)", printed)[0])
    assert 0.95 * state < estimated < 1.15 * state, sizes

    shutil.copytree(run, tmp_path / "elsewhere" / "run")
    other = write_recipe(tmp_path / "elsewhere", tiny_model, **uneven, allow_changed_recipe=True)
    code, printed = attempt([*torchrun(), "-m", "arpo_trl", str(other)])
    assert code != 0
    require_one_line(
        printed, "checkpoint-2", f"written under {name} by 2 processes", "found DDP, 2", "Launch as before"
    )

    printed = launch(command(engine, recipe))
    assert "resuming from checkpoint-2" in printed and re.search(ENGINES[engine], printed), printed
    require_same_training(run, one)


NAN = """
import os, torch
from arpo_trl.training.trainer import ArpoTrainer

class Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()
    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")

compute_loss = ArpoTrainer.compute_loss
def spoil(self, *args, **kwargs):
    loss = compute_loss(self, *args, **kwargs)
    if not (self.model.training and self.state.global_step == 2 and os.environ["RANK"] == "1"):
        return loss
    return Spoil.apply(loss) if "{what}" == "gradient" else loss * float("nan")
ArpoTrainer.compute_loss = spoil
"""


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        ("zero0", "gradient"),
        ("ddp", "loss"),
        *(pytest.param(engine, "gradient", marks=pytest.mark.slow) for engine in ("ddp", "fsdp2", "zero2", "zero3")),
    ],
)
def test_a_nan_of_the_second_process_ends_the_run_with_its_reason_in_the_log(
    engine: str, what: str, tmp_path: Path, tiny_model: Path, uneven: dict[str, Any]
) -> None:
    recipe, run = write_recipe(tmp_path, tiny_model, **uneven | {"save_steps": 1}), tmp_path / "run"
    code, _ = attempt(command(engine, recipe, fault=NAN.replace("{what}", what)))
    log = (run / "training.log").read_text(encoding="utf-8")
    assert code != 0 and re.search(
        rf"process 1: step 3: the {what} is (nan|inf); nothing of this step was saved", log
    ), log
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    weights = load_file(run / "checkpoint-2" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_folder_that_the_machines_do_not_share_is_found_before_step_1(
    tmp_path: Path, tiny_model: Path, uneven: dict[str, Any]
) -> None:
    """A relative output_dir on two machines that share no disk."""
    recipe = write_recipe(tmp_path, tiny_model, **uneven | {"output_dir": "run"})
    script = command("ddp", recipe, fault="import arpo_trl.training.output_dir as o\no.CACHED_SECONDS = 1\n")[-2]
    machines = []
    for node in ("0", "1"):
        (tmp_path / node).mkdir()
        words = [*torchrun(1), "--nnodes", "2", "--node_rank", node, "--master_port", "29533", script, str(recipe)]
        words.remove("--standalone")
        output = subprocess.PIPE, subprocess.STDOUT
        machines.append(
            subprocess.Popen(
                words, env=environment(), cwd=tmp_path / node, stdout=output[0], stderr=output[1], text=True
            )
        )
    printed = [machine.communicate(timeout=120)[0] for machine in machines]
    assert all(machine.returncode != 0 for machine in machines), printed
    require_one_line(printed[0], "output_dir: run is not the same folder on", "a disk that all machines share")
    assert not (tmp_path / "0" / "run" / "run.json").exists()


# --- without a launch ---

FILES = {
    "DDP": "optimizer.pt",
    "FSDP2": "pytorch_model_fsdp.bin",
    "ZeRO-2": "global_step2/mp_rank_00_model_states.pt",
    "ZeRO-3": "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt",
}


@pytest.mark.parametrize("now", FILES)
@pytest.mark.parametrize("before", FILES)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_checkpoint_resumes_under_its_own_engine_only(
    before: Any, now: Any, has_manifest: bool, tmp_path: Path, recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without run.json the files still tell ZeRO, FSDP and DDP apart."""
    checkpoint = tmp_path / "checkpoint-2"
    for name in ("rng_state.pth", FILES[before]):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).touch()
    if has_manifest:
        manifest = {"recipe": {}, "data": {}, "day": "2026-11-29", "versions": {}, "split": before}
        (tmp_path / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    monkeypatch.setattr(output_dir, "find_split", lambda recipe: Split(now))
    recipe = recipe_of("allow_changed_recipe=true")
    if now == before or (not has_manifest and {now, before} == {"ZeRO-2", "ZeRO-3"}):
        output_dir._require_same_split(recipe, checkpoint)
        return
    with pytest.raises(
        RecipeError, match=rf"checkpoint-2 was written under {before[:4]}.* by 1 process.*found {now}, 1"
    ):
        output_dir._require_same_split(recipe, checkpoint)


def test_zero_does_not_resume_on_another_number_of_processes(
    tmp_path: Path, recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rng_state_0.pth", "rng_state_1.pth", FILES["ZeRO-2"]):
        (tmp_path / "checkpoint-2" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoint-2" / name).touch()
    monkeypatch.setattr(output_dir, "find_split", lambda recipe: Split("ZeRO-2"))
    with pytest.raises(RecipeError, match=r"written under ZeRO by 2 processes, .*found ZeRO-2, 1"):
        output_dir._require_same_split(recipe_of(), tmp_path / "checkpoint-2")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_split_is_that_of_deepspeeds_config_and_pissa_asks_it(stage: int, recipe_of: Any) -> None:
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    zero = {"stage": stage, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    config = HfDeepSpeedConfig({"zero_optimization": zero})  # alive, as transformers keeps a weak reference
    recipe = recipe_of("pissa_init=true", "deepspeed={}")
    try:
        assert str(find_split(recipe)) == f"ZeRO-{stage} (offload of optimizer)"
        assert find_split(recipe).shards_weights == (stage == 3)
        if stage == 3:
            with pytest.raises(
                RecipeError, match="pissa_init: can't be converted to plain LoRA with FSDP or DeepSpeed"
            ):
                Pissa(recipe).prepare_base(None)  # type: ignore[arg-type]
    finally:
        unset_hf_deepspeed_config()
        del config


# --- slow ---


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_an_evaluation_without_training_equals_that_of_one_process(
    engine: str, tmp_path: Path, tiny_model: Path, uneven: dict[str, Any]
) -> None:
    """DeepSpeed and FSDP split nothing then, except ZeRO-3; and the advice for predictions works."""
    changes: dict[str, Any] = uneven | {
        "do_train": False,
        "do_eval": True,
        "do_predict": engine != "zero3",
        "eval_dataset": "uneven",
        "dataset": None,
        "max_new_tokens": 4,
    }
    expected = small_run.run(tmp_path / "one", tiny_model, **changes | {"do_predict": False})
    launch(command(engine, write_recipe(tmp_path, tiny_model, **changes)))
    found, wanted = (
        json.loads((run / "eval_results.json").read_text("utf-8"))["eval_loss"] for run in (tmp_path / "run", expected)
    )
    assert found == pytest.approx(wanted, rel=1e-6)
    assert (tmp_path / "run" / "generated_predictions.jsonl").is_file() == (engine != "zero3")


@pytest.mark.slow
def test_four_processes_resume_bit_for_bit_without_preflight_and_others_with_the_same_rows(
    tmp_path: Path, tiny_model: Path
) -> None:
    keys: dict[str, Any] = {"global_batch_size": 4, "per_device_train_batch_size": 1, "preflight": False}

    def resume(name: str, source: Path, processes: int) -> Path:
        folder = tmp_path / name
        shutil.copytree(source, folder / "run")
        shutil.rmtree(folder / "run" / "checkpoint-4", ignore_errors=True)
        manifest = json.loads((folder / "run" / "run.json").read_text("utf-8")) | {"status": "running"}
        (folder / "run" / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
        printed = launch(command("ddp", write_recipe(folder, tiny_model, **keys), processes))
        assert "resuming from checkpoint-2" in printed, printed
        return folder / "run"

    launch(command("ddp", write_recipe(tmp_path / "four", tiny_model, **keys), 4))
    four = tmp_path / "four" / "run"
    again = resume("again", four, 4)
    assert log_without_times(again) == log_without_times(four)
    assert (again / "model.safetensors").read_bytes() == (four / "model.safetensors").read_bytes()
    two = resume("two", four, 2)
    one = resume("one", two, 1)
    for run in (two, one, resume("back", one, 4)):
        require_same_training(run, four)


@pytest.mark.slow
def test_fsdp2_resumes_on_another_number_of_processes(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"global_batch_size": 4, "per_device_train_batch_size": 1}
    launch(command("fsdp2", write_recipe(tmp_path / "two", tiny_model, **keys)))
    shutil.copytree(tmp_path / "two" / "run", tmp_path / "four" / "run")
    shutil.rmtree(tmp_path / "four" / "run" / "checkpoint-4")
    manifest = json.loads((tmp_path / "four" / "run" / "run.json").read_text("utf-8")) | {"status": "running"}
    (tmp_path / "four" / "run" / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    printed = launch(command("fsdp2", write_recipe(tmp_path / "four", tiny_model, **keys), 4))
    assert "resuming from checkpoint-2" in printed and "with the same rows per step" in printed, printed
    require_same_training(tmp_path / "four" / "run", tmp_path / "two" / "run")


@pytest.mark.slow
def test_the_final_file_of_a_float32_base_has_the_float32_weights_of_zero(
    tmp_path: Path, tiny_model: Path, uneven: dict[str, Any]
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = {name: weight.float() for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text("utf-8")) | {"dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for engine in ("zero2", "zero3"):
        recipe = write_recipe(tmp_path / engine, base, **uneven | {"bf16": True, "force_bf16": True})
        launch(command(engine, recipe))
        final = load_file(tmp_path / engine / "run" / "model.safetensors")
        assert {weight.dtype for weight in final.values()} == {torch.float32}
        assert json.loads((tmp_path / engine / "run" / "config.json").read_text("utf-8"))["dtype"] == "float32"
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in final.values()), engine
