"""The parts of a model: the weights that text reaches, and the linear layers."""

from collections.abc import Mapping
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

Model = PreTrainedModel | PeftModel


def without_adapter(model: Model) -> PreTrainedModel:
    """Return the model below PEFT's wrapper, if it has one. A LoRA adapter's layers stay in it."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def unreached_by_text(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules, and of single weights, that get no gradient from text.

    These are all parts of a multimodal model except its text part and its head, and the indexers of sparse attention
    (DeepSeek V3.2, GLM-5), which only choose the positions to attend to.
    """
    modules = dict(model.named_modules())
    unreached = [name for name, module in modules.items() if type(module).__name__.endswith("Indexer")]
    names = {id(module): name for name, module in modules.items()}
    text = names.get(id(model.get_decoder()), "")
    if not text or model.config.get_text_config() is model.config:
        return unreached
    used = {text, *(names.get(id(part)) for part in (model.get_input_embeddings(), model.get_output_embeddings()))}
    for name in [*modules, *dict(model.named_parameters())]:
        parent = name.rpartition(".")[0]
        is_next_to_text = name and f"{text}.".startswith(f"{parent}." if parent else "") and name not in used
        if is_next_to_text and not f"{text}.".startswith(f"{name}.") and not f"{name}.".startswith(f"{text}."):
            unreached.append(name)
    return unreached


def is_inside(name: str, modules: list[str]) -> bool:
    """Return whether a module or weight is one of the `modules`, or inside one."""
    return f"{name}.".startswith(tuple(f"{module}." for module in modules))


def is_text_part(model: PreTrainedModel, file_config: Mapping[str, Any]) -> bool:
    """Return whether the model is only the text part of the one that its config.json describes."""
    return "text_config" in file_config and model.config.model_type != file_config.get("model_type")


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of all linear layers except the head, including those of GPTQ, AWQ and AQLM."""
    head = model.get_output_embeddings()
    return [
        name
        for name, layer in model.named_modules()
        if layer is not head and (isinstance(layer, nn.Linear) or "Linear" in type(layer).__name__)
    ]
