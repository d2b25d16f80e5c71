"""`check-serving` names each planted fault of a server, in each protocol, and finds none in an untouched one.

The servers here are small, and the model behind them is real: it knows by heart the rows that it was trained on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_tiny_model
import pytest
import small_run
import torch
from peft import LoraConfig, get_peft_model
from served_model import Served, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from arpo_trl.__main__ import main
from arpo_trl.data.serving_causes import UNKNOWN
from arpo_trl.data.serving_rows import read_rows, write_rows
from arpo_trl.data.tokenizer import shipped_template
from arpo_trl.generate.check_serving import check_serving

pytestmark = small_run.QUIET
KINDS = ["vllm", "sglang", "llama.cpp", "transformers", "other"]
TOOLS = [
    {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
]


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n in range(6):
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": n}}}
        system = {"role": "system", "content": f"You are clerk number {n} of Acme."}
        ask = {"role": "user", "content": f"Add {n}."}
        turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": str(n)}]
        rows.append(
            {"messages": [system, ask, *turns, {"role": "assistant", "content": f"It is {n}."}], "tools": TOOLS}
        )
        rows.append(
            {"messages": [system, {"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}!"}]}
        )
    return rows


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder; the model answers the rows that it was trained on, calls included."""
    home = tmp_path_factory.mktemp("trained")
    (home / "d.jsonl").write_text("\n".join(map(json.dumps, _rows())), encoding="utf-8")
    info = {
        "d": {"file_name": "d.jsonl", "formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}}
    }
    (home / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    keys = {"dataset": "d", "dataset_dir": str(home), "max_steps": 120, "learning_rate": 5e-3, "plot_loss": False}
    keys |= {"per_device_train_batch_size": 12, "save_strategy": "no", "logging_steps": 40, "preflight": False}
    return small_run.run(home, tiny_model, **keys)


def causes(folder: Path, served: Served) -> list[str]:
    with serve(served) as url:
        return [one.cause for one in check_serving(folder, url).differences]


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_server_has_no_difference(kind: str, trained: Path) -> None:
    with serve(Served(trained, kind)) as url:
        report = check_serving(trained, url)
    assert not report.differences, report.lines()
    assert "18 of 18 prompts identical" in report.prompts
    if kind != "other":
        assert "18 of 18 greedy replies identical" in report.replies
        assert "8 of 8 answers as generated, 6 of them asked for tool calls" in report.chats


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["llama2", "nobody's"])
def test_another_chat_template_is_named(template: str, kind: str, trained: Path) -> None:
    own = shipped_template("qwen")
    jinja = own.replace("<|im_start|>", "<|im_start|>:") if template == "nobody's" else shipped_template(template)
    found = causes(trained, Served(trained, kind, chat_template=jinja))
    # A server that tells only how many tokens a prompt has does not show a template that nobody knows.
    assert found[0] == (
        UNKNOWN if (template, kind) in {("nobody's", "other"), ("nobody's", "sglang")} else "chat template"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_without_the_system_message_is_named(kind: str, trained: Path) -> None:
    head = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    with serve(Served(trained, kind, chat_template=head + shipped_template("qwen"))) as url:
        difference, *_ = check_serving(trained, url).differences
    assert difference.cause == "chat template"
    assert "system message" in difference.found


def test_another_text_of_as_many_tokens_is_named_where_the_served_folder_is_here(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "m")
    path = tmp_path / "m" / "chat_template.jinja"
    own = path.read_text(encoding="utf-8")
    path.write_text(own.replace("<|im_start|>assistant", "<|im_end|>assistant"), encoding="utf-8")
    with serve(Served(tmp_path / "m", "transformers")) as url:
        report = check_serving(trained, url, 4, str(tmp_path / "m"))
    assert [one.cause for one in report.differences] == ["chat template"]


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama.cpp", "transformers"])
def test_a_server_that_does_not_stop_is_named(kind: str, trained: Path) -> None:
    assert causes(trained, Served(trained, kind, ends=[])) == ["end-of-turn token"]


def test_a_generation_config_without_the_end_token_is_named(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"eos_token_id": 0}), encoding="utf-8")
    assert causes(tmp_path / "m", Served(tmp_path / "m", "vllm")) == ["end-of-turn token"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_parser_that_is_off_is_named_with_the_flag_to_start_it(kind: str, trained: Path) -> None:
    with serve(Served(trained, kind, parses_calls=False)) as url:
        found = check_serving(trained, url).differences
    if kind in ("vllm", "sglang", "llama.cpp"):
        assert [one.cause for one in found] == ["tool-call parser"]
        assert "--tool-call-parser hermes" in found[0].fix
    else:  # transformers serve has no flag to set; of other servers the reply as it was generated is not known
        assert not found


def changed_weights(folder: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    shutil.copytree(folder, target)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(change(weight))
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llama.cpp", "transformers"])
def test_another_model_is_named(kind: str, trained: Path, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(trained, tmp_path / "before")
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "before")
    with serve(Served(tmp_path / "before", kind)) as url:
        difference, *_ = check_serving(trained, url).differences
    assert difference.cause == "wrong model"
    assert "the model before training" in difference.found
    noisy = changed_weights(
        trained, tmp_path / "noisy", lambda weight: weight + 0.3 * torch.randn_like(weight) * weight.std()
    )
    assert causes(trained, Served(noisy, kind))[0] == "wrong model"


def test_a_bos_that_the_server_adds_is_named(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"bos_token": "<|endoftext|>"}
    path.write_text(json.dumps(config), encoding="utf-8")
    for kind in ("vllm", "llama.cpp"):
        assert "BOS added" in causes(tmp_path / "m", Served(tmp_path / "m", kind, add_bos=True))


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp", "transformers"])
def test_todays_date_is_a_note(kind: str, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "m")
    template = folder / "chat_template.jinja"
    template.write_text('{{- strftime_now("%d %b %Y") }}' + template.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    day = tokenizer("03 Feb 2024", add_special_tokens=False)["input_ids"]
    rows = [
        replace(row, day="2024-02-03", segments=["03 Feb 2024", *row.segments], ids=day + row.ids)
        for row in read_rows(folder)
    ]
    write_rows(rows, folder)
    with serve(Served(folder, kind)) as url:
        report = check_serving(folder, url)
    assert not report.differences, report.lines()
    assert any("writes today's date" in note for note in report.notes)
    assert "answers as generated" in report.chats


def test_the_report_is_json_and_the_exit_code_is_1_if_something_differs(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    with serve(Served(trained, "vllm")) as url:
        assert main(["check-serving", str(trained), "--url", f"{url}/v1/", "--rows", "4", "--json", str(report)]) == 0
    assert "what is served is what was trained" in capsys.readouterr().out
    assert json.loads(report.read_text(encoding="utf-8"))["passed"]
    with serve(Served(trained, "vllm", ends=[])) as url:
        assert main(["check-serving", str(trained), "--url", url, "--rows", "4", "--json", str(report)]) == 1
    assert "differs  end-of-turn token: the server does not stop at '<|im_end|>'" in capsys.readouterr().out
    values = json.loads(report.read_text(encoding="utf-8"))
    assert not values["passed"]
    assert values["differences"][0]["cause"] == "end-of-turn token"


def test_a_missing_server_is_an_error_in_one_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-serving", str(trained), "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("--url http://127.0.0.1:9: no OpenAI-compatible server")


def test_a_model_that_no_run_wrote_is_compared_on_built_in_conversations(tiny_model: Path) -> None:
    with serve(Served(tiny_model, "vllm")) as url:
        report = check_serving(tiny_model, url, number=8)
    assert not report.differences, report.lines()
    assert "built-in conversations" in report.notes[0]
    assert "8 of 8 prompts identical" in report.prompts
    assert AutoTokenizer.from_pretrained(tiny_model).chat_template


@pytest.fixture(scope="module")
def adapter(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of 16 layers, whose sum with its base loses more in float16 than a model of so few weights should."""
    home = tmp_path_factory.mktemp("adapter")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    base = make_tiny_model.make_model(tokenizer.backend_tokenizer, 64, 16, 0).float()
    base.save_pretrained(home / "base")
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), config).save_pretrained(home / "adapter")
    tokenizer.save_pretrained(home / "adapter")
    for name in ("serving_check.jsonl", "generation_config.json"):
        shutil.copy(trained / name, home / "adapter")
    return home / "adapter"


def test_a_merge_that_rounds_a_large_adapter_is_named(adapter: Path, tmp_path: Path) -> None:
    for dtype, expected in (("float32", []), ("float16", ["merge rounding"])):
        assert main(["merge", str(adapter), str(tmp_path / dtype), "--dtype", dtype]) == 0
        with serve(Served(tmp_path / dtype, "vllm")) as url:
            report = check_serving(adapter, url, number=3)
        assert [one.cause for one in report.differences] == expected, report.lines()


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_weights_that_float16_cannot_hold_are_named(kind: str, trained: Path, tmp_path: Path) -> None:
    large = changed_weights(trained, tmp_path / "large", lambda weight: weight * (1e6 if weight.ndim > 1 else 1))
    AutoModelForCausalLM.from_pretrained(large).half().float().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "half")
    with serve(Served(tmp_path / "half", kind)) as url:
        first, *_ = check_serving(large, url, number=3).differences
    assert first.cause == "merge rounding"
    assert "float16 cannot hold" in first.found
