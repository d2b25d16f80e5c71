"""A small HTTP server that answers as vLLM, SGLang, llama.cpp or `transformers serve` do, with a real model behind it.

Its faults are those of real servers: another template, other defaults, no end token, no parser.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


def parse_calls(text: str) -> list[dict[str, Any]]:
    """The calls of a text; none if one is malformed, as parsers do."""
    try:
        calls = [json.loads(call) for call in CALL.findall(text)]
        return [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, KeyError, TypeError):
        return []


@dataclass
class Served:
    """What is served, and how."""

    folder: Path
    kind: str
    chat_template: str | None = None
    switches: dict[str, Any] = field(default_factory=dict)
    ends: list[int] | None = None
    parses_calls: bool = True
    add_bos: bool = False
    listed: str = "m"

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        if self.ends is None:
            ends = self.model.generation_config.eos_token_id
            self.ends = ends if isinstance(ends, list) else [ends]
        self.lock = threading.Lock()

    def render(self, body: dict[str, Any]) -> str:
        messages = json.loads(json.dumps(body["messages"]))
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        switches = {"chat_template": self.chat_template, **self.switches, **body.get("chat_template_kwargs", {})}
        apply: Any = self.tokenizer.apply_chat_template
        return str(apply(messages, tools=body.get("tools"), add_generation_prompt=True, tokenize=False, **switches))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.tokenizer.bos_token_id, *ids] if self.add_bos else ids

    def generate(self, ids: list[int], limit: int) -> tuple[list[int], list[dict[int, float]], bool]:
        """The tokens, the five likeliest at each position, and whether an end token stopped it."""
        found: list[int] = []
        places: list[dict[int, float]] = []
        with self.lock, torch.inference_mode():
            for _ in range(limit):
                logits = self.model(input_ids=torch.tensor([ids + found]), logits_to_keep=1).logits
                top = logits[0, -1].float().log_softmax(-1).topk(5)
                places.append(dict(zip(top.indices.tolist(), top.values.tolist())))
                found.append(int(top.indices[0]))
                if found[-1] in (self.ends or ()):
                    return found, places, True
        return found, places, False

    def score(self, ids: list[int]) -> list[float]:
        with self.lock, torch.inference_mode():
            predicted = self.model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        values: list[float] = predicted.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        return values

    def text(self, ids: list[int], special: bool = False) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special))

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.encode(self.render(body))
        found, _, stopped = self.generate(ids, body.get("max_tokens", 16))
        if "logit_bias" in body:
            found, stopped = [int(next(iter(body["logit_bias"])))], True
        text = self.text(found)
        calls = parse_calls(text) if body.get("tools") and self.parses_calls else []
        message: dict[str, Any] = {"role": "assistant", "content": CALL.sub("", text).strip() if calls else text}
        if calls:
            functions = [{"name": call["name"], "arguments": json.dumps(call["arguments"])} for call in calls]
            message["tool_calls"] = [{"id": "c", "type": "function", "function": one} for one in functions]
        finish = "tool_calls" if calls else "stop" if stopped else "length"
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(found)}
        return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}

    # --- the protocols: a path -> its answer ---

    def get(self, path: str) -> Any:
        owners = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp"}
        if path == "/v1/models":
            card: dict[str, Any] = {"id": self.listed, "owned_by": owners.get(self.kind, "me")}
            if self.kind == "llama.cpp":
                parameters = self.model.num_parameters()
                card["meta"] = {"n_params": parameters, "size": 4 * parameters}
            return {"data": [card]}
        if path == "/openapi.json" and self.kind == "transformers":
            return {"paths": {"/load_model": {}, "/reset": {}, "/v1/chat/completions": {}}}
        if path == "/props" and self.kind == "llama.cpp":
            return {"default_generation_settings": {}, "model_path": "m.gguf"}
        if path == "/get_model_info" and self.kind == "sglang":
            return {"model_path": "elsewhere"}
        return None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/chat/completions":
            return self.chat(body)
        name = path.removeprefix("/v1").strip("/").replace("-", "_")
        answer = getattr(self, f"{self.kind.replace('.', '_')}_{name}", None)
        return answer(body) if answer else None

    def vllm_tokenize(self, body: dict[str, Any]) -> Any:
        return {"tokens": self.encode(self.render(body))}

    def vllm_completions(self, body: dict[str, Any]) -> Any:
        ids = body["prompt"]
        found, places, stopped = self.generate(ids, body["max_tokens"])
        top = [{f"token_id:{token}": value for token, value in place.items()} for place in places]
        scores = {"token_logprobs": [place[token] for token, place in zip(found, places)], "top_logprobs": top}
        choice: dict[str, Any] = {"text": self.text(found[: len(found) - stopped], True), "token_ids": found}
        choice |= {"logprobs": scores, "finish_reason": "stop" if stopped else "length"}
        if "prompt_logprobs" in body:
            values = self.score(ids)
            choice["prompt_logprobs"] = [None, *({str(t): {"logprob": v}} for t, v in zip(ids[1:], values))]
        return {"choices": [choice], "usage": {"completion_tokens": len(found)}}

    def transformers_completions(self, body: dict[str, Any]) -> Any:
        ids = self.encode(body["prompt"])
        found, _, stopped = self.generate(ids, body["max_tokens"])
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(found)}
        return {
            "choices": [{"text": self.text(found), "finish_reason": "stop" if stopped else "length"}],
            "usage": usage,
        }

    def sglang_generate(self, body: dict[str, Any]) -> Any:
        ids = body["input_ids"]
        found, places, stopped = self.generate(ids, body["sampling_params"]["max_new_tokens"])
        chosen = [[place[token], token, None] for token, place in zip(found, places)]
        told: dict[str, Any] = {"output_token_logprobs": chosen, "completion_tokens": len(found)}
        told["output_top_logprobs"] = [[[value, token, None] for token, value in place.items()] for place in places]
        told["finish_reason"] = {"type": "stop" if stopped else "length"}
        if "logprob_start_len" in body:
            start = body["logprob_start_len"]
            values = [None, *self.score(ids)]
            told["input_token_logprobs"] = [[value, token, None] for value, token in zip(values[start:], ids[start:])]
        return {"text": self.text(found), "meta_info": told}

    def llama_cpp_apply_template(self, body: dict[str, Any]) -> Any:
        return {"prompt": self.render(body)}

    def llama_cpp_tokenize(self, body: dict[str, Any]) -> Any:
        return {"tokens": self.encode(body["content"])}

    def llama_cpp_completion(self, body: dict[str, Any]) -> Any:
        found, places, stopped = self.generate(body["prompt"], body["n_predict"])
        probabilities = [
            {
                "id": token,
                "logprob": place[token],
                "top_logprobs": [{"id": one, "logprob": value} for one, value in place.items()],
            }
            for token, place in zip(found, places)
        ]
        told = {"content": self.text(found), "tokens": found, "completion_probabilities": probabilities}
        return told | {"stop_type": "eos" if stopped else "limit", "tokens_predicted": len(found)}


@contextmanager
def serve(served: Served) -> Iterator[str]:
    """Serve until the block ends; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(served.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(served.post(self.path, body))

        def _answer(self, value: Any) -> None:
            text = json.dumps({} if value is None else value).encode()
            self.send_response(404 if value is None else 200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
