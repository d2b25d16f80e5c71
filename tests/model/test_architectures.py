"""docs/reference/architectures.md equals the measurements: every family trains with the plain loss, and packs exactly or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest

# Old models warn of what they are.
pytestmark = pytest.mark.filterwarnings("default")

TABLE = architectures.read_table(architectures.DOCS.read_text(encoding="utf-8"))


def test_the_table_has_every_family_and_no_failing_cell() -> None:
    assert list(TABLE) == sorted(architectures.FAMILIES)
    for line in TABLE.values():
        assert (line["full"], line["LoRA"]) == ("exact", "exact")
        assert {line["padding_free"], line["packing"]} in ({"exact"}, {"not supported"})
        assert line["balancing loss"] in ("added", "-")


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    architectures.make_model(request.param, tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("folder", ["gpt_oss"], indirect=True)
def test_moe_models_train_with_the_plain_loss_by_default_and_are_not_packed_if_rows_would_mix(
    folder: Path, capfd: Any
) -> None:
    rows = architectures.write_rows(folder / "data")
    expected = architectures.plain_loss(folder, rows)
    assert architectures.first_loss(folder, rows) == pytest.approx(expected, abs=1e-4)
    assert architectures.first_loss(folder, rows, moe_aux_loss_coef=1.0) > expected + 0.1  # its config says 0.9
    assert architectures.first_loss(folder, rows, padding_free=True) == "not supported"
    evaluates = {"do_train": False, "do_eval": True, "eval_dataset": "rows", "padding_free": True}
    assert architectures.first_loss(folder, rows, **evaluates) == "not supported"
    said = capfd.readouterr().out
    assert "padding_free: gpt_oss with eager attention mixes the rows of a padding-free batch; set" in said


@pytest.mark.parametrize("folder", ["lfm2"], indirect=True)
def test_a_model_that_raises_an_error_for_packed_rows_is_rejected_in_one_line(folder: Path, capfd: Any) -> None:
    rows = architectures.write_rows(folder / "data")
    assert architectures.first_loss(folder, rows, padding_free=True) == "not supported"
    assert "does not support padding-free batches: " in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("family", architectures.FAMILIES)
def test_a_line_of_the_table_equals_a_new_measurement(family: str, tmp_path: Path) -> None:
    assert architectures.measure(family, tmp_path) == TABLE[family]
