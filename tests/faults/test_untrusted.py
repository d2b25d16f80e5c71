"""Checkpoints and models from strangers: no code of theirs runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRecipe
from runs import make_trainer

from arpo_trl.__main__ import main
from arpo_trl.training.checkpoints import FILES


class Planted:
    """Unpickled, it makes a folder."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def test_the_planted_pickle_would_run(tmp_path: Path) -> None:
    """The proof is one: loaded as Python's pickle does, the file runs code."""
    torch.save(Planted(tmp_path / "ran"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        *((f"{name}.pt", False) for name in ("optimizer", "scheduler", "scaler")),
        *((name, False) for name in ("rng_state.pth", "training_args.bin", "pytorch_model.bin")),
        ("optimizer.pt", True),
    ],
)
def test_a_pickle_planted_in_a_checkpoint_does_not_run(
    name: str,
    listed: bool,
    make_recipe: MakeRecipe,
    output_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run ends in one line, or does not read the file; even if the list of files has been made to fit."""
    folder = output_dir / "checkpoint-3"
    for other in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(output_dir / other)
    torch.save(Planted(tmp_path / "ran"), folder / name)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    if listed:
        sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != FILES}
        (folder / FILES).write_text(json.dumps(sizes), encoding="utf-8")
    else:
        (folder / FILES).unlink()
    code = main([str(make_recipe())])
    error = capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in error
    if name == "training_args.bin":  # a resume does not read it
        assert code == 0
    else:
        reason = "AttributeError" if name == "scaler.pt" else "UnpicklingError: Weights only load failed"
        assert code == 1 and error.splitlines()[-1].startswith(reason)  # only fp16 on a GPU has a scaler to load into


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_pickle_planted_as_an_adapter_does_not_run(tmp_path: Path, tiny_model: Path) -> None:
    """PEFT loads adapter_model.bin with weights_only, too."""
    trainer = make_trainer(tmp_path / "run", tiny_model, lora=True, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Planted(tmp_path / "ran"), folder / "adapter_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        make_trainer(tmp_path / "run", tiny_model, lora=True, max_steps=2).train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("trust", [False, True], ids=["not_trusted", "trusted"])
def test_code_in_the_folder_of_a_known_architecture_does_not_run(
    trust: bool,
    file: str,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """transformers has Qwen2 built in, so trust_remote_code is not used, which one line reports."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    proof = tmp_path / "ran"
    (model / "strange.py").write_text(
        f"import os\nos.mkdir({str(proof)!r})\n"
        "from transformers import Qwen2Config as Config, Qwen2ForCausalLM as Model, Qwen2Tokenizer as Tokenizer\n",
        encoding="utf-8",
    )
    config = json.loads((model / file).read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": "strange.Config",
        "AutoModelForCausalLM": "strange.Model",
        "AutoTokenizer": ["strange.Tokenizer", "strange.Tokenizer"],
    }
    (model / file).write_text(json.dumps(config), encoding="utf-8")
    recipe = make_recipe(model_name_or_path=str(model), trust_remote_code=trust, max_steps=1)
    code = main([str(recipe)])
    told = capsys.readouterr()
    assert not proof.exists()
    assert code == 0, told.err
    assert (told.out + told.err).count("trust_remote_code") == int(trust)
