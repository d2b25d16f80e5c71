"""Shipped recipes, and recipes written for LLaMA-Factory."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import make_keys
import pytest
import yaml

from arpo_trl.__main__ import main
from arpo_trl.errors import RecipeError
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.recipe import read_recipe
from arpo_trl.training.requirements import check_packages

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted((REPOSITORY / "recipes").rglob("*.yaml"))
FOREIGN = sorted((Path(__file__).parent / "fixtures").rglob("*.yaml"))
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((REPOSITORY / "recipes" / "schema.json").read_text(encoding="utf-8"))
)


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


@pytest.fixture(autouse=True)
def output_goes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_a_shipped_recipe_becomes_an_sft_config(path: Path) -> None:
    recipe = read_recipe(path)
    config = to_sft_config(recipe)
    assert [line for line in recipe.notices if "trust_remote_code" not in line] == []
    assert config.output_dir.startswith("checkpoints/")
    assert config.learning_rate == recipe.learning_rate


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_a_shipped_recipe_is_valid_and_does_not_refer_to_the_schema(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    SCHEMA.validate(yaml.safe_load(text))
    assert "$schema" not in text  # a copied recipe would cause "Unable to load schema"


def test_vs_code_finds_the_schema_of_every_shipped_recipe() -> None:
    settings = json.loads((REPOSITORY / ".vscode" / "settings.json").read_text(encoding="utf-8"))
    ((schema, recipes),) = settings["yaml.schemas"].items()
    assert REPOSITORY / schema == REPOSITORY / "recipes" / "schema.json"
    assert sorted(REPOSITORY.glob(recipes)) == SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=names(SHIPPED))
def test_a_shipped_recipes_header_gives_its_command_and_its_data_is_registered(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = text.split("### model")[0]
    assert f"-m arpo_trl recipes/{path.name}" in header
    for config in re.findall(r"accelerate_configs/\w+\.yaml", text):
        assert (REPOSITORY / config).is_file()
    recipe = read_recipe(path)
    known = json.loads((REPOSITORY / recipe.dataset_dir / "dataset_info.json").read_text(encoding="utf-8"))
    assert set(recipe.dataset) <= set(known)


def test_the_schema_rejects_a_typo_and_a_wrong_type() -> None:
    SCHEMA.check_schema(SCHEMA.schema)
    good = yaml.safe_load((REPOSITORY / "recipes" / "qwen_toy.yaml").read_text(encoding="utf-8"))
    SCHEMA.validate(
        good | {"use_unsloth": True, "vllm_enforce_eager": False, "kto_chosen_weight": 1.0, "packing": None}
    )
    for wrong in (
        {"vllm_enforce_eager": True},
        {"kto_chosen_weight": 2.0},
        {"warmup_ration": 0.1},
        {"cutoff_len": "4k"},
        {"learning_rate": -1},
        {"optim": "adam"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            SCHEMA.validate(good | wrong)


def test_keys_md_and_the_schema_are_up_to_date() -> None:
    assert make_keys.main(["--check"]) == 0


@pytest.fixture
def copied_table(tmp_path: Path) -> Path:
    """Return the table of SFTConfig's fields in a copy of all files that make_keys.py reads and writes."""
    for folder in ("arpo_trl", "recipes", "scripts"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "arpo_trl" / "recipe" / "keys_of_trl.py"


@pytest.mark.parametrize(
    ("ours", "theirs", "is_stale"),
    [
        ("(default=-1, description='Overrides", "(default=-1, description='Wins over", False),
        ("of TRL 1.", "of TRL 2.", False),
        ("max_steps: Whole = Field(default=-1,", "max_steps: Whole = Field(default=-2,", True),
        ("max_steps: Whole =", "max_steps: Number =", True),
        ("    max_grad_norm:", "    max_grad_nrom:", True),
    ],
)
def test_the_check_compares_types_and_defaults_but_not_help(
    copied_table: Path, monkeypatch: pytest.MonkeyPatch, ours: str, theirs: str, is_stale: bool
) -> None:
    monkeypatch.setattr(make_keys, "KEYS_OF_TRL", copied_table)
    text = copied_table.read_text(encoding="utf-8")
    assert text.count(ours) == 1
    copied_table.write_text(text.replace(ours, theirs), encoding="utf-8")
    assert make_keys.main(["--check"]) == is_stale


@pytest.mark.slow
def test_one_run_of_make_keys_is_enough(copied_table: Path, tmp_path: Path) -> None:
    text = copied_table.read_text(encoding="utf-8")
    old = "".join(line for line in text.splitlines(keepends=True) if "    weight_decay:" not in line)
    copied_table.write_text(old, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "scripts" / "make_keys.py")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True, cwd=tmp_path)
    assert copied_table.read_text(encoding="utf-8") == text
    for name in ("KEYS.md", "schema.json"):
        assert (tmp_path / "recipes" / name).read_bytes() == (REPOSITORY / "recipes" / name).read_bytes()


@pytest.mark.parametrize("path", FOREIGN, ids=names(FOREIGN))
def test_a_recipe_written_for_llama_factory_is_read_unchanged(path: Path) -> None:
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    SCHEMA.validate(given)
    recipe = read_recipe(path)
    config = to_sft_config(read_recipe(path, ["deepspeed=null"]))
    unread = {key for notice in recipe.notices if "ignored" in notice for key in given if f" {key}" in notice}
    assert unread == given.keys() & {
        "preprocessing_num_workers",
        "ray_num_workers",
        "use_v1_kernels",
    }  # placement and speed
    assert recipe.dataset == given["dataset"].split(",")
    assert config.learning_rate == float(given.get("learning_rate", 5e-5))
    assert config.warmup_steps == given.get("warmup_ratio", given.get("warmup_steps", 0))
    assert (config.bf16, recipe.fp16) == (given.get("bf16", False), given.get("fp16", False))  # float16 requires a GPU


def test_arpos_recipe_keeps_its_meaning() -> None:
    path = next(path for path in FOREIGN if path.parent.name == "arpo")
    recipe = read_recipe(path)
    assert recipe.deepspeed == "../examples/deepspeed/ds_z3_config.json"
    assert (recipe.cutoff_len, recipe.gradient_accumulation_steps, recipe.learning_rate) == (15000, 2, 7e-6)
    assert (recipe.finetuning_type, recipe.template, recipe.overwrite_output_dir) == ("full", "qwen", True)
    with pytest.raises(RecipeError, match="deepspeed: "):
        check_packages(recipe)


def test_init_writes_what_a_first_run_needs(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--init", "first"]) == 0
    written = [Path(line.removeprefix("wrote ")) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert {path.name for path in written} >= {"recipe.yaml", "schema.json", "dataset_info.json", "rows.jsonl"}
    for config in (REPOSITORY / "accelerate_configs").glob("*.yaml"):
        assert (tmp_path / "first" / "accelerate_configs" / config.name).read_text("utf-8") == config.read_text(
            "utf-8"
        )
    assert (tmp_path / "first" / "schema.json").read_text("utf-8") == (
        REPOSITORY / "recipes" / "schema.json"
    ).read_text("utf-8")
    os.chdir("first")
    text = Path("recipe.yaml").read_text("utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n") and Path("schema.json").is_file()
    SCHEMA.validate(yaml.safe_load(text))
    assert main(["recipe.yaml", f"model_name_or_path={tiny_model}", "--preview", "3"]) == 0
    assert "\\boxed{391}" in capsys.readouterr().out
    os.chdir(tmp_path)
    assert main(["--init", "first"]) == 2
    there = Path("first/data/dataset_info.json")
    assert capsys.readouterr().err == f"{there}: already exists; choose another folder for --init\n"
    assert main(["--init"]) == 2 and main(["--init", "first/recipe.yaml/x"]) == 2
