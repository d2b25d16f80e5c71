"""The keys of stage: dpo: what they mean, what contradicts them, and LLaMA-Factory's spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from arpo_trl.errors import RecipeError
from arpo_trl.recipe import Recipe, read_recipe
from arpo_trl.recipe.preference import LOSSES, PreferenceKeys, keeps_base, needs_reference

FIXTURES = sorted((Path(__file__).parent / "fixtures" / "preference").glob("*.yaml"))
GOOD = {"model_name_or_path": "m", "output_dir": "o", "do_train": True, "dataset": "a", "stage": "dpo"}


def read(folder: Path, **keys: Any) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(GOOD | keys), encoding="utf-8")
    return read_recipe(path)


def notices(folder: Path, **keys: Any) -> list[str]:
    return [line.partition(": ")[2] for line in read(folder, **keys).notices]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_recipes_of_others_are_read_without_a_word(path: Path) -> None:
    recipe = read_recipe(path)
    known = ("trust_remote_code", "preprocessing_num_workers")
    assert [line for line in recipe.notices if not any(word in line for word in known)] == []
    assert (recipe.stage, recipe.pref_loss, recipe.pref_beta, recipe.simpo_gamma) == ("dpo", "sigmoid", 0.1, 0.5)
    assert recipe.ref_model is None and not recipe.precompute_ref_log_probs


def test_older_names(tmp_path: Path) -> None:
    recipe = read(tmp_path, dpo_beta=0.2, dpo_loss="hinge", dpo_ftx=1.0)
    assert (recipe.pref_beta, recipe.pref_loss, recipe.pref_ftx) == (0.2, "hinge", 1.0)
    old = read(tmp_path, stage="orpo", orpo_beta=0.05)
    assert (old.stage, old.pref_loss, old.pref_beta) == ("dpo", "orpo", 0.05)
    assert notices(tmp_path, stage="orpo") == ["stage: orpo means stage: dpo with pref_loss: orpo"]


@pytest.mark.parametrize("text", ["5e-1", "0.5", ".5", "5.0e-01"])
def test_a_number_in_any_spelling(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump(GOOD) + f"pref_beta: {text}\neval_strategy: no\nwarmup_steps: 0.1\nreport_to: [none]\n"
    )
    assert read_recipe(path).pref_beta == 0.5


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"pref_loss": "kto_pair"}, "pref_loss: expected one of sigmoid, hinge, ipo, orpo, simpo, found 'kto_pair'; LLaMA-Factory with trl 0.20 or later trains sigmoid for it"),
    *(
        ({"pref_loss": name}, f"pref_loss: expected one of sigmoid, hinge, ipo, orpo, simpo, found {name!r}, which LLaMA-Factory trains as sigmoid without a warning")
        for name in ("robust", "bco_pair", "exo_pair", "nca_pair", "sppo_hard")
    ),
    ({"pref_beta": 0}, "pref_beta: expected a number > 0, found 0"),
    ({"dpo_label_smoothing": 0.1, "pref_loss": "ipo"}, "dpo_label_smoothing: requires pref_loss: sigmoid, found ipo"),
    ({"pref_bco_weight": 0.5}, "pref_bco_weight: not supported; there is no BCO loss; remove it, or use pref_ftx for an SFT loss on chosen"),
    ({"ref_model": "m", "ref_model_quantization_bit": 4}, "ref_model_quantization_bit: not supported; set ref_model to a quantized model, or precompute_ref_log_probs: true"),
    ({"ref_model_adapters": "a"}, "ref_model_adapters: requires ref_model, the base of these adapters"),
    ({"packing": True}, "packing: not supported with stage: dpo (in LLaMA-Factory it only lowers cutoff_len by 1). Remove the line"),
    ({"neat_packing": True}, "neat_packing: not supported with stage: dpo. Remove the line; padding_free: true avoids padding"),
    ({"streaming": True, "max_steps": 3}, "streaming: not supported with stage: dpo. Remove the line"),
    ({"train_on_prompt": True}, "train_on_prompt: not supported with stage: dpo, where chosen and rejected share the prompt. Remove the line"),
    ({"mask_history": True}, "mask_history: not supported with stage: dpo, which never trains on the earlier replies in the prompt. Remove the line"),
    ({"predict_with_generate": True, "val_size": 1}, "predict_with_generate: not supported with stage: dpo. To predict, use a recipe with stage: sft and the trained model"),
    ({"use_dft_loss": True}, "use_dft_loss: not supported with stage: dpo, whose loss is over pairs. Remove the line"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: not supported with stage: dpo. Write dpo_label_smoothing"),
    ({"neftune_noise_alpha": 5}, "neftune_noise_alpha: not supported with stage: dpo, whose reference has no noise. Remove the line"),
    ({"finetuning_type": "lora", "pissa_init": True}, "pissa_init: changes the base model, which is also the DPO reference. Remove the line"),
    ({"pref_loss": "simpo", "pref_beta": 2, "precompute_ref_log_probs": True}, "precompute_ref_log_probs: not used by pref_loss: simpo, which has no reference model. Remove the line"),
    ({"metric_for_best_model": "perplexity"}, "metric_for_best_model: expected loss, rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen, logps/rejected; found perplexity"),
    ({"do_train": False, "do_eval": True, "val_size": 1}, "ref_model: required to evaluate without training: the model is compared with it"),
    ({"stage": "sft", "pref_beta": 0.2}, "pref_beta: requires stage: dpo"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "problem"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_what_contradicts_the_stage_says_why(keys: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        read(tmp_path, **keys)
    lines = [line.strip().partition("  ")[2].strip() for line in str(raised.value).splitlines()[1:]]
    assert problem in lines


def test_false_and_null_ask_for_nothing(tmp_path: Path) -> None:
    keys = dict.fromkeys(
        ("packing", "neat_packing", "streaming", "mask_history", "use_dft_loss", "train_on_prompt"), False
    )
    keys |= {"pref_bco_weight": 0.0, "ref_model_quantization_bit": None, "ld_alpha": None, "ref_model": None}
    assert notices(tmp_path, **keys) == []
    assert notices(tmp_path, stage="sft", pref_beta=0.1, pref_loss="sigmoid", simpo_gamma=0.5) == []


def test_notices(tmp_path: Path) -> None:
    for loss in ("hinge", "ipo"):
        assert notices(tmp_path, pref_loss=loss) == [
            f"pref_loss: {loss} is used; LLaMA-Factory with trl 0.20 or later uses sigmoid instead"
        ]
    assert notices(tmp_path, pref_loss="orpo", ref_model="m") == [
        "ref_model is ignored: pref_loss: orpo has no reference"
    ]
    assert notices(tmp_path, finetuning_type="lora", lora_dropout=0.1) == [
        "lora_dropout is ignored: stage: dpo trains without dropout, as LLaMA-Factory does"
    ]
    assert notices(tmp_path, pref_loss="simpo") == [
        "pref_beta is 0.1: SimPO usually takes 2 to 10 (simpo_gamma / pref_beta is a margin of 5)"
    ]


def test_the_old_name_of_bitsandbytes_quantizes(tmp_path: Path) -> None:
    keys = {"finetuning_type": "lora", "quantization_bit": 4}
    assert notices(tmp_path, **keys, quantization_method="bitsandbytes") == [
        "quantization_method: bitsandbytes means bnb; LLaMA-Factory loads the model unquantized, without a warning"
    ]
    assert notices(tmp_path, **keys, quantization_method="bnb") == []


def test_which_losses_and_methods_need_a_second_model(tmp_path: Path) -> None:
    assert [loss for loss in LOSSES if needs_reference(read(tmp_path, pref_loss=loss, pref_beta=1))] == [
        "sigmoid",
        "hinge",
        "ipo",
    ]
    lora = {"finetuning_type": "lora"}
    assert keeps_base(read(tmp_path, **lora)) and not keeps_base(read(tmp_path, finetuning_type="full"))
    assert keeps_base(read(tmp_path, **lora, ref_model="m", ref_model_adapters="a"))
    assert not keeps_base(read(tmp_path, **lora, ref_model="other"))
    assert not keeps_base(read(tmp_path, **lora, ref_model="m", adapter_name_or_path="a", create_new_adapter=True))


def test_the_defaults_are_llama_factorys() -> None:
    defaults = {name: field.default for name, field in PreferenceKeys.model_fields.items()}
    expected = {
        "pref_beta": 0.1,
        "pref_loss": "sigmoid",
        "simpo_gamma": 0.5,
        "pref_ftx": 0.0,
        "dpo_label_smoothing": 0.0,
    }
    assert defaults | expected == defaults and defaults["ld_alpha"] is None
