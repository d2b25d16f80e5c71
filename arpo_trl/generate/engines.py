"""Engines that continue token ids: transformers, batched, in this process. server.py has the other one."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import psutil
import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from ..data.tokenizer import decode
from ..errors import RecipeError, in_one_line
from ..machine import format_bytes
from ..model.base import auto_class, base_of
from ..model.model import end_tokens, through_end
from ..model.weights import Model
from ..report.console import say
from ..run_folder import read_json
from .predict import continue_rows, generation_config

TAIL_TOKENS = 16
"""Tokens in which an end tag is looked for: it may be as many tokens as it has characters."""
PADDING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}  # of the largest logit


class Sampling(NamedTuple):
    """How tokens are drawn. `seed`: of the run; each request has its own on top."""

    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42

    def __str__(self) -> str:
        if not self.do_sample:
            return "greedy"
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}, top_k {self.top_k}, seed {self.seed}"


class Request(NamedTuple):
    """Ids to continue by at most `limit` tokens, up to an end token or one of the texts `stops`. `key`: its own seed."""

    ids: list[int]
    limit: int
    key: str
    stops: tuple[str, ...] = ()


class Engine(Protocol):
    """`context`: tokens that the model can read. `ends`: ids that end a reply."""

    context: int
    ends: list[int]

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the new ids of each request, with the end token or the token that completes a stop text."""


def seed_of(sampling: Sampling, key: str) -> int:
    """Return the seed of a request: the same for the same key, whatever else is generated with it."""
    return int.from_bytes(hashlib.blake2b(f"{sampling.seed} {key}".encode(), digest_size=4).digest())


class TransformersEngine:
    """Generates with transformers, in left-padded batches that the caller chooses.

    Each request draws from its own generator: Gumbel noise is added to the logits and the maximum is taken, which is a
    sample of their softmax. So a request's tokens don't depend on its batch, apart from rounding in the padding.
    """

    def __init__(
        self, model: Model, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, bf16: bool = False
    ) -> None:
        """`bf16`: generate under bfloat16 autocast, as a recipe with bf16 trains."""
        self.model, self.tokenizer, self.sampling, self.bf16 = model.eval(), tokenizer, sampling, bf16
        self.ends = end_tokens(model, tokenizer)
        text_config = model.config.get_text_config()
        self.context = int(getattr(text_config, "max_position_embeddings", None) or 1 << 30)
        self.streamer: BaseStreamer | None = None

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        width = max(len(request.ids) for request in requests)
        stop = _StopEachRow(self.tokenizer, requests, width)
        hooks = {"logits_processor": self._processors(requests), "stopping_criteria": StoppingCriteriaList([stop])}
        output = self._continue(
            [request.ids for request in requests],
            hooks | {"streamer": self.streamer},
            max_new_tokens=max(request.limit for request in requests),
            repetition_penalty=self.sampling.repetition_penalty,
        )
        return [
            through_end(row[:length] if length else row, self.ends)
            for row, length in zip(output[:, width:].tolist(), stop.lengths.tolist(), strict=True)
        ]

    def _continue(self, rows: Sequence[Sequence[int]], hooks: dict[str, Any], **settings: Any) -> Any:
        """Continue rows of ids greedily. `hooks`: arguments of transformers' `generate`; `settings`: of its config."""
        config = generation_config(self.model, self.tokenizer, do_sample=False, **settings)
        with torch.no_grad(), torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            return continue_rows(self.model, rows, config, "per_device_eval_batch_size or max_new_tokens", **hooks)

    def padding_error(self, first: Sequence[int], second: Sequence[int]) -> float:
        """Return how much padding the shorter one changes its next logits, relative to the largest logit."""
        short, long = sorted((first, second), key=len)
        returned = {"output_logits": True, "return_dict_in_generate": True}
        alone, together = (
            self._continue(rows, {}, max_new_tokens=1, **returned).logits[0][0].float()
            for rows in ([short], [short, long])
        )
        return float((alone - together).abs().max() / alone.abs().max())

    @property
    def padding_tolerance(self) -> float:
        dtype = torch.bfloat16 if self.bf16 else next(self.model.parameters()).dtype
        return PADDING_TOLERANCE.get(dtype, 0.15)

    def _processors(self, requests: Sequence[Request]) -> LogitsProcessorList:
        sampling, processors = self.sampling, LogitsProcessorList()
        if not sampling.do_sample:
            return processors
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_GumbelNoise([seed_of(sampling, request.key) for request in requests], self.model.device))
        return processors


def _fits_in_float32(folder: Path) -> bool:
    """Return whether the weights fit in free memory as float32; if not, warn. An adapter's base is not counted."""
    config = read_json(folder / "config.json") or {}
    is_half = (config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16")
    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * (2 if is_half else 1)
    free = psutil.virtual_memory().available
    if not is_half or needed < free:
        return True
    say(
        f"{folder}: float32 needs {format_bytes(needed)}, but only {format_bytes(free)} of memory is free; loaded in half "
        "precision instead (slow on CPUs without bfloat16 instructions)"
    )
    return False


class _GumbelNoise(LogitsProcessor):
    """Adds noise from a generator of each row."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


class _StopEachRow(StoppingCriteria):
    """Ends a row at its limit, or once its last tokens complete one of its stop texts. `lengths`: 0 while it runs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], width: int) -> None:
        self.tokenizer, self.requests, self.width = tokenizer, requests, width
        self.lengths = torch.zeros(len(requests), dtype=torch.long)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        written = input_ids.shape[1] - self.width
        tails = input_ids[:, max(self.width, input_ids.shape[1] - TAIL_TOKENS) :].tolist()
        for at, (request, tail) in enumerate(zip(self.requests, tails, strict=True)):
            if not self.lengths[at] and (written >= request.limit or self._completes(request.stops, tail)):
                self.lengths[at] = written
        return (self.lengths > 0).to(input_ids.device)

    def _completes(self, stops: Sequence[str], tail: list[int]) -> bool:
        if not stops:
            return False
        text, before = decode(self.tokenizer, tail), decode(self.tokenizer, tail[:-1])
        return any(text.rfind(stop) + len(stop) > len(before) for stop in stops if stop in text)


def load_for_generation(path: str | Path, trust_remote_code: bool = False) -> Model:
    """Load a model folder, or an adapter folder with its base: on a GPU in the dtype of its file, else in float32.

    On a CPU with too little free memory for float32, the dtype of the file is used as well, with a warning.

    Raises:
        RecipeError: there is no model, or an adapter's base is missing.
    """
    device = str(PartialState().device) if torch.cuda.is_available() else "cpu"
    try:
        config = AutoConfig.from_pretrained(base_of(path), trust_remote_code=trust_remote_code)
        model = auto_class(config).from_pretrained(
            path,
            dtype="auto" if device != "cpu" or not _fits_in_float32(Path(path)) else torch.float32,
            device_map=device,
            trust_remote_code=trust_remote_code,
        )
    except (ImportError, OSError, ValueError) as error:
        fix = "Use the output_dir of a finished run, and run this in the folder where that run was started"
        raise RecipeError(f"{path}: can't be loaded ({in_one_line(error)}). {fix}") from None
    return cast(Model, model.eval())
