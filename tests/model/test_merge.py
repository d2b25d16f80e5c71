"""`arpo-trl merge` writes a model that predicts what the adapter predicts, and stops where it stops."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import small_run
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from arpo_trl.__main__ import main
from arpo_trl.errors import RunFailed
from arpo_trl.model.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A base model that stops only at the end of a document."""
    shutil.copytree(tiny_model, tmp_path / "base")
    end = AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids("<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "base" / name).read_text(encoding="utf-8"))
        (tmp_path / "base" / name).write_text(json.dumps(values | {"eos_token_id": end}), encoding="utf-8")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of that base, whose tokenizer ends a turn with <|im_end|>."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "adapter"))
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_full_disk_is_reported_before_anything_is_written(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto").parameters())
    for free, code in ((size - 1, 1), (size, 0)):
        monkeypatch.setattr("arpo_trl.machine.free_space", lambda folder, free=free: free)
        assert main(["merge", str(adapter), str(tmp_path / "merged")]) == code
        assert (tmp_path / "merged").exists() == (not code)
        assert ("disk full: the merged model needs " in capsys.readouterr().err) == bool(code)


def test_the_merged_model_keeps_the_dtype_and_the_template_and_stops_at_the_end_of_a_turn(
    adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert (
        "predicts what the adapter predicts, apart from rounding: bfloat16 changes a token's log-probability by"
        in said
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    end_of_turn, end_of_text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert merged.dtype == torch.bfloat16
    assert merged.generation_config.eos_token_id == [end_of_turn, end_of_text]
    assert merged.config.eos_token_id == tokenizer.eos_token_id == end_of_turn
    saved, own = (folder / "chat_template.jinja" for folder in (tmp_path / "merged", base))
    assert saved.read_text(encoding="utf-8") == own.read_text(encoding="utf-8")
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_dtype_float32_keeps_the_log_probabilities(adapter: Path, tmp_path: Path) -> None:
    rounded = merge(adapter, tmp_path / "rounded")
    kept = merge(adapter, tmp_path / "kept", "float32")
    assert kept.dtype == torch.float32 and kept.most < 1e-4 < rounded.mean < rounded.most


def test_a_merged_model_that_predicts_otherwise_is_not_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, safe_merge: self.unload())
    with pytest.raises(RunFailed, match="log-probabilities differ by"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["elsewhere/tiny", "a/folder/of/three"])
def test_a_missing_base_is_named(
    name: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": name}), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["merge", str(adapter), "merged"]) == 2
    assert capsys.readouterr().err == (
        f"{adapter / 'adapter_config.json'}: base_model_name_or_path: no model {name!r} in {tmp_path} or on "
        "the hub. Run this in the folder where the training was started, or correct the path in that file\n"
    )
    assert not (tmp_path / "merged").exists()


def test_the_folders_are_checked_first(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path), "merged"]) == 2
    assert "adapter_config.json is missing. Use the output_dir of a LoRA run" in capsys.readouterr().err
    assert main(["merge", str(adapter), str(adapter)]) == 2
    assert f"{adapter}: exists and is not an empty folder. Choose another one" in capsys.readouterr().err
    file = adapter / "adapter_config.json"
    assert main(["merge", str(adapter), str(file / "merged")]) == 2
    assert f"{file}: exists and is not an empty folder. Choose another one" in capsys.readouterr().err


def test_an_adapters_folder_has_the_end_of_turn_in_its_generation_config(base: Path, tmp_path: Path) -> None:
    """Its base's generation config lacks it; `generate` and servers read the file next to the adapter."""
    from small_run import run

    folder = run(tmp_path, base, finetuning_type="lora", max_steps=1, preflight=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends


CALLS_END_OTHERWISE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|endoftext|>' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_generation_also_stops_at_a_separate_token_that_ends_calls(tiny_model: Path, tmp_path: Path) -> None:
    """As in gpt-oss: in a full run's model, an adapter's folder and its merged model."""
    from small_run import run

    template, base = tmp_path / "calls.jinja", shutil.copytree(tiny_model, tmp_path / "base")
    template.write_text(CALLS_END_OTHERWISE, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    generates = json.loads((base / "generation_config.json").read_text(encoding="utf-8")) | {"eos_token_id": ends[0]}
    (base / "generation_config.json").write_text(json.dumps(generates), encoding="utf-8")
    for kind in ("full", "lora"):
        folder = run(tmp_path / kind, base, template=str(template), finetuning_type=kind, max_steps=1, preflight=False)
        assert GenerationConfig.from_pretrained(folder).eos_token_id == ends, kind
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == ends


def test_a_merge_ends_with_the_serving_check_of_the_rows_that_the_run_kept(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = small_run.run(tmp_path, tiny_model, finetuning_type="lora")
    assert "serving check  12 of 12 prompts identical" in capsys.readouterr().out
    assert main(["merge", str(trained), str(tmp_path / "merged")]) == 0
    assert "serving check  12 of 12 prompts identical" in capsys.readouterr().out
    template = tmp_path / "run" / "chat_template.jinja"
    template.write_text(
        template.read_text(encoding="utf-8").replace("<|im_start|>", "<|fim_prefix|>"), encoding="utf-8"
    )
    assert main(["merge", str(trained), str(tmp_path / "again")]) == 0
    assert "serving check  0 of 12 prompts identical; chat template: " in capsys.readouterr().out


def test_a_dtype_that_cannot_hold_the_weights_is_an_error(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = small_run.read_weights(adapter / "adapter_model.safetensors")
    save_file({name: weight * 3e4 for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--dtype", "float16"]) == 1
    assert "float16 cannot hold the merged weights" in capsys.readouterr().err
