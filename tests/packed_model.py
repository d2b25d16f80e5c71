"""A model folder quantized as GPTQ's, AWQ's and AQLM's files are, by the nearest code and without calibration.

Written from the formats alone: none of the packages is imported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

GROUP = 32  # weights that share a scale
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of the eight codes in an int32
CODEBOOK_BITS = 10  # AQLM's largest have 16


def pack(model: Path, packed: Path, method: str, **changes: Any) -> Path:
    """`model` with its blocks' linear layers quantized, as the folder `packed`; and the same unpacked, `packed`_plain."""
    plain = packed.with_name(f"{packed.name}_plain")
    for folder in (packed, plain):
        shutil.copytree(model, folder, dirs_exist_ok=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    state = loaded.state_dict()
    layers = [
        f"model.layers.{name}" for name, one in loaded.model.layers.named_modules() if hasattr(one, "in_features")
    ]
    tensors = {name: tensor.half() for name, tensor in state.items()}
    tied = "lm_head.weight" if loaded.config.tie_word_embeddings else None
    for layer in layers:
        of_layer, state[f"{layer}.weight"] = (_aqlm if method == "aqlm" else _int4)(state[f"{layer}.weight"], method)
        del tensors[f"{layer}.weight"]
        tensors |= {f"{layer}.{name}": tensor.contiguous() for name, tensor in of_layer.items()}
    for folder, weights in ((packed, tensors), (plain, state)):
        kept = {name: tensor for name, tensor in weights.items() if name != tied}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    settings = {
        "gptq": {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
        "awq": {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        "aqlm": {
            "in_group_size": 8,
            "out_group_size": 1,
            "num_codebooks": 1,
            "nbits_per_codebook": CODEBOOK_BITS,
            "linear_weights_not_to_quantize": ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"],
        },
    }
    config |= {"dtype": "float16", "quantization_config": {"quant_method": method, **settings[method], **changes}}
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return packed


def _int4(weight: Tensor, method: str) -> tuple[dict[str, Tensor], Tensor]:
    """Codes of four bits around 8, eight in an int32: GPTQ's along the inputs, AWQ's along the outputs."""
    outputs, inputs = weight.shape
    groups = weight.view(outputs, inputs // GROUP, GROUP)
    scales = (groups.abs().amax(-1) / 7).half()
    codes = (groups / scales[..., None].float()).round().clamp(-8, 7) + 8
    unpacked = ((codes - 8) * scales[..., None].float()).view(outputs, inputs)
    codes = codes.view(outputs, inputs).T.long()
    zero = 8 if method == "awq" else 7  # GPTQ's first format has one less
    zeros = torch.full((inputs // GROUP, outputs // 8, 8), zero)
    if method == "awq":
        qweight = _to_int32(codes.view(inputs, outputs // 8, 8)[..., AWQ_ORDER])
        return {"qweight": qweight, "qzeros": _to_int32(zeros), "scales": scales.T}, unpacked
    qweight = _to_int32(codes.view(inputs // 8, 8, outputs).transpose(1, 2))
    g_idx = torch.arange(inputs, dtype=torch.int32) // GROUP
    return {"qweight": qweight, "qzeros": _to_int32(zeros), "scales": scales.T, "g_idx": g_idx}, unpacked


def _to_int32(codes: Tensor) -> Tensor:
    """Eight codes of the last dimension as one number, the first in the lowest bits."""
    number = (codes << (4 * torch.arange(8))).sum(-1)
    return torch.where(number >= 2**31, number - 2**32, number).to(torch.int32)


def _aqlm(weight: Tensor, method: str) -> tuple[dict[str, Tensor], Tensor]:
    """The nearest of 1,024 of the layer's own groups of eight weights, times a scale for each output."""
    outputs, inputs = weight.shape
    scales = weight.norm(dim=1, keepdim=True).half()
    groups = (weight / scales.float()).view(-1, 8)
    codebook = groups[
        torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))[: 2**CODEBOOK_BITS]
    ].half()
    nearest = torch.cdist(groups, codebook.float()).argmin(1)
    unpacked = codebook.float()[nearest].view(outputs, inputs) * scales.float()
    padded = torch.zeros(2**CODEBOOK_BITS, 8, dtype=torch.float16)
    padded[: len(codebook)] = codebook
    signed = torch.where(nearest >= 2 ** (CODEBOOK_BITS - 1), nearest - 2**CODEBOOK_BITS, nearest)
    return {
        "codes": signed.view(outputs, inputs // 8, 1).to(torch.int16),
        "codebooks": padded.view(1, -1, 1, 8),
        "scales": scales.view(outputs, 1, 1, 1),
    }, unpacked
