"""The model card: README.md of the output folder, from the run's files and the template model_card.md."""

import re
from pathlib import Path
from typing import cast

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..recipe.rules import changed_keys
from ..run_folder import own_path, read_json, read_lines, write_text
from .log_file import format_seconds, run_seconds
from .manifest import Manifest
from .serving_flags import serving_commands

TEMPLATE = Path(__file__).with_name("model_card.md")

NOT_FOR_THE_HUB = """\
# not uploaded by push_to_hub: excerpts of rows, trackers' files, leftovers of a crash
row_audit.jsonl
serving_check.jsonl
wandb/
trackio/
.lock
runs/
*-checkpoint-*/
"""
"""The Hub obeys a .gitignore that is uploaded (huggingface_hub: `preupload_lfs_files`, gitignore_content)."""

CARD_MARKS = ("- arpo_trl\n", "# Model Card for Model ID")
"""Marks of a README.md written by a run: a tag in our card's header, or the title of the one that PEFT saves first."""

PLOTS = ("training_loss.png", "training_rewards_accuracies.png")
FIGURES = r"eval_.*(loss|perplexity|rewards/(accuracies|margins))"

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)")


def write_model_card(output_dir: Path, manifest: Manifest, merged: Path | None = None) -> None:
    """Write README.md from a run's run.json, trainer_log.jsonl, all_results.json and trainer_state.json.

    With `merged`, the folder of the run's adapter and its base as one model, the card is written there. The header is
    metadata for the Hub (https://huggingface.co/docs/hub/model-cards#model-card-metadata). It has no
    license, which the publisher chooses, and no base model if that is a local folder.
    """
    results = read_json(output_dir / "all_results.json")
    log = read_lines(output_dir / "trainer_log.jsonl")
    trained_from = str(manifest.recipe["model_name_or_path"])
    base, is_hub_id = base_model(trained_from)
    lora = manifest.recipe["finetuning_type"] in ("lora", "oft")
    is_adapter, target = lora and not merged, merged or output_dir
    header = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[str(manifest.recipe["stage"]), "trl", "arpo_trl"],
        model_name=target.resolve().name,
        base_model=base if is_hub_id else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if is_hub_id else None,
    )
    last = next((line["loss"] for line in reversed(log) if "loss" in line), None)
    figures = {"last training loss": last, "mean training loss": results.get("train_loss")}
    figures |= {k.replace("_", " "): v for k, v in results.items() if re.fullmatch(FIGURES, k)}
    names = {
        "name": target.resolve().name,
        "folder": target.as_posix(),
        "model": f"{target.as_posix()}{'-merged' if is_adapter else ''}",
        "base": base if is_hub_id else Path(trained_from).as_posix(),
    }
    card = ModelCard.from_template(
        header,
        template_path=str(TEMPLATE),
        base_name=base,
        base_link=f"[{base}](https://huggingface.co/{base})" if is_hub_id else f"`{base}`",
        lora=lora,
        is_adapter=is_adapter,
        method=_describe_method(manifest),
        pairs=manifest.recipe["stage"] == "dpo",
        manifest=manifest,
        steps=read_json(output_dir / "trainer_state.json")["global_step"],
        epoch=results["epoch"],
        time=format_seconds(max(results.get("train_runtime", 0), run_seconds(log))),
        figures={name: value for name, value in figures.items() if value is not None},
        plots=[name for name in PLOTS if (target / name).exists()],
        recipe=yaml.safe_dump(changed_keys(manifest.recipe), sort_keys=False, allow_unicode=True).strip(),
        servers=serving_commands(target, names, is_adapter),
        **names,
    )
    write_text(own_path(target / "README.md", *CARD_MARKS), str(card))


def _describe_method(manifest: Manifest) -> str:
    """Return what the model was trained on and by which loss, in words."""
    recipe, reference = manifest.recipe, manifest.reference
    if recipe["stage"] != "dpo":
        return "conversations (SFT)"
    compared = ""
    if reference:
        names = [base_model(str(name))[0] for name in (reference["path"], *cast("list[str]", reference["adapters"]))]
        compared = f", compared with {' and '.join(names)}"
    return f"preference pairs (DPO: {recipe['pref_loss']} loss, beta {recipe['pref_beta']:g}{compared})"


def base_model(name_or_path: str) -> tuple[str, bool]:
    """Return the base model's name, and whether it is a Hub id: also of a folder in the Hub's cache; else the folder's name."""
    path = Path(name_or_path)
    if not path.exists():
        return name_or_path, bool(HUB_ID.fullmatch(name_or_path))
    if cached := CACHED.search(str(path.resolve())):
        return "/".join(cached.groups()), True
    return path.resolve().name, False
