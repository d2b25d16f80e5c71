"""A dataset is encoded once, however many runs and processes ask for it."""

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
from hashlib import sha256
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, answers, numbered
from datasets import Dataset, DatasetDict, load_from_disk

from arpo_trl.data import cache
from arpo_trl.data.encode import Encoder, encode_rows
from arpo_trl.data.files import read_dataset
from arpo_trl.data.in_use import mark_in_use
from arpo_trl.data.registry import read_registry
from arpo_trl.data.sources import select_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.errors import DatasetError
from arpo_trl.recipe import Recipe


def test_rows_are_encoded_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("d", [*numbered(3), 3])
    keys: dict[str, Any] = {"max_dropped": 0.5}
    first = bench.prepare(**keys)
    (bench.folder / "out" / "row_audit.jsonl").unlink()
    monkeypatch.setattr(cache, "encode_batches", None)
    second = bench.prepare(**keys)
    assert second.train[:] == first.train[:] and second.audit == first.audit
    assert len(bench.findings()) == 1
    with pytest.raises(TypeError):
        bench.prepare(**keys, overwrite_cache=True)
    with pytest.raises(TypeError):
        bench.prepare(**keys, mask_history=True)


READER = """
import json, sys
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.recipe import Recipe

model, folder = sys.argv[1:]
recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir="out", cutoff_len=256)
rows = prepare_datasets(recipe, load_template(recipe)).train
for line in sys.stdin:
    print(json.dumps(rows["labels"][:]), flush=True)
"""


def test_overwrite_cache_never_replaces_rows_that_are_read_and_leaves_one_folder_after_five_runs(
    bench: Bench, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows can't delete a file that a process has mapped. `same` is a second name of the rows of `d`."""
    bench.register("same", file_name=bench.add("d", numbered(5)).name)
    marks: list[int] = []
    monkeypatch.setattr(cache, "mark_in_use", lambda folder: marks.append(mark_in_use.__wrapped__(folder)))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(bench.folder / "cache")}
    command = [sys.executable, "-c", READER, str(tiny_model), str(bench.folder)]

    def run() -> list[list[int]]:
        """Encode both again, as a run that then ends."""
        labels: list[list[int]] = bench.prepare(overwrite_cache=True).train["labels"][:]
        gc.collect()  # what this process has mapped: a run would have ended
        while marks:
            os.close(marks.pop())
        return labels

    def encodings() -> list[str]:
        return sorted(path.name for path in bench.folder.glob("cache/arpo_trl/*/*") if path.is_dir())

    first = run()
    assert len(first) == 10 and encodings() == ["1", "2"]  # this run has read both
    with subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True) as reader:
        assert reader.stdin and reader.stdout
        for _ in range(2):
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert json.loads(reader.stdout.readline()) == first[:5]
            assert run() == first
        assert encodings() == ["2", "5", "6"]
        reader.kill()
    (key,) = bench.folder.glob("cache/arpo_trl/*/")
    (key / "6.incomplete").mkdir()  # of a killed run
    assert [run() for _ in range(2)] == [first] * 2
    assert bench.prepare().train["labels"][:] == first and encodings() == ["10"]
    assert {re.split("[._]", path.name)[0] for path in key.iterdir()} == {"10"}


def test_a_tokenized_path_that_windows_does_not_replace_is_an_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("d", numbered(2))
    path = bench.folder / "tokenized"
    bench.prepare(tokenized_path=str(path))

    def rename(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Access is denied", str(self))

    with monkeypatch.context() as windows:
        windows.setattr(Path, "rename", rename)
        with pytest.raises(DatasetError, match=r"d is in use by another run; stop it, or set another tokenized_path"):
            bench.prepare(tokenized_path=str(path), overwrite_cache=True)
    assert [entry.name for entry in path.iterdir() if entry.is_dir()] == ["d"]
    assert bench.replies(bench.prepare(tokenized_path=str(path)).train) == answers(0, 1)


def test_a_changed_file_is_encoded_again(bench: Bench) -> None:
    bench.add("d", numbered(1))
    first = bench.prepare()
    bench.add("d", numbered(1, start=7))
    second = bench.prepare()
    assert bench.replies(second.train) == answers(7)
    assert first.fingerprints != second.fingerprints


def test_tokenized_path_is_written_once_and_an_error_after_a_change(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("d", numbered(2))
    path = bench.folder / "tokenized"
    keys: dict[str, Any] = {"tokenized_path": str(path)}
    assert bench.replies(bench.prepare(**keys).train) == answers(0, 1)
    with monkeypatch.context() as context:
        context.setattr(cache, "encode_batches", None)
        assert bench.replies(bench.prepare(**keys).train) == answers(0, 1)
    with pytest.raises(DatasetError) as error:
        bench.prepare(**keys, cutoff_len=100)
    assert str(error.value) == (
        f"tokenized_path: {path / 'd'} was encoded with other settings (cutoff_len); set overwrite_cache: true to encode again, "
        "or another tokenized_path"
    )
    bench.add("d", numbered(2, start=5))
    own = bench.tokenizer.chat_template
    try:
        bench.tokenizer.chat_template = str(own).replace("You are Qwen", "You are")
        with pytest.raises(DatasetError, match=r"was encoded with other settings \(data, template\);"):
            bench.prepare(**keys)
    finally:
        bench.tokenizer.chat_template = own
    assert bench.replies(bench.prepare(**keys, overwrite_cache=True).train) == answers(5, 6)


def test_a_tokenized_path_needs_no_raw_data(bench: Bench) -> None:
    path = bench.add("d", numbered(2))
    keys: dict[str, Any] = {"tokenized_path": str(bench.folder / "tokenized")}
    first = bench.prepare(**keys)
    path.unlink()
    second = bench.prepare(**keys)
    assert second.train[:] == first.train[:] and second.fingerprints == first.fingerprints
    with pytest.raises(DatasetError, match=r"other settings \(mask_history\); set overwrite_cache"):
        bench.prepare(**keys, mask_history=True)


@pytest.mark.parametrize("overwrite_cache", [False, True])
def test_a_foreign_folder_is_rejected_as_tokenized_path_and_kept(overwrite_cache: bool, bench: Bench) -> None:
    bench.add("d", numbered(2))
    (bench.folder / "theirs" / "d").mkdir(parents=True)
    (bench.folder / "theirs" / "d" / "precious.txt").touch()
    with pytest.raises(DatasetError, match=r"theirs[/\\]d was not saved by arpo_trl; set another tokenized_path"):
        bench.prepare(tokenized_path=str(bench.folder / "theirs"), overwrite_cache=overwrite_cache)
    assert (bench.folder / "theirs" / "d" / "precious.txt").exists()


@pytest.mark.parametrize("split", [True, False], ids=["DatasetDict", "Dataset"])
def test_a_folder_saved_by_llamafactory_is_read_unchanged(split: bool, bench: Bench) -> None:
    """Its columns beside the tokens hold nulls, and its recipe may name a dataset that is nowhere."""
    bench.add("d", numbered(1))
    tokens = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, -100]}]
    nulls = {"images": None, "videos": None, "audios": None}
    rows = Dataset.from_list([{**row, "attention_mask": [1] * len(row["labels"]), **nulls} for row in tokens])
    saved = DatasetDict(train=rows, validation=Dataset.from_list(tokens[:1])) if split else rows
    saved.save_to_disk(str(bench.folder / "theirs"))
    keys: dict[str, Any] = {"dataset": ["nowhere"], "tokenized_path": str(bench.folder / "theirs")}
    for _ in range(2):
        data = bench.prepare(**keys)
        source = f"{bench.folder / 'theirs'}/train:1"
        assert data.trained_on == ["train"] and select_datasets(bench.recipe(**keys)) == []
        assert data.train[:] == {"input_ids": [[1, 2, 3]], "labels": [[-100, 2, 3]], "source": [source]}
        held_out = {name: rows["labels"][:] for name, rows in data.eval.items()}
        assert held_out == ({"validation": [[-100, 2, 3]]} if split else {})
        assert data.audit.datasets["train"].first == [f"{source[:-1]}2: no trained token"]
        assert data.notices == [
            f"tokenized_path: {bench.folder / 'theirs'} was saved by LLaMA-Factory; all other data keys (dataset, "
            "template, cutoff_len, ...) are ignored"
        ]


def test_a_saved_folder_without_tokens_is_an_error(bench: Bench) -> None:
    Dataset.from_list([{"text": "A"}]).save_to_disk(str(bench.folder / "theirs"))
    with pytest.raises(DatasetError, match="missing columns in train: input_ids, labels; set a folder saved"):
        bench.prepare(dataset=["d"], tokenized_path=str(bench.folder / "theirs"))


KILLED = """
import os, signal, sys
from arpo_trl.data import cache
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.recipe import Recipe

def killed(*args, encode_batches=cache.encode_batches):
    for number, batch in enumerate(encode_batches(*args)):
        if number == 2:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        yield batch

cache.encode_batches = killed
model, folder = sys.argv[1:]
recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir="out", cutoff_len=256,
                preprocessing_batch_size=100)
prepare_datasets(recipe, load_template(recipe))
"""


def test_a_killed_preparation_leaves_no_encoded_rows(bench: Bench, tiny_model: Path) -> None:
    bench.add("d", numbered(300))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(bench.folder / "cache")}
    command = [sys.executable, "-c", KILLED, str(tiny_model), str(bench.folder)]
    killed = subprocess.run(command, env=environment, check=False).returncode
    assert killed == (signal.SIGTERM if sys.platform == "win32" else -signal.SIGKILL)
    assert len(list(bench.folder.rglob("*.incomplete"))) == 1
    assert bench.replies(bench.prepare().train) == answers(*range(300))
    assert not list(bench.folder.rglob("*.incomplete"))


def test_temporary_folders_of_a_killed_run_are_removed_from_tokenized_path(bench: Bench) -> None:
    beside = bench.folder / "tokenized"
    for name in ("d.unfinished/new", "d.123", "notes"):
        (beside / name).mkdir(parents=True)
        (beside / name / "rows.arrow").touch()
    bench.add("d", numbered(2))
    bench.prepare(tokenized_path=str(beside))
    locks = {".d.lock"}  # filelock deletes them on Windows
    assert {path.name for path in beside.iterdir()} - locks == {"d", "d.123", "notes"}


def test_the_format_is_increased_when_the_golden_rows_change(bench: Bench) -> None:
    """Rows that older code encoded count as encoded until cache.FORMAT is raised."""
    golden = Path(__file__).parents[1] / "golden"
    encoded = sha256()
    for name, truncation_mode in product(
        ("identity", "alpaca_en_demo", "glaive_toolcall_en_demo"), ("keep_start", "llamafactory")
    ):
        keys: dict[str, Any] = {"template": "qwen", "cutoff_len": 300, "truncation_mode": truncation_mode}
        recipe = Recipe(model_name_or_path=str(golden / "tokenizer"), output_dir="unused", **keys)
        info = read_registry(golden / "data")[name]
        encoder = Encoder(info, recipe, load_template(recipe))
        for row in islice(encode_rows(read_dataset(info, streaming=False), encoder), 20):
            tokens = row["input_ids"].tobytes() + row["labels"].tobytes()
            encoded.update(
                tokens
                + "\0".join(
                    (row["outcome"], row["reason"], row["excerpt"], *row["fields"], json.dumps(row["notes"]))
                ).encode()
            )
    now = {"format": cache.FORMAT, "sha256": encoded.hexdigest()}
    recorded = json.loads((golden / "format.json").read_text(encoding="utf-8"))
    assert now == recorded, (
        f"raise arpo_trl.data.cache.FORMAT, and write it and the new hash into {golden / 'format.json'}"
    )


def test_a_new_format_encodes_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("d", numbered(2))
    keys = {"tokenized_path": str(bench.folder / "tokenized")}
    first = bench.prepare()
    bench.prepare(**keys)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    with pytest.raises(
        DatasetError, match=r"was encoded with other settings \(format of arpo_trl\); set overwrite_cache: true"
    ):
        bench.prepare(**keys)
    assert bench.prepare().train[:] == first.train[:]
    assert len([path for path in bench.folder.glob("cache/arpo_trl/*") if path.is_dir()]) == 2


def test_other_special_tokens_encode_again(bench: Bench) -> None:
    """They are written by the template, and stand in no file of the vocabulary."""
    bench.add("d", numbered(2))
    own = bench.tokenizer.bos_token, bench.tokenizer.chat_template
    first = bench.prepare()
    try:
        bench.tokenizer.chat_template = "{{ bos_token }}" + str(own[1])
        bench.tokenizer.bos_token = "<|endoftext|>"
        one = bench.prepare()
        bench.tokenizer.bos_token = "<|im_start|>"
        other = bench.prepare()
    finally:
        bench.tokenizer.bos_token, bench.tokenizer.chat_template = own
    firsts = {data.train["input_ids"][0][0] for data in (one, other)}
    assert firsts == {*map(bench.tokenizer.convert_tokens_to_ids, ("<|endoftext|>", "<|im_start|>"))}
    assert len(one.train["input_ids"][0]) == len(first.train["input_ids"][0]) + 1


# Several processes

RANK = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from arpo_trl.data import cache
from arpo_trl.data import prepare as dataset
from arpo_trl.data.tokenizer import load_template
from arpo_trl.recipe import Recipe

model, folder = sys.argv[1:]
state = PartialState(cpu=True)
if not state.is_main_process:
    cache.encode_batches = None  # only the main process may need it
recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir=f"{folder}/out", overwrite_cache=True)
data = dataset.prepare_datasets(recipe, load_template(recipe))
Path(folder, f"rank{state.process_index}.json").write_text(json.dumps(data.train[:]))
state.destroy_process_group()
"""


def run_ranks(bench: Bench, script: str, *args: str, **per_rank: tuple[str, str]) -> None:
    """Two processes of one run; `per_rank` are environment variables."""
    (bench.folder / "rank.py").write_text(script, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(bench.folder / "rank.py"), *args]
    own = [{name: values[rank] for name, values in per_rank.items()} for rank in (0, 1)]
    ranks = [subprocess.Popen(command, env={**os.environ, **world, **env}) for env in own]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]


def test_on_two_processes_the_main_one_prepares_and_the_other_reads(bench: Bench, tiny_model: Path) -> None:
    bench.add("d", numbered(5))
    cached = (str(bench.folder / "cache"),) * 2
    ranks = ("0", "1")
    run_ranks(bench, RANK, str(tiny_model), str(bench.folder), RANK=ranks, LOCAL_RANK=ranks, HF_DATASETS_CACHE=cached)
    first, second = (json.loads((bench.folder / f"rank{rank}.json").read_text()) for rank in "01")
    assert first == second and len(first["labels"]) == 5


NODE = """
import json, os, sys
from pathlib import Path
from accelerate import PartialState
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.recipe import Recipe

model, folder = sys.argv[1:]
state = PartialState(cpu=True)
os.chdir(os.environ["DISK"])
recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir="out", overwrite_cache=True,
                tokenized_path="tokenized", cutoff_len=200)
prepare_datasets(recipe, load_template(recipe))
state.destroy_process_group()
"""


def test_each_node_without_a_shared_disk_encodes_again(bench: Bench, tiny_model: Path) -> None:
    """Also where the second one's tokenized_path is stale, which only the first one's is not."""
    bench.add("d", numbered(5))
    disks = [bench.folder / "first", bench.folder / "second"]
    bench.prepare(tokenized_path=str(disks[0] / "tokenized"), cutoff_len=200)
    bench.prepare(tokenized_path=str(disks[1] / "tokenized"), cutoff_len=100)
    saved = [disk / "tokenized" / "d" for disk in disks]
    before = [load_from_disk(str(one)).info.description for one in saved]
    run_ranks(
        bench,
        NODE,
        str(tiny_model),
        str(bench.folder),
        RANK=("0", "1"),
        LOCAL_RANK=("0", "0"),
        DISK=(str(disks[0]), str(disks[1])),
    )
    first, second = (load_from_disk(str(one)).info.description for one in saved)
    assert first == second == before[0] != before[1]


RACE = """
import json, sys, time
from pathlib import Path
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.recipe import Recipe

model, folder, me, other = sys.argv[1:]
for number in range(1, 21):
    Path(folder, f"{me}.{number}").touch()
    end = time.monotonic() + 60
    while not Path(folder, f"{other}.{number}").exists():
        assert time.monotonic() < end, "the other one has died"
    # Odd turns: a name that neither has encoded. Even turns: one that both encode again.
    keys = {"max_samples": number} if number % 2 else {"tokenized_path": f"{folder}/tokenized", "overwrite_cache": True}
    recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir="out", **keys)
    rows = prepare_datasets(recipe, load_template(recipe)).train[:]
    assert len(rows["labels"]) == keys.get("max_samples", 40), number
"""


def test_two_runs_may_encode_the_same_data_at_once(bench: Bench, tiny_model: Path) -> None:
    bench.add("d", numbered(40))
    (bench.folder / "race.py").write_text(RACE, encoding="utf-8")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(bench.folder / "cache")}
    command = [sys.executable, str(bench.folder / "race.py"), str(tiny_model), str(bench.folder)]
    runs = [subprocess.Popen([*command, *names], env=environment) for names in ("ab", "ba")]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    assert {path.name for path in (bench.folder / "tokenized").iterdir()} - {".d.lock"} == {"d"}
