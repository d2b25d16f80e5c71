"""Keys of a recipe: LLaMA-Factory's names with their types, defaults and help.

Each key has exactly one mapping. Keys of the groups below are read by our code; other fields of TRL's `SFTConfig` are
passed on in `recipe.trl`; llamafactory.toml lists aliases and keys that are ignored or not supported; read.py rejects
unknown keys. Defaults of LLaMA-Factory's keys are those of its release 0.9, except `finetuning_type: full`; those of
TRL's other fields are in keys_of_trl.py.
"""

import functools
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import JsonSchemaValue

from ..errors import RecipeError
from .keys_of_trl import OURS_TOO, SftKeys
from .methods import AdvancedKeys
from .preference import PreferenceKeys
from .types import (
    Attention,
    Count,
    Location,
    Locations,
    Names,
    Number,
    Numbers,
    RequiredLocation,
    Rows,
    Seed,
    Spans,
    Stage,
    TemplateName,
    Tools,
    Trackers,
    Whole,
    from_json,
    key,
)

# --------------------------------------------------------------------------------------------------------------------
# The keys, in the groups of LLaMA-Factory's recipes. One key per line.
# fmt: off


class ModelKeys(BaseModel):
    model_name_or_path: RequiredLocation = key(..., "Base model: a hub ID or a local folder")
    model_revision: str = key("main", "Branch, tag or commit of the model on the hub", "from_pretrained(revision)")
    trust_remote_code: bool = key(False, "Run code from the model's repository")
    cache_dir: Location | None = key(None, "Folder for downloaded models", "from_pretrained(cache_dir)")
    use_fast_tokenizer: bool = key(True, "Use the Rust tokenizer", "from_pretrained(use_fast)")
    adapter_name_or_path: Locations = key([], "Adapters to start from, separated by commas")
    flash_attn: Attention = key("auto", "Attention kernel; fa2 falls back to sdpa without flash-attn", "from_pretrained(attn_implementation)")
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = key(None, "Scaling of the position embeddings to cutoff_len", "config.rope_parameters")
    enable_liger_kernel: bool = key(False, "Use Liger's Triton kernels", "use_liger_kernel")


class MethodKeys(BaseModel):
    stage: Stage = key("sft", "sft: train on replies; dpo: train on preference pairs")
    do_train: bool = key(False, "Train the model")
    finetuning_type: Literal["full", "freeze", "lora", "oft"] = key("full", "Train all weights (full), some layers (freeze) or an adapter (lora, oft)")
    pure_bf16: bool = key(False, "Keep master weights in bfloat16: half the memory, but small updates are lost", "dtype")
    lora_rank: Count = key(8, "LoRA: rank", "LoraConfig(r)")
    lora_alpha: Count | None = key(None, "LoRA: scale; default: twice the rank", "LoraConfig")
    lora_dropout: Number = key(0.0, "LoRA: dropout before the adapter", "LoraConfig", ge=0, lt=1)
    lora_target: Names = key(["all"], "LoRA: modules to adapt; all means all linear layers except the head", "target_modules")
    additional_target: Names = key([], "LoRA: other modules to train fully and save with the adapter", "modules_to_save")
    use_rslora: bool = key(False, "rsLoRA: scale by alpha/sqrt(rank)", "LoraConfig")
    use_dora: bool = key(False, "DoRA: weight-decomposed LoRA", "LoraConfig")
    create_new_adapter: bool = key(False, "Merge adapter_name_or_path into the base model and train a new adapter")


class DatasetKeys(BaseModel):
    dataset: Names = key([], "Training datasets: names in dataset_info.json, data files, or owner/name on the hub")
    dataset_dir: Location = key("data", "Folder of dataset_info.json; its file names are relative to this folder")
    template: TemplateName | None = key(None, "LLaMA-Factory template name or .jinja file; default: the tokenizer's own")
    enable_thinking: bool | None = key(True, "Reasoning templates: train on the empty block of replies without reasoning (null: mask it; false: also remove the rows' reasoning)")
    preserve_thinking: bool = key(False, "Keep the reasoning of earlier replies with mask_history")
    default_system: str | None = key(None, "System prompt of rows that have none")
    cutoff_len: Count = key(2048, "Maximum row length in tokens; longer rows are truncated", "max_length with packing")
    truncation_mode: Literal["keep_start", "llamafactory"] = key("keep_start", "Truncate the end (keep_start), or prompts and replies in proportion as LLaMA-Factory does")
    max_dropped: Number = key(0.05, "Maximum fraction of dropped rows; beyond it the run stops", ge=0, le=1)
    max_samples: Rows | None = key(None, "Maximum number of rows per dataset")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = key("concat", "Concatenate datasets, or interleave until the first ends (under), the last ends (over), or all rows were used (once)")
    interleave_probs: Numbers | None = key(None, "Sampling probability of each interleaved dataset")
    streaming: bool = key(False, "Read rows on demand; requires max_steps")
    buffer_size: Count = key(16384, "Number of rows shuffled together when streaming")
    tokenized_path: Location | None = key(None, "Folder to save the encoded datasets to, or to load them from")
    overwrite_cache: bool = key(False, "Encode the datasets again even if they are cached")
    preprocessing_num_workers: Count | None = key(None, "Number of processes that pack rows; encoding needs one, whose tokenizer uses all cores", "dataset_num_proc")
    preprocessing_batch_size: Count = key(1000, "Number of rows encoded at a time", "Dataset.map(batch_size)")
    train_on_prompt: bool = key(False, "Train on complete rows, prompts included")
    mask_history: bool = key(False, "Train only on the last reply")
    mask_spans: Spans = key([], "Parts of a reply to mask: tag names (result: <result>..</result>) or regular expressions (. matches line ends)")
    packing: bool = key(False, "Pack conversations into rows of cutoff_len tokens; they do not attend to each other")
    neat_packing: bool = key(False, "Alias of packing", "packing")
    padding_free: bool = key(False, "Concatenate rows instead of padding them; they do not attend to each other")


class OutputKeys(BaseModel):
    output_dir: RequiredLocation = key(..., "Folder of the run: checkpoints, logs and the final model")
    overwrite_output_dir: bool = key(False, "Start over; otherwise resume, or stop if the run is finished")
    resume_from_checkpoint: bool | Location | None = key(None, "true for the latest complete checkpoint, or a path")
    allow_changed_recipe: bool = key(False, "Resume even if keys that change the result differ")
    logging_steps: Number = key(500, "Number of steps between log lines; below 1, a fraction of the run", gt=0)
    save_strategy: Literal["no", "steps", "epoch", "best"] = key("steps", "When to save checkpoints")
    save_steps: Number = key(500, "Number of steps between checkpoints; below 1, a fraction of the run", gt=0)
    plot_loss: bool = key(False, "Write training_loss.png")
    report_to: Trackers = key([], "Trackers (wandb, tensorboard, trackio, ..., all), or none")
    use_swanlab: bool = key(False, "Add swanlab to report_to", "report_to")
    swanlab_project: str = key("llamafactory", "SwanLab project", "SWANLAB_PROJECT")
    swanlab_workspace: str | None = key(None, "SwanLab workspace", "SWANLAB_WORKSPACE")
    swanlab_mode: Literal["cloud", "local"] = key("cloud", "SwanLab mode; local does not upload", "SWANLAB_MODE")
    swanlab_logdir: Location | None = key(None, "SwanLab's files; default: output_dir/swanlog", "SWANLAB_LOG_DIR")
    run_name: str | None = key(None, "Name of the run in trackers")
    project: str | None = key(None, "Project in W&B and Trackio; default: WANDB_PROJECT or huggingface")
    on_save_error: Literal["stop", "continue"] = key("stop", "What to do if a checkpoint can't be saved")


class TrainKeys(BaseModel):
    per_device_train_batch_size: Count = key(8, "Number of rows in each device's batch")
    gradient_accumulation_steps: Count = key(1, "Number of batches per update")
    global_batch_size: Count | None = key(None, "Number of rows per update; sets gradient_accumulation_steps")
    num_train_epochs: Number = key(3.0, "Number of epochs; max_steps overrides it", gt=0, le=1_000_000)
    learning_rate: Number = key(5e-5, "Peak learning rate", ge=0)
    warmup_ratio: Number = key(0.0, "Fraction of the run used for warmup", "warmup_steps", ge=0, lt=1)
    warmup_steps: Number = key(0, "Number of warmup steps (below 1, a fraction); overrides warmup_ratio", ge=0)
    bf16: bool = key(False, "Compute in bfloat16; master weights stay in float32")
    force_bf16: bool = key(False, "With bf16: keep bfloat16 on a CPU without its instructions, where float32 is faster")
    fp16: bool = key(False, "Compute in float16 with loss scaling")
    gradient_checkpointing: bool | Literal["auto"] = key(True, "Recompute activations; auto: only if the longest batch does not fit on the GPU", "activation_checkpointing")
    disable_gradient_checkpointing: bool = key(False, "Turn gradient checkpointing off", "activation_checkpointing")
    use_reentrant_gc: bool | None = key(None, "Use torch's reentrant checkpointing", "activation_checkpointing_kwargs")
    disable_shuffling: bool = key(False, "Keep the rows in order", "train_sampling_strategy: sequential")
    group_by_length: bool = key(False, "Batch rows of similar length", "train_sampling_strategy: group_by_length")
    use_dft_loss: bool = key(False, "DFT loss (dynamic fine-tuning)", "loss_type: dft")
    deepspeed: Annotated[Location | dict[str, object] | None, BeforeValidator(from_json)] = key(None, "DeepSpeed JSON config; or use accelerate_configs/zero3.yaml")
    seed: Seed = key(42, "Random seed")
    preflight: bool | Literal["auto"] = key("auto", "Run the longest batch first, to catch OOM; auto skips it on a CPU if it needs less than 4 GB")


class EvalKeys(BaseModel):
    do_eval: bool = key(False, "Evaluate after training")
    eval_dataset: Names = key([], "Evaluation datasets, as named in dataset_info.json")
    eval_on_each_dataset: bool = key(False, "Evaluate each dataset of eval_dataset separately")
    val_size: Number = key(0.0, "Training rows held out for evaluation: a fraction below 1, or a number of rows", ge=0)
    per_device_eval_batch_size: Count | None = key(None, "Number of rows in each device's batch; default: as in training")
    eval_strategy: Literal["no", "steps", "epoch"] = key("no", "When to evaluate during training")
    load_best_model_at_end: bool = key(False, "Load the best checkpoint at the end")
    early_stopping_steps: Count | None = key(None, "Number of evaluations without improvement before stopping")


class PredictKeys(BaseModel):
    do_predict: bool = key(False, "Generate and score replies to the rows of eval_dataset or val_size at the end")
    predict_with_generate: bool = key(False, "Alias of do_predict", "do_predict")
    predict_during_eval: Count | None = key(None, "Number of held-out rows to generate replies to at each evaluation")
    max_new_tokens: Count = key(1024, "Maximum number of generated tokens", "generate(max_new_tokens)")
    do_sample: bool | None = key(None, "Sample tokens; default: if temperature, top_p or top_k is set", "generate(do_sample)")
    temperature: Number = key(0.95, "Sampling temperature", "generate(temperature)", gt=0)
    top_p: Number = key(0.7, "Sampling: cumulative probability of the candidate tokens", "generate(top_p)", gt=0, le=1)
    top_k: Whole = key(50, "Sampling: number of candidate tokens; 0 means all", "generate(top_k)", ge=0)
    num_beams: Count = key(1, "Number of beams; 1 means no beam search", "generate(num_beams)")
    repetition_penalty: Number = key(1.0, "Penalty for repetition; 1 means none", "generate(repetition_penalty)", gt=0)
    length_penalty: Number = key(1.0, "Beam search: above 0 favors long replies", "generate(length_penalty)")
    skip_special_tokens: bool = key(True, "Omit special tokens from generated_predictions.jsonl")


class RolloutKeys(BaseModel):
    rollout_on: Literal["eval", "train"] = key("eval", "Rows that give the questions. eval measures; train is for selecting rows and pairs")
    num_generations: Count = key(8, "Trajectories per question; 1 is greedy unless do_sample is set")
    max_tool_calls: Whole = key(10, "Tool calls per trajectory; one more call ends it", ge=0)
    tools: Tools = key({"python": "python"}, "Tools by name: python, or a command that reads the query on stdin and prints the result")
    tool_timeout: Number = key(20.0, "Time limit of a tool call, in seconds", gt=0)
    tool_memory: Count = key(1024, "Memory limit of a python call, in MB")
    max_tool_output: Count = key(10_000, "Longest result of a tool call, in characters; the rest is cut")
    server_url: str | None = key(None, "Generate on this OpenAI-compatible server (http://host:port/v1); if omitted, with transformers")
    server_requests: Count = key(64, "Requests in flight on server_url")
    judge: str | None = key(None, "Command that scores a trajectory: JSON with question, answer and trajectory on stdin, a number on stdout; 0.5 or more is right. If omitted, the final answer is compared with the reference")
    max_per_question: Count = key(1, "Selected trajectories per question")
    max_pairs_per_question: Count = key(1, "Preference pairs per question")


COMMAND_LINE = Path("command line")  # the path of a recipe without a file
GROUPS = (
    ModelKeys, MethodKeys, PreferenceKeys, DatasetKeys, OutputKeys, TrainKeys, EvalKeys, PredictKeys, RolloutKeys, AdvancedKeys
)


class Recipe(
    SftKeys, AdvancedKeys, RolloutKeys, PredictKeys, EvalKeys, TrainKeys, OutputKeys, DatasetKeys, PreferenceKeys, MethodKeys, ModelKeys
):
    # fmt: on
    """Resolved configuration of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, protected_namespaces=())

    path: Path = Field(default=Path(), exclude=True)  # of the recipe's file, or `COMMAND_LINE`
    lines: dict[str, int] = Field(default={}, exclude=True)  # the line of each key in the file
    notices: list[str] = Field(default=[], exclude=True)  # to print once

    @property
    def trl(self) -> dict[str, Any]:
        """Fields of SFTConfig that the recipe sets and that have no key of ours."""
        return {name: getattr(self, name) for name in SftKeys.model_fields if name in self.model_fields_set}

    @property
    def trains_adapter(self) -> bool:
        return self.finetuning_type in ("lora", "oft")

    @property
    def adapters_to_merge(self) -> list[str]:
        """Return the adapters to merge into the base before training: all except the last, which is trained further."""
        return self.adapter_name_or_path if self.create_new_adapter else self.adapter_name_or_path[:-1]

    def with_notices(self, *lines: str) -> Self:
        """Return the recipe with more lines to print, without duplicates."""
        return self.model_copy(update={"notices": list(dict.fromkeys([*self.notices, *lines]))})

    def error(self, key: str, problem: str) -> RecipeError:
        """Return an error with the key's location: `recipes/x.yaml:12: lora_target: no module matches`."""
        line = f":{self.lines[key]}" if key in self.lines else ""
        location = "" if self.path == Path() else f"{self.path}{line}: "
        problem = problem.replace("\n", "\\n")  # of a value that was written in several lines
        return RecipeError(f"{location}{key}: {problem}")

    def resolved(self) -> dict[str, Any]:
        """Return all resolved keys as plain YAML values, which `read_recipe` reads back to an equal recipe."""
        values = self.model_dump(mode="json", exclude=SftKeys.model_fields.keys() - self.model_fields_set)
        short = {key: int(value) for key, value in values.items() if isinstance(value, float) and value.is_integer()}
        return values | short


# --------------------------------------------------------------------------------------------------------------------
# One table of all keys, for messages, --help, KEYS.md and schema.json


class Key(NamedTuple):
    group: str
    schema: JsonSchemaValue
    default: object
    mapping: str
    help: str

    @property
    def may_be_null(self) -> bool:
        """Return whether null means the default, which is none, false or an empty list."""
        return self.default in (None, []) or self.default is False


@functools.cache
def keys() -> dict[str, Key]:
    """Return every key of a recipe, in the order of the groups."""
    table = {}
    schemas = Recipe.model_json_schema()["properties"]
    for group in (*GROUPS, SftKeys):
        for name, known in group.model_fields.items():
            same = "same" if group is SftKeys or name in OURS_TOO else "ours"
            mapping = f"becomes {schemas[name]['to']}" if schemas[name].get("to") else same
            default = ... if known.is_required() else known.default
            title = "trl" if group is SftKeys else group.__name__.removesuffix("Keys").lower()
            table[name] = Key(title, schemas[name], default, mapping, known.description or "")
    return table


_KINDS = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a string"}
_KINDS |= {"array": "a list", "object": "a mapping"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def in_words(schema: JsonSchemaValue) -> str:
    """Return a JSON Schema as text, such as `an integer > 0` or `one of steps, epoch`."""
    if "words" in schema:
        return str(schema["words"])
    if "anyOf" in schema:
        parts = dict.fromkeys(in_words(part) for part in schema["anyOf"] if part != {"type": "null"})
        *first, last = " or ".join(parts).split(" or ")  # "true or false" is two
        return f"{', '.join(first)} or {last}" if first else last
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"]).lower()
    bounds = [f"{sign} {schema[limit]:.15g}" for limit, sign in _BOUNDS.items() if limit in schema]
    return f"{_KINDS.get(schema.get('type', ''), 'anything')} {' and '.join(bounds)}".rstrip()
