"""The engine that continues token ids on an OpenAI-compatible server: vLLM, SGLang, llama.cpp."""

import os
import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal

import httpx
from transformers import PreTrainedTokenizerBase

from ..data.messages import Fields
from ..errors import RunFailed, reason
from ..model.model import through_end
from .engines import Request, Sampling, seed_of

RETRIES = 5
WAIT_SECONDS = 0.5  # before the first retry; doubled each time
READ_SECONDS = 600.0
Ids = Literal["token_ids", "tokens", "text"]
"""Where a reply's ids are: vLLM's `token_ids`, `tokens` of llama.cpp's own /completion, or nowhere.

llama.cpp's /v1/completions has ids in its log-probabilities only, without the tokens of a stop text and without those
that are part of a character (xllamacpp 2026.10.11549).
"""


def make_client(base_url: str = "") -> httpx.Client:
    """Return a client that waits long for a reply, and sends the key in OPENAI_API_KEY."""
    key = os.environ.get("OPENAI_API_KEY")
    return httpx.Client(
        base_url=base_url,
        timeout=httpx.Timeout(READ_SECONDS, connect=10.0),
        limits=httpx.Limits(),  # none: the callers' threads bound the connections
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )


def get_fields(client: httpx.Client, url: str) -> Fields:
    """Return the JSON object at `url`, or an empty one."""
    try:
        answer = client.get(url).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


class ServerEngine:
    """Sends prompts as token ids to `url` (http://host:port/v1). Safe to use from several threads.

    `notices`: what the server lacks, found out by small requests.

    Raises:
        RunFailed: the server can't be reached, or doesn't take token ids.
    """

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], sampling: Sampling) -> None:
        self.url, self.tokenizer, self.ends, self.sampling = url.rstrip("/"), tokenizer, list(ends), sampling
        self.client = make_client()
        self.ids: Ids = "token_ids"
        models = self._send("/models").get("data") or [{}]
        self.model = str(models[0].get("id", "default"))
        self.context = int(models[0].get("max_model_len") or self._slot_context() or 1 << 30)
        self.notices: list[str] = []
        self._probe()

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        return [self._continue(request) for request in requests]

    def close(self) -> None:
        self.client.close()

    def _continue(self, request: Request) -> list[int]:
        ids = self._read_ids(self._complete(request), request.stops)
        return cut_after_stop(self.tokenizer, through_end(ids, self.ends), request.stops)[: request.limit]

    def _complete(self, request: Request) -> dict[str, Any]:
        """Send every sampling parameter: llama.cpp has its own defaults (min_p 0.05), vLLM those of the model's file."""
        sampling = self.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": request.ids,
            "max_tokens": request.limit,
            "temperature": sampling.temperature if sampling.do_sample else 0.0,
            "top_p": sampling.top_p if sampling.do_sample else 1.0,
            "top_k": (sampling.top_k if sampling.do_sample else 0) or -1,  # SGLang rejects 0
            "min_p": 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "repeat_penalty": sampling.repetition_penalty,
            "seed": seed_of(sampling, request.key) % (1 << 31),
            "stop_token_ids": self.ends,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
        }
        if request.stops:
            body |= {"stop": list(request.stops), "include_stop_str_in_output": True}
        if self.ids == "tokens":
            return self._send("/completion", body | {"n_predict": request.limit, "return_tokens": True})
        return self._send("/completions", body)

    def _read_ids(self, answer: dict[str, Any], stops: Sequence[str]) -> list[int]:
        if self.ids == "tokens":
            return list(answer["tokens"])
        choice = answer["choices"][0]
        if self.ids == "token_ids":
            return list(choice["token_ids"])
        text, end = str(choice["text"]), list[int]()
        if choice.get("finish_reason") == "stop":
            # A stop text may be cut off, and the server doesn't report which one: it is the one that is open.
            opened = [stop for stop in stops if text.rfind(stop.replace("/", "")) > text.rfind(stop)]
            text += opened[0] if opened else ""
            end = [] if opened else self.ends[:1]
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], *end]

    def _probe(self) -> None:
        prompt: list[int] = self.tokenizer("The quick brown fox", add_special_tokens=False)["input_ids"]
        answer = self._complete(Request(prompt, 8, "probe"))
        if not isinstance(answer["choices"][0].get("token_ids"), list):
            self.ids = "tokens" if self._slot_context() else "text"
            if self.ids == "text":
                self.notices.append("returns no token ids: replies are tokenized again, which may give other ids")
        counted = (answer.get("usage") or {}).get("prompt_tokens", len(prompt))
        if counted != len(prompt):
            self.notices.append(f"counts {counted} tokens for a prompt of {len(prompt)}: it adds some (BOS?)")
        if self.sampling.do_sample:
            first, again, other = (self._continue(Request(prompt, 8, key)) for key in ("probe", "probe", "other"))
            if first != again:
                self.notices.append("ignores seeds: a repeated rollout gives other trajectories")
            elif again == other:
                self.notices.append("gives the same sample for different seeds")

    def _slot_context(self) -> int | None:
        """Return the context of a slot of llama.cpp, which divides its total by the slots."""
        properties = get_fields(self.client, f"{self.url.removesuffix('/v1')}/props")
        context: int | None = (properties.get("default_generation_settings") or {}).get("n_ctx")
        return context

    def _send(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        url = self.url.removesuffix("/v1") if path == "/completion" else self.url
        problem = ""
        for attempt in range(RETRIES):
            if attempt:
                time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                response = self.client.request("POST" if body else "GET", url + path, json=body)
            except httpx.TransportError as error:
                problem = f"no answer ({reason(error)})"
                continue
            if response.status_code < 400:
                answer: dict[str, Any] = response.json()
                return answer
            problem = f"HTTP {response.status_code}: {' '.join(response.text.split())[:200]}"
            if response.status_code < 500 and response.status_code not in (408, 425, 429):
                break
        if not body:
            fix = "Start the server, or check the URL (http://host:port/v1)"
        elif "HTTP 400" in problem:
            fix = "The server has to take token ids as prompt (vLLM, SGLang and llama.cpp do)"
        else:
            fix = "Run the same command again to resume"
        raise RunFailed(f"server_url: {self.url}{path}: {problem}. {fix}")


def cut_after_stop(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[str]) -> list[int]:
    """Return the ids up to the token that completes the first stop text."""

    def has_stop(length: int) -> bool:
        return any(stop in str(tokenizer.decode(ids[:length])) for stop in stops)

    return ids[: bisect_left(range(len(ids)), True, key=has_stop)]
