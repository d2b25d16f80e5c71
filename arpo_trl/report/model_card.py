"""The model card: README.md of the output folder, from what the run wrote there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .figures import format_seconds
from .log_file import read_log, run_seconds

NOT_FOR_THE_HUB = """\
# push_to_hub leaves these out: excerpts of rows, the trackers' own files, what a crash left
row_audit.jsonl
wandb/
trackio/
runs/
damaged-*/
"""
"""The Hub obeys a .gitignore that is uploaded (huggingface_hub: `preupload_lfs_files`, gitignore_content)."""

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)")


def write_model_card(output_dir: Path, recipe_yaml: str) -> None:
    """Write README.md from run.json, trainer_log.jsonl, all_results.json, trainer_state.json and the recipe.

    The head is what the Hub reads (https://huggingface.co/docs/hub/model-cards#model-card-metadata). A licence is the
    publisher's to state, so none is given.
    """
    manifest = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    results = json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))
    results["steps"] = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    card = model_card(output_dir, manifest, results, read_log(output_dir / "trainer_log.jsonl"), recipe_yaml)
    (output_dir / "README.md").write_text(card, encoding="utf-8")


def model_card(
    output_dir: Path, manifest: dict[str, Any], results: dict[str, Any], log: list[dict[str, Any]], recipe_yaml: str
) -> str:
    """The text of the card."""
    recipe = manifest["recipe"]
    name, base = output_dir.resolve().name, base_model(recipe["model_name_or_path"])
    lora = recipe["finetuning_type"] == "lora"
    head: dict[str, Any] = {
        "library_name": "peft" if lora else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "trl", "arpo_trl"],
        "model_name": name,
    }
    if base.is_hub_id:
        head |= {"base_model": base.name, "base_model_relation": "adapter" if lora else "finetune"}
    link = f"[{base.name}](https://huggingface.co/{base.name})" if base.is_hub_id else f"`{base.name}`"
    rows = [
        f"| {dataset} | {c['kept']:,} | {c['shortened']:,} | {c['lost_answer']:,} | {c['dropped']:,} "
        f"| {c['tokens']:,} | {c['trained_tokens']:,} |"
        for dataset, c in manifest["audit"].items()
    ]
    last = next((line for line in reversed(log) if "loss" in line), None)
    figures = {"last training loss": last and last["loss"], "mean training loss": results.get("train_loss")}
    figures |= {k.replace("_", " "): v for k, v in results.items() if re.fullmatch(r"eval_.*(loss|perplexity)", k)}
    time = format_seconds(max(results.get("train_runtime", 0), run_seconds(log)))
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# {name}",
            "",
            f"{link}, {'with a LoRA adapter ' if lora else ''}fine-tuned on conversations (SFT) with arpo_trl "
            f"{manifest['versions']['arpo_trl']}.",
            "",
            "## Data",
            "",
            "Rows by what became of them; loss fell on the assistant's turns, the trained tokens.",
            "",
            "| dataset | whole | shortened | lost their final answer | dropped | tokens | trained tokens |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *rows,
            "",
            "## Training",
            "",
            f"{results['steps']:,} steps, to epoch {results['epoch']:g}, in {time}.",
            "",
            *([*(f"- {what}: {value:.4f}" for what, value in figures.items() if value is not None), ""]),
            *(["![loss](training_loss.png)", ""] if (output_dir / "training_loss.png").exists() else []),
            "<details><summary>Recipe</summary>",
            "",
            "```yaml",
            recipe_yaml.strip(),
            "```",
            "",
            "</details>",
            "",
            "## Chat",
            "",
            "```",
            f"python scripts/chat.py {output_dir}              # in arpo_trl's repository",
            f"transformers serve {output_dir} & transformers chat {output_dir}",
            "```",
            "",
            "## Versions",
            "",
            ", ".join(f"{package} {number}" for package, number in manifest["versions"].items()),
            "",
        ]
    )


class BaseModel(NamedTuple):
    name: str
    is_hub_id: bool


def base_model(name_or_path: str) -> BaseModel:
    """The base model by the name it goes by: its hub id, also in the hub's cache, or the name of its folder."""
    path = Path(name_or_path)
    if not path.exists():
        return BaseModel(name_or_path, bool(HUB_ID.fullmatch(name_or_path)))
    if cached := CACHED.search(str(path.resolve())):
        return BaseModel("/".join(cached.groups()), True)
    return BaseModel(path.resolve().name, False)
