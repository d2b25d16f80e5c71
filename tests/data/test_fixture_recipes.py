"""Recipes written for LLaMA-Factory, down to the tokens that their first rows train.

Each is read as it is; only the model (a tokenizer with its template's tokens, made here), the data and the output folder
are others. What each template writes is held against LLaMA-Factory in test_template.py.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from compare_templates import make_tokenizer, tokens_of
from packed_model import pack
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from arpo_trl.__main__ import main
from arpo_trl.data.labels import IGNORED
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template, shipped_template
from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe
from arpo_trl.recipe.llamafactory import MULTIMODAL

FIXTURES = sorted((Path(__file__).parents[1] / "recipe" / "fixtures").rglob("*.yaml"))
FIXTURES = [
    path for path in FIXTURES if path.parent.name != "preference"
]  # see tests/training/test_preference_runs.py
WORDS = "red green blue grey pink".split()
LLAMA3 = (
    "<s><|start_header_id|>user<|end_header_id|>\n\nSay red.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
)
QWEN = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nSay red.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>\n",
)
PLAIN = QWEN[0].partition("<|im_end|>\n")[2]
# What stands before the first row's reply, and what ends a reply
EXPECTED = {
    "llama3": LLAMA3,
    "qwen": QWEN,
    "qwen3": (PLAIN, "<|im_end|>\n"),
    "qwen3_nothink": (PLAIN, "<|im_end|>\n"),
    "qwen3_5": (PLAIN, "<|im_end|>\n"),
    "qwen3_5_nothink": (PLAIN, "<|im_end|>\n"),
    "qwen3_6": (PLAIN, "<|im_end|>\n"),
    "chatml": (PLAIN, "<|im_end|>\n"),
    "default": ("Human: Say red.</s>\nAssistant:", "</s>\n"),
    "mistral": ("<s>[INST] Say red.[/INST]", "</s>"),
    "gemma": ("<s><start_of_turn>user\nSay red.<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
}
BEFORE_THE_TEXT = dict.fromkeys(("qwen3", "qwen3_5", "qwen3_6"), "<think>\n\n</think>\n\n") | {"mistral": " "}
CASES = [(path, yaml.safe_load(path.read_text(encoding="utf-8")).get("template", "")) for path in FIXTURES]
CASES += [(FIXTURES[0], template) for template in EXPECTED]

EXAMPLE_FACTS = json.loads(
    (Path(__file__).parents[1] / "recipe" / "fixtures" / "llama_factory_examples.json").read_text(encoding="utf-8")
)
EXAMPLES: dict[str, dict[str, Any]] = EXAMPLE_FACTS["examples"]
REFUSED = {
    "extras/mod/llama3_full_sft": "mixture_of_depths: not supported; it fails in LLaMA-Factory 0.9.5 too",
}
QUANTIZED = [name for name in EXAMPLES if name.endswith(("_gptq", "_awq", "_aqlm"))]
RUN = [name for name, keys in EXAMPLES.items() if name not in REFUSED and keys["template"] not in MULTIMODAL]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
QWEN_EXPERTS = EXPERTS | {"num_experts": 4}
DEEPSEEK_EXPERTS = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
DEEPSEEK_EXPERTS |= {"first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16}
DEEPSEEK_EXPERTS |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
QWEN_3_5 = {"head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
FAMILIES: dict[str, tuple[Any, dict[str, int]]] = {  # the first whose name fits
    "DeepSeek-V2": (DeepseekV2Config, DEEPSEEK_EXPERTS),
    "DeepSeek-V3": (DeepseekV3Config, DEEPSEEK_EXPERTS),
    "A22B": (Qwen3MoeConfig, QWEN_EXPERTS),
    "A3B": (Qwen3MoeConfig, QWEN_EXPERTS),
    "Qwen3.5-397B": (Qwen3_5MoeTextConfig, QWEN_EXPERTS | {"shared_expert_intermediate_size": 64} | QWEN_3_5),
    "Qwen3.5": (Qwen3_5TextConfig, QWEN_3_5),
    "qwen3": (Qwen3Config, {}),
    "qwen": (Qwen2Config, {}),
    "": (LlamaConfig, {}),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in; the signal handlers that a run replaces are put back."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def write_inputs(path: Path, template: str, place: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The model's tokenizer and the rows of all of the recipe's datasets; returns these, and what the recipe is given."""
    jinja = shipped_template(template)
    special = [token for token in tokens_of(jinja) if token not in ("<|eom_id|>",)]
    make_tokenizer(*special, chat_template=jinja).save_pretrained(place / "model")
    (place / "data").mkdir()
    rows, registry = [], {}
    recipe = read_recipe(path)
    for name in dict.fromkeys([*recipe.dataset, *recipe.eval_dataset]):
        own = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}, says {name}."} for word in WORDS]
        (place / "data" / f"{name}.json").write_text(json.dumps(own), encoding="utf-8")
        registry[name] = {"file_name": f"{name}.json"}
        rows += own
    (place / "data" / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    named = {"model_name_or_path": "model", "dataset_dir": "data", "output_dir": "out", "template": template}
    return rows, [f"{key}={value}" for key, value in named.items()]


def write_example(name: str, folder: Path) -> Path:
    """An example of LLaMA-Factory's as a file; the fixture says what most share, and what each has of its own."""
    own = {key: value for key, value in EXAMPLES[name].items() if key != "without"}
    shared = {k: v for k, v in EXAMPLE_FACTS["common"].items() if k not in EXAMPLES[name].get("without", "").split()}
    path = folder / f"{name.replace('/', '_')}.yaml"
    path.write_text(yaml.safe_dump(shared | own), encoding="utf-8")
    return path


@pytest.mark.parametrize(("path", "template"), CASES, ids=[f"{path.stem}-{template}" for path, template in CASES])
def test_a_recipe_of_llama_factorys_trains_these_tokens(path: Path, template: str, place: Path) -> None:
    rows, given = write_inputs(path, template, place)
    recipe = read_recipe(path, given)
    data = prepare_datasets(recipe, load_template(recipe))
    tokenizer = data.template.tokenizer
    found = []
    for row in (*data.train, *(row for held_out in data.eval.values() for row in held_out)):
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        runs = groupby(pairs, lambda pair: pair[1] != IGNORED)
        found.append([(trained, tokenizer.decode([token for token, _ in run])) for trained, run in runs])
    before, end = EXPECTED[template]
    replies = [BEFORE_THE_TEXT.get(template, "") + row["output"] + end for row in rows]
    asked = [before.replace("Say red.", row["instruction"]) for row in rows]
    assert sorted(found) == sorted([[(False, ask), (True, reply)] for ask, reply in zip(asked, replies, strict=True)])


def test_every_sft_example_of_llama_factory_is_read_or_names_the_unsupported_keys(tmp_path: Path) -> None:
    """And what a refused one asks for is all that stands in its way: without those keys it is read."""
    for name in EXAMPLES:
        path = write_example(name, tmp_path)
        asked = REFUSED.get(name, "template:" if EXAMPLES[name]["template"] in MULTIMODAL else None)
        if asked is None:
            read_recipe(path)
            continue
        with pytest.raises(RecipeError) as caught:
            read_recipe(path)
        found = re.findall(r"^  line \d+ +(\w+): (.+)", str(caught.value), re.MULTILINE)
        assert found and asked in [f"{key}: {said}"[: len(asked)] for key, said in found]
        read_recipe(path, [f"{key}=null" for key, _ in found])


def test_the_docs_count_the_examples() -> None:
    text = (Path(__file__).parents[2] / "docs" / "llamafactory.md").read_text(encoding="utf-8")
    refused = len(REFUSED)
    assert f"has {len(EXAMPLES)} SFT examples" in text
    assert f"| {len(RUN)} | pass `--check` and train two steps (one predicts); {len(QUANTIZED)} of them use" in text
    assert f"| {refused} | `mixture_of_depths`: not supported" in text
    assert f"| {len(EXAMPLES) - len(RUN) - refused} | templates for images" in text
    section = text.partition("## Its example recipes")[2].partition("\n## ")[0]
    assert sum(int(count) for count in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)) == len(EXAMPLES)


@pytest.mark.slow  # 5 s each
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # its workers, on fewer cores
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")  # galore_torch's own
@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning")  # of the tiny model's narrow layers
@pytest.mark.parametrize("source", [*FIXTURES, *RUN], ids=lambda source: getattr(source, "stem", source))
def test_a_recipe_of_llama_factorys_passes_check_and_trains_two_steps(
    source: Path | str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As it is, but for DeepSpeed and FSDP, which need GPUs; the model is a tiny one of its family."""
    path = source if isinstance(source, Path) else write_example(source, place)
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows, given = write_inputs(path, keys["template"], place)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    kind, own = next(
        two for name, two in FAMILIES.items() if name in f"{keys['model_name_or_path']} {keys['template']}"
    )
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 8 if keys.get("use_llama_pro") else 2}
    # 512: transformers' Qwen2 tokenizer adds a token for padding.
    config = kind(**(sizes | own), vocab_size=512, eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(place / "model")
    if source in QUANTIZED:
        method = str(source).rpartition("_")[2]
        for package in ["aqlm"] if method == "aqlm" else ["gptqmodel", "optimum"]:
            pytest.importorskip(package)
        given += [f"model_name_or_path={pack(place / 'model', place / method, method)}"]
    given += ["deepspeed=null", "fsdp=null", "max_steps=2", "logging_steps=1", "report_to=none"]
    if "adapter_name_or_path" in keys:
        get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(place / "adapter")
        given += ["adapter_name_or_path=adapter", "max_new_tokens=4"]
    assert main(["--check", str(path), *given]) == 0
    assert main([str(path), *given]) == 0
    assert "Traceback" not in capfd.readouterr().err
    if not keys.get("do_train"):
        assert (place / "out" / "generated_predictions.jsonl").read_text(encoding="utf-8").count("\n") == len(rows)
        return
    assert json.loads((place / "out" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    log = [json.loads(line) for line in (place / "out" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum("loss" in line for line in log) == 2


def test_a_vision_model_is_trained_and_saved_without_its_vision_part_and_this_is_reported(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, given = write_inputs(FIXTURES[0], "qwen3_5", place)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    text = sizes | {"num_key_value_heads": 2, "vocab_size": 512} | QWEN_3_5
    seeing = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=seeing)).eval()
    whole.save_pretrained(place / "model")
    given += [
        "finetuning_type=full",
        "max_steps=1",
        "learning_rate=1e-12",
        "bf16=false",
        "report_to=none",
        "deepspeed=",
    ]
    for words in (["--check"], []):
        assert main([*words, str(FIXTURES[0]), *given]) == 0
        assert ", text part only\n" in capsys.readouterr().out
    saved = AutoModelForCausalLM.from_pretrained(place / "out").eval()
    assert not [name for name in saved.state_dict() if "visual" in name]
    row = torch.arange(20)[None]
    torch.testing.assert_close(saved(input_ids=row).logits, whole(input_ids=row).logits, rtol=1e-4, atol=1e-5)
