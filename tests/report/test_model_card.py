"""The model card says what was trained, on what and how; no file of a run holds a secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run
import yaml
from huggingface_hub import ModelCard
from test_trackers import SECRETS, files_that_hold
from transformers import AutoModelForCausalLM

from arpo_trl.__main__ import main
from arpo_trl.report.model_card import base_model
from arpo_trl.training import requirements

pytestmark = small_run.QUIET


@pytest.fixture(scope="module")
def home(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with a recipe, in which a child process ran it with secrets in its environment."""
    home = tmp_path_factory.mktemp("home")
    (home / "work").mkdir()
    recipe = small_run.make_recipe(home / "work", tiny_model, val_size=3, do_eval=True, tokenized_path=None)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "WANDB_", "TMP"))}
    env = kept | SECRETS | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "arpo_trl", str(recipe.path)],
        env=env,
        cwd=home / "work",
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (home / "work" / "stdout").write_text(done.stdout, encoding="utf-8")
    (home / "work" / "stderr").write_text(done.stderr, encoding="utf-8")
    return home


@pytest.fixture
def run(home: Path) -> Path:
    return home / "work" / "run"


def test_the_cards_header_is_valid_metadata_for_the_hub(run: Path) -> None:
    data = ModelCard.load(run / "README.md").data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "trl", "arpo_trl"],
        "model_name": "run",
    }  # no base_model: a local folder is no hub id; no licence: the publisher states it


def test_the_card_has_data_losses_recipe_versions_and_usage(run: Path, tiny_model: Path) -> None:
    card = (run / "README.md").read_text(encoding="utf-8")
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    counts = manifest["audit"]["counting"]
    assert f"| counting | 12 | 0 | 0 | 0 | {counts['tokens']:,} | {counts['trained_tokens']:,} |" in card
    results = json.loads((run / "all_results.json").read_text(encoding="utf-8"))
    assert f"- eval loss: {results['eval_loss']:.4f}" in card
    assert f"- mean training loss: {results['train_loss']:.4f}" in card
    assert f"`{tiny_model.name}`, fine-tuned" in card and str(tiny_model.parent) not in card.split("<details>")[0]
    assert (
        "4 steps, to epoch" in card
        and "![loss](training_loss.png)" in card
        and f"trl {manifest['versions']['trl']}" in card
    )
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    every = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    assert all(every[key] == value for key, value in shown.items())
    # keys that differ from their defaults: those of the recipe
    assert {"output_dir", "val_size", "save_steps"} <= shown.keys() and "seed" in every.keys() - shown.keys()


QWEN_FLAGS = "--enable-auto-tool-choice --tool-call-parser hermes"


def use_section(card: Path) -> tuple[str, str]:
    """The card's lines of Python, and what follows them."""
    _, code = card.read_text(encoding="utf-8").split("## Use\n")
    _, python, rest = code.split("```", 2)
    return python.removeprefix("python\n"), rest


def test_the_cards_python_code_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python, rest = use_section(run / "README.md")
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1] and capsys.readouterr().out
    folder = run.as_posix()
    assert f"`vllm serve {folder} {QWEN_FLAGS}`" in rest and "merge" not in rest
    assert f"convert_hf_to_gguf.py {folder} " in rest


def test_an_adapters_card_has_the_commands_to_merge_and_to_serve_it(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run.run(tmp_path, tiny_model, finetuning_type="lora")
    capsys.readouterr()
    python, rest = use_section(run / "README.md")
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1] and capsys.readouterr().out
    base, folder = tiny_model.as_posix(), run.as_posix()
    assert f"vllm serve {base} --enable-lora --lora-modules run={folder} --generation-config {folder}" in rest
    assert f"`vllm serve {folder}-merged {QWEN_FLAGS}`" in rest
    merge = next(line for line in rest.splitlines() if line.startswith("arpo-trl merge"))
    assert main(merge.split()[1:]) == 0
    assert AutoModelForCausalLM.from_pretrained(f"{run}-merged").config.model_type == "qwen2"


def test_a_merged_models_card_has_its_commands(tiny_model: Path, tmp_path: Path) -> None:
    run, merged = small_run.run(tmp_path, tiny_model, finetuning_type="lora"), tmp_path / "merged"
    assert main(["merge", str(run), str(merged)]) == 0
    assert ModelCard.load(merged / "README.md").data.to_dict()["library_name"] == "transformers"
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert "with a merged LoRA adapter fine-tuned on conversations (SFT)" in card and "training_loss.png" not in card
    python, rest = use_section(merged / "README.md")
    exec(python, names := dict[str, Any]())
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert "arpo-trl merge" not in rest and f"`vllm serve {merged.as_posix()} {QWEN_FLAGS}`" in rest

    # Killed while it wrote its last files, the run has a complete adapter, but not all that a card needs.
    (run / "trainer_state.json").unlink()
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(manifest | {"status": "running"}), encoding="utf-8")
    assert main(["merge", str(run), str(tmp_path / "killed")]) == 0
    assert (tmp_path / "killed" / "model.safetensors").is_file() and not (tmp_path / "killed" / "README.md").exists()


def test_a_base_model_is_named_by_its_hub_id_or_folder(tmp_path: Path) -> None:
    cached = tmp_path / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "060db6499f32faf8b98477b0a26969ef7d8b9987"
    cached.mkdir(parents=True)
    (tmp_path / "my-model").mkdir()
    assert base_model("Qwen/Qwen2.5-0.5B") == ("Qwen/Qwen2.5-0.5B", True)
    assert base_model(str(cached)) == ("Qwen/Qwen2.5-0.5B", True)
    assert base_model(str(tmp_path / "my-model")) == ("my-model", False)


def test_no_file_of_a_run_holds_a_secret_of_its_environment(home: Path) -> None:
    assert files_that_hold(SECRETS, home) == []
    assert files_that_hold({"control": "count to"}, home)


def test_without_a_tracker_only_caches_are_written_outside_output_dir(home: Path, run: Path) -> None:
    """Encoded rows go to the Hugging Face datasets cache, the list of fonts to matplotlib's."""
    ours = {"work/data", "work/recipe.yaml", "work/stdout", "work/stderr"}
    files = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
    outside = [f for f in files if not f.startswith(("work/run/", *ours))]
    assert [f for f in outside if not f.startswith((".cache/huggingface/datasets/", ".cache/matplotlib/"))] == []


def test_a_pipe_gets_plain_lines_and_the_log_the_same(home: Path, run: Path) -> None:
    lines = (home / "work" / "stdout").read_text(encoding="utf-8").splitlines(keepends=True)
    shown = "".join(
        line for line in lines if "real_accelerator.py" not in line
    )  # DeepSpeed prints, where it is installed
    assert (home / "work" / "stderr").read_text(encoding="utf-8") == ""
    assert "\r" not in shown and "\x1b" not in shown and "it/s" not in shown
    assert (run / "training.log").read_text(encoding="utf-8").splitlines()[1:] == shown.splitlines()


def test_push_to_hub_uploads_the_folder_with_our_card(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, **kwargs: Any) -> Any:
            folder = Path(kwargs["folder_path"])
            pushed.append(kwargs | {"files": {path.name for path in folder.iterdir()}})
            return type("Job", (), {"done": lambda self: True})()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr("arpo_trl.training.requirements.probe_hub", lambda: requirements.Hub("reachable"))
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda api: {"name": "me"})
    small_run.run(
        tmp_path, tiny_model, push_to_hub=True, hub_model_id="me/cold-start", hub_strategy="end", hub_private_repo=True
    )
    assert {job["repo_id"] for job in pushed} == {"me/cold-start"}
    assert {"README.md", "model.safetensors", "recipe.yaml"} <= pushed[-1]["files"]  # Trainer pushes its save first
    assert pushed[-1]["ignore_patterns"] == ["_*", "checkpoint-*"]
    left_out = (tmp_path / "run" / ".gitignore").read_text(encoding="utf-8")  # uploaded, and obeyed by the Hub
    assert ".gitignore" in pushed[0]["files"] and "row_audit.jsonl\n" in left_out and "wandb/\n" in left_out
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8").count("# run\n") == 1
