"""Files, packages and devices that a recipe needs are checked before anything is loaded."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from arpo_trl.data.sources import select_datasets
from arpo_trl.errors import RecipeError
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.recipe import Recipe
from arpo_trl.recipe.keys import keys
from arpo_trl.recipe.types import TRACKERS
from arpo_trl.training.requirements import (
    _packages,
    check_before_torch,
    check_inputs,
    check_packages,
)
from arpo_trl.training.setup import check_after_torch, check_device


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that are found; empty unless a test adds some."""
    keys()  # reads transformers' sources, which would not be found either
    found: set[str] = set()

    def find_spec(name: str) -> ModuleSpec | None:
        return ModuleSpec(name, None) if name in found else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return found


@pytest.fixture
def with_data(tmp_path: Path) -> list[str]:
    """Return lines for a dataset that exists."""
    (tmp_path / "dataset_info.json").write_text(
        '{"d": {"file_name": "d.jsonl"}, "pairs": {"file_name": "d.jsonl", "ranking": true}}', encoding="utf-8"
    )
    (tmp_path / "d.jsonl").touch()
    return [f"dataset_dir={tmp_path}", "dataset=d"]


def check_machine(recipe: Recipe) -> None:
    check_packages(recipe)
    check_device(recipe)


def missing(recipe: Recipe) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        check_machine(recipe)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{recipe.path}") for line in lines)
    return [line.partition(f"{recipe.path}")[2].partition(": ")[2] for line in lines]


def test_all_missing_packages_are_reported_at_once_with_fixes(recipe_of: Any, installed: set[str]) -> None:
    recipe = recipe_of("deepspeed=z3.json", "quantization_bit=4", "report_to=wandb", "enable_liger_kernel=true")
    assert missing(recipe) == [
        "deepspeed: not installed; pip install deepspeed, or remove the line and launch with "
        "accelerate_configs/fsdp2.yaml (multi_gpu.yaml if the model fits one GPU)",
        "quantization_bit: needs bitsandbytes, which is not installed; pip install bitsandbytes, or remove the line",
        "enable_liger_kernel: needs liger_kernel, which is not installed; pip install liger_kernel, or remove the line",
        "report_to: wandb is not installed; pip install wandb, or set report_to: none",
    ]


def test_a_recipe_without_extra_packages_passes(recipe_of: Any, installed: set[str]) -> None:
    check_machine(recipe_of("bf16=true", "report_to=none"))


def test_a_missing_deepspeed_file_is_named(recipe_of: Any, installed: set[str], tmp_path: Path) -> None:
    installed.add("deepspeed")
    (line,) = missing(recipe_of("deepspeed=z3.json"))
    assert line.startswith(f"deepspeed: z3.json: no such file; paths are relative to {Path.cwd()}")
    (tmp_path / "z3.json").write_text("{}", encoding="utf-8")
    check_machine(recipe_of(f"deepspeed={tmp_path / 'z3.json'}"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")
def test_keys_that_need_a_gpu_are_rejected_without_one(recipe_of: Any) -> None:
    assert missing(recipe_of("activation_offloading=true", "tf32=true", "flash_attn=flex")) == [
        "activation_offloading: needs a GPU; remove the line",
        "tf32: needs a GPU; remove the line",
        "flash_attn: flex attention can't train on a CPU; set flash_attn: sdpa",
    ]


def test_muon_needs_a_recent_torch(recipe_of: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe_of("use_muon=true", "report_to=none", f"model_name_or_path={tiny_model}")
    check_after_torch(given)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(RecipeError, match=r"use_muon: requires torch 2\.9 or later"):
        check_after_torch(given)


def test_a_recipe_accepts_the_trackers_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) == TRACKERS


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("use_galore=true", "galore_torch"),
        ("use_apollo=true", "apollo_torch"),
        ("optim=galore_adamw", "galore_torch"),
        ("optim=paged_adamw_8bit", "bitsandbytes"),
    ],
)
def test_the_package_of_an_optimizer_is_required(recipe_of: Any, installed: set[str], line: str, package: str) -> None:
    recipe = recipe_of("finetuning_type=full", line)
    assert f"needs {package}, which is not installed" in missing(recipe)[0]
    installed.add(package)
    check_machine(recipe)


def test_every_optimizers_package_is_known(recipe_of: Any, installed: set[str]) -> None:
    """None of them is installed, and transformers requires one whenever `check_packages` does."""
    names = keys()["optim"].schema["enum"]
    torchs_own = [name for name in names if not [*_packages(recipe_of(f"optim={name}"))]]
    assert sorted(torchs_own) == ["adafactor", "adagrad", "adamw_torch", "adamw_torch_fused", "rmsprop", "sgd"]
    for name in torchs_own:
        assert Trainer.get_optimizer_cls_and_kwargs(to_sft_config(recipe_of(f"optim={name}")))


class Wandb:
    def __init__(self, logged_in: bool):
        self.logged_in = logged_in

    def login(self, prompt: bool) -> bool:
        assert prompt is False  # nobody can answer
        return self.logged_in


def test_wandb_needs_a_login_unless_it_is_offline(
    recipe_of: Any, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.add("wandb")
    monkeypatch.delitem(os.environ, "WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", Wandb(logged_in=False))
    assert missing(recipe_of("report_to=wandb")) == [
        "report_to: not logged in to wandb; run `wandb login`, set WANDB_MODE=offline, or set report_to: none"
    ]
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    check_machine(recipe_of("report_to=wandb"))
    monkeypatch.delitem(os.environ, "WANDB_MODE")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(logged_in=True))
    check_machine(recipe_of("report_to=wandb"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_name_or_path", "/nowhere/m", "/nowhere/m: no such folder"),
        ("model_name_or_path", "./m", "./m: no such folder; paths are relative to "),
        ("model_name_or_path", "a/b/c", "a/b/c: no such folder; paths are relative to "),
        ("model_name_or_path", "D:qwen", "D:qwen: no such folder; paths are relative to "),
        ("model_name_or_path", r"\\server\qwen", r"\\server\qwen: no such folder"),
        ("model_name_or_path", "x" * 300, f"{'x' * 300}: no such folder, not in the Hub's cache"),
        ("model_name_or_path", "{empty}", "{empty}: config.json is missing"),
        ("adapter_name_or_path", "{empty}", "{empty}: adapter_config.json is missing"),
        ("adapter_name_or_path", "/nowhere/a", "/nowhere/a: no such folder"),
        (
            "dataset_dir",
            "/nowhere",
            f"{Path('/nowhere')}: no such folder; expected the folder of dataset_info.json",
        ),
        ("dataset_dir", "x" * 300, f"{'x' * 300}: no such folder"),
        ("dataset", "e", "e: no such dataset in "),
        ("eval_dataset", "e", "e: no such dataset in "),
        ("template", "my.jinja", "my.jinja: no such file; paths are relative to "),
    ],
)
def test_a_missing_file_is_reported_with_the_line_of_its_key(
    recipe_of: Any, with_data: list[str], tmp_path: Path, tiny_model: Path, key: str, value: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    keys = {"model_name_or_path": str(tiny_model), key: value.replace("{empty}", str(tmp_path / "empty"))}
    with pytest.raises(RecipeError) as caught:
        check_inputs(recipe_of(*with_data, *(f"{key}={value}" for key, value in keys.items())))
    assert f": {key}: {message.replace('{empty}', str(tmp_path / 'empty'))}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("has_code", [False, True])
def test_trust_remote_code_is_reported_if_the_model_has_code(
    has_code: bool, recipe_of: Any, with_data: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}} if has_code else {}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = check_inputs(recipe_of(*with_data, f"model_name_or_path={folder}", "trust_remote_code=true"))
    assert any(notice.startswith("trust_remote_code: code of") for notice in recipe.notices) == has_code


def test_a_notice_of_the_registry_appears_once(
    recipe_of: Any, with_data: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.jsonl", "colums": {}}}', encoding="utf-8")
    recipe = check_before_torch(recipe_of(*with_data, f"model_name_or_path={tiny_model}"))
    assert sum("colums" in line for line in recipe.notices) == 1
    assert check_before_torch(recipe).notices == recipe.notices


def answer_before_torch(tmp_path: Path, model: Path) -> str:
    """What `check_inputs` says of a recipe that trains this model, in a process that has not imported torch."""
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.jsonl"}}', encoding="utf-8")
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    lines = [f"model_name_or_path: {model}", f"output_dir: {tmp_path / 'out'}", f"dataset_dir: {tmp_path}"]
    (tmp_path / "r.yaml").write_text("\n".join([*lines, "dataset: d", "do_train: true"]), encoding="utf-8")
    code = (
        "import sys; from arpo_trl.recipe import read_recipe; from arpo_trl.training.requirements import check_inputs\n"
        "try: check_inputs(read_recipe(sys.argv[1]))\n"
        "except Exception as error: print(error); assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_quantized(folder: Path, method: str) -> Path:
    """The config of a base that is quantized already."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": {"quant_method": method, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_reference_must_exist_and_have_the_models_vocabulary(
    recipe_of: Any, with_data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, config in (("m", {"vocab_size": 1000}), ("other", {"text_config": {"vocab_size": 999}})):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config), encoding="utf-8")
    lines = [*with_data, "stage=dpo", "dataset=pairs"]
    for ref, problem in [
        ("./none", "ref_model: ./none: no such folder; paths are relative to "),
        ("./other", "ref_model: ./other has 999 tokens in its vocabulary, m has 1,000; use a reference with the same"),
    ]:
        with pytest.raises(RecipeError, match=problem):
            check_inputs(recipe_of(*lines, f"ref_model={ref}"))
    with pytest.raises(RecipeError, match=r"ref_model_adapters: \./none: no such folder"):
        check_inputs(recipe_of(*lines, "ref_model=./m", "ref_model_adapters=./none"))
    with pytest.raises(RecipeError, match="output_dir: other is the folder of the reference; choose another folder"):
        Path("other", "config.json").write_text('{"vocab_size": 1000}', encoding="utf-8")
        check_inputs(recipe_of(*lines, "ref_model=./other", "output_dir=other"))


def test_model_revision_is_not_that_of_another_reference(
    recipe_of: Any, with_data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is loaded from `main`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, revision, size in (("m", "v1", 1000), ("other", "main", 999)):
        snapshot = tmp_path / f"models--{name}" / "snapshots" / "abc"  # huggingface_hub's cache
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / revision).write_text("abc", encoding="utf-8")
        (snapshot / "config.json").write_text(json.dumps({"vocab_size": size}), encoding="utf-8")
    lines = [*with_data, "stage=dpo", "dataset=pairs", f"cache_dir={tmp_path}", "model_revision=v1"]
    with pytest.raises(RecipeError, match="ref_model: other has 999 tokens in its vocabulary, m has 1,000"):
        check_inputs(recipe_of(*lines, "ref_model=other"))


@pytest.mark.parametrize(("method", "package"), [("gptq", "gptqmodel"), ("awq", "gptqmodel"), ("aqlm", "aqlm")])
def test_the_package_of_a_quantized_base_is_required_before_torch(method: str, package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    model = write_quantized(tmp_path / "model", method)
    told = answer_before_torch(tmp_path, model)
    assert f"r.yaml:1: model_name_or_path: {model} is quantized with {method.upper()}, which needs {package}" in told
    assert f"; pip install {package}" in told


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["finetuning_type=full"],
            "finetuning_type: {base}, which does not support full training; use finetuning_type: lora",
        ),
        (["use_dora=true"], "use_dora: not supported: {base}; remove the line"),
        (["pissa_init=true"], "pissa_init: not supported: {base}; remove the line"),
        (["adapter_name_or_path=a,b"], "adapter_name_or_path: {base}, so no adapter can be merged into it; keep one"),
        (
            ["adapter_name_or_path=a", "create_new_adapter=true"],
            "adapter_name_or_path: {base}, so no adapter can be merged into it; keep one and create_new_adapter: false",
        ),
        (
            ["stage=dpo", "dataset=pairs", "adapter_name_or_path=a", "create_new_adapter=true"],
            "create_new_adapter: false; or compare with it unmerged: create_new_adapter: false, ref_model: m, "
            "ref_model_adapters: a",
        ),
        (["adapter_name_or_path=a"], None),
        (["quantization_bit=4"], None),
        (["finetuning_type=full", "do_train=false", "do_predict=true", "eval_dataset=d", "dataset=null"], None),
    ],
)
def test_keys_not_supported_on_a_quantized_base_are_reported_with_their_line(
    lines: list[str],
    expected: str | None,
    installed: set[str],
    recipe_of: Any,
    with_data: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text("{}", encoding="utf-8")
    base = f"{write_quantized(Path('m'), 'gptq')} is quantized with GPTQ"
    given = recipe_of(*with_data, *lines)
    with pytest.raises(RecipeError) as caught:
        check_inputs(given)
    assert f"{base}, which needs gptqmodel and optimum; pip install gptqmodel optimum, or use the unquantized" in str(
        caught.value
    )
    installed |= {"gptqmodel", "optimum"}
    if expected:
        with pytest.raises(RecipeError) as caught:
            check_inputs(given)
        assert expected.format(base=base) in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    told = check_inputs(given)
    assert told.quantization_bit is None
    unread = "quantization_bit: ignored: the model is already quantized with GPTQ"
    assert [line for line in told.notices if unread in line] == [f"{given.path}: {unread}"] * ("bit" in lines[0])


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("run.json", '{"status": "finished"}', "contains a finished run; choose another folder, or set"),
        ("run.json", '{"status": "stopped"}', ""),
        ("config.json", "{}", "contains a model that was not written by a run; choose another folder, or set"),
    ],
)
def test_an_output_dir_in_use_is_rejected_before_torch(
    file: str, text: str, expected: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text(text, encoding="utf-8")
    told = answer_before_torch(tmp_path, tiny_model)
    assert (
        told.startswith(f"{tmp_path / 'r.yaml'}:2: output_dir: {tmp_path / 'out'} {expected}")
        if expected
        else not told
    )


def test_an_unreachable_hub_is_reported_at_once(
    recipe_of: Any, with_data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")  # where nobody listens any more
    with pytest.raises(RecipeError, match=rf"m: no such folder, .*, and http://127.0.0.1:{port} can't be reached"):
        check_inputs(recipe_of(*with_data))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    snapshot = tmp_path / "models--m" / "snapshots" / "abc"  # huggingface_hub's cache
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc", encoding="utf-8")
    (snapshot / "config.json").touch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    assert "can't be reached" in check_inputs(recipe_of(*with_data, f"cache_dir={tmp_path}")).notices[-1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        check_inputs(recipe_of(*with_data))  # it answers, though with an error: huggingface_hub will say what is wrong
        hub.shutdown()


def test_dataset_dir_may_be_on_the_hub_as_in_llamafactory(recipe_of: Any, tmp_path: Path) -> None:
    (online,) = select_datasets(recipe_of("dataset_dir=ONLINE", "dataset=owner/rows"))
    assert (online.hf_hub_url, online.formatting, online.columns["prompt"]) == ("owner/rows", "alpaca", "instruction")
    snapshot = tmp_path / "datasets--owner--registry" / "snapshots" / "abc"  # huggingface_hub's cache
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc", encoding="utf-8")
    (snapshot / "dataset_info.json").write_text('{"d": {"hf_hub_url": "owner/d"}}', encoding="utf-8")
    (remote,) = select_datasets(recipe_of("dataset_dir=REMOTE:owner/registry", f"cache_dir={tmp_path}", "dataset=d"))
    assert remote.hf_hub_url == "owner/d"
    with pytest.raises(
        RecipeError, match=r"dataset_dir: owner/none: dataset_info.json of this dataset repository can.t be downloaded"
    ):
        select_datasets(recipe_of("dataset_dir=REMOTE:owner/none", f"cache_dir={tmp_path}", "dataset=d"))
