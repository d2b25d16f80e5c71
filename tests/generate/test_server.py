"""Rollouts on servers: the protocol of each kind, with the real tiny model behind it, and a real llama.cpp server."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import small_run
from small_rollout import without_seconds
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from arpo_trl.__main__ import main
from arpo_trl.generate.engines import Request, Sampling, TransformersEngine, load_for_generation
from arpo_trl.generate.server import ServerEngine, cut_after_stop
from arpo_trl.run_folder import read_lines

pytestmark = small_run.QUIET
GREEDY = Sampling(do_sample=False)


class Server:
    """An OpenAI-compatible server on the tiny model. `kind`: how it returns ids and stop texts."""

    def __init__(self, model: Path, kind: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model, self.kind, self.lock = load_for_generation(model), kind, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = self.failures = 0
        self.dies_after: int | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                return

            def do_GET(self) -> None:
                known: dict[str, Any] = {"/v1/models": {"data": [{"id": "tiny", "max_model_len": 512}]}}
                if outer.kind == "llama.cpp":
                    known["/v1/models"] = {"data": [{"id": "tiny"}]}
                    known["/props"] = {"default_generation_settings": {"n_ctx": 512}}
                self.reply(200 if self.path in known else 404, known.get(self.path, {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(*outer.answer(body | {"path": self.path}))

            def reply(self, status: int, value: dict[str, Any]) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if self.kind == "no ids" and not isinstance(body["prompt"], str):
            return 400, {"error": {"message": "prompt must be a string"}}
        with self.lock:
            self.requests.append(body)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            if self.failures:
                self.failures -= 1
                self.in_flight -= 1
                return 503, {"error": "busy"}
            if self.dies_after is not None and len(self.requests) > self.dies_after:
                self.in_flight -= 1
                return 503, {"error": "dead"}
        time.sleep(0.02)
        with self.lock:
            ids = self.generate(body)
            self.in_flight -= 1
        text, stops = (
            self.tokenizer.decode([token for token in ids if token != self.tokenizer.eos_token_id]),
            body.get("stop", []),
        )
        cut = [stop for stop in stops if stop in text]
        if cut and not (self.kind == "vllm" and body.get("include_stop_str_in_output")):
            text = text[: text.index(cut[0])]
        stopped = bool(cut) or ids[-1:] == [self.tokenizer.eos_token_id]
        choice: dict[str, Any] = {"text": text, "finish_reason": "stop" if stopped else "length"}
        if self.kind == "vllm" and body.get("return_token_ids"):
            choice["token_ids"] = ids
        if self.kind == "llama.cpp" and body["path"] == "/completion" and body["return_tokens"]:
            return 200, {"tokens": ids, "content": text}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}}

    def generate(self, body: dict[str, Any]) -> list[int]:
        sampling = Sampling(
            do_sample=body["temperature"] > 0,
            temperature=body["temperature"] or 1.0,
            top_p=body["top_p"],
            top_k=max(body["top_k"], 0),
            seed=body["seed"],
        )
        engine = TransformersEngine(self.model, self.tokenizer, sampling)
        [ids] = engine.generate([Request(body["prompt"], body["max_tokens"], "", tuple(body.get("stop", ())))])
        return ids


@pytest.fixture(scope="module", params=["turns", "inside"])
def trained(request: pytest.FixtureRequest, train_once: Callable[[str], Path]) -> Path:
    return train_once(request.param)


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Any]:
    servers: list[Server] = []

    def make(model: Path, kind: str) -> Server:
        servers.append(Server(model, kind))
        return servers[-1]

    yield make
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def command(trained: Path, tmp_path: Path, url: str | None, *more: str) -> list[str]:
    server = [f"server_url={url}"] if url else []
    keys = ["do_train=false", f"model_name_or_path={trained / 'run'}", f"output_dir={tmp_path}", *server, *more]
    return ["rollout", str(trained / "recipe.yaml"), *keys]


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp", "text only"])
def test_a_server_gives_what_transformers_gives(
    kind: str, trained: Path, tmp_path: Path, serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(trained, tmp_path / "here", None, "num_generations=1")) == 0
    server = serve(trained / "run", kind)
    assert main(command(trained, tmp_path / "there", server.url, "num_generations=1")) == 0
    printed = capsys.readouterr().out
    here, there = (read_lines(tmp_path / name / "rollouts.jsonl") for name in ("here", "there"))
    assert any(line["calls"] for line in here)
    if kind == "text only":  # `>\\n` may come back as `>` and a newline: the same text, but other ids to continue
        first, second = (
            [[call["arguments"] for call in line["calls"]][:1] for line in lines] for lines in (here, there)
        )
        assert first == second
    else:
        assert without_seconds(there) == without_seconds(here)
    assert ("returns no token ids" in printed) == (kind == "text only")
    assert server.most_in_flight > 1
    assert all(isinstance(token, int) for body in server.requests for token in body["prompt"])
    for body in server.requests:
        assert {
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repeat_penalty",
            "repetition_penalty",
            "seed",
        } <= body.keys()


def test_samples_have_their_own_seeds(turns: Path, tmp_path: Path, serve: Any) -> None:
    server = serve(turns / "run", "vllm")
    for name in "ab":
        assert main(command(turns, tmp_path / name, server.url, "num_generations=3", "temperature=1.5")) == 0
    first, second = (read_lines(tmp_path / name / "rollouts.jsonl") for name in "ab")
    assert without_seconds(first) == without_seconds(second)
    assert len({json.dumps(line["conversations"]) for line in first}) > len({line["source"] for line in first})
    probes = 4
    assert len({body["seed"] for body in server.requests}) >= len(first) + probes - 2


def test_a_server_that_dies_ends_in_one_line_and_the_same_command_resumes(
    turns: Path, tmp_path: Path, serve: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arpo_trl.generate.server.WAIT_SECONDS", 0.01)
    server = serve(turns / "run", "vllm")
    server.failures = 2  # retried
    server.dies_after = 16
    words = command(turns, tmp_path / "out", server.url, "num_generations=3", "server_requests=2")
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "HTTP 503" in error and "Run the same command again to resume" in error and error.count("\n") == 1
    saved = len(read_lines(tmp_path / "out" / "rollouts-part-0.jsonl"))
    assert saved > 0
    before = len(server.requests)
    server.dies_after = None
    assert main(words) == 0
    assert f"{saved:,} trajectories of this process are complete" in capsys.readouterr().out
    lines = read_lines(tmp_path / "out" / "rollouts.jsonl")
    assert len(lines) == 18 and len(server.requests) > before


@pytest.mark.parametrize("kind", ["no ids", "nobody"])
def test_a_server_that_cannot_be_used_is_one_line(
    kind: str,
    turns: Path,
    tmp_path: Path,
    serve: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("arpo_trl.generate.server.WAIT_SECONDS", 0.01)
    url = serve(turns / "run", kind).url if kind != "nobody" else "http://127.0.0.1:9/v1"
    assert main(command(turns, tmp_path, url)) == 1
    error = capsys.readouterr().err
    expected = "has to take token ids" if kind == "no ids" else "Start the server, or check the URL"
    assert expected in error and error.count("\n") == 1


def test_ids_after_a_stop_text_are_cut(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tiny_tokenizer("<python>1</python> and more", add_special_tokens=False).input_ids
    cut = cut_after_stop(tiny_tokenizer, ids, ["</search>", "</python>"])
    assert tiny_tokenizer.decode(cut) == "<python>1</python>" and cut_after_stop(tiny_tokenizer, ids, ["x</"]) == ids


# --- a real server ---


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("ROLLOUT_SERVER"), reason="needs ROLLOUT_SERVER: 'URL FOLDER'")
@pytest.mark.parametrize("stops", [(), ("stop",)])
def test_a_real_server_continues_our_ids(stops: tuple[str, ...]) -> None:
    """FOLDER: of `small_rollout.train`, whose run/ is served at URL (http://host:port/v1)."""
    url, folder = os.environ["ROLLOUT_SERVER"].split()
    tokenizer = AutoTokenizer.from_pretrained(Path(folder, "run"))
    here = TransformersEngine(load_for_generation(Path(folder, "run")), tokenizer, GREEDY)
    there = ServerEngine(url, tokenizer, here.ends, GREEDY)
    assert there.ids != "text" and not there.notices
    prompt = tokenizer("What is").input_ids
    stops = tuple(tokenizer.decode(here.generate([Request(prompt, 4, "")])[0][2:4]) for _ in stops)
    request = Request(prompt, 16, "a", stops)
    assert there.generate([request]) == here.generate([request])
    there.close()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("ROLLOUT_SERVER"), reason="needs ROLLOUT_SERVER: 'URL FOLDER'")
def test_a_real_server_rolls_out_what_transformers_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, folder = os.environ["ROLLOUT_SERVER"].split()

    def roll_out(name: str, url: str | None, *more: str) -> list[dict[str, Any]]:
        assert main(command(Path(folder), tmp_path / name, url, *more)) == 0
        return without_seconds(read_lines(tmp_path / name / "rollouts.jsonl"))

    here = roll_out("here", None, "num_generations=1")
    assert roll_out("there", url, "num_generations=1") == here
    assert any(line["calls"] for line in here)
    sampled = ("num_generations=4", "temperature=1.5")
    first, again, other = (roll_out(name, url, *sampled, f"seed={name[-1]}") for name in ("a1", "b1", "c2"))
    assert first == again != other
    assert len({json.dumps(line["conversations"]) for line in first}) > len(here)
    assert "ignores seeds" not in (printed := capsys.readouterr().out) and "no token ids" not in printed
