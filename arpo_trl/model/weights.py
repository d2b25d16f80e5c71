"""The linear layers of a model, and the bytes that their weights take when quantized."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of all linear layers except the head, including those of GPTQ, AWQ and AQLM."""
    head = model.get_output_embeddings()
    return [name for name, layer in model.named_modules() if _is_linear(layer) and layer is not head]


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or "Linear" in type(layer).__name__


def frozen_linear_weights(model: PreTrainedModel) -> list[Tensor]:
    """Return the weights that are quantized: those of frozen linear layers except the head."""
    layers = [layer.weight for layer in model.base_model.modules() if isinstance(layer, nn.Linear)]
    return [weight for weight in layers if not weight.requires_grad]


def saved_bytes(weights: list[Tensor], bits: float, codebooks: int = 0) -> int:
    """Return the bytes that quantization to `bits` per weight saves; `codebooks`: entries stored with each weight."""
    if not bits:
        return 0
    return sum(w.nbytes - int(w.numel() * bits / 8) - codebooks * w.element_size() for w in weights)
