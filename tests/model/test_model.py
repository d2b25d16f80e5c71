"""`load_model` builds what the recipe asks for, and the saved model is the trained one."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import architectures
import pytest
import small_run
import torch
from datasets import Dataset
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GptOssConfig, LlamaConfig

from arpo_trl.errors import RecipeError
from arpo_trl.model.adapters import keep_adapter_in_float32
from arpo_trl.model.merge import merge
from arpo_trl.model.methods.chosen import methods_of, trainer_kwargs
from arpo_trl.model.methods.freeze import trained_layers
from arpo_trl.model.methods.quantized import dequantized
from arpo_trl.model.model import load_model
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.recipe import Recipe, read_recipe
from arpo_trl.run_folder import checkpoint_step, list_checkpoints
from arpo_trl.training.checkpoints import find_problem, newest_complete_checkpoint
from arpo_trl.training.trainer import ArpoTrainer

OFT = {"finetuning_type": "oft", "oft_block_size": 16, "module_dropout": 0.2}
INPUT_IDS = torch.arange(300, 332).unsqueeze(0)
ROWS = [
    {
        "input_ids": [300 + (7 * i + j) % 90 for j in range(12)],
        "labels": [-100] * 4 + [300 + (i * j) % 90 for j in range(8)],
    }
    for i in range(16)
]


def recipe(folder: Path, model: Path, **keys: Any) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    keys = {
        "model_name_or_path": str(model),
        "output_dir": str(folder),
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "none",
        "learning_rate": 5e-3,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | keys
    path = folder / "given.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return read_recipe(path)


needs_badam = pytest.mark.skipif(find_spec("badam") is None, reason="needs badam")


def run(given: Recipe, resume: bool = False) -> Any:
    """Train as `train` does, without its data and reports."""
    args = to_sft_config(given)
    model, dtype = load_model(given)
    trainer = ArpoTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(given.model_name_or_path),
        **trainer_kwargs(given, model, args),
    )
    keep_adapter_in_float32(model)
    checkpoint = newest_complete_checkpoint(Path(given.output_dir))[0] if resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_final_model(dtype)
    for method in methods_of(given):
        method.finish(model, Path(given.output_dir))
    return trainer


def assert_a_resume_is_exact(folder: Path, model: Path, *files: str, **keys: Any) -> None:
    """Assert that a run of four steps and one resumed from checkpoint-2 end with the same tensors in `files`."""
    keys |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(recipe(folder / "whole", model, **keys))
    parts = recipe(folder / "parts", model, **keys)
    run(parts)
    shutil.rmtree(folder / "parts" / "checkpoint-4")
    run(parts, resume=True)
    for file in files:
        whole, found = (load_file(folder / name / file) for name in ("whole", "parts"))
        assert whole and [name for name in whole if not torch.equal(whole[name], found[name])] == []


def predict(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=INPUT_IDS).logits.float()
    return logits


def on_its_base(adapter: Path) -> PeftModel:
    """Return the adapter on the base that its config names, in float32."""
    name = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), str(adapter))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[Path]:
    """Two trained adapters of the tiny model."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        run(recipe(folder, tiny_model, seed=seed))
    return folders


# --- what is saved is what was trained ---


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="lora"),
        pytest.param({"use_dora": True}, id="dora"),
        pytest.param({"use_rslora": True, "lora_rank": 4}, id="rslora"),
        pytest.param({"loraplus_lr_ratio": 16.0}, id="loraplus"),
        pytest.param({"pissa_init": True, "pissa_iter": -1}, id="pissa"),
        pytest.param({"pissa_init": True, "use_rslora": True}, id="pissa_fast_svd_rslora"),
        pytest.param({"finetuning_type": "oft", "oft_block_size": 16}, id="oft"),
        pytest.param({"use_llama_pro": True, "freeze_trainable_layers": 1}, id="llama_pro"),
        pytest.param({"lora_target": "q_proj,v_proj", "additional_target": "embed_tokens"}, id="embedding_whole"),
    ],
)
def test_an_adapter_on_the_original_base_predicts_what_was_trained(
    keys: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    before = predict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    trained = predict(run(recipe(tmp_path / "run", tiny_model, **keys)).model)
    assert float((trained - before).abs().max()) > 0.01
    torch.testing.assert_close(predict(on_its_base(tmp_path / "run")), trained, atol=2e-5, rtol=1e-4)
    assert not (tmp_path / "run" / "pissa_start").exists()

    dtype, mean, most = merge(tmp_path / "run", tmp_path / "merged")  # raises when the sum predicts otherwise
    assert dtype == torch.bfloat16
    assert mean <= most < 0.05


@pytest.mark.parametrize("keys", [{"pissa_init": True}, {"use_dora": True, "loraplus_lr_ratio": 4.0}, OFT], ids=str)
def test_a_resumed_adapter_equals_the_uninterrupted_one(
    keys: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    files = ("checkpoint-4/adapter_model.safetensors", "adapter_model.safetensors")
    assert_a_resume_is_exact(tmp_path, tiny_model, *files, **keys, lora_dropout=0.2)


def test_a_run_in_the_folder_of_an_earlier_one_leaves_one_model(tmp_path: Path, tiny_model: Path) -> None:
    for kind, there, gone in (("lora", "adapter_model", "model"), ("full", "model", "adapter_model")) * 2:
        trained = predict(run(recipe(tmp_path / "run", tiny_model, finetuning_type=kind)).model)
        assert (tmp_path / "run" / f"{there}.safetensors").exists()
        assert not (tmp_path / "run" / f"{gone}.safetensors").exists()
    found = predict(AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.bfloat16))
    torch.testing.assert_close(found, trained, atol=0.02, rtol=0.0)  # both compute in bfloat16


# --- where an adapter starts ---


def test_under_bf16_the_base_is_bfloat16_and_trained_weights_are_float32(tmp_path: Path, tiny_model: Path) -> None:
    trainer = run(recipe(tmp_path, tiny_model, bf16=True, additional_target="embed_tokens"))
    parameters = list(trainer.model.parameters())
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in parameters if not p.requires_grad} == {torch.bfloat16}


def test_full_keeps_float32_master_weights_and_saves_the_dtype_of_the_file(tmp_path: Path, tiny_model: Path) -> None:
    model, base = load_model(recipe(tmp_path, tiny_model, finetuning_type="full", bf16=True))
    assert base
    assert (model.dtype, base.dtype) == (torch.float32, torch.bfloat16)


def test_all_is_every_linear_layer_except_the_head(tmp_path: Path, tiny_model: Path) -> None:
    model, _ = load_model(recipe(tmp_path, tiny_model))
    adapted = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_seed_initializes_the_adapter(tmp_path: Path, tiny_model: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        model, _ = load_model(recipe(tmp_path, tiny_model, seed=seed))
        weight: torch.Tensor = next(p for name, p in model.named_parameters() if "lora_A" in name)
        return weight

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_a_single_adapter_is_trained_further(tmp_path: Path, tiny_model: Path, adapters: list[Path]) -> None:
    model, _ = load_model(recipe(tmp_path, tiny_model, adapter_name_or_path=str(adapters[0])))
    torch.testing.assert_close(predict(model), predict(on_its_base(adapters[0])))
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 14  # A and B of 7 layers in 2 blocks


def test_an_adapter_on_the_hub_uses_the_models_revision_and_cache(
    tmp_path: Path, tiny_model: Path, adapters: list[Path]
) -> None:
    """As in LLaMA-Factory."""
    for name, revision, adapter in (("a", "main", adapters[0]), ("b", "v1", adapters[1])):
        shutil.copytree(adapter, tmp_path / "models--me--adapter" / "snapshots" / name)
        ref = tmp_path / "models--me--adapter" / "refs" / revision
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(name)
    keys = {"adapter_name_or_path": "me/adapter", "model_revision": "v1", "cache_dir": str(tmp_path)}
    model, _ = load_model(recipe(tmp_path / "run", tiny_model, **keys))
    torch.testing.assert_close(predict(model), predict(on_its_base(adapters[1])))
    assert model.peft_config["default"].revision is None  # of the base


@pytest.mark.parametrize("new", [False, True], ids=["the_last_is_trained_on", "create_new_adapter"])
def test_earlier_adapters_are_merged_into_a_saved_base(
    new: bool, tmp_path: Path, tiny_model: Path, adapters: list[Path]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for adapter in adapters:
        base = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    both = ",".join(map(str, adapters))
    given = recipe(tmp_path / "run", tiny_model, adapter_name_or_path=both, create_new_adapter=new, lora_rank=2)
    model: Any = load_model(given)[0]
    torch.testing.assert_close(predict(model), predict(base), atol=1e-5, rtol=1e-4)
    assert model.peft_config["default"].r == (2 if new else 8)

    trained = predict(run(given).model)
    torch.testing.assert_close(predict(on_its_base(tmp_path / "run")), trained, atol=1e-5, rtol=1e-4)


def test_loraplus_gives_b_a_different_learning_rate(tmp_path: Path, tiny_model: Path) -> None:
    given = recipe(tmp_path, tiny_model, loraplus_lr_ratio=16.0, learning_rate=1e-3, weight_decay=0.1)
    model, _ = load_model(given)
    groups = [group for group in create_optimizer(given, model).param_groups if group["params"]]
    assert [(group["lr"], len(group["params"]), group["weight_decay"]) for group in groups] == [
        (1e-3, 14, 0.1),
        (1.6e-2, 14, 0.1),
    ]


def create_optimizer(given: Recipe, model: Any) -> torch.optim.Optimizer:
    factory, kwargs = trainer_kwargs(given, model, to_sft_config(given))["optimizer_cls_and_kwargs"]
    optimizer: torch.optim.Optimizer = factory()(model, **kwargs)
    return optimizer


# --- mixtures of experts ---


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("deepseek_v2", "all"),
        ("deepseek_v3", "kv_b_proj,gate_proj,up_proj,down_proj"),
        ("qwen3_moe", "q_proj,gate_proj,up_proj,down_proj"),  # it has no layers of these names but its experts
    ],
)
def test_an_adapter_trains_experts_shared_experts_and_dense_blocks(family: str, target: str, tmp_path: Path) -> None:
    """With the losses of a plain loop, and as it is saved. PEFT alone would adapt only the fused experts."""
    base = tmp_path / "model"
    plain_base = architectures.make_model(family, base)
    layers = (name for name, one in plain_base.named_modules() if isinstance(one, torch.nn.Linear))
    wanted = {name for name in layers if name != "lm_head" and (target == "all" or name.split(".")[-1] in target)}
    given = recipe(tmp_path / "run", base, lora_target=target, per_device_train_batch_size=16, logging_steps=1)
    model: Any = load_model(given)[0]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0.0)
    ids, labels = (torch.tensor([row[key] for row in ROWS]) for key in ("input_ids", "labels"))
    losses = []
    for lr in (5e-3, 2.5e-3):
        optimizer.param_groups[0]["lr"] = lr
        loss = model(input_ids=ids, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trainer = run(given)
    assert [line["loss"] for line in trainer.state.log_history[:2]] == pytest.approx(losses)
    again = on_its_base(tmp_path / "run")
    moved = {n.split(".lora_B")[0][17:] for n, p in again.named_parameters() if ".lora_B" in n and p.abs().sum() > 0}
    assert wanted <= moved and any(name.endswith("mlp.experts") for name in moved)
    assert torch.equal(predict(again), predict(trainer.model))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_settings_that_peft_lacks_for_fused_experts_are_errors_with_a_fix(tmp_path: Path) -> None:
    base = tmp_path / "model"
    architectures.make_model("qwen3_moe", base)
    with pytest.raises(RecipeError, match=r"lora_target: .*gate_proj without also targeting up_proj"):
        load_model(recipe(tmp_path, base, lora_target="q_proj,gate_proj"))
    load_model(recipe(tmp_path, base, lora_target="q_proj,gate_proj,up_proj"))
    for keys in ({"lora_dropout": 0.1}, {"use_dora": True}, {"pissa_init": True}):
        with pytest.raises(
            RecipeError, match=rf"{next(iter(keys))}: not supported by PEFT for LoRA on MoE experts; remove the line"
        ):
            load_model(recipe(tmp_path, base, **keys))
        load_model(recipe(tmp_path, base, **keys, lora_target="q_proj,v_proj"))


# --- oft, LLaMA Pro ---


def test_oft_trains_what_peft_trains(tmp_path: Path, tiny_model: Path) -> None:
    keys = {"finetuning_type": "oft", "oft_rank": 4, "oft_block_size": 0, "module_dropout": 0.1}
    model, _ = load_model(recipe(tmp_path, tiny_model, **keys))
    config = OFTConfig(task_type="CAUSAL_LM", r=4, oft_block_size=0, module_dropout=0.1, target_modules="all-linear")
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    shapes, expected = ({n: p.shape for n, p in one.named_parameters() if p.requires_grad} for one in (model, plain))
    assert shapes == expected and len(shapes) == 14
    default = load_model(recipe(tmp_path, tiny_model, finetuning_type="oft"))[0].peft_config["default"]
    assert (default.r, default.oft_block_size, default.module_dropout) == (0, 32, 0)  # LLaMA-Factory's defaults


@pytest.mark.parametrize(
    ("layers", "count", "trained"),
    [(40, 8, [4, 9, 14, 19, 24, 29, 34, 39]), (32, 8, [3, 7, 11, 15, 19, 23, 27, 31]), (6, 6, [0, 1, 2, 3, 4, 5])],
)
def test_llama_pro_trains_every_nth_layer(layers: int, count: int, trained: list[int], tmp_path: Path) -> None:
    given = recipe(tmp_path, tmp_path, freeze_trainable_layers=count, use_llama_pro=True)
    assert list(trained_layers(given, layers)) == trained


def test_llama_pro_adapts_only_the_trained_layers(tmp_path: Path, tiny_model: Path) -> None:
    for target in ("all", "q_proj,up_proj"):
        keys = {"freeze_trainable_layers": 1, "use_llama_pro": True, "lora_target": target}
        model, _ = load_model(recipe(tmp_path, tiny_model, **keys))
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(names) == {"all": 14, "q_proj,up_proj": 4}[target] and all(".layers.1." in name for name in names)


# --- Muon, Adam-mini ---


def plain_muon(model: Any, **lr: float) -> list[torch.optim.Optimizer]:
    """Return the optimizers of LLaMA-Factory's use_muon, in plain torch. Its scale is 0.2 sqrt(the longer side)."""
    names = dict(model.named_parameters())
    inner = [names.pop(n) for n in [*names] if names[n].ndim == 2 and not re.search("embed|lm_head", n)]
    return [
        torch.optim.Muon(inner, **lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(names.values(), **lr, weight_decay=0.1),
    ]


def plain_adam_mini(model: Any, **lr: float) -> list[torch.optim.Optimizer]:
    adam_mini = pytest.importorskip("adam_mini")
    heads = {"dim": 64, "n_heads": 4, "n_kv_heads": 2}
    return [adam_mini.Adam_mini(model.named_parameters(), **lr, weight_decay=0.1, **heads, verbose=False)]


@pytest.mark.parametrize(
    ("key", "plain"), [("use_muon", plain_muon), ("use_adam_mini", plain_adam_mini)], ids=["muon", "adam_mini"]
)
def test_muon_and_adam_mini_step_as_the_plain_optimizers_and_resume(
    key: str, plain: Any, tmp_path: Path, tiny_model: Path
) -> None:
    if key == "use_adam_mini":
        pytest.importorskip("adam_mini")
    keys = {"finetuning_type": "full", key: True, "weight_decay": 0.1}
    given = recipe(tmp_path, tiny_model, **keys)
    ours, theirs = (load_model(given)[0] for _ in range(2))
    optimizer, plain_ones = create_optimizer(given, ours), plain(theirs, lr=given.learning_rate)
    for _ in range(3):
        for weight, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        for one in (optimizer, *plain_ones):
            one.step()
            for group in one.param_groups:
                group["lr"] /= 2  # as a schedule does
    assert [n for n, weight in ours.named_parameters() if not torch.equal(weight, theirs.get_parameter(n))] == []

    assert_a_resume_is_exact(tmp_path, tiny_model, "model.safetensors", **keys)


@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")  # galore_torch's own
@pytest.mark.parametrize(
    "keys", [{"use_galore": True}, {"use_apollo": True}, {"use_apollo": True, "apollo_proj": "svd"}]
)
def test_galore_and_apollo_resume_with_their_projections(
    keys: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    pytest.importorskip("galore_torch" if "use_galore" in keys else "apollo_torch")
    assert_a_resume_is_exact(tmp_path, tiny_model, "model.safetensors", finetuning_type="full", **keys)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_asft_resumes_with_the_initial_model_as_reference(method: str, tmp_path: Path, tiny_model: Path) -> None:
    keys = {"finetuning_type": method, "use_asft_loss": True, "asft_alpha": 5.0}
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert_a_resume_is_exact(tmp_path, tiny_model, file, **keys)


# --- bases in MXFP4 and FP8 ---


def write_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Write a tiny gpt-oss in MXFP4. Return its weights, dequantized and packed."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32, "vocab_size": 1088}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    AutoModelForCausalLM.from_config(GptOssConfig(**sizes, **heads)).save_pretrained(folder)
    weights = small_run.read_weights(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, columns = weights[name].shape
        codes = torch.randint(0, 16, (experts, columns, rows // 32, 32))  # two in a byte; a scale for 32 of them
        weights[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        weights[f"{name}_scales"] = torch.full(
            (experts, columns, rows // 32), 121, dtype=torch.uint8
        )  # 2 ** (121 - 127)
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat([values, -values])[codes].reshape(experts, columns, rows).transpose(1, 2) / 64
        weights[name] = values.contiguous()
    return weights


def write_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Write a tiny Llama in FP8, as DeepSeek-V3's files are. Return its weights, dequantized and packed."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 1088}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    weights = small_run.read_weights(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        weights[f"{name}_blocks"] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[name] = weights[f"{name}_blocks"].float() * scale
    return weights


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("kind", "write"), [("mxfp4", write_mxfp4), ("fp8", write_fp8)], ids=["mxfp4", "fp8"])
def test_mxfp4_and_fp8_bases_are_dequantized_and_trained(
    kind: str, write: Any, method: str, tmp_path: Path, tiny_model: Path
) -> None:
    base = tmp_path / "base"
    weights = write(base)
    stored = {name: weight for name, weight in weights.items() if f"{name}_blocks" not in weights}
    if kind == "fp8":
        stored = {name.removesuffix("_blocks"): weight for name, weight in stored.items()}
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": kind}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)

    assert dequantized(AutoConfig.from_pretrained(base))["quantization_config"].dequantize
    given = recipe(tmp_path / "run", base, finetuning_type=method, bf16=True)
    loaded = load_model(given)[0]
    names = dict((loaded.get_base_model() if isinstance(loaded, PeftModel) else loaded).named_parameters())
    names = {name.replace(".base_layer", ""): weight for name, weight in names.items()}
    for name in [name for name in weights if f"{name}_blocks" in weights]:
        found = names[name if name in names else name.replace(".experts", ".experts.base_layer")]
        torch.testing.assert_close(found.float(), weights[name].float(), rtol=1e-2, atol=1e-4)
    trainer = run(given)
    assert trainer.state.log_history[-1]["train_loss"] > 0
    if method == "full":
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        assert not hasattr(saved.config, "quantization_config")
    else:
        on_its_base(tmp_path / "run")


def test_muon_trains_an_adapter_too(tmp_path: Path, tiny_model: Path) -> None:
    run(recipe(tmp_path, tiny_model, use_muon=True))
    assert all(weight.any() for weight in load_file(tmp_path / "adapter_model.safetensors").values())


# --- BAdam ---


BADAM = {"finetuning_type": "full", "use_badam": True, "badam_switch_interval": 3, "weight_decay": 0.1}


@needs_badam
def test_badam_is_float32_adamw_on_one_block_after_another(tmp_path: Path, tiny_model: Path) -> None:
    """The first block has one step less: BAdam 1.4 counts the next step before it compares."""
    given = recipe(tmp_path, tiny_model, **BADAM)
    ours, theirs = (load_model(given)[0] for _ in range(2))
    assert ours.dtype == torch.bfloat16  # the file's
    optimizer, before = create_optimizer(given, ours), -1
    for step, block in enumerate([0, 0, 1, 1, 1, 0, 0, 0]):
        trained = {n: p for n, p in theirs.named_parameters() if f"layers.{block}." in n}
        assert {n for n, p in ours.named_parameters() if p.requires_grad} == {*trained}
        if block != before:
            copies = {name: weight.detach().float() for name, weight in trained.items()}
            plain, before = torch.optim.AdamW(copies.values(), weight_decay=0.1, fused=True), block
        for name, copy in copies.items():
            ours.get_parameter(name).grad = torch.randn_like(trained[name])
            copy.grad = ours.get_parameter(name).grad.float()
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = 1e-2 / (step + 1)  # as a schedule does
        optimizer.step()
        plain.step()
        for name, weight in trained.items():
            weight.data.copy_(copies[name])
        assert [n for n, weight in ours.named_parameters() if not torch.equal(weight, theirs.get_parameter(n))] == []


@needs_badam
@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        ("random", (4, 2)),  # in a block, and where one has just begun
        *(
            pytest.param(mode, (5, 4, 3, 2, 1), marks=pytest.mark.slow)
            for mode in ("ascending", "descending", "random")
        ),
    ],
)
def test_badam_resumes_in_its_block(mode: str, steps: tuple[int], tmp_path: Path, tiny_model: Path) -> None:
    keys = BADAM | {"badam_switch_mode": mode, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    given = recipe(tmp_path, tiny_model, **keys)
    run(given)
    whole = load_file(tmp_path / "model.safetensors")
    before = load_file(tiny_model / "model.safetensors")
    trained = {n for n in whole if not torch.equal(whole[n], before[n])}
    assert {re.sub(r"(layers\.\d).*", r"\1", name) for name in trained} <= {"model.layers.0", "model.layers.1"}
    for step in steps:
        for folder in list_checkpoints(tmp_path):
            if checkpoint_step(folder) > step:
                shutil.rmtree(folder)
        run(given, resume=True)
        found = load_file(tmp_path / "model.safetensors")
        assert [name for name in whole if not torch.equal(whole[name], found[name])] == [], step


@needs_badam
def test_badam_rejects_a_checkpoint_of_another_optimizer(tmp_path: Path, tiny_model: Path) -> None:
    keys = {"finetuning_type": "full", "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    run(recipe(tmp_path, tiny_model, **keys))
    with pytest.raises(
        RecipeError, match="use_badam: the checkpoint was saved with another optimizer; set a new output_dir"
    ):
        run(recipe(tmp_path, tiny_model, **keys | BADAM | {"max_steps": 2}), resume=True)


@needs_badam
def test_badam_trains_through_a_reentrant_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    weights = []
    for reentrant in (False, True):
        run(recipe(tmp_path, tiny_model, **BADAM, use_reentrant_gc=reentrant, max_steps=3))
        weights.append(load_file(tmp_path / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@needs_badam
def test_badam_does_not_change_a_weight_without_a_gradient(tmp_path: Path, tiny_model: Path) -> None:
    keys = {"vocab_size": 1024, "pad_token_id": 0, **architectures.FAMILIES["ernie4_5_moe"]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("ernie4_5_moe", **keys))
    model.save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "moe")
    keys = BADAM | {"badam_switch_mode": "descending", "weight_decay": 0.0}
    run(recipe(tmp_path, tmp_path / "moe", **keys))
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "moe", tmp_path))
    assert {n for n in after if ".layers.1." in n and torch.equal(before[n], after[n])} == {
        "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    }


def test_badam_reports_models_and_keys_without_matching_blocks(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match="badam_start_block: expected a block of 0 to 1, found 2"):
        load_model(recipe(tmp_path, tiny_model, **BADAM, badam_start_block=2))
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=32, n_head=2, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(RecipeError, match="use_badam: gpt2 has no blocks named layers; remove the line"):
        load_model(recipe(tmp_path, tmp_path / "gpt2", **BADAM))


# --- freeze ---


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ({"freeze_trainable_layers": 1}, {"1.self_attn", "1.mlp", "1.input_layernorm", "1.post_attention_layernorm"}),
        ({"freeze_trainable_layers": 1, "use_llama_pro": True, "freeze_trainable_modules": "mlp"}, {"1.mlp"}),
        ({"freeze_trainable_layers": -1, "freeze_trainable_modules": "mlp"}, {"0.mlp"}),
        ({"freeze_trainable_modules": "self_attn,mlp"}, {"0.self_attn", "0.mlp", "1.self_attn", "1.mlp"}),
        ({"freeze_trainable_layers": 0, "freeze_extra_modules": "norm"}, {"norm.weight"}),
    ],
    ids=str,
)
def test_freeze_trains_the_given_layers_and_modules(
    keys: dict[str, Any], trained: set[str], tmp_path: Path, tiny_model: Path
) -> None:
    model, base = load_model(recipe(tmp_path, tiny_model, finetuning_type="freeze", bf16=True, **keys))
    names = [
        name.removeprefix("model.layers.").removeprefix("model.")
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    assert {".".join(name.split(".")[:2]) for name in names} == trained
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert base
    assert base.dtype == torch.bfloat16


def test_freeze_changes_only_the_given_modules_and_resumes(tmp_path: Path, tiny_model: Path) -> None:
    keys: dict[str, Any] = {"bf16": True, "use_reentrant_gc": True}
    keys |= {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_trainable_modules": "mlp"}
    assert_a_resume_is_exact(tmp_path, tiny_model, "model.safetensors", **keys)
    base, whole = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "whole"))
    assert {name for name in base if not torch.equal(base[name], whole[name])} == {
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }


# --- quantized ---


@pytest.mark.parametrize("bits", [4, 8])
def test_the_adapter_of_a_quantized_base_is_float32(bits: int, tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = run(recipe(tmp_path, tiny_model, quantization_bit=bits))
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)


def test_a_4_bit_base_has_the_same_gradients_after_an_evaluation(tmp_path: Path, tiny_model: Path) -> None:
    """On CPUs with AVX512_BF16, bitsandbytes would keep the layout into which it packs weights for inference."""
    pytest.importorskip("bitsandbytes")
    model, _ = load_model(recipe(tmp_path, tiny_model, quantization_bit=4))

    def gradients() -> dict[str, torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before, _ = gradients(), predict(model)
    torch.testing.assert_close(gradients(), before, rtol=0, atol=0)
    assert any(bool(tensor.any()) for tensor in before.values())


# --- refusals ---


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_name_or_path": "/nowhere/model"}, "model_name_or_path: /nowhere/model can't be loaded ("),
        ({"adapter_name_or_path": "/nowhere/a"}, "adapter_name_or_path: /nowhere/a can't be loaded ("),
        (
            {"lora_target": "q_proj,v_porj"},
            "lora_target: the model has no module v_porj; expected some of down_proj, embed_tokens, gate_proj, k_proj, o_proj, q_proj,",
        ),
        (
            {"additional_target": "norm,embed_tokn"},
            "additional_target: the model has no module embed_tokn; expected some of down_proj, emb",
        ),
        ({"moe_aux_loss_coef": 0.1}, "moe_aux_loss_coef: not supported: qwen2 has no router; remove the line"),
        ({"quantization_bit": 4, "adapter_name_or_path": "/a,/b"}, "/a can't be merged into a quantized base"),
        (
            {"finetuning_type": "freeze", "freeze_trainable_modules": "mlpp"},
            "no module mlpp; expected some of all, input_layernorm, mlp",
        ),
        (
            {"finetuning_type": "freeze", "freeze_extra_modules": "head"},
            "no module head; expected some of embed_tokens, norm",
        ),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": 0},
            "freeze_trainable_layers: 0 leaves nothing to train",
        ),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": 3, "use_llama_pro": True},
            "freeze_trainable_layers: expected a divisor of the model's 2 layers (use_llama_pro), found 3",
        ),
        (
            {"finetuning_type": "oft", "oft_target": "q_prj"},
            "oft_target: the model has no module q_prj; expected some of",
        ),
        (
            {"pissa_init": True, "use_dora": True},
            "pissa_init: can't be converted to plain LoRA with use_dora; remove one",
        ),
    ],
)
def test_a_model_that_cannot_be_loaded_is_reported_in_one_line(
    keys: dict[str, Any], words: str, tmp_path: Path, tiny_model: Path
) -> None:
    if "quantization_bit" in keys:
        pytest.importorskip("bitsandbytes")
    with pytest.raises(RecipeError) as error:
        load_model(recipe(tmp_path, **{"model": tiny_model, **keys}))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def rename(file: Path, kept: str, prefix: str = "") -> None:
    """Keep the tensors whose name contains `kept`, and add a prefix to their names."""
    save_file(
        {prefix + name: t for name, t in small_run.read_weights(file).items() if kept in name}, file, {"format": "pt"}
    )


@pytest.mark.parametrize(
    ("kept", "prefix", "layers", "words"),
    [
        ("", "base_model.model.", 2, "27 missing keys, the first is lm_head.weight"),  # of a merge gone wrong
        ("layers.0", "", 2, "15 missing keys, the first is lm_head.weight"),
        ("", "", 1, "12 unexpected keys, the first is model.layers.1.input_layernorm.weight"),
    ],
)
def test_weights_that_do_not_match_the_config_are_an_error(
    kept: str, prefix: str, layers: int, words: str, tmp_path: Path, tiny_model: Path
) -> None:
    """transformers would initialize or ignore them, with a warning that is easy to miss."""
    shutil.copytree(tiny_model, tmp_path / "base")
    rename(tmp_path / "base" / "model.safetensors", kept, prefix)
    config = tmp_path / "base" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values |= {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    config.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(RecipeError, match=f"weights don't match its config.json: {words}; expected the files of one"):
        load_model(recipe(tmp_path / "run", tmp_path / "base"))


@pytest.mark.parametrize(
    ("kept", "prefix", "words"),
    [("layers.1", "", "Found missing adapter keys"), ("", "model.", "Found missing adapter keys")],
)
def test_an_adapter_that_lacks_modules_is_an_error(
    kept: str, prefix: str, words: str, tmp_path: Path, tiny_model: Path, adapters: list[Path]
) -> None:
    shutil.copytree(adapters[0], tmp_path / "adapter")
    rename(tmp_path / "adapter" / "adapter_model.safetensors", kept, prefix)
    with pytest.raises(RecipeError, match=rf"adapter_name_or_path: \S+ can't be loaded \({words}"):
        load_model(recipe(tmp_path / "run", tiny_model, adapter_name_or_path=str(tmp_path / "adapter")))


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_an_adapter_of_a_deeper_model_is_an_error(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    configs = {"lora": LoraConfig(target_modules="all-linear"), "oft": OFTConfig(oft_block_size=16, r=0)}
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, configs[kind]).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    deeper = {name.replace("layers.1", "layers.2"): tensor for name, tensor in small_run.read_weights(file).items()}
    save_file(small_run.read_weights(file) | deeper, file, {"format": "pt"})
    keys = {"finetuning_type": kind, "adapter_name_or_path": str(tmp_path / "adapter")}
    with pytest.raises(RecipeError, match=r"is of another model: this one has no module for \S+layers\.2\."):
        load_model(recipe(tmp_path / "run", tiny_model, **keys))


# --- large models ---


def test_a_sharded_model_resumes_and_a_missing_shard_is_found(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = AutoModelForCausalLM.from_pretrained(tiny_model).__class__.save_pretrained
    monkeypatch.setattr(
        "transformers.PreTrainedModel.save_pretrained",
        lambda self, *args, **kwargs: save(self, *args, **{**kwargs, "max_shard_size": "200KB"}),
    )
    keys = {"finetuning_type": "full", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run(recipe(tmp_path / "whole", tiny_model, **keys))
    parts = recipe(tmp_path / "parts", tiny_model, **keys)
    run(parts)
    last, first = (tmp_path / "parts" / f"checkpoint-{step}" for step in (4, 2))
    assert len(list(last.glob("model-*.safetensors"))) > 2
    assert find_problem(last) is None
    next(iter(sorted(last.glob("model-*.safetensors")))).unlink()
    assert "is missing" in str(find_problem(last))
    assert find_problem(first) is None

    run(parts, resume=True)
    whole, found = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []


def test_an_adapter_of_a_sharded_model_is_trained_and_merged(tmp_path: Path, tiny_model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "base", max_shard_size="200KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    trained = predict(run(recipe(tmp_path / "run", tmp_path / "base")).model)
    merge(tmp_path / "run", tmp_path / "merged")
    merged = predict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(merged, trained, atol=0.05, rtol=0.05)  # the merged weights are bfloat16


# --- rotary positions ---


@pytest.mark.parametrize("family", ["gemma3_text", "opt", "granitemoehybrid"])
def test_rope_scaling_that_a_model_ignores_is_an_error(family: str, tmp_path: Path) -> None:
    """Frequencies per type of layer, no rotary embeddings, and a config with rotary embeddings of a model without them."""
    model = tmp_path / "model"
    if family == "granitemoehybrid":
        nope = {"position_embedding_type": "nope", "layer_types": ["attention"] * 2}
        config = AutoConfig.for_model(family, **architectures.FAMILIES[family] | nope, vocab_size=64)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
    else:
        AutoConfig.for_model(family, **architectures.FAMILIES[family]).save_pretrained(model)
    with pytest.raises(
        RecipeError, match=rf"rope_scaling: not supported: {family} has no rope_type .* set cutoff_len to at most 512"
    ):
        load_model(recipe(tmp_path / "run", model, rope_scaling="linear", cutoff_len=2048))
