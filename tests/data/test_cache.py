"""A dataset is encoded once, however many runs and processes ask for it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, answers, numbered

from arpo_trl.data import cache
from arpo_trl.errors import DatasetError


def test_rows_are_encoded_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("d", [*numbered(3), 3])
    keys: dict[str, Any] = {"max_dropped": 0.5}
    first = bench.prepare(**keys)
    (bench.folder / "out" / "row_audit.jsonl").unlink()
    monkeypatch.setattr(cache, "encode_rows", None)
    second = bench.prepare(**keys)
    assert second.train[:] == first.train[:] and second.audit == first.audit
    assert len(bench.findings()) == 1
    with pytest.raises(TypeError):
        bench.prepare(**keys, overwrite_cache=True)
    with pytest.raises(TypeError):
        bench.prepare(**keys, mask_history=True)


def test_a_changed_file_is_encoded_again(bench: Bench) -> None:
    bench.add("d", numbered(1))
    first = bench.prepare()
    bench.add("d", numbered(1, start=7))
    second = bench.prepare()
    assert bench.replies(second.train) == answers(7)
    assert first.fingerprints != second.fingerprints


def test_tokenized_path_is_written_once_and_refused_when_what_is_behind_it_changed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("d", numbered(2))
    path = bench.folder / "tokenized"
    keys: dict[str, Any] = {"tokenized_path": str(path)}
    assert bench.replies(bench.prepare(**keys).train) == answers(0, 1)
    with monkeypatch.context() as context:
        context.setattr(cache, "encode_rows", None)
        assert bench.replies(bench.prepare(**keys).train) == answers(0, 1)
    with pytest.raises(DatasetError) as error:
        bench.prepare(**keys, cutoff_len=100)
    assert str(error.value) == (
        f"tokenized_path: {path / 'd'} was made with another cutoff_len; set overwrite_cache: true to make it again, "
        "or name another tokenized_path"
    )
    bench.add("d", numbered(2, start=5))
    own = bench.tokenizer.chat_template
    try:
        bench.tokenizer.chat_template = str(own).replace("You are Qwen", "You are")
        with pytest.raises(DatasetError, match="was made with another data and another template;"):
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
    with pytest.raises(DatasetError, match="was made with another mask_history"):
        bench.prepare(**keys, mask_history=True)


def test_a_folder_that_is_not_ours_is_no_tokenized_path(bench: Bench) -> None:
    bench.add("d", numbered(2))
    (bench.folder / "theirs" / "d").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"not written by arpo_trl \(no prepared.json\)"):
        bench.prepare(tokenized_path=str(bench.folder / "theirs"))


def test_a_folder_that_is_not_ours_is_never_replaced(bench: Bench) -> None:
    bench.add("d", numbered(2))
    (bench.folder / "theirs" / "d").mkdir(parents=True)
    (bench.folder / "theirs" / "d" / "precious.txt").touch()
    with pytest.raises(DatasetError, match=r"not written by arpo_trl \(no prepared.json\)"):
        bench.prepare(tokenized_path=str(bench.folder / "theirs"), overwrite_cache=True)
    assert (bench.folder / "theirs" / "d" / "precious.txt").exists()


@pytest.mark.parametrize("left", [None, "", "{}"])
def test_half_a_folder_in_the_cache_counts_as_none(left: str | None, bench: Bench) -> None:
    """As a kill within a removal leaves it: rows.arrow may be there or not."""
    bench.add("d", numbered(2))
    bench.prepare()
    (prepared,) = bench.folder.glob("cache/arpo_trl/*/prepared.json")
    prepared.unlink()
    if left is not None:
        prepared.write_text(left)
    assert bench.replies(bench.prepare().train) == answers(0, 1)
    assert [path.name for path in prepared.parent.parent.iterdir()] == [prepared.parent.name]


def test_what_dead_runs_left_is_removed_after_a_day(bench: Bench) -> None:
    beside = bench.folder / "tokenized"
    for name in ("d.unfinished-dead", "d.unfinished-alive", "d.unfinished-busy", "d.123", "notes"):
        (beside / name).mkdir(parents=True)
        (beside / name / "rows.arrow").touch()
    yesterday = time.time() - 25 * 3600
    for path in [*beside.glob("*/rows.arrow"), *beside.iterdir()]:
        if path.parent.name != "d.unfinished-busy" and path.name != "d.unfinished-alive":
            os.utime(path, (yesterday, yesterday))
    bench.add("d", numbered(2))
    bench.prepare(tokenized_path=str(beside))
    assert sorted(path.name for path in beside.iterdir()) == [
        "d",
        "d.123",
        "d.unfinished-alive",
        "d.unfinished-busy",
        "notes",
    ]


def test_other_code_encodes_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit changes no version."""
    bench.add("d", numbered(2))
    keys = {"tokenized_path": str(bench.folder / "tokenized")}
    first = bench.prepare()
    bench.prepare(**keys)
    source = tmp_path / "source"
    shutil.copytree(Path(cache.__file__).parent, source)
    hashes = {cache.hash_of_sources()}
    monkeypatch.setattr(cache, "files", lambda _: source)
    for name in ("files", "messages", "tokenizer", "labels", "encode"):
        with (source / f"{name}.py").open("a") as file:
            file.write("# an edit")
        hashes.add(cache.hash_of_sources.__wrapped__())
    assert len(hashes) == 6
    monkeypatch.setattr(cache, "hash_of_sources", lambda: "another")
    with pytest.raises(DatasetError, match="was made with another arpo_trl; set overwrite_cache: true"):
        bench.prepare(**keys)
    assert bench.prepare().train[:] == first.train[:]
    assert len(list(bench.folder.glob("cache/arpo_trl/d-*"))) == 2


# Several processes

RANK = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from transformers import AutoTokenizer
from arpo_trl.data import cache
from arpo_trl.data import prepare as dataset
from arpo_trl.recipe import Recipe

model, folder = sys.argv[1:]
state = PartialState(cpu=True)
if not state.is_main_process:
    cache.encode_rows = None  # only the main process may need it
recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir=f"{folder}/out", overwrite_cache=True)
data = dataset.prepare_datasets(recipe, AutoTokenizer.from_pretrained(model))
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
from transformers import AutoTokenizer
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.recipe import Recipe

model, folder = sys.argv[1:]
state = PartialState(cpu=True)
os.chdir(os.environ["DISK"])
recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir="out", overwrite_cache=True,
                tokenized_path="tokenized", cutoff_len=200)
prepare_datasets(recipe, AutoTokenizer.from_pretrained(model))
state.destroy_process_group()
"""


def test_each_node_without_a_shared_disk_encodes_again(bench: Bench, tiny_model: Path) -> None:
    """Also where the second one's tokenized_path is stale, which only the first one's is not."""
    bench.add("d", numbered(5))
    disks = [bench.folder / "first", bench.folder / "second"]
    bench.prepare(tokenized_path=str(disks[0] / "tokenized"), cutoff_len=200)
    bench.prepare(tokenized_path=str(disks[1] / "tokenized"), cutoff_len=100)
    first, second = (disk / "tokenized" / "d" / "prepared.json" for disk in disks)
    before = first.read_text()
    run_ranks(
        bench,
        NODE,
        str(tiny_model),
        str(bench.folder),
        RANK=("0", "1"),
        LOCAL_RANK=("0", "0"),
        DISK=(str(disks[0]), str(disks[1])),
    )
    assert first.read_text() == second.read_text() != before


RACE = """
import json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.recipe import Recipe

model, folder, me, other = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
for number in range(1, 21):
    Path(folder, f"{me}.{number}").touch()
    end = time.monotonic() + 60
    while not Path(folder, f"{other}.{number}").exists():
        assert time.monotonic() < end, "the other one has died"
    # Odd turns: a name that neither has encoded. Even turns: one that both encode again.
    keys = {"max_samples": number} if number % 2 else {"tokenized_path": f"{folder}/tokenized", "overwrite_cache": True}
    recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir="out", **keys)
    rows = prepare_datasets(recipe, tokenizer).train[:]
    assert len(rows["labels"]) == keys.get("max_samples", 40), number
"""


def test_two_runs_may_encode_the_same_data_at_once(bench: Bench, tiny_model: Path) -> None:
    bench.add("d", numbered(40))
    (bench.folder / "race.py").write_text(RACE, encoding="utf-8")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(bench.folder / "cache")}
    command = [sys.executable, str(bench.folder / "race.py"), str(tiny_model), str(bench.folder)]
    runs = [subprocess.Popen([*command, *names], env=environment) for names in ("ab", "ba")]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    assert not [*bench.folder.glob("cache/arpo_trl/*.unfinished-*"), *bench.folder.glob("tokenized/*.unfinished-*")]
