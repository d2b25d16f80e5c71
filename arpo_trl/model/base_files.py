"""The base model's files: the final model keeps the dtype of each tensor, config.json and generation_config.json."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import get_local_safetensors_metadata
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file

from ..run_folder import write_json
from .weights import is_text_part

Values = dict[str, Any]
Headers = dict[str, tuple[torch.dtype, int]]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
CHANGED_CONFIG_KEYS = {
    **dict.fromkeys(TOKENS, "the run's tokens: a reply ends with the template's end-of-turn token"),
    "rope_parameters": "rope_scaling of the recipe",
    "max_position_embeddings": "rope_scaling of the recipe",
    "quantization_config": "removed, because the saved weights are dequantized",
    "auto_map": "names the code that is saved with the model",
}
"""The keys of config.json that may differ from the base's, and why. Of generation_config.json: TOKENS."""
TEXT_PART_KEYS = {"architectures": "the class of the text part", "model_type": "of the text part"}
"""The other keys of config.json that differ if only the text part of a larger model was trained."""


class BaseFiles(NamedTuple):
    """What the final model keeps of the base.

    Attributes:
        dtype: Of most weights in the base's files.
        others: The dtypes of the other tensors, by their names in the model.
        in_float32: The names of those which transformers computes in float32.
        config: config.json, of the text part if only that is trained.
        generation_config: generation_config.json; empty if the base has none.
        only_text: Whether the base is a larger model, and only its text part is trained.
    """

    dtype: torch.dtype
    others: dict[str, torch.dtype]
    in_float32: frozenset[str]
    config: Values
    generation_config: Values
    only_text: bool

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in the base's files. `name`: in the model."""
        return self.others.get(name, self.dtype)

    def cast(self, model: nn.Module, computes: bool = False) -> None:
        """Cast each tensor to the dtype of the base's files, or of a model that computes, as transformers loads it.

        Files may have float32 norms; between bfloat16 layers these would fail.
        """
        saved = model.state_dict().keys()
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
        for name, tensor in [*model.named_parameters(), *buffers]:
            if tensor.is_floating_point():
                keeps = not computes or name in self.in_float32
                tensor.data = tensor.data.to(self.dtype_of(name) if keeps else self.dtype)

    def restore_configs(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Rewrite a saved model's configs: those of the base, with the changed keys. `dtype`: if another was requested."""
        path = folder / "config.json"
        if self.config:
            saved = json.loads(path.read_text(encoding="utf-8"))
            of_text_part = TEXT_PART_KEYS if self.only_text else ()
            values = _with_changes(self.config, saved, *CHANGED_CONFIG_KEYS, *of_text_part)
            if "quantization_config" not in saved:
                values.pop("quantization_config", None)
            if "rope_parameters" in values and "rope_parameters" not in self.config:
                values.pop("rope_scaling", None)  # the older form, now in rope_parameters
            if dtype is not None:
                values["torch_dtype" if "torch_dtype" in values else "dtype"] = str(dtype).removeprefix("torch.")
            write_json(path, values)
        path = folder / "generation_config.json"
        if self.generation_config and path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, _with_changes(self.generation_config, saved, *TOKENS))


def read_base_files(
    name: str | Path, model: PreTrainedModel, revision: str = "main", cache_dir: str | None = None
) -> BaseFiles:
    """Return what the final model keeps of the base. `model`: loaded from `name`."""
    hub: Values = {"revision": revision, "cache_dir": cache_dir}
    config = _read(_find(name, "config.json", hub))  # not by transformers, which decodes {"__float__": "Infinity"}
    only_text = is_text_part(model, config)
    if only_text:
        dtypes = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
        config = dtypes | config["text_config"]
    in_file, counts = _read_headers(name, hub), Counter[torch.dtype]()
    for kind, count in in_file.values():
        counts[kind] += count
    of_config: torch.dtype = getattr(model.config, "dtype", None) or torch.float32
    dtype = max(counts, key=lambda kind: counts[kind], default=of_config)
    others = {} if counts.keys() <= {dtype} else _others(model, in_file, dtype)
    strict = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    in_float32 = frozenset(
        tensor
        for tensor in others
        if tensor.rpartition(".")[2] not in ("weight", "bias") or any(part in tensor for part in strict)
    )
    generation = _read(_find(name, "generation_config.json", hub))
    return BaseFiles(dtype, others, in_float32, config, generation, only_text)


def _with_changes(base: Values, saved: Values, *keys: str) -> Values:
    changed = {key: saved[key] for key in keys if key in saved and saved[key] != base.get(key)}
    if saved.get("max_position_embeddings") == base.get("max_position_embeddings"):  # which the recipe scales, too
        changed.pop("rope_parameters", None)
    return base | changed


def _read(path: Path | None) -> Values:
    values: Values = json.loads(path.read_text(encoding="utf-8")) if path else {}
    return values


def _find(name: str | Path, file: str, hub: Values) -> Path | None:
    missing_is_none: Values = dict.fromkeys(
        ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
    )
    path: str | None = cached_file(str(name), file, **hub, **missing_is_none)
    return Path(path) if path else None


def _read_headers(name: str | Path, hub: Values) -> Headers:
    """Return the dtype and the number of parameters of each tensor in the base's safetensors files."""
    file = _find(name, "model.safetensors", hub) or _find(name, "model.safetensors.index.json", hub)
    parts = get_local_safetensors_metadata(file.parent).files_metadata.values() if file else ()
    tensors = [pair for part in parts for pair in part.tensors.items()]
    return {name: (DTYPES[about.dtype], about.parameter_count) for name, about in tensors if about.dtype in DTYPES}


def _others(model: PreTrainedModel, in_file: Headers, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the tensors of the model whose dtype in the file is another one. The file may name and divide them otherwise."""
    others = {}
    for name, tensor in model.state_dict().items():
        saved = [name]
        if name not in in_file:
            try:
                saved = list(revert_weight_conversion(model, {name: torch.empty_like(tensor, device="meta")}))
            except (RuntimeError, ValueError, KeyError, IndexError):  # a weight that is saved with others
                continue
        kinds = {in_file[key][0] for key in saved if key in in_file}
        if len(kinds) == 1 and kinds != {dtype}:
            others[name] = kinds.pop()
    return others
