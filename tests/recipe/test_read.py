"""Reading a recipe: accepted values, their meaning, and the errors for everything else."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from arpo_trl.errors import RecipeError
from arpo_trl.recipe import Recipe, read_recipe
from arpo_trl.recipe.help import _groups, explain, explain_key, usage
from arpo_trl.recipe.keys import keys
from arpo_trl.recipe.keys_of_trl import OURS_TOO, SftKeys
from arpo_trl.recipe.llamafactory import IGNORED, MULTIMODAL, NO_OP, NOT_SUPPORTED, RENAMED, SHIPPED, TOKENIZERS_OWN
from arpo_trl.recipe.read import takes_text
from arpo_trl.shell import quote_command

LLAMA_FACTORY = json.loads(
    (Path(__file__).parent / "fixtures" / "llama_factory_keys.json").read_text(encoding="utf-8")
)
GOOD = "model_name_or_path: m\noutput_dir: o\ndo_train: true\ndataset: a\n"  # 4 lines


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """Return the lines of the error without its header."""
    path = write(folder, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    header, *lines = str(caught.value).split("\n")
    assert header == f"{path}: {len(lines)} problem{'s' * (len(lines) > 1)}"
    return [line.strip() for line in lines]


# --- wrong recipes: the fifth line of an otherwise good one ---

WRONG = [
    # types
    ("cutoff_len: 4k", "cutoff_len: expected an integer > 0, found '4k'"),
    ("cutoff_len: true", "cutoff_len: expected an integer > 0, found true"),
    ("cutoff_len: 0", "cutoff_len: expected an integer > 0, found 0"),
    ("cutoff_len: null", "cutoff_len: expected an integer > 0, found null"),
    ("per_device_train_batch_size: 2.5", "per_device_train_batch_size: expected an integer > 0, found 2.5"),
    ("learning_rate: [1, 2]", "learning_rate: expected a number >= 0, found [1, 2]"),
    ("learning_rate: -1", "learning_rate: expected a number >= 0, found -1"),
    ("learning_rate: .inf", "learning_rate: expected a number >= 0, found inf"),
    ("learning_rate: fast", "learning_rate: expected a number >= 0, found 'fast'"),
    ("bf16: maybe", "bf16: expected true or false, found 'maybe'"),
    ("bf16: 2", "bf16: expected true or false, found 2"),
    ("warmup_ratio: 1", "warmup_ratio: expected a number >= 0 and < 1, found 1"),
    ("lora_dropout: 1.5", "lora_dropout: expected a number >= 0 and < 1, found 1.5"),
    ("lora_target: {q: 1}", "lora_target: expected a string or a list, found {'q': 1}"),
    ("interleave_probs: 0.5,half", "interleave_probs: expected numbers such as 0.7,0.3, found '0.5,half'"),
    ("run_name: [a]", "run_name: expected a string, found ['a']"),
    ("finetuning_type: vera", "finetuning_type: expected one of full, freeze, lora, oft, found 'vera'"),
    ("quantization_bit: 3", "quantization_bit: expected one of 4, 8, found 3"),
    ("quantization_method: hqq", "quantization_method: expected one of bnb, bitsandbytes, found 'hqq'"),
    ("flash_attn: fa4", "flash_attn: expected one of auto, disabled, sdpa, fa2, fa3, flex, found 'fa4'"),
    ("stage: ppo", "stage: expected sft or dpo, found 'ppo'; TRL has removed PPO; use its GRPOTrainer or RLOOTrainer"),
    ("stage: pt", "stage: expected sft or dpo, found 'pt'; use TRL's SFTTrainer on rows with a `text` column"),
    ("stage: rm", "stage: expected sft or dpo, found 'rm'; use TRL's RewardTrainer"),
    ("stage: kto", "stage: expected sft or dpo, found 'kto'; use TRL's KTOTrainer"),
    ("stage: grpo", "stage: expected sft or dpo, found 'grpo'"),
    # beyond what torch and numpy count
    ("seed: 4294967296", "seed: expected an integer >= 0 and < 4294967296, found 4294967296"),
    ("data_seed: -1", "data_seed: expected an integer >= 0 and < 4294967296, found -1"),
    ("per_device_train_batch_size: 1180591620717411303424", "per_device_train_batch_size: expected an integer <= 2147483647, found 1180591620717411303424"),
    ("max_steps: 1180591620717411303424", "max_steps: expected an integer <= 2147483647, found 1180591620717411303424"),
    ("num_train_epochs: 1e300", "num_train_epochs: expected a number <= 1e15, found 1e+300"),
    ("num_train_epochs: 1e7", "num_train_epochs: expected a number > 0 and <= 1000000, found 10000000.0"),
    ("dataloader_num_workers: -1", "dataloader_num_workers: expected an integer >= 0, found -1"),
    # types of SFTConfig's own fields
    ("save_steps: true", "save_steps: expected a number > 0, found true"),
    ("save_steps: 0", "save_steps: expected a number > 0, found 0"),
    ("num_train_epochs: -1", "num_train_epochs: expected a number > 0 and <= 1000000, found -1"),
    ("eval_steps: true", "eval_steps: expected a number, found true"),
    ("max_steps: 1.5", "max_steps: expected an integer, found 1.5"),
    ("hub_strategy: never", "hub_strategy: expected one of end, every_save, checkpoint, all_checkpoints, found 'never'"),
    ("weight_decay: none", "weight_decay: expected a number, found 'none'"),
    ("lr_scheduler_kwargs: [3]", "lr_scheduler_kwargs: expected a mapping, found [3]"),
    ("lr_scheduler_kwargs: '{a'", "lr_scheduler_kwargs: expected a mapping, found '{a'"),
    ("report_to: wandbb", "report_to: expected none, all or a list of azure_ml, clearml, codecarbon, comet_ml, dagshub, dvclive, flyte, kubeflow, mlflow, neptune, swanlab, tensorboard, trackio, wandb, found 'wandbb'"),
    # names
    ("warmup_ration: 0.1", "warmup_ration: unknown key; did you mean warmup_ratio?"),
    ("Learning_rate: 1", "Learning_rate: unknown key; did you mean learning_rate?"),
    ("qwertz: 1", "qwertz: unknown key; --help all lists all keys"),
    ("env: {A: b}", "env: unknown key; --help all lists all keys"),
    ("use_liger_kernel: true\nenable_liger_kernel: false", "use_liger_kernel: an alias of enable_liger_kernel, which is also set; keep one"),
    # YAML
    ("dataset: b", "dataset: duplicate of line 4; keep one"),
    ("seed: !!python/object/apply:os.getpid []", "seed: YAML tag !!python/object/apply:os.getpid is not supported; write a plain value"),
    ("lr_scheduler_kwargs: {a: !!python/name:os.system ''}", "lr_scheduler_kwargs: YAML tag !!python/name:os.system is not supported; write a plain value"),
    ("lr_scheduler_kwargs: {a: 1, a: 2}", "lr_scheduler_kwargs: duplicate key a; keep one"),
    ("eval_dataset: &x [*x]", "eval_dataset: invalid YAML value (an alias that contains itself, or a tag such as !!int that does not fit); write a plain value"),
    ("cutoff_len: !!int [1]", "cutoff_len: invalid YAML value (an alias that contains itself, or a tag such as !!int that does not fit); write a plain value"),
    ("learning_rate: !!float {a: 1}", "learning_rate: invalid YAML value (an alias that contains itself, or a tag such as !!int that does not fit); write a plain value"),
    ("lr_scheduler_kwargs: !!map a", "lr_scheduler_kwargs: invalid YAML value (an alias that contains itself, or a tag such as !!int that does not fit); write a plain value"),
    ("bf16: !!bool maybe", "bf16: invalid YAML value (an alias that contains itself, or a tag such as !!int that does not fit); write a plain value"),
    ("run_name: ${oc.env:HOME}", "run_name: ${...} interpolation is not supported; write the value, or pass run_name=... on the command line"),
    # not supported
    ("hf_hub_token: hf_x", "hf_hub_token: not supported; it would be saved with the model. Run `hf auth login` instead"),
    ("max_length: 512", "max_length: not supported; use cutoff_len for the length of rows, max_new_tokens for that of replies"),
    ("do_predict: true\npredict_with_generate: true", "do_predict: no evaluation rows; set eval_dataset or val_size"),
    ("predict_with_generate: true", "predict_with_generate: no evaluation rows; set eval_dataset or val_size"),
    ("eval_on_start: true", "eval_on_start: no evaluation rows; set eval_dataset or val_size"),
    ("val_size: 0.1\npredict_during_eval: 8", "predict_during_eval: requires do_eval, or eval_strategy: steps or epoch"),
    ("freeze_language_model: true", "freeze_language_model: not supported; only text is trained"),
    ("split: all", "split: not supported; set the dataset's split in dataset_info.json"),
    ("max_source_length: 512", "max_source_length: not supported; use cutoff_len, which counts prompt and reply together"),
    ("mixed_precision: bf16", "mixed_precision: not supported; use bf16: true, or mixed_precision: bf16 in the Accelerate config"),
    ("swanlab_api_key: k", "swanlab_api_key: not supported; it would be saved with the model. Set the environment variable SWANLAB_API_KEY instead"),
    ("extra_config: x.json", "extra_config: not supported; use this recipe's own keys instead of Megatron's"),
    ("use_packed_sequences: true", "use_packed_sequences: not supported; use packing: true"),
    ("kt_lora_expert_num: 2", "kt_lora_expert_num: not supported; to train the model's existing experts, set lora_target: all"),
    ("ppo_epochs: 2", "ppo_epochs: not supported; it belongs to stage ppo, which TRL has removed; use its GRPOTrainer or RLOOTrainer"),
    ("vllm_maxlen: 8192", "vllm_maxlen: not supported; it belongs to an inference server; start one with the saved model"),
    # conflicts
    ("val_size: 0.1\neval_dataset: b", "val_size: eval_dataset is set too; keep one"),
    ("val_size: 1.5", "val_size: expected a fraction or an integer, found 1.5"),
    ("do_eval: true", "do_eval: no evaluation rows; set eval_dataset or val_size"),
    ("eval_strategy: steps", "eval_strategy: no evaluation rows; set eval_dataset or val_size"),
    ("load_best_model_at_end: true", "load_best_model_at_end: requires eval_strategy: steps or epoch"),
    ("early_stopping_steps: 3", "early_stopping_steps: requires eval_strategy, and load_best_model_at_end or metric_for_best_model"),
    ("save_strategy: best", "save_strategy: best requires eval_strategy, and load_best_model_at_end or metric_for_best_model"),
    ("save_strategy: best\nmetric_for_best_model: loss", "save_strategy: best requires eval_strategy, and load_best_model_at_end or metric_for_best_model"),
    ("metric_for_best_model: eval_accuracy", "metric_for_best_model: expected loss, perplexity, entropy, mean_token_accuracy, or predict_<score> with predict_during_eval, found accuracy"),
    ("metric_for_best_model: predict_tokens", "metric_for_best_model: expected loss, perplexity, entropy, mean_token_accuracy, or predict_<score> with predict_during_eval, found predict_tokens"),
    ("interleave_probs: 1", "interleave_probs: requires mix_strategy: interleave_under, interleave_over or interleave_once"),
    ("interleave_probs: 0.9\nmix_strategy: interleave_over", "interleave_probs: expected values that sum to 1, found 0.9"),
    ("interleave_probs: 0.5,0.5\nmix_strategy: interleave_over", "interleave_probs: expected one value per dataset (1), found 2"),
    ("streaming: true", "streaming: requires max_steps, because the number of rows is unknown"),
    ("mask_history: true\ntrain_on_prompt: true", "mask_history: train_on_prompt is set too; keep one"),
    ("use_muon: true\nuse_galore: true", "use_galore: use_muon is set too; keep one"),
    ("use_muon: true\noptim: adamw_torch", "use_muon: optim is set too; keep one"),
    ("use_muon: true\ndeepspeed: z2.json", "use_muon: not supported with deepspeed; remove one"),
    ("use_muon: true\nfinetuning_type: lora\nloraplus_lr_ratio: 4", "use_muon: loraplus_lr_ratio is set too; keep one"),
    ("use_galore: true\ngalore_layerwise: true\ngradient_accumulation_steps: 8", "galore_layerwise: updates at each batch; set gradient_accumulation_steps: 1"),
    ("use_eaft_loss: true\nuse_dft_loss: true", "use_eaft_loss: use_dft_loss is set too; keep one"),
    ("use_eaft_loss: true\nuse_asft_loss: true", "use_eaft_loss: use_asft_loss is set too; keep one"),
    ("use_asft_loss: true\nmoe_aux_loss_coef: 0.1", "use_asft_loss: moe_aux_loss_coef is set too; keep one"),
    ("use_asft_loss: true\nquantization_bit: 4\nfinetuning_type: lora", "use_asft_loss: not supported with quantization_bit; remove one"),
    ("use_dft_loss: true\nlabel_smoothing_factor: 0.1", "use_dft_loss: label_smoothing_factor is set too; keep one"),
    ("loss_type: dft\nlabel_smoothing_factor: 0.1", "loss_type: label_smoothing_factor is set too; keep one"),
    ("loss_type: nll\nuse_dft_loss: true", "use_dft_loss: loss_type is set too; keep one"),
    ("use_adam_mini: true\nfinetuning_type: lora", "use_adam_mini: requires finetuning_type: full"),
    ("use_badam: true\nfinetuning_type: lora", "use_badam: requires finetuning_type: full"),
    ("use_badam: true\nbadam_mode: ratio", "badam_mode: not supported; BAdam 1.4 does not save the state of mode ratio; use layer"),
    ("use_badam: true\nfp16: true", "fp16: not supported with use_badam; use bf16: true"),
    ("use_badam: true\nbadam_switch_mode: fixed", "badam_switch_mode: the mode fixed requires badam_start_block"),
    ("badam_switch_interval: -1", "badam_switch_interval: expected an integer > 0, found -1"),
    ("use_llama_pro: true\nfinetuning_type: full", "use_llama_pro: requires finetuning_type: freeze or lora"),
    ("finetuning_type: oft\noft_rank: 8", "oft_rank: set one of oft_rank and oft_block_size, and the other to 0"),
    ("adapter_name_or_path: a", "adapter_name_or_path: requires finetuning_type: lora (or oft)"),
    ("bf16: true\nfp16: true", "bf16: fp16 is set too; keep one"),
    ("disable_gradient_checkpointing: true\ngradient_checkpointing: true", "disable_gradient_checkpointing: gradient_checkpointing is set too; keep one"),
    ("global_batch_size: 8\ngradient_accumulation_steps: 2", "global_batch_size: gradient_accumulation_steps is set too; keep one"),
    ("group_by_length: true\ndisable_shuffling: true", "group_by_length: disable_shuffling is set too; keep one"),
    ("finetuning_type: full\nquantization_bit: 4", "quantization_bit: full training of a quantized model is not supported; use finetuning_type: lora"),
    ("lora_rank: 16", "lora_rank: requires finetuning_type: lora, which is not the default here"),
    ("finetuning_type: full\nuse_dora: true", "use_dora: requires finetuning_type: lora"),
    ("finetuning_type: lora\nuse_galore: true", "use_galore: requires finetuning_type: full"),
    ("finetuning_type: lora\nquantization_bit: 4\npissa_init: true", "pissa_init: not supported with quantization_bit; remove one"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "message"), WRONG, ids=[lines.replace("\n", " ") for lines, _ in WRONG])
def test_each_problem_is_one_line_with_its_fix(tmp_path: Path, lines: str, message: str) -> None:
    (found,) = problems(tmp_path, GOOD + lines + "\n")
    place, text = found.split("  ", 1)
    assert text == message
    line = int(place.removeprefix("line "))
    assert (GOOD + lines).split("\n")[line - 1].startswith(message.split(":")[0])


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "cutoff_len: 4k\nwarmup_ration: 0.1\nshift_attn: true\noutput_dir: o\nsave_steps: x\n"
    assert problems(tmp_path, text, "lora_rank=a", "seed") == [
        "line 1    cutoff_len: expected an integer > 0, found '4k'",
        "line 2    warmup_ration: unknown key; did you mean warmup_ratio?",
        "line 3    shift_attn: not supported; attention is always full; remove the line",
        "line 5    save_steps: expected a number > 0, found 'x'",
        "missing   model_name_or_path: required. Base model: a hub ID or a local folder",
        "override  seed: expected key=value",
        "override  lora_rank: expected an integer > 0, found 'a'",
    ]


def test_a_value_that_cannot_be_read_hides_the_conflicts_it_might_resolve(tmp_path: Path) -> None:
    text = GOOD.replace("dataset: a", "dataset: !!binary aGk=") + "do_eval: true\nval_size: 0.1\n"
    assert len(problems(tmp_path, text)) == 1


@pytest.mark.parametrize(
    ("line", "done"),
    [
        ("do_eval: true", "evaluated"),
        ("do_predict: true", "used to generate replies"),
        ("predict_with_generate: true", "used to generate replies"),
        ("do_eval: true\npredict_with_generate: true", "evaluated and used to generate replies"),
    ],
)
def test_a_recipe_that_only_evaluates_is_reported_first(tmp_path: Path, line: str, done: str) -> None:
    path = write(tmp_path, f"model_name_or_path: m\noutput_dir: o\n{line}\neval_dataset: a\nuse_unsloth: true\n")
    first, *_ = read_recipe(path).notices
    assert first == f"{path}: do_train is not true; the model is only {done}"


@pytest.mark.parametrize("key", ["output_dir", "dataset_dir", "tokenized_path", "adapter_name_or_path", "template"])
@pytest.mark.parametrize("path", [r"C:\new\tmp", r"C:\bin", r"models\rl"])
def test_a_path_that_yaml_has_changed_is_an_error(key: str, path: str, tmp_path: Path) -> None:
    """In double quotes; in single quotes, or without quotes, the same path is right."""
    lines = {
        "model_name_or_path": "m",
        "output_dir": "o",
        "do_train": "true",
        "dataset": "d",
        "finetuning_type": "lora",
    }
    for quote in ('"', "'", ""):
        text = "".join(f"{name}: {value}\n" for name, value in (lines | {key: f"{quote}{path}{quote}"}).items())
        if quote == '"':
            (found,) = problems(tmp_path, text)
            changed = path.replace("\\n", "\n").replace("\\t", "\t").replace("\\b", "\b").replace("\\r", "\r")
            assert (
                f"  {key}: expected a path without control characters, found {changed!r}; in double quotes, a" in found
            )
        elif key != "template":
            (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
            value = getattr(read_recipe(tmp_path / "r.yaml"), key)
            assert value in (path, [path])


def test_a_recipe_without_anything_to_do_is_an_error(tmp_path: Path) -> None:
    assert problems(tmp_path, "model_name_or_path: m\noutput_dir: o\n") == [
        "missing  do_train: nothing to do; set do_train: true"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "r.yaml:1: invalid YAML (expected ',' or ']', but got '<stream end>')"),
        ("a: 1\nb: c: d", "r.yaml:2: invalid YAML (mapping values are not allowed here)"),
        ("a: 1\n\tb: 2", "r.yaml:2: invalid YAML (found character '\\t' that cannot start any token)"),
        ("a: 1\nb:x\n\nc: 2\n", "r.yaml:2: invalid YAML (expected key: value, with a space after the colon)"),
        ("a: 1\nb：x\nc: 2\n", "r.yaml:2: invalid YAML (expected key: value, with a space after the colon)"),
        ("a: 1\nb: 'x\nc: 2\n", "r.yaml:2: invalid YAML (found unexpected end of stream)"),
        (
            'a: 1\nb: "D:\\data"\n',
            "r.yaml:2: invalid YAML (found unknown escape character 'd'); in double quotes, a backslash starts an escape such "
            "as \\n or \\t; write single quotes, or / instead of \\",
        ),
        (
            "a: 1\n---\na: 2",
            "r.yaml:2: invalid YAML (expected a single document in the stream, but found another document)",
        ),
        ("", "r.yaml: expected lines such as learning_rate: 1e-5, found an empty file"),
        ("- a", "r.yaml: expected lines such as learning_rate: 1e-5, found no keys"),
        (
            "\0",
            "r.yaml: invalid YAML or not UTF-8 (unacceptable character #x0000: special characters are not allowed)",
        ),
    ],
)
def test_a_file_that_is_not_a_recipe_is_reported_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(tmp_path, text))
    assert str(caught.value) == f"{tmp_path}{os.sep}{message}"


def test_a_missing_recipe_lists_the_recipes_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^nope.yaml: No such file or directory; recipes nearby: none$"):
        read_recipe("nope.yaml")
    write(tmp_path, GOOD)
    with pytest.raises(RecipeError, match=r"^nope.yaml: No such file or directory; recipes nearby: r.yaml$"):
        read_recipe("nope.yaml")


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*keys(), *RENAMED, *IGNORED, *NOT_SUPPORTED, "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=3,
        ),
        max_size=4,
    ),
    st.text(max_size=12),
)
def test_any_input_gives_a_recipe_or_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object], noise: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(values) + noise, encoding="utf-8", errors="replace")
    try:
        read_recipe(path, [f"run_name={noise}"])
    except RecipeError as error:
        assert str(error).startswith(str(path))


def test_yaml_bombs_are_rejected_in_little_time_and_memory(tmp_path: Path) -> None:
    bomb = "&b0 [" + ",".join(["lol"] * 10) + "]"
    for level in range(1, 9):
        bomb = f"&b{level} [{bomb}, {','.join([f'*b{level - 1}'] * 9)}]"
    for line in (f"learning_rate: {bomb}", f"deepspeed: {{a: {bomb}}}"):
        (found,) = problems(tmp_path, GOOD + line)
        assert found.endswith(": expected a plain value, found more than 10,000 values after expanding aliases")
    with pytest.raises(RecipeError, match=r"r\.yaml: values are nested too deeply"):
        read_recipe(write(tmp_path, GOOD + "report_to: " + "[" * 1000 + "]" * 1000))


@pytest.mark.parametrize("file", ["/dev/zero", "/dev/urandom"])
def test_an_endless_file_is_not_read_as_a_recipe(file: str) -> None:
    with pytest.raises(RecipeError, match="found more than 1,000,000 bytes"):
        read_recipe(file)


@pytest.mark.parametrize("key", [key for key in keys() if takes_text(key)])
@pytest.mark.parametrize("text", ['"\\ud800"', '"a\\0b"'])
def test_an_invalid_character_is_reported_in_one_line(tmp_path: Path, key: str, text: str) -> None:
    good = "".join(line for line in GOOD.splitlines(keepends=True) if not line.startswith(key))
    (found,) = problems(tmp_path, f"{good}{key}: {text}\n")
    assert found.endswith("which is not a valid character")


def test_messages_contain_no_terminal_escapes(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD + '"\\e]0;title\\a": 1\nrun_name: ["\\u202egnp", "\\e[2J"]\n')
    assert all(line.isprintable() for line in found) and len(found) == 2


@pytest.mark.parametrize("key", ["model_name_or_path", "output_dir", "dataset_dir", "cache_dir", "tokenized_path",
    "template", "resume_from_checkpoint", "deepspeed", "adapter_name_or_path"])  # fmt: skip
def test_the_tilde_is_expanded_once_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    for name in ("HOME", "USERPROFILE"):  # Windows reads the second
        monkeypatch.setenv(name, "/home/me")
    good = "".join(line for line in GOOD.splitlines(keepends=True) if not line.startswith(key))
    name = "x.jinja" if key == "template" else "x"
    for recipe in (
        read_recipe(write(tmp_path, f"{good}finetuning_type: lora\n{key}: ~/{name}\n")),
        read_recipe(write(tmp_path, good), ["finetuning_type=lora", f"{key}=~/{name}"]),
    ):
        assert getattr(recipe, key) == ([f"/home/me/{name}"] if key == "adapter_name_or_path" else f"/home/me/{name}")


# LLaMA-Factory 0.9, examples/extras/nlg_eval/llama3_lora_predict.yaml
PREDICT = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
adapter_name_or_path: saves/llama3-8b/lora/sft
trust_remote_code: true
stage: sft
do_predict: true
finetuning_type: lora
eval_dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 50
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves/llama3-8b/lora/predict
overwrite_output_dir: true
report_to: none
per_device_eval_batch_size: 1
predict_with_generate: true
ddp_timeout: 180000000
"""


@pytest.mark.parametrize(
    ("lines", "samples"),
    [
        ("", False),
        ("temperature: 0.7\n", True),  # LLaMA-Factory samples unless do_sample is false
        ("do_sample: false\ntemperature: 0.7\n", False),
        ("do_sample: true\nnum_beams: 1\nrepetition_penalty: 1.1\nlength_penalty: 1.0\nmax_new_tokens: 8\n", True),
    ],
)
def test_llama_factorys_predict_recipe_is_greedy_unless_it_samples(tmp_path: Path, lines: str, samples: bool) -> None:
    recipe = read_recipe(write(tmp_path, PREDICT + lines))
    assert (recipe.do_train, recipe.do_predict, recipe.do_sample) == (False, True, samples)
    assert (recipe.temperature, recipe.top_p, recipe.top_k) == (0.7 if lines.endswith("0.7\n") else 0.95, 0.7, 50)
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump(recipe.resolved()), encoding="utf-8")
    assert read_recipe(tmp_path / "resolved.yaml").resolved() == recipe.resolved()


OTHER_FORMS = [
    ("model: m\ntrain_dataset: d\npeft_config: {name: lora}\noutput_dir: o\n", "LLaMA-Factory's v1 format (model:, train_dataset:, peft_config:) is not supported; use its flat keys (--help all)"),
    ("model_name_or_path: m\nadapter_name_or_path: a\ntemplate: qwen\nexport_dir: out\nexport_size: 5\n", "this is a LLaMA-Factory export recipe; to merge the adapter, run: python -m arpo_trl merge a out"),
    ("model_name_or_path: m\nexport_dir: out\n", "this is a LLaMA-Factory export recipe without an adapter; a trained model needs no export"),
    ("top.model_path: m\ntop.template: qwen\ntrain.dataset: [a]\ntrain.output_dir: o\n", "LLaMA Board's saved settings are not supported; pass the flags shown by its Preview command button"),
    ("model_name_or_path: m\nadapter_name_or_path: a\ntemplate: qwen\ninfer_backend: huggingface\n", "this is a LLaMA-Factory chat or API recipe; to chat with the model, run: python -m arpo_trl chat a"),
    ("model_name_or_path: m\ntemplate: qwen\ninfer_backend: vllm\nvllm_enforce_eager: true\n", "this is a LLaMA-Factory chat or API recipe; to chat with the model, run: python -m arpo_trl chat m"),
    ("model_name_or_path: m\nstage: sft\ntemplate: qwen\ndo_sample: false\n", "this is a LLaMA-Factory chat or API recipe; to chat with the model, run: python -m arpo_trl chat m"),
    ("model_name_or_path: 'my model'\nadapter_name_or_path: a b\nexport_dir: the out\n", "this is a LLaMA-Factory export recipe; to merge the adapter, run: python -m arpo_trl merge 'a b' 'the out'"),
    ("model_name_or_path: m\ntask: mmlu_test\ntemplate: qwen\nlang: en\nn_shot: 5\nsave_dir: s\n", "LLaMA-Factory's benchmark recipes are not supported; use lm-evaluation-harness"),
]  # fmt: skip


QUOTED = "'a b' 'the out'"


@pytest.mark.parametrize(("text", "message"), OTHER_FORMS)
def test_a_recipe_for_another_llama_factory_command_is_reported_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(caught.value) == f"{path}: {message.replace(QUOTED, quote_command(['a b', 'the out']))}"


# --- right recipes ---


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 7e-6", 7e-6),
        ("learning_rate: 7.0e-6", 7e-6),
        ("learning_rate: '7e-6'", 7e-6),
        ("learning_rate: 1", 1.0),
        ("cutoff_len: 4_096", 4096),
        ("cutoff_len: '4096'", 4096),
        ("cutoff_len: 4096.0", 4096),
        ("bf16: 'false'", False),
        ("bf16: True", True),
        ("packing: null", False),
        ("bf16: yes", True),
        ("bf16: 0", False),
        ("eval_strategy: no", "no"),
        ("run_name: 2024-01-01", "2024-01-01"),
        ("run_name: 7", "7"),
        ("run_name: 007", "007"),
        ("run_name: 1e5", "1e5"),
        ("model_revision: 0123", "0123"),
        ("resume_from_checkpoint: null", None),
        ("resume_from_checkpoint: 'true'", True),
        ("resume_from_checkpoint: a/checkpoint-5", "a/checkpoint-5"),
        ("gradient_checkpointing: auto", "auto"),
        ("dataset_dir: 数据", "数据"),
        ("eval_dataset: null", []),
        ("lora_target: q_proj, v_proj", ["q_proj", "v_proj"]),
        ("lora_target: [q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("report_to: none", []),
        ("report_to: [none]", []),
        ("report_to: tensorboard", ["tensorboard"]),
        ("mix_strategy: interleave_once", "interleave_once"),
        ("stage: sft", "sft"),
    ],
)
def test_values_are_read_as_a_person_would(tmp_path: Path, line: str, value: object) -> None:
    recipe = read_recipe(write(tmp_path, GOOD + "finetuning_type: lora\n" + line))
    found = getattr(recipe, line.split(":")[0])
    assert found == value and type(found) is type(value)


def test_other_fields_of_sft_config_are_passed_on_by_name(tmp_path: Path) -> None:
    lines = "eval_steps: 50\nevaluation_strategy: 'no'\nno_cuda: true\nfsdp: [full_shard, auto_wrap]\n"
    recipe = read_recipe(write(tmp_path, GOOD + lines))
    assert recipe.trl == {"eval_steps": 50, "use_cpu": True, "fsdp": "full_shard auto_wrap"}
    assert recipe.eval_strategy == "no"


def test_overrides_follow_the_rules_of_the_file_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "learning_rate: 1\nmax_samples: 5\n")
    recipe = read_recipe(path, ["learning_rate=2e-5", "dataset=[b, c]", "max_samples=", "eval_steps=3"])
    assert (recipe.learning_rate, recipe.dataset, recipe.max_samples, recipe.trl) == (
        2e-5,
        ["b", "c"],
        None,
        {"eval_steps": 3},
    )


def test_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_recipe(path).dataset == ["a"]


def test_ignored_keys_are_reported_once_by_reason(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "top_p: 0.4\ntemperature: 1\nsave_safetensors: true\n")
    assert read_recipe(path).notices == [
        f"{path}: save_safetensors: ignored; weights are always saved as safetensors",
        f"{path}: temperature, top_p: ignored unless do_predict or predict_during_eval is set",
    ]


def test_keys_for_images_are_ignored_in_a_text_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "template: qwen\nimage_max_pixels: 262144\nfreeze_vision_tower: false\n")
    assert read_recipe(path).notices == [
        f"{path}: image_max_pixels, freeze_vision_tower: ignored; only text is trained"
    ]


def test_keys_of_older_llama_factory_releases_are_read_as_their_new_names(tmp_path: Path) -> None:
    old = (
        "finetuning_type: freeze\nnum_layer_trainable: -3\nname_module_trainable: mlp,self_attn\nflash_attn: off\n"
        "evaluation_strategy: no\nsft_packing: yes\nsplit: train\nreserved_label_len: 1\nmax_samples: 10000000000000\n"
    )
    new = (
        "finetuning_type: freeze\nfreeze_trainable_layers: -3\nfreeze_trainable_modules: [mlp, self_attn]\n"
        "flash_attn: disabled\neval_strategy: no\npacking: true\nmax_samples: 2147483647\n"
    )
    read = read_recipe(write(tmp_path, GOOD + old))
    assert read.resolved() == read_recipe(write(tmp_path, GOOD + new)).resolved()
    assert f"{tmp_path / 'r.yaml'}: reserved_label_len: ignored; truncation is set by truncation_mode" in read.notices
    assert read_recipe(write(tmp_path, GOOD + "flash_attn: true\n")).resolved()["flash_attn"] in ("fa2", "sdpa")
    assert read_recipe(write(tmp_path, GOOD + "flash_attn: false\n")).flash_attn == "auto"


def test_unsupported_keys_pass_if_they_request_nothing(tmp_path: Path) -> None:
    lines = [f"{key}: {json.dumps(value)}" for key, value in NO_OP.items() if key != "max_length"]
    lines += [f"{key}: {('null', 'false')[len(key) % 2]}" for key in NOT_SUPPORTED if key not in NO_OP]
    assert read_recipe(write(tmp_path, GOOD + "\n".join(lines))).notices == []


def test_every_key_accepts_llama_factorys_default(tmp_path: Path) -> None:
    given = LLAMA_FACTORY["defaults"] | LLAMA_FACTORY["other_defaults"]
    given |= {"model_name_or_path": "m", "output_dir": "o", "do_train": True, "dataset": "a"}
    recipe = read_recipe(write(tmp_path, yaml.safe_dump(given)))
    plain = read_recipe(write(tmp_path, GOOD + "finetuning_type: lora\n"))
    differs = {*OTHER_DEFAULTS, "do_sample"} - {"finetuning_type"}  # do_sample: greedy is the default here
    assert recipe.model_dump(exclude=differs) == plain.model_dump(exclude=differs)
    (max_length,) = [line for line in recipe.notices if "max_length" in line]
    assert max_length.endswith("use cutoff_len for the length of rows, max_new_tokens for that of replies")


def test_keys_that_only_affect_speed_are_ignored_with_a_notice(tmp_path: Path) -> None:
    keys = "use_unsloth use_unsloth_gc use_v1_kernels use_ray upcast_layernorm enable_torch_profiler".split()
    path = write(tmp_path, GOOD + "".join(f"{key}: true\n" for key in keys))
    notices = read_recipe(path).notices
    assert all(any(key in line.split(": ignored; ")[0] for line in notices) for key in keys) and len(notices) == 5


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("pipeline_model_parallel_size: 4\ntensor_model_parallel_size: 2\ngradient_accumulation_steps: 16", "8x as many per step; set gradient_accumulation_steps: 2 to keep the batch size"),
        ("pipeline_model_parallel_size: 4\ngradient_accumulation_steps: 6", "4x as many per step; use 1/4 of the GPUs to keep the batch size"),
        ("sequence_parallel_size: 2", "2x as many per step; use 1/2 of the GPUs to keep the batch size"),
        ("expert_model_parallel_size: 2\ncontext_parallel_size: 3", "3x as many per step; use 1/3 of the GPUs to keep the batch size"),
        ("expert_model_parallel_size: 2\nuse_megatron_bridge: true", "2x as many per step; use 1/2 of the GPUs to keep the batch size"),
        ("expert_model_parallel_size: 2\ntensor_model_parallel_size: 1\nsequence_parallel: true", None),
        ("pipeline_model_parallel_size: 4\nglobal_batch_size: 64", None),
    ],
)  # fmt: skip
def test_gpus_that_would_share_a_row_get_a_notice_about_the_larger_batch(
    tmp_path: Path, lines: str, said: str | None
) -> None:
    notices = read_recipe(write(tmp_path, f"{GOOD}{lines}\n")).notices
    told = [line.split("its own rows here, ")[1] for line in notices if "its own rows here" in line]
    assert told == [said] * (said is not None)


def test_swanlab_of_llama_factory_becomes_a_tracker(tmp_path: Path) -> None:
    lines = "use_swanlab: true\nreport_to: tensorboard\nswanlab_run_name: first\nswanlab_mode: local\n"
    recipe = read_recipe(write(tmp_path, GOOD + lines))
    assert (recipe.report_to, recipe.run_name) == (["tensorboard", "swanlab"], "first")
    assert read_recipe(write(tmp_path, yaml.safe_dump(recipe.resolved()))).report_to == recipe.report_to


def test_resolved_reads_back_to_the_same_recipe(tmp_path: Path) -> None:
    text = (
        GOOD
        + "neat_packing: true\nwarmup_ratio: 0.1\nwarmup_steps: 3\nsave_steps: 50\neval_steps: 2.0\nlr_scheduler_kwargs: {a: 1}\n"
    )
    recipe = read_recipe(write(tmp_path, text))
    again = read_recipe(write(tmp_path, yaml.safe_dump(recipe.resolved())))
    assert again.resolved() == recipe.resolved() == json.loads(json.dumps(recipe.resolved()))
    assert again.model_dump() == recipe.model_dump() and again.trl == recipe.trl
    assert (recipe.packing, recipe.lora_alpha, recipe.warmup_ratio) == (True, 16, 0)
    assert again.notices == []


def test_fa2_without_flash_attn_falls_back_to_sdpa_with_a_notice(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD + "flash_attn: fa2"))
    assert recipe.flash_attn == "sdpa"
    assert recipe.notices[0].endswith(
        "flash_attn: fa2 requires the package flash_attn, which is not installed; using sdpa"
    )


def test_wandb_disabled_is_honored_with_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DISABLED", "true")
    recipe = read_recipe(write(tmp_path, GOOD + "report_to: wandb,tensorboard"))
    assert recipe.report_to == ["tensorboard"]
    assert recipe.notices[0].endswith("report_to: wandb is ignored, because WANDB_DISABLED is set")


# --- the vocabulary ---

# Ours, and why, where LLaMA-Factory 0.9 with transformers 4.57 has another default.
OTHER_DEFAULTS = {
    "project": None,  # WANDB_PROJECT, or else theirs
    "use_reentrant_gc": None,  # transformers 5 recomputes without re-entering; the gradients are the same
    "per_device_eval_batch_size": None,  # the training batch: an evaluation needs no more memory
    "finetuning_type": "full",  # adapters are asked for; a recipe with LoRA's keys and without this one is refused
    "gradient_checkpointing": True,  # LLaMA-Factory switches it on after reading the arguments
    "include_num_input_tokens_seen": "no",  # transformers 5's word for false
}


@pytest.mark.parametrize("key", [key for key in LLAMA_FACTORY["defaults"] if key not in IGNORED])
def test_an_omitted_key_means_what_it_means_in_llama_factory(key: str) -> None:
    default = LLAMA_FACTORY["defaults"][key]
    if key in NOT_SUPPORTED:
        assert default in (None, False)  # which is accepted
        return
    ours = keys()[RENAMED.get(key, key)].default
    if key in OTHER_DEFAULTS:
        assert ours == OTHER_DEFAULTS[key] != default
    elif isinstance(ours, list):
        assert ours == ([] if default is None else [default])
    elif key == "report_to":
        assert ours == "none" and default is None
    else:
        assert (ours or None) == (default or None) and (ours is None) <= (default is None)


def test_every_key_of_llama_factory_and_every_field_of_sft_config_has_exactly_one_mapping() -> None:
    from trl.trainer.sft_config import SFTConfig

    tables = [set(keys()), set(RENAMED), set(IGNORED), set(NOT_SUPPORTED)]
    llama_factorys = [key for part in LLAMA_FACTORY if part != "source" for key in LLAMA_FACTORY[part]]
    for key in [*llama_factorys, *(field.name for field in dataclasses.fields(SFTConfig))]:
        assert sum(key in table for table in tables) == 1, key
    assert set(RENAMED.values()) <= set(keys())
    assert set(NO_OP) <= set(NOT_SUPPORTED)


def test_the_table_of_sft_config_has_its_fields_and_defaults() -> None:
    from trl.trainer.sft_config import SFTConfig

    real = {field.name: field for field in dataclasses.fields(SFTConfig)}
    own = set(Recipe.model_fields) - set(SftKeys.model_fields)
    assert [name for name in real if name in own] == OURS_TOO
    others = [name for name in real if name not in {*own, *RENAMED, *IGNORED, *NOT_SUPPORTED}]
    assert list(SftKeys.model_fields) == others
    for name, field in SftKeys.model_fields.items():
        if real[name].default is not dataclasses.MISSING:
            assert field.default == real[name].default, name


# --- help, and speed ---


def run(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run `python -m arpo_trl ...` with torch blocked, and return its CPU seconds as well."""
    code = (
        "import runpy, sys, time\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['arpo_trl', *{list(arguments)!r}]\n"
        "try: runpy.run_module('arpo_trl', run_name='__main__')\n"
        "finally:\n"
        "    assert not {'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        "    print('\\nCPU', time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    done.stdout, cpu = done.stdout.rsplit("\nCPU ", 1)
    return done, float(cpu)


def test_a_typo_is_reported_in_under_a_second_without_torch(tmp_path: Path) -> None:
    write(tmp_path, GOOD + "lerning_rate: 1\n")
    done, seconds = run("r.yaml", cwd=tmp_path)
    assert done.stderr == "r.yaml: 1 problem\n  line 5  lerning_rate: unknown key; did you mean learning_rate?\n"
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert seconds < 1


@pytest.mark.parametrize("options", [[], ["--check"]], ids=["train", "check"])
def test_missing_files_and_datasets_are_reported_in_under_a_second_without_torch(
    tmp_path: Path, options: list[str]
) -> None:
    """All problems are reported at once."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"b": {"file_name": "b.json"}}', encoding="utf-8")
    write(tmp_path, GOOD.replace("path: m", "path: ./m") + "template: t.jinja\n")
    done, seconds = run("r.yaml", *options, cwd=tmp_path)
    here = f"paths are relative to {tmp_path}"
    assert done.stderr.splitlines() == [
        f"r.yaml:5: template: t.jinja: no such file; {here}",
        f"r.yaml:1: model_name_or_path: ./m: no such folder; {here}",
        f"r.yaml:4: dataset: a: no such dataset in {Path('data/dataset_info.json')}; expected b",
    ]
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert seconds < 1


def test_help_is_one_screen_in_under_a_second_without_torch(tmp_path: Path) -> None:
    done, seconds = run("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == usage()
    assert len(usage().splitlines()) <= 40 and max(map(len, usage().splitlines())) <= 120
    assert seconds < 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("chat --help", 0, "usage: arpo-trl chat "),
        ("merge --help", 0, "usage: arpo-trl merge "),
        ("rollout --help", 0, "python -m arpo_trl rollout RECIPE.yaml [key=value ...]\n\nrollout:\n  rollout_on "),
        ("rollout", 2, "expected one recipe, found none\n"),
        ("chat nothing", 2, "'nothing' is not a model folder. Use the output_dir of a finished run"),
        ("chat . --tools t.json", 2, "--tools: t.json: No such file or directory"),
        ("merge nothing out", 2, "nothing: adapter_config.json is missing. Use the output_dir of a LoRA run"),
    ],
)
def test_commands_check_arguments_and_folders_before_torch(tmp_path: Path, words: str, code: int, said: str) -> None:
    done, seconds = run(*words.split(), cwd=tmp_path)
    assert done.returncode == code and (done.stdout + done.stderr).startswith(said), done
    assert seconds < 1


@pytest.mark.parametrize("key", [*keys(), *RENAMED, *IGNORED, *NOT_SUPPORTED])
def test_every_key_can_be_explained(key: str) -> None:
    assert explain_key(key).startswith(key)


def test_explaining_a_key_gives_type_default_mapping_and_help() -> None:
    assert explain_key("cutoff_len") == (
        "cutoff_len  (dataset)\n"
        "  type     an integer > 0\n"
        "  default  2048\n"
        "  mapping  becomes max_length with packing\n"
        "  Maximum row length in tokens; longer rows are truncated"
    )
    assert "  Label smoothing factor to prevent" in explain_key("label_smoothing_factor")  # TRL's help
    listed = set(re.findall(r"[\w.-]+", explain_key("template")))
    assert listed >= SHIPPED | TOKENIZERS_OWN and not listed & MULTIMODAL
    with pytest.raises(RecipeError, match=r"^lerning_rate: unknown key; did you mean learning_rate\?$"):
        explain_key("lerning_rate")


def test_keys_are_listed_by_group_without_cut_words() -> None:
    text = explain(["all"])
    assert all(f"  {key} " in text for key in keys()) and "cutoff_len" not in explain(["train"])
    known = {word for key in keys().values() for word in key.help.split()}
    for line in [*text.splitlines(), *usage().splitlines()]:
        assert len(line) <= 120
        if line.endswith(" ..."):
            assert line.split()[-2] in known
    assert explain(["bf16", "cutoff_len"]) == f"{explain_key('bf16')}\n\n{explain_key('cutoff_len')}"
    assert "default  adamw_torch_fused" in explain(["optim"])


@pytest.mark.parametrize("key", ["model_name_or_path", "output_dir"])
def test_an_empty_path_is_not_the_working_directory(key: str, tmp_path: Path) -> None:
    lines = [line for line in GOOD.splitlines() if not line.startswith(key)]
    assert problems(tmp_path, "\n".join([*lines, f"{key}: ''"])) == [f"line 4  {key}: expected a path, found ''"]


@pytest.mark.parametrize("width", [60, 80, 119])
def test_help_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def show() -> str:
        return f"{usage()}\n{explain([*_groups(), 'template'])}"

    words = show().split()
    monkeypatch.setattr("arpo_trl.recipe.help.terminal_width", lambda: width)
    assert show().split() == words
    rows = [line for line in show().splitlines() if re.search(r"\S  +\S| {20}\S+ ", line)]
    assert len(rows) > 50 and max(map(len, rows)) <= max(width, 80)


@pytest.mark.parametrize("keys", ["use_badam", "use_galore\ngalore_layerwise"])
def test_optimizers_for_one_process_are_rejected_on_several(
    keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = GOOD + "".join(f"\n{key}: true" for key in keys.split())
    with pytest.raises(RecipeError, match=f"{keys.split()[-1]}: not supported on several processes; remove the line"):
        read_recipe(write(tmp_path, text))
    read_recipe(write(tmp_path, GOOD))


def test_messages_name_the_program_as_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for called, name in (("/x/bin/arpo-trl", "arpo-trl"), ("/x/arpo_trl/__main__.py", "python -m arpo_trl")):
        monkeypatch.setattr(sys, "argv", [called])
        assert all(line.startswith(f"{name} ") for line in usage().splitlines()[:8])


def test_every_key_is_read_by_code() -> None:
    package = Path(__file__).parents[2] / "arpo_trl"
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for path in package.rglob("*.py")
        if path.stem not in ("keys", "methods", "rules", "llamafactory")
    )
    from arpo_trl.model.sft_config import _SAME  # read by their names, as is what the next test looks at

    unread = {name for name, key in keys().items() if key.group != "trl" and f".{name}" not in code} - {*_SAME}
    # one value only, or settled while the recipe is read, or so in any case
    assert unread - {*LOW_RANK} <= {"stage", "quantization_method", "create_new_adapter"} | {
        "neat_packing",
        "disable_gradient_checkpointing",
    } | {
        "use_swanlab",
        "predict_with_generate",
    }


LOW_RANK = [key for key in keys() if key.startswith(("galore_", "apollo_"))]


@pytest.mark.parametrize("key", LOW_RANK)
def test_every_key_of_galore_and_apollo_changes_the_optimizer(tmp_path: Path, key: str) -> None:
    from arpo_trl.model.sft_config import to_sft_config

    choices = [*keys()[key].schema.get("enum", []), "true", "3", "mlp"]  # one of them has the key's type
    path = write(tmp_path, GOOD + f"finetuning_type: full\nuse_{key[:6]}: true\n")
    told = []
    for override in ([], *([f"{key}={choice}"] for choice in choices)):
        with contextlib.suppress(RecipeError):
            config = to_sft_config(read_recipe(path, override))
            told.append((config.optim, config.optim_args, config.optim_target_modules))
    assert len(set(map(str, told))) > 1


def test_a_dataset_listed_twice_is_used_once() -> None:
    """As in LLaMA-Factory, which keeps its datasets by name."""
    recipe = read_recipe(None, ["model_name_or_path=m", "output_dir=o", "do_train=true", "dataset=a,b,a"])
    assert recipe.dataset == ["a", "b"]
    line = "command line: dataset: a is listed 2 times and used once, as in LLaMA-Factory"
    assert line in recipe.notices


def test_a_dataset_listed_twice_has_one_probability() -> None:
    keys = ["model_name_or_path=m", "output_dir=o", "do_train=true", "dataset=a,b,a", "mix_strategy=interleave_over"]
    assert read_recipe(None, [*keys, "interleave_probs=0.5,0.5"]).interleave_probs == [0.5, 0.5]
    with pytest.raises(RecipeError, match=r"interleave_probs: expected one value per dataset \(2\), found 3"):
        read_recipe(None, [*keys, "interleave_probs=0.25,0.5,0.25"])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lora_alpha=0", "expected an integer > 0, found 0"),  # LLaMA-Factory: twice the rank
        ("lora_target=''", "expected all or names of modules, found ''"),
        ("max_samples=0", "expected an integer > 0, found 0"),  # LLaMA-Factory: no rows, then an error
        ("max_samples=-1", "expected an integer > 0, found -1"),
        ("early_stopping_steps=0", "expected an integer > 0, found 0"),
        ("max_new_tokens=-1", "expected an integer > 0, found -1"),  # LLaMA-Factory: max_length
        ("cutoff_len=0", "expected an integer > 0, found 0"),
        ("template=''", "unknown template ''"),
        ("quantization_bit=0", "expected one of 4, 8, found 0"),
    ],
)
def test_a_value_that_llama_factory_reads_as_another_is_an_error(setting: str, expected: str) -> None:
    keys = ["model_name_or_path=m", "output_dir=o", "do_train=true", "dataset=a", "finetuning_type=lora"]
    with pytest.raises(RecipeError) as error:
        read_recipe(None, [*keys, setting])
    assert f"{setting.partition('=')[0]}: {expected}" in str(error.value)


def test_a_quoted_boolean_is_a_boolean() -> None:
    """LLaMA-Factory reads any text as true, "false" too."""
    keys = ["model_name_or_path=m", "output_dir=o", "do_train='true'", "dataset=a", "mask_history='false'"]
    recipe = read_recipe(None, keys)
    assert (recipe.do_train, recipe.mask_history) == (True, False)
