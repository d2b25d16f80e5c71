"""output_dir: which folders are resumed, rejected, deleted, and never changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import MakeRecipe, differing, make_link

from arpo_trl.__main__ import main
from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe
from arpo_trl.run_folder import list_checkpoints
from arpo_trl.training.checkpoints import FILES
from arpo_trl.training.output_dir import clear_earlier_run, find_resume_point


def resume(path: Path, **changes: Any) -> tuple[Path | None, list[str]]:
    return find_resume_point(read_recipe(path, [f"{key}={value}" for key, value in changes.items()]))


@pytest.fixture
def finished(output_dir: Path) -> Path:
    (output_dir / "run.json").write_text(
        '{"status": "finished", "recipe": {}, "data": {}, "versions": {}}', encoding="utf-8"
    )
    return output_dir


@pytest.mark.parametrize("by", ["manifest", "config.json", "adapter_config.json"])
def test_a_folder_with_a_finished_run_or_a_model_is_rejected(
    by: str, make_recipe: MakeRecipe, output_dir: Path
) -> None:
    """One line that names the key; nothing is removed."""
    if by == "manifest":
        (output_dir / "run.json").write_text(
            '{"status": "finished", "recipe": {}, "data": {}, "versions": {}}', encoding="utf-8"
        )
    else:
        (output_dir / by).write_text("{}", encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"^\S+recipe\.yaml:\d+: output_dir: .* set overwrite_output_dir: true to [^\n]*$"
    ):
        resume(make_recipe())
    assert len(list_checkpoints(output_dir)) == 3


def test_a_finished_run_is_resumed_if_asked(make_recipe: MakeRecipe, finished: Path) -> None:
    """resume_from_checkpoint beats both the manifest and overwrite_output_dir."""
    for overwrite in ("true", "false"):
        found = resume(make_recipe(), resume_from_checkpoint="true", overwrite_output_dir=overwrite)
        assert found == (finished / "checkpoint-3", [])


def test_an_unfinished_run_is_resumed(make_recipe: MakeRecipe, output_dir: Path) -> None:
    """The same command after a crash just works."""
    assert resume(make_recipe()) == (output_dir / "checkpoint-3", [])


@pytest.mark.parametrize("place", ["itself", "checkpoint", "link", "adapter"])
def test_a_base_model_in_the_output_dir_is_rejected(
    place: str, make_recipe: MakeRecipe, output_dir: Path, tmp_path: Path
) -> None:
    """It would be overwritten, or removed before it is read."""
    paths = {"itself": output_dir, "checkpoint": output_dir / "checkpoint-2", "link": tmp_path / "link"}
    if not make_link(paths["link"], output_dir) and place == "link":
        pytest.skip("no symbolic links")
    changes: dict[str, Any] = {"model_name_or_path": str(paths.get(place))}
    if place == "adapter":
        changes = {"adapter_name_or_path": str(output_dir / "checkpoint-2"), "finetuning_type": "lora"}
    with pytest.raises(RecipeError, match=r"^\S+recipe\.yaml:\d+: output_dir: .*model to train"):
        resume(make_recipe(overwrite_output_dir=True, **changes))
    assert len(list_checkpoints(output_dir)) == 3


def test_an_output_dir_that_is_a_file_or_below_one_is_rejected(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """One line, and the file stays."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/1/run")):
        with pytest.raises(RecipeError, match=r"^\S+recipe\.yaml:\d+: output_dir: [^\n]* is not writable [^\n]*$"):
            resume(make_recipe(output_dir=str(path)))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            "nowhere",
            "expected a checkpoint-<step> folder, found nowhere; there are: .*checkpoint-1, .*checkpoint-2, .*checkpoint-3$",
        ),
        (
            "{run}",
            "expected a checkpoint-<step> folder, found .*; there are: .*checkpoint-1, .*checkpoint-2, .*checkpoint-3$",
        ),
        ("{run}/checkpoint-9", "expected a checkpoint-<step> folder"),
        ("{run}/checkpoint-x", "expected a checkpoint-<step> folder"),
        ("{run}/checkpoint-2/optimizer.pt", "expected a checkpoint-<step> folder"),
        ("{run}/checkpoint-1", r"checkpoint-1 can't be resumed from \(optimizer.pt is missing\); choose another"),
    ],
)
def test_a_missing_or_incomplete_checkpoint_is_rejected_by_name(
    wanted: str, message: str, make_recipe: MakeRecipe, output_dir: Path
) -> None:
    """One line that lists those there are."""
    (output_dir / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(RecipeError, match=r"^\S+recipe\.yaml:\d+: resume_from_checkpoint: .*" + message):
        resume(make_recipe(resume_from_checkpoint=wanted.format(run=output_dir)))
    assert len(list_checkpoints(output_dir)) == 3


def test_checkpoints_newer_than_the_named_one_are_renamed(make_recipe: MakeRecipe, output_dir: Path) -> None:
    """They are of another course: the next resume would take the newest."""
    found, lines = resume(make_recipe(resume_from_checkpoint=str(output_dir / "checkpoint-1")))
    assert found == output_dir / "checkpoint-1" and len(lines) == 2
    assert list_checkpoints(output_dir) == [found]
    assert (output_dir / "superseded-checkpoint-3" / "optimizer.pt").exists()


@pytest.mark.parametrize("name", ["checkpoint-2", "training_loss.png", "trainer_state.json"])
def test_starting_over_changes_nothing_while_a_program_has_a_file_open(
    name: str, output_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows neither renames nor deletes an open file, such as a plot in a viewer, nor the folder it is in."""
    for file in ("training_loss.png", "trainer_state.json", "notes.txt"):
        (output_dir / file).write_text(file, encoding="utf-8")
    before = sorted(output_dir.rglob("*"))
    rename = Path.rename

    def rename_on_windows(self: Path, target: Path) -> Path:
        if self.name == name:
            raise PermissionError(13, "The process cannot access the file", str(self))
        return rename(self, target)

    with monkeypatch.context() as windows, pytest.raises(RecipeError) as error:
        windows.setattr(Path, "rename", rename_on_windows)
        clear_earlier_run(output_dir)
    assert str(error.value) == (
        f"{output_dir / name} can't be replaced (The process cannot access the file); close the program that has it open, "
        "or choose another output_dir"
    )
    assert sorted(output_dir.rglob("*")) == before
    (output_dir / ".earlier-run" / "checkpoint-9").mkdir(parents=True)  # of a killed run
    (line,) = clear_earlier_run(output_dir)
    assert "deleted checkpoint-1, checkpoint-2, checkpoint-3 of the earlier run" in line
    assert [path.name for path in output_dir.iterdir()] == ["notes.txt"]


def test_an_error_without_a_complete_checkpoint_lists_the_incomplete_ones(
    make_recipe: MakeRecipe, output_dir: Path
) -> None:
    """The lines about incomplete checkpoints are part of the error."""
    for folder in list_checkpoints(output_dir):
        (folder / "optimizer.pt").unlink()
    with pytest.raises(
        RecipeError,
        match=r"(?s)checkpoint-3 can't be resumed from.*resume_from_checkpoint: .* has no complete checkpoint",
    ):
        resume(make_recipe(resume_from_checkpoint=True))


def test_a_checkpoint_of_llamafactory_is_resumed_with_a_notice(
    make_recipe: MakeRecipe, output_dir: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no run.json, no files.json, none of our log's state and none of its seconds: the run says what it could not
    compare."""
    line = {"current_steps": 3, "total_steps": 3, "loss": 7.0, "lr": 1e-3, "epoch": 1.0, "elapsed_time": "0:00:09"}
    (output_dir / "trainer_log.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    for folder in list_checkpoints(output_dir):
        (folder / FILES).unlink()
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        del state["stateful_callbacks"]["_LogState"]
        (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    assert main([str(make_recipe(max_steps=4))]) == 0
    out = capsys.readouterr().out
    assert "resuming from checkpoint-3" in out and "run.json is missing or unreadable" in out
    assert differing(output_dir / "checkpoint-3", saved / "checkpoint-3") == []


# --- starting over ---


def test_overwriting_deletes_the_earlier_run_and_nothing_else(
    make_recipe: MakeRecipe, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints and logs of the earlier run are deleted, which one line reports; other files and folders stay."""
    foreign = [
        "notes.txt",
        "checkpoint-best/x",
        "eval/checkpoint-1/x",
        "incomplete-checkpoint-7/x",
        "checkpoint-12.tar",
    ]
    for name in foreign:
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (finished / name).write_text("mine", encoding="utf-8")
    (finished / "notes.txt").chmod(0o600)
    mode = (finished / "notes.txt").stat().st_mode
    (finished / "training.log").write_text("# an earlier session\n", encoding="utf-8")
    outside = Path(shutil.copytree(finished / "checkpoint-3", tmp_path / "outside"))
    link = make_link(finished / "checkpoint-9", outside)
    assert main([str(make_recipe(overwrite_output_dir=True))]) == 0
    out = capsys.readouterr().out
    gone = "checkpoint-1, checkpoint-2, checkpoint-3" + ", checkpoint-9" * link
    assert f"{finished}: deleted {gone} of the earlier run (overwrite_output_dir: true)" in out
    assert [p.name for p in list_checkpoints(finished)] == ["checkpoint-2", "checkpoint-4"]
    assert [(finished / name).read_text(encoding="utf-8") for name in foreign] == ["mine"] * len(foreign)
    assert (finished / "notes.txt").stat().st_mode == mode
    assert len(list(outside.iterdir())) > 5
    log = (finished / "training.log").read_text(encoding="utf-8")
    assert "earlier session" not in log and log.startswith("# 2") and "step 4/4" in log
    steps = [json.loads(line)["current_steps"] for line in (finished / "trainer_log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "mistake",
    [
        {"model_name_or_path": "./nowhere"},
        {"dataset": "no_such"},
        {"template": "no_such"},
        {"dataset_dir": "./nowhere"},
    ],
    ids=lambda m: next(iter(m)),
)
def test_an_error_in_the_recipe_deletes_nothing(
    mistake: dict[str, Any], make_recipe: MakeRecipe, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The earlier run goes only once the new one is about to begin."""
    (finished / "training.log").write_text("# an earlier session\n", encoding="utf-8")
    assert main([str(make_recipe(overwrite_output_dir=True, **mistake))]) == 2
    assert len(list_checkpoints(finished)) == 3 and (finished / "trainer_log.jsonl").exists()
    assert (finished / "training.log").read_text(encoding="utf-8").startswith("# an earlier session\n")
    assert "Traceback" not in capsys.readouterr().err


def test_nothing_is_written_outside_the_run_folder(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the working directory, not next to the data or the model; only libraries fill their caches."""

    def listing() -> dict[str, float]:
        files = [*tmp_path.rglob("*"), *tiny_model.rglob("*")]
        ours = (p for p in files if not {tmp_path / "run", tmp_path / "here" / ".cache"} & set(p.parents))
        return {str(p): p.stat().st_mtime for p in ours if p.is_file()}

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "here"))
    path = make_recipe(plot_loss=True)
    before = listing()
    assert main([str(path)]) == 0
    assert listing() == before
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"model.safetensors", "run.json", "training_loss.png"}


def test_a_run_killed_in_its_final_save_is_completed_by_the_same_command(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """run.json has status finished only once the model is saved; the second run takes no step and saves it."""
    path = make_recipe()
    with monkeypatch.context() as patch:

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("arpo_trl.training.trainer.ArpoTrainer.save_final_model", interrupt)
        assert main([str(path)]) == 130
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    log = (run / "trainer_log.jsonl").read_text(encoding="utf-8")
    assert main([str(path)]) == 0
    assert "resuming from checkpoint-4" in capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert (run / "trainer_log.jsonl").read_text(encoding="utf-8") == log
    assert (run / "model.safetensors").exists() and len(list(run.iterdir())) > 10


def test_a_users_recipe_and_readme_are_kept(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for each says under which name the run writes its own, which the next run finds again."""
    run = tmp_path / "run"
    run.mkdir()
    text = "# this learning rate won the sweep\n" + make_recipe().read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(text, encoding="utf-8")
    (run / "README.md").write_text("my lab book", encoding="utf-8")
    for more in ([], ["overwrite_output_dir=true"]):
        assert main([str(run / "recipe.yaml"), *more]) == 0
        told = capsys.readouterr().out
        for name, ours in (("recipe.yaml", "recipe-of-the-run.yaml"), ("README.md", "README-of-the-run.md")):
            assert f"{run / name} was not written by a run, and is kept; this run writes {ours} instead" in told
            assert (run / ours).exists()
        assert (run / "recipe.yaml").read_text(encoding="utf-8") == text
        assert (run / "README.md").read_text(encoding="utf-8") == "my lab book"
