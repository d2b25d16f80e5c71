"""`arpo-trl --init FOLDER`: a recipe, its data, accelerate's configs and the schema for editors, ready to be changed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from ..errors import RecipeError
from .json_schema import schema_json

PACKAGE = Path(__file__).parents[1]


def write_starter(folder: Path) -> list[Path]:
    """Write the files into a folder that has none of them, and return their paths.

    Raises:
        RecipeError: one of them is there, or the folder can't be written.
    """
    data = ("dataset_info.json", "rows.jsonl")
    texts = {folder / "recipe.yaml": _read(PACKAGE / "starter" / "recipe.yaml"), folder / "schema.json": schema_json()}
    texts |= {folder / "data" / name: _read(PACKAGE / "starter" / name) for name in data}
    texts |= {folder / "accelerate_configs" / path.name: _read(path) for path in accelerate_configs()}
    try:
        if there := [str(path) for path in texts if path.exists()]:
            raise RecipeError(f"{there[0]}: is there already; --init FOLDER writes into a folder without such files")
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    except (OSError, ValueError) as error:
        raise RecipeError(f"--init {folder}: cannot be written ({error})") from None
    return list(texts)


def accelerate_configs() -> list[Path]:
    """Those of this repository, or of the wheel that was installed from it."""
    clone = PACKAGE.parent / "accelerate_configs"
    if clone.is_dir():
        return sorted(clone.glob("*.yaml"))
    try:
        installed = files("arpo_trl") or []
    except PackageNotFoundError:
        return []
    return sorted(Path(str(file.locate())) for file in installed if file.parent.name == "accelerate_configs")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
