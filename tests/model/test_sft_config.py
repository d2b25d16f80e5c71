"""A recipe's keys reach TRL, PEFT and transformers."""

import copy
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl import SFTConfig

from arpo_trl.errors import RecipeError
from arpo_trl.model import sft_config as trl_config
from arpo_trl.model.adapters import new_adapter
from arpo_trl.model.methods.chosen import methods_of
from arpo_trl.model.methods.pissa import Pissa
from arpo_trl.model.methods.qlora import Qlora, to_bitsandbytes_config
from arpo_trl.model.sft_config import model_init_kwargs, to_lora_config, to_sft_config
from arpo_trl.recipe import Recipe
from arpo_trl.recipe.keys import keys


def test_a_minimal_recipe_has_llama_factorys_defaults(recipe_of: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no FutureWarning reaches the user
        config = to_sft_config(recipe_of())
    assert (config.learning_rate, config.logging_steps, config.save_steps, config.warmup_steps) == (5e-5, 500, 500, 0)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.num_train_epochs) == (
        8,
        1,
        3,
    )
    assert (config.bf16, config.fp16, config.report_to, config.seed, config.weight_decay) == (False, False, [], 42, 0)
    assert (config.max_grad_norm, config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (1, 0.9, 0.999, 1e-8)
    assert config.activation_checkpointing and config.gradient_checkpointing
    assert config.average_tokens_across_devices


def test_trl_neither_truncates_nor_prepares_the_encoded_rows(recipe_of: Any) -> None:
    config = to_sft_config(recipe_of("cutoff_len=512"))
    assert config.max_length is None and config.dataset_kwargs == {"skip_prepare_dataset": True}
    packed = to_sft_config(recipe_of("cutoff_len=512", "neat_packing=true"))
    assert (packed.packing, packed.packing_strategy, packed.max_length) == (True, "bfd", 512)
    assert packed.dataset_kwargs is None


def test_use_cpu_is_set_without_a_gpu(recipe_of: Any) -> None:
    config = to_sft_config(recipe_of("bf16=true"))
    assert config.use_cpu is not torch.accelerator.is_available() and config.bf16


@pytest.mark.parametrize(
    "config", ["null", "{}", "{fsdp_reshard_after_forward: false}", "{cpu_offload: false}", "f.json"]
)
@pytest.mark.parametrize(
    "words", ["full_shard auto_wrap", "shard_grad_op offload", "full_shard shard_grad_op", "true"]
)
def test_the_words_of_fsdp_mean_the_same_as_in_transformers_without_its_warning(
    words: str, config: str, recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.json").write_text('{"reshard_after_forward": false, "fsdp_version": "2"}', encoding="utf-8")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # arpo-trl merge silences it
    recipe = recipe_of(f"fsdp={words}", f"fsdp_config={config}")
    ours = to_sft_config(recipe)
    assert "deprecated" not in caplog.text
    given: Any = {"fsdp": recipe.fsdp, "fsdp_config": copy.deepcopy(recipe.fsdp_config), "use_cpu": ours.use_cpu}
    theirs = SFTConfig(output_dir="o", gradient_checkpointing=None, bf16=False, **given)
    assert "deprecated" in caplog.text and ours.fsdp is theirs.fsdp is True
    assert (ours.fsdp_config, ours.fsdp_plugin_args) == (theirs.fsdp_config, theirs.fsdp_plugin_args)


@pytest.mark.parametrize("keys", [("fsdp=hybrid_shard",), ("fsdp=all",), ("fsdp=full_shard", "fsdp_config=f.json")])
def test_invalid_fsdp_values_are_reported_with_their_line(
    keys: tuple[str, ...], recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(RecipeError, match=": fsdp"):
        to_sft_config(recipe_of(*keys))


def test_a_process_without_a_launcher_uses_one_of_several_gpus(
    recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer would wrap the model in nn.DataParallel, which TRL rejects after the model is loaded."""
    real = SFTConfig.__post_init__

    def with_four_gpus(config: SFTConfig) -> None:
        real(config)
        config._n_gpu = 4

    monkeypatch.setattr(SFTConfig, "__post_init__", with_four_gpus)
    config = to_sft_config(recipe_of("per_device_train_batch_size=2"))
    assert (config.n_gpu, config.train_batch_size) == (1, 2)


# Every key with a field in SFTConfig: what is written, the field, and what must stand there.
MOVED = {
    "accelerator_config={use_seedable_sampler: false}": ("accelerator_config.use_seedable_sampler", False),
    "activation_checkpointing_kwargs={every_n_layers: 2}": ("activation_checkpointing_kwargs", {"every_n_layers": 2}),
    "gradient_checkpointing_kwargs={every_n_layers: 2}": ("activation_checkpointing_kwargs", {"every_n_layers": 2}),
    "use_reentrant_gc=true": ("activation_checkpointing_kwargs", {"use_reentrant": True}),
    "gradient_checkpointing=false": ("activation_checkpointing", False),
    "gradient_checkpointing=auto": ("activation_checkpointing", True),
    "activation_checkpointing=false": ("activation_checkpointing", False),
    "disable_gradient_checkpointing=true": ("gradient_checkpointing", False),
    "ddp_timeout=180000000": ("ddp_timeout_delta.days", 2083),
    "disable_shuffling=true": ("train_sampling_strategy", "sequential"),
    "do_eval=true": ("do_eval", True),
    "do_predict=true": ("do_predict", True),
    "enable_liger_kernel=true": ("use_liger_kernel", True),
    "eval_strategy=epoch": ("eval_strategy", "epoch"),
    "evaluation_strategy=steps": ("eval_strategy", "steps"),
    "fp16=true": ("fp16", torch.accelerator.is_available()),  # else Accelerate ignores it
    "gradient_accumulation_steps=3": ("gradient_accumulation_steps", 3),
    "global_batch_size=24": ("gradient_accumulation_steps", 3),
    "group_by_length=true": ("train_sampling_strategy", "group_by_length"),
    "learning_rate=3e-4": ("learning_rate", 3e-4),
    "load_best_model_at_end=true": ("load_best_model_at_end", True),
    "logging_steps=7": ("logging_steps", 7),
    "moe_aux_loss_coef=0.01": ("router_aux_loss_coef", 0.01),
    "num_train_epochs=2": ("num_train_epochs", 2),
    "optim=adafactor": ("optim", "adafactor"),
    "padding_free=true": ("padding_free", True),
    "per_device_eval_batch_size=3": ("per_device_eval_batch_size", 3),
    "per_device_train_batch_size=3": ("per_device_train_batch_size", 3),
    "preprocessing_num_workers=2": ("dataset_num_proc", 2),
    "project=p": ("project", "p"),
    "pure_bf16=true": ("bf16", False),
    "report_to=tensorboard": ("report_to", ["tensorboard"]),
    "resume_from_checkpoint=x": ("resume_from_checkpoint", None),
    "run_name=r": ("run_name", "r"),
    "save_only_model=true": ("save_only_model", True),
    "save_total_limit=2": ("save_total_limit", 2),
    "save_steps=50": ("save_steps", 50),
    "save_strategy=epoch": ("save_strategy", "epoch"),
    "seed=7": ("seed", 7),
    "trust_remote_code=true": ("trust_remote_code", True),
    "truncation_mode=llamafactory": ("truncation_mode", "keep_start"),
    "use_dft_loss=true": ("loss_type", "dft"),
    "warmup_ratio=0.1": ("warmup_steps", 0.1),
    "warmup_steps=10": ("warmup_steps", 10),
}
EVALUATES = ("do_eval", "do_predict", "eval_strategy", "evaluation_strategy")


@pytest.mark.parametrize("line", MOVED)
def test_a_key_reaches_sft_config(recipe_of: Any, line: str) -> None:
    field, expected = MOVED[line]
    extra = ["val_size=0.1"] if line.startswith(EVALUATES) else []
    if line.startswith("load_best"):
        extra = ["val_size=0.1", "eval_strategy=epoch", "save_strategy=epoch"]
    value: Any = to_sft_config(recipe_of(line, *extra))
    for part in field.split("."):
        value = getattr(value, part)
    assert value == expected


def test_every_key_of_sft_config_is_tested_above() -> None:
    tried = {line.split("=")[0] for line in MOVED}
    same = {name for name, key in keys().items() if key.group != "trl" and key.mapping == "same"}
    # tried by the other tests of this file
    assert same - tried <= {"bf16", "deepspeed", "do_train", "output_dir", "packing"}


@pytest.mark.parametrize("strategy", ["load_best_model_at_end=true", "save_strategy=best", "early_stopping_steps=3"])
@pytest.mark.parametrize(
    ("metric", "greater"),
    [("loss", False), ("eval_a_loss", False), ("perplexity", False), ("eval_entropy", False),
     ("eval_mean_token_accuracy", True), ("predict_right_tool", True)],
)  # fmt: skip
def test_lower_is_better_for_losses_perplexity_and_entropy(
    metric: str, greater: bool, strategy: str, recipe_of: Any
) -> None:
    evaluated = ("val_size=2", "eval_strategy=steps", "save_strategy=steps", "save_steps=10", "eval_steps=10")
    evaluated += ("predict_during_eval=2",)
    config = to_sft_config(recipe_of(*evaluated, strategy, f"metric_for_best_model={metric}"))
    assert config.greater_is_better is greater
    given = recipe_of(*evaluated, strategy, f"metric_for_best_model={metric}", f"greater_is_better={not greater}")
    assert to_sft_config(given).greater_is_better is not greater


def test_warmup_steps_override_warmup_ratio_as_in_transformers_4(recipe_of: Any) -> None:
    recipe = recipe_of("warmup_steps=10", "warmup_ratio=0.1")
    assert to_sft_config(recipe).warmup_steps == 10
    assert "warmup_ratio: ignored" in recipe.notices[0]


def test_global_batch_size_counts_the_processes(recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    recipe = recipe_of("global_batch_size=24", "per_device_train_batch_size=2")
    assert trl_config._accumulation(recipe) == 3
    with pytest.raises(
        RecipeError,
        match=r"global_batch_size: expected a multiple of 8 \(per_device_train_batch_size 2 x 4 processes\), found 12",
    ):
        trl_config._accumulation(recipe_of("global_batch_size=12", "per_device_train_batch_size=2"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["lr_scheduler_type=greedy"], "lr_scheduler_type greedy requires an eval strategy"),
        (
            ["lr_scheduler_type=polynomial", "learning_rate=1e-8"],
            "lr_end (1e-07) must be smaller than initial lr (1e-08)",
        ),
        (["dataloader_prefetch_factor=2"], "--dataloader_prefetch_factor can only be set when data is loaded in a"),
    ],
)
def test_errors_of_transformers_are_one_line_per_key(recipe_of: Any, lines: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        to_sft_config(recipe_of(*lines))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_recipe_sets_the_precision_not_the_launcher(recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "ACCELERATE_MIXED_PRECISION", "bf16")
    assert to_sft_config(recipe_of()).mixed_precision == "no"
    assert to_sft_config(recipe_of("bf16=true")).mixed_precision == "bf16"


def test_galore_and_apollo_become_transformers_optimizers(recipe_of: Any) -> None:
    galore = to_sft_config(recipe_of("finetuning_type=full", "use_galore=true", "galore_rank=128"))
    assert galore.optim == "galore_adamw"
    assert galore.optim_args == "rank=128,update_proj_gap=200,scale=2.0,proj_type=std"
    apollo = to_sft_config(
        recipe_of("finetuning_type=full", "use_apollo=true", "apollo_layerwise=true", "apollo_target=q_proj,v_proj")
    )
    assert (apollo.optim, apollo.optim_target_modules) == ("apollo_adamw_layerwise", ["q_proj", "v_proj"])
    assert apollo.optim_args == "rank=16,update_proj_gap=200,scale=32.0,proj=random,proj_type=std,scale_type=channel"


# --- the adapter ---


def adapted(recipe: Recipe, tiny_model: Path) -> set[str]:
    """Return the modules that PEFT adapts, by the last part of their names."""
    adapter = new_adapter(recipe, AutoModelForCausalLM.from_pretrained(tiny_model))
    names = [name for name, weight in adapter.named_parameters() if weight.requires_grad]
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}


# PEFT 0.21 asks transformers 5.23 by the old name, and not of us.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_all_adapts_every_linear_layer_except_the_head(recipe_of: Any, tiny_model: Path) -> None:
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted(recipe_of(), tiny_model) == linear
    assert adapted(recipe_of("lora_target=q_proj, v_proj"), tiny_model) == {"q_proj", "v_proj"}


def test_the_keys_of_an_adapter_are_passed_to_peft(recipe_of: Any, tiny_model: Path) -> None:
    config = to_lora_config(recipe_of("lora_rank=4"), tied=True)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0)
    assert config.init_lora_weights is True and config.modules_to_save is None
    lines = ["lora_alpha=3", "lora_dropout=0.1", "use_rslora=true", "use_dora=true", "additional_target=embed_tokens"]
    config = to_lora_config(recipe_of(*lines), tied=True)
    assert config.ensure_weight_tying and (config.lora_alpha, config.lora_dropout) == (3, 0.1)
    assert config.use_rslora and config.use_dora and config.modules_to_save == ["embed_tokens"]
    for iterations, start in ((16, "pissa_niter_16"), (-1, "pissa")):
        recipe = recipe_of("pissa_init=true", f"pissa_iter={iterations}")
        config = Pissa(recipe).adapter_config(
            to_lora_config(recipe, tied=True), AutoModelForCausalLM.from_pretrained(tiny_model)
        )
        assert not config.ensure_weight_tying and config.init_lora_weights == start


# --- the model ---


def init_kwargs(recipe: Recipe, config: PreTrainedConfig | None = None) -> dict[str, Any]:
    return model_init_kwargs(recipe, config or PreTrainedConfig())


@pytest.mark.parametrize(
    ("lines", "dtype"),
    [
        (["finetuning_type=full", "bf16=true"], torch.float32),  # master weights
        (["finetuning_type=full"], torch.float32),
        (["finetuning_type=full", "pure_bf16=true"], torch.bfloat16),
        (["bf16=true"], torch.bfloat16),  # the frozen base of an adapter
        (["fp16=true"], torch.float16 if torch.accelerator.is_available() else torch.float32),
        ([], torch.float32),  # on a CPU
    ],
)
def test_the_dtype_of_the_weights_follows_method_and_precision(
    recipe_of: Any, lines: list[str], dtype: object
) -> None:
    assert init_kwargs(recipe_of(*lines))["dtype"] == dtype


def test_on_a_gpu_a_frozen_base_keeps_its_files_dtype_unless_modules_are_trained(
    recipe_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert init_kwargs(recipe_of())["dtype"] == "auto"
    assert init_kwargs(recipe_of("additional_target=embed_tokens"))["dtype"] == torch.float32
    assert init_kwargs(recipe_of("finetuning_type=freeze"))["dtype"] == torch.float32


def test_pure_bf16_gives_a_notice(recipe_of: Any) -> None:
    assert "most updates are rounded to zero" in recipe_of("pure_bf16=true").notices[0]


@pytest.mark.parametrize(("written", "told"), [("disabled", "eager"), ("sdpa", "sdpa"), ("flex", "flex_attention")])
def test_flash_attn_selects_an_attention_implementation(recipe_of: Any, written: str, told: str) -> None:
    assert init_kwargs(recipe_of(f"flash_attn={written}"))["attn_implementation"] == told
    assert "attn_implementation" not in init_kwargs(recipe_of())


def test_revision_and_cache_of_the_model_are_passed_on(recipe_of: Any) -> None:
    kwargs = init_kwargs(recipe_of("model_revision=r", "cache_dir=c", "trust_remote_code=true"))
    assert (kwargs["revision"], kwargs["cache_dir"], kwargs["trust_remote_code"]) == ("r", "c", True)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_rope_scaling_uses_the_smallest_integer_that_covers_the_cutoff(
    recipe_of: Any, tiny_model: Path, kind: str
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).config
    length = plain.max_position_embeddings
    lines = [f"model_name_or_path={tiny_model}", f"rope_scaling={kind}"]
    assert "rope_parameters" not in init_kwargs(recipe_of(*lines, f"cutoff_len={length}"), plain)
    kwargs = init_kwargs(recipe_of(*lines, f"cutoff_len={2 * length + 1}"), plain)
    del kwargs["revision"], kwargs["cache_dir"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, **kwargs)
    assert model.config.max_position_embeddings == 3 * length
    assert (model.config.rope_parameters["rope_type"], model.config.rope_parameters["factor"]) == (kind, 3.0)
    assert model.config.rope_parameters["rope_theta"] == plain.rope_parameters["rope_theta"]
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_quantization_bit_configures_bitsandbytes(recipe_of: Any) -> None:
    pytest.importorskip("bitsandbytes")  # transformers asks for its version
    assert not any(isinstance(method, Qlora) for method in methods_of(recipe_of()))
    four = to_bitsandbytes_config(recipe_of("quantization_bit=4", "bf16=true", "double_quantization=false"))
    assert four is not None and four.load_in_4bit and not four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_compute_dtype == four.bnb_4bit_quant_storage == torch.bfloat16
    eight = to_bitsandbytes_config(recipe_of("quantization_bit=8"))
    assert eight is not None and eight.load_in_8bit


def test_wandb_disabled_overrides_all(recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WANDB_DISABLED", "true")
    assert "wandb" not in to_sft_config(recipe_of("report_to=all")).report_to


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("mean_token_accuracy", "max"), ("loss", None), ("entropy", None), ("predict_right_tool", "max")],
)
def test_plateau_follows_the_direction_of_the_metric(recipe_of: Any, metric: str, mode: str | None) -> None:
    plateau = "lr_scheduler_type=reduce_lr_on_plateau"
    lines = [plateau, f"metric_for_best_model={metric}", "eval_strategy=steps", "val_size=2", "predict_during_eval=2"]
    config = to_sft_config(recipe_of(*lines))
    assert (config.lr_scheduler_kwargs or {}).get("mode") == mode
    assert config.greater_is_better == (mode == "max")
