"""The folder's own replies and scores by transformers, with its weights rounded to the dtype of a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel

from ..errors import RecipeError, in_one_line
from ..model.base import auto_class, base_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Scores(NamedTuple):
    """Of each token of a reply, in nats: its log-probability, and the likeliest token with its own."""

    log_probs: list[float]
    best: list[int]
    best_log_probs: list[float]
    second_log_probs: list[float]


@dataclass
class Reference:
    """A model in float32. `dtype`: that of its file; an adapter's sum with its base is taken in float32."""

    name: str
    model: PreTrainedModel
    dtype: str
    rounded_to: str = "float32"
    _exact: dict[str, Tensor] | None = None

    def round_to(self, dtype: str) -> None:
        """Round the weights to `dtype`, and compute in float32 all the same."""
        if self._exact is None and dtype != self.dtype:
            self._exact = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        if self._exact is not None and dtype != self.rounded_to:
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    weight.copy_(self._exact[name].to(DTYPES[dtype]).float())
        self.rounded_to = dtype

    def overflows(self, dtype: str) -> int:
        """Count weights that `dtype` cannot hold."""
        most = torch.finfo(DTYPES[dtype]).max
        exact = self._exact or dict(self.model.named_parameters())
        return sum(int((weight.abs() > most).sum()) for weight in exact.values())

    def score(self, context: list[int], reply: list[int], compute_in: str = "float32") -> Scores:
        """Score a reply token by token after its context, with matrix products in `compute_in`."""
        device = self.model.device
        ids = torch.tensor([context + reply], device=device)
        rough = torch.autocast(device.type, DTYPES[compute_in], enabled=compute_in != "float32")
        with torch.inference_mode(), rough:
            logits = self.model(input_ids=ids, logits_to_keep=len(reply) + 1).logits[0, :-1].float()
        predicted = logits.log_softmax(-1)
        top = predicted.topk(2)
        chosen = predicted.gather(1, torch.tensor(reply, device=predicted.device)[:, None])[:, 0]
        best, second = top.values.T.tolist()
        return Scores(chosen.tolist(), top.indices[:, 0].tolist(), best, second)

    def reply(self, context: list[int], limit: int, ends: list[int]) -> list[int]:
        """Generate greedily until one of `ends`, which is returned too."""
        ids = torch.tensor([context], device=self.model.device)
        config = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
        generate = cast(GenerationMixin, self.model).generate
        written = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        reply: list[int] = cast(Tensor, written)[0, len(context) :].tolist()
        return reply


def load_reference(folder: Path | str) -> Reference:
    """Load a model folder, or the sum of an adapter and its base.

    Raises:
        RecipeError: its weights, or those of its base, cannot be read.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_adapter = (Path(folder) / "adapter_config.json").is_file()
    try:
        base = base_of(folder)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = auto_class(config).from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
        if is_adapter:
            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{folder}: the model could not be loaded ({in_one_line(error)}). Use the output_dir of a finished run, from "
            "the folder where it was started."
        ) from None
    own = str(config.dtype).removeprefix("torch.")
    dtype = own if own in DTYPES and not is_adapter else "float32"
    return Reference(str(folder), cast(PreTrainedModel, model.eval().to(device)), dtype)
