"""What the serving check asks of a running server, in each server's own protocol.

vLLM, SGLang and llama.cpp render a prompt without generating and take token ids; `transformers serve` takes a chat template in
the request; of any other OpenAI-compatible server only chats and token counts are known.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import httpx
from transformers import PreTrainedTokenizerBase

from ..data.messages import Fields, Message
from ..data.serving_rows import ServingRow
from ..errors import RunFailed, reason
from .rollout_files import to_openai
from .server import get_fields, make_client

RETRIES = 3  # a server may close a connection that was idle
CANDIDATES = 5
"""Likeliest tokens that are asked for at each position."""

GREEDY: Fields = {"temperature": 0.0, "top_p": 1.0, "seed": 0}
# Servers take these defaults from generation_config.json or have their own (llama.cpp's min_p of 0.05).
NO_SAMPLING: Fields = {**GREEDY, "top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0}


class ServerError(Exception):
    """An answer of the server that is an error, with its status and its message."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {' '.join(text.split())[:300]}")
        self.status = status


class Rendered(NamedTuple):
    """A prompt as the server renders it; what it does not tell is None."""

    text: str | None
    ids: list[int] | None
    tokens: int


class Reply(NamedTuple):
    """What the server generated after a prompt.

    `log_probs`: of each token of `ids`; `candidates`: the likeliest tokens at each position with theirs. `tokens`: their
    number, the end-of-turn token included where the server counts it.
    """

    text: str
    ids: list[int] | None
    log_probs: list[float]
    candidates: list[dict[int, float]]
    stopped: bool
    tokens: int


class Chat(NamedTuple):
    """The answer to a chat request."""

    content: str
    reasoning: str
    calls: list[Fields]
    finish: str
    prompt_tokens: int


class Server:
    """Any OpenAI-compatible server: only chats, and the token counts of their usage.

    Attributes:
        kind: The server, as the table of serving flags names it.
        model: The name of the served model.
        folder: The served folder, where the server tells it and it is on this machine.
        facts: What the server tells of itself, for the report.
        bits: Bits of a weight, where it tells them.
        computes_in: The dtype that it computes in whatever that of the weights is.
        greedy: Its parameters for greedy replies.
    """

    kind = "other"
    computes_in: str | None = None
    greedy: ClassVar[Fields] = GREEDY

    def __init__(self, client: httpx.Client, model: Fields, tokenizer: PreTrainedTokenizerBase) -> None:
        self.client, self.tokenizer = client, tokenizer
        self.model = str(model.get("id", "default"))
        self.folder: Path | None = None
        self.facts: dict[str, Any] = {"model": self.model}
        self.bits: float | None = None
        self.parameters: int | None = None

    def render(self, row: ServingRow, switches: Fields | None = None) -> Rendered:
        """Render a row's prompt. Raises ServerError."""
        return Rendered(None, None, self.chat(row, 1, switches).prompt_tokens)

    def complete(self, ids: list[int], limit: int) -> Reply | None:
        """Continue token ids greedily; None if the server does not take a prompt that is not a chat. Raises ServerError."""
        return None

    def score(self, ids: list[int], start: int) -> list[float] | None:
        """Return the log-probabilities of the tokens from `start` on; None if it has none of prompts. Raises ServerError."""
        return None

    def chat(self, row: ServingRow, limit: int, switches: Fields | None = None, **parameters: Any) -> Chat:
        """Answer a row's messages greedily. Raises ServerError."""
        body = self.request(row, switches) | {"max_tokens": limit, **self.greedy, **parameters}
        answer = self.post("/v1/chat/completions", body)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message = choice["message"]
        return Chat(
            content=message.get("content") or "",
            reasoning=message.get("reasoning_content") or message.get("reasoning") or "",
            calls=[call["function"] for call in message.get("tool_calls") or ()],
            finish=choice.get("finish_reason") or "",
            prompt_tokens=usage.get("prompt_tokens", 0),
        )

    def request(self, row: ServingRow, switches: Fields | None) -> Fields:
        """Return a row's messages, tools and switches as every server takes them."""
        body: Fields = {"model": self.model, "messages": to_wire(row.messages), "tools": row.tools}
        return {name: value for name, value in (body | {"chat_template_kwargs": switches}).items() if value}

    def post(self, path: str, body: Fields) -> Any:
        """Send a request. Raises ServerError, and RunFailed if nothing answers."""
        for attempt in range(RETRIES):
            try:
                response = self.client.post(path, json=body)
                break
            except httpx.HTTPError as error:
                if attempt == RETRIES - 1 or isinstance(error, httpx.TimeoutException):
                    url = self.client.base_url
                    raise RunFailed(f"{url}: no answer from the server ({reason(error)})") from None
        if response.status_code >= 400:
            raise ServerError(response.status_code, response.text)
        return response.json()


class Vllm(Server):
    """https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html"""

    kind = "vllm"
    greedy: ClassVar[Fields] = NO_SAMPLING

    def __init__(self, client: httpx.Client, model: Fields, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(client, model, tokenizer)
        self.folder = as_folder(model.get("root"))

    def render(self, row: ServingRow, switches: Fields | None = None) -> Rendered:
        ids = self.post("/tokenize", self.request(row, switches) | {"add_generation_prompt": True})["tokens"]
        return Rendered(str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)), ids, len(ids))

    def complete(self, ids: list[int], limit: int) -> Reply | None:
        body = {"model": self.model, "prompt": ids, "max_tokens": limit, "logprobs": CANDIDATES, **self.greedy}
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
        answer = self.post("/v1/completions", body)
        choice = answer["choices"][0]
        scores = choice.get("logprobs") or {}
        log_probs, prefix = scores.get("token_logprobs") or [], "token_id:"
        return Reply(
            text=choice["text"],
            ids=choice.get("token_ids"),
            log_probs=[math.nan if value is None else value for value in log_probs],  # JSON has no NaN
            candidates=[
                {int(name[len(prefix) :]): value for name, value in (place or {}).items() if name.startswith(prefix)}
                for place in scores.get("top_logprobs") or []
            ],
            stopped=choice["finish_reason"] == "stop",
            tokens=answer["usage"]["completion_tokens"],
        )

    def score(self, ids: list[int], start: int) -> list[float] | None:
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, **self.greedy}
        places = self.post("/v1/completions", body)["choices"][0].get("prompt_logprobs")
        if not places:
            return None
        return [float(place[str(token)]["logprob"]) for token, place in zip(ids[start:], places[start:])]


class SGLang(Vllm):
    """https://docs.sglang.ai. Written from its documentation and never run: it needs a GPU.

    `/tokenize` takes no messages in every version; then the prompt is known by its number of tokens.
    """

    kind = "sglang"

    def __init__(self, client: httpx.Client, model: Fields, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(client, model, tokenizer)
        self.folder = as_folder(get_fields(client, "/get_model_info").get("model_path"))

    def render(self, row: ServingRow, switches: Fields | None = None) -> Rendered:
        try:
            return super().render(row, switches)
        except (ServerError, KeyError):
            return Rendered(None, None, self.chat(row, 1, switches).prompt_tokens)

    def complete(self, ids: list[int], limit: int) -> Reply | None:
        sampling = {"temperature": 0.0, "max_new_tokens": limit, "skip_special_tokens": False}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": CANDIDATES}
        answer = self.post("/generate", body)
        meta = answer["meta_info"]
        chosen = meta.get("output_token_logprobs") or []
        return Reply(
            text=answer["text"],
            ids=[token for _, token, *_ in chosen],
            log_probs=[value for value, *_ in chosen],
            candidates=[
                {token: value for value, token, *_ in place} for place in meta.get("output_top_logprobs") or []
            ],
            stopped=(meta.get("finish_reason") or {}).get("type") == "stop",
            tokens=meta.get("completion_tokens", len(chosen)),
        )

    def score(self, ids: list[int], start: int) -> list[float] | None:
        sampling = {"temperature": 0.0, "max_new_tokens": 1}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": start - 1}
        places = self.post("/generate", body)["meta_info"].get("input_token_logprobs") or []
        values = [value for value, *_ in places if value is not None][-(len(ids) - start) :]
        return values if len(values) == len(ids) - start else None


class LlamaCpp(Server):
    """https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"""

    kind = "llama.cpp"
    computes_in = "float16"  # its cache of keys and values, unless started with --cache-type-k and -v
    greedy: ClassVar[Fields] = {"temperature": 0.0, "seed": 0, "repeat_penalty": 1.0}

    def __init__(self, client: httpx.Client, model: Fields, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(client, model, tokenizer)
        meta = model.get("meta") or {}
        if meta.get("n_params") and meta.get("size"):
            self.parameters = int(meta["n_params"])
            self.bits = 8 * int(meta["size"]) / self.parameters
            self.facts["bits of a weight"] = round(self.bits, 1)
        self.facts["model_path"] = get_fields(client, "/props").get("model_path")

    def render(self, row: ServingRow, switches: Fields | None = None) -> Rendered:
        text = self.post("/apply-template", self.request(row, switches) | {"add_generation_prompt": True})["prompt"]
        ids = self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        bos, bos_id = str(self.tokenizer.bos_token or ""), self.tokenizer.bos_token_id
        if bos:  # it takes the template's BOS away, and adds it with the tokens
            added = next((at for at, token in enumerate(ids) if token != bos_id), len(ids))
            text = bos * added + re.sub(f"^({re.escape(bos)})*", "", text)
        return Rendered(text, ids, len(ids))

    def complete(self, ids: list[int], limit: int) -> Reply | None:
        body = {"prompt": ids, "n_predict": limit, "return_tokens": True, "n_probs": CANDIDATES, "cache_prompt": False}
        answer = self.post("/completion", body | {"samplers": ["temperature"], **self.greedy})
        places = answer.get("completion_probabilities") or []
        return Reply(
            text=answer["content"],
            ids=answer["tokens"] if len(answer["tokens"]) >= len(places) else [place["id"] for place in places],
            log_probs=[place["logprob"] for place in places],
            candidates=[
                {candidate["id"]: candidate["logprob"] for candidate in place.get("top_logprobs", ())}
                for place in places
            ],
            stopped=answer.get("stop_type") == "eos",
            tokens=answer.get("tokens_predicted", len(places)),
        )


class TransformersServe(Server):
    """https://huggingface.co/docs/transformers/serving. It gives neither ids nor log-probabilities."""

    kind = "transformers"
    greedy: ClassVar[Fields] = {"temperature": 0.0}

    def __init__(self, client: httpx.Client, model: Fields, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(client, model, tokenizer)
        self.folder = as_folder(self.model)

    def render(self, row: ServingRow, switches: Fields | None = None) -> Rendered:
        """Count a prompt's tokens; the end token is forced, since 5.24 fails on a tool call that max_tokens cuts."""
        chat = self.chat(row, 1, switches, logit_bias={str(row.end): 1000.0})
        return Rendered(None, None, chat.prompt_tokens)

    def complete(self, ids: list[int], limit: int) -> Reply | None:
        """Continue the text of the ids, without the BOS that its tokenizer adds."""
        text = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if self.tokenizer("a")["input_ids"][0] == self.tokenizer.bos_token_id:
            text = text.removeprefix(str(self.tokenizer.bos_token))
        body = {"model": self.model, "prompt": text, "max_tokens": limit, **self.greedy}
        answer = self.post("/v1/completions", body)
        choice, usage = answer["choices"][0], answer["usage"]
        if usage["prompt_tokens"] != len(ids):
            return None  # the text has other tokens, at the borders of segments
        return Reply(choice["text"], None, [], [], choice["finish_reason"] == "stop", usage["completion_tokens"])


def connect(url: str, model: str | None, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Server:
    """Find out which server answers at `url` and what it serves.

    Args:
        url: http://host:port, with or without /v1.
        model: The name of the served model; the server's only one if None, else the folder.
        folder: The folder that the server is compared with.
        tokenizer: The folder's.

    Raises:
        RunFailed: nothing answers, or it serves several models.
    """
    client = make_client(url.rstrip("/").removesuffix("/v1"))
    try:
        answer = client.get("/v1/models")
        cards: list[Fields] = answer.json().get("data") or answer.json().get("models") or []
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        raise RunFailed(
            f"--url {url}: no OpenAI-compatible server ({reason(error)}). Start one, or correct the URL."
        ) from None
    kind = _kind(client, cards)
    if model is None and kind is TransformersServe and not _is_pinned(client, folder):
        model = str(folder.resolve())  # it loads what a request names
    if model is None and len(cards) > 1:
        names = ", ".join(str(card.get("id")) for card in cards[:8])
        raise RunFailed(f"--url {url}: serves {len(cards)} models. Choose one with --served-model: {names}")
    card = next((card for card in cards if model in (None, card.get("id"))), {"id": model})
    return kind(client, card, tokenizer)


def _kind(client: httpx.Client, cards: list[Fields]) -> type[Server]:
    owner = str(cards[0].get("owned_by", "")) if cards else ""
    by_owner: dict[str, type[Server]] = {"vllm": Vllm, "sglang": SGLang, "llamacpp": LlamaCpp}
    if owner in by_owner:
        return by_owner[owner]
    paths = get_fields(client, "/openapi.json").get("paths", {})
    if "/load_model" in paths and "/reset" in paths:
        return TransformersServe
    if "/tokenize" in paths and "/v1/completions" in paths:
        return Vllm
    return LlamaCpp if "default_generation_settings" in get_fields(client, "/props") else Server


def _is_pinned(client: httpx.Client, folder: Path) -> bool:
    """Return whether `transformers serve` was started with a model, and rejects every other name."""
    body = {"model": str(folder.resolve()), "messages": [{"role": "user", "content": "."}], "max_tokens": 1}
    try:
        response = client.post("/v1/chat/completions", json=body)
    except httpx.HTTPError:
        return True
    return response.status_code == 400 and "pinned" in response.text


def to_wire(messages: list[Message]) -> list[Fields]:
    """The messages as OpenAI's API takes them."""
    wire = list(map(to_openai, messages))
    for message in wire:
        if reasoning := message.get("reasoning_content"):
            message["reasoning"] = reasoning  # vLLM's name; llama.cpp reads reasoning_content
        if message["role"] == "tool":
            message.setdefault("tool_call_id", "call_0")
    return wire


def as_folder(name: object) -> Path | None:
    """The folder of that name, if it is on this machine."""
    return Path(name) if isinstance(name, str) and os.path.isdir(name) else None
