"""The places in which TRL's `SFTTrainer` is changed, each with its reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..errors import RunFailed
from ..machine import checkpoint_bytes
from .checkpoints import save_checkpoint
from .loss import mask_repeated_rows, score_labelled_positions_only, token_means
from .order import Endless, EpochOrder
from .stop import Stopped


@dataclass
class Window:
    """What is summed up between two lines of the log, over all processes, and counted over the whole run.

    Attributes:
        loss: The sum of the losses of the updates since the last line.
        last_logged: The step of the last line.
        metrics: A value for each micro-batch since the last line.
        seen_tokens: All tokens of the run so far, padding left out.
        trained_tokens: Those of them that carry loss.
    """

    loss: float = 0.0
    last_logged: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seen_tokens: int = 0
    trained_tokens: int = 0


class _Line(Trainer):
    """Stands between `SFTTrainer` and `Trainer`, to give a line of the log its figures after TRL has given its own.

    Trainer starts its loss average, and TRL its metrics and its token count, at zero on resume; here they go on.
    """

    window: Window
    more_figures: Callable[[], dict[str, float]] | None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            window = self.window
            logs["loss"] = window.loss / max(self.state.global_step - window.last_logged, 1)
            logs |= {name: sum(values) / len(values) for name, values in window.metrics.items()}
            logs |= {"num_tokens": window.seen_tokens} | (self.more_figures() if self.more_figures else {})
            window.loss, window.last_logged, window.metrics = 0.0, self.state.global_step, {}
        super().log(logs, start_time)


class ArpoTrainer(SFTTrainer, _Line):
    """`SFTTrainer` whose checkpoints are whole or marked, whose runs resume exactly, and which stops at a NaN.

    Its evaluation means over tokens, and keeps no logits. transformers means over batches: a batch of two short replies
    weighs as much as one of two long ones, and the same model has another loss at another batch size. Here `eval_loss`
    is the mean of -log p over all labelled tokens of a dataset, whatever the training loss adds to that (DFT, label
    smoothing, the routers' loss), and `eval_perplexity` is its exponential; `eval_entropy` and
    `eval_mean_token_accuracy` are over the same tokens. Several datasets have a loss each, as `eval_<name>_loss`, and
    `eval_loss` is that of all of them together.

    Args:
        rows: The rows behind the training batches, with columns `input_ids` and `source` ("file:line"), to name the
            rows of a batch that fails. With packing these are the rows before packing.
        on_save_error: "stop" ends the run when a checkpoint cannot be written, "continue" goes on without it.
        **kwargs: As `trl.SFTTrainer`.
    """

    def __init__(
        self, *, args: SFTConfig, rows: Dataset | None = None, on_save_error: str = "stop", **kwargs: Any
    ) -> None:
        args = copy.copy(args)
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None  # only whole ones replace others
        # Trainer would replace a NaN loss by the running average and log 0: the step below raises instead.
        args.logging_nan_inf_filter = False
        self.window, self.more_figures = Window(), None
        text_config = kwargs["model"].config.get_text_config()
        coefficient = getattr(text_config, "router_aux_loss_coef", None)
        super().__init__(args=args, **kwargs)
        if coefficient is not None and not self.aux_loss_enabled:
            text_config.router_aux_loss_coef = coefficient  # TRL writes 0 where the recipe asks for no such loss
        self.rows = rows
        self.on_save_error = on_save_error
        self.batches: list[dict[str, Tensor]] = []  # of the update in progress
        self._sums: list[Tensor] = []  # and what is known of each: see _score
        self._last_batch = ""
        self._eval_sums = torch.zeros(4, dtype=torch.float64)
        self.checkpoint_bytes = checkpoint_bytes(self.model, self.args.save_only_model)  # until one is measured
        self.pending_evaluation = self.has_stepped = False
        self.add_callback(_LogState(self))
        model = self.accelerator.unwrap_model(self.model)
        model.register_forward_hook(torch.compiler.disable(self._score))
        if isinstance(self.train_dataset, IterableDataset):
            self.train_dataset = Endless(self.train_dataset)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # Accelerate 1.15 rounds what leaves the model, each token's log-probability, to bfloat16 (7.68 to 7.6875),
            # and sums gradients in it. https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/dataclasses.py
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)
        if self.accelerator.device.type not in ("cuda", "xpu"):
            score_labelled_positions_only(model.get_base_model() if hasattr(model, "get_base_model") else model)

    # --- a step ---

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; a device without memory ends the run with what to change, a signal with a checkpoint.

        Before its first step a resumed run takes the evaluation that a signal had stopped.
        """
        try:
            return super().train(*args, **kwargs)
        except Stopped:
            if self.pending_evaluation and self.state.global_step:
                self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise RunFailed(self._out_of_memory()) from error
            raise

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        if sampler is None or isinstance(sampler, BatchRebalanceSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochOrder(sampler, seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """No batch once the run is to stop: Trainer asks for the next one before it looks, at the start of a resume."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Labelled tokens of an update, without the rows that accelerate repeats to fill up an epoch's last batches."""
        args: Any = self.args
        ends = args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader and batch_samples
        ends = ends and "labels" in batch_samples[-1]
        if ends and isinstance(self.train_dataset, Dataset) and not args.dataloader_drop_last:
            # Not the state's `remainder`: accelerate 1.15 does not know it where a resumed run skips batches.
            remainder = len(self.train_dataset) % (args.per_device_train_batch_size * args.world_size)
            earlier = args.process_index * args.per_device_train_batch_size
            if remainder:
                mask_repeated_rows(batch_samples[-1], remainder - earlier, args.packing)
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; a loss that is not finite ends the run by name."""
        self.batches.append(inputs)
        self._last_batch = f"training batch of {_shape(inputs)} tokens"
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if not torch.isfinite(loss):
            raise RunFailed(self._not_finite("loss", float(loss)))
        if "attention_mask" in inputs:
            seen = inputs["attention_mask"]
            if "labels" in inputs:  # under Ulysses they are shift_labels
                seen = seen[(inputs["labels"] != -100).any(-1)]  # repeated rows have none
            seen = seen.sum()
        else:  # laid end to end
            seen = torch.tensor(inputs["input_ids"].numel())
        self._sums[-1] = torch.stack([loss.float(), seen.to(loss), *self._sums[-1]])
        return loss

    def _score(self, model: nn.Module, args: Any, output: Any) -> None:
        """Note entropy, first guesses that are right, and labelled tokens of a training batch: sums over its tokens.

        A hook of the model's forward pass, as TRL's loss hands on its sum alone. Label smoothing asks a second pass for
        these, activation checkpointing takes none of the whole model: the last pass counts.
        """
        if model.training and hasattr(output, "label_mask"):
            parts = [output.entropy, output.is_top1, output.label_mask]
            sums = [part.detach().float().sum() for part in parts]
            if self.aux_loss_enabled:
                sums.append(output.aux_loss.detach().float())
            del self._sums[len(self.batches) - 1 :]
            self._sums.append(torch.stack(sums))

    def end_update(self) -> None:
        """Add what the batches of an update were to the window, before the optimizer's step; a gradient that is not
        finite ends the run by name."""
        norm = self._gradient_norm()
        sums = torch.stack(self._sums)  # shape (batches, 5 or 6)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(torch.cat([sums, norm.expand(len(sums), 1)], dim=1))
            sums, norm = sums[:, :-1], sums[0, -1]
        # Under float16 the scaler meets infinite gradients by design: it skips the step and lowers its scale.
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise RunFailed(self._not_finite("gradient", float(norm)))
        window = self.window
        for loss, seen, entropy, top1, labelled, *aux in sums.double().tolist():
            window.loss += loss / self.args.world_size
            window.seen_tokens += int(seen)
            window.trained_tokens += int(labelled)
            values = {"entropy": entropy / max(labelled, 1), "mean_token_accuracy": top1 / max(labelled, 1)}
            if aux:
                values["aux_loss"] = aux[0] / self.args.world_size
            for name, value in values.items():
                window.metrics.setdefault(name, []).append(value)
        self.has_stepped = True
        self.forget_batches()

    def forget_batches(self) -> None:
        """Drop the batches of the update in progress."""
        self.batches.clear()
        self._sums.clear()

    def _gradient_norm(self) -> Tensor:
        """Of this process's part of the gradients; only whether it is finite is asked."""
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            return torch.as_tensor(float(engine.get_global_grad_norm() or 0.0), device=self.args.device)
        model: Any = self.model
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(grads)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of FSDP's shards
        return whole

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._last_batch = f"evaluation batch of {_shape(inputs)} tokens"
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _not_finite(self, what: str, value: float) -> str:
        model: Any = self.model
        weight = next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)
        cause = (
            f"The model itself is broken: its weight {weight} is not finite"
            if weight
            else "Lower learning_rate, use bf16 instead of fp16, or look at these rows"
        )
        return (
            f"step {self.state.global_step + 1}: the {what} is {value}; nothing of this step was saved. "
            f"Rows in its batch: {', '.join(self._sources_in_window()) or 'unknown'}. {cause}"
        )

    def _out_of_memory(self) -> str:
        args, ways = self.args, []
        if self._last_batch.startswith("evaluation"):
            ways += ["per_device_eval_batch_size (same run)"]
        else:
            if args.per_device_train_batch_size > 1:
                ways += [
                    "per_device_train_batch_size (raise gradient_accumulation_steps, or keep global_batch_size: same run)"
                ]
            if not args.activation_checkpointing:
                ways += ["gradient_checkpointing: true (slower, same run)"]
        ways += ["cutoff_len (rows are cut)"]
        ways += [] if hasattr(self.model, "peft_config") else ["finetuning_type: lora"]
        return (
            f"step {self.state.global_step + 1}: out of memory on {self.accelerator.device} with a "
            f"{self._last_batch or 'model of this size'}. In order of what it costs, change: {'; '.join(ways)}"
        )

    def _sources_in_window(self) -> list[str]:
        """`file:line` of each row in the batches of this step, found by its tokens: columns do not reach the model."""
        if self.rows is None or "source" not in self.rows.column_names:
            return []
        wanted = {tuple(row) for batch in self.batches for row in _split_rows(batch)}
        rows = self.rows.select_columns(["input_ids", "source"])
        return [row["source"] for row in rows if tuple(row["input_ids"]) in wanted]

    # --- an evaluation ---

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate`. The steps after it draw the random numbers that they would have drawn without it."""
        logged = len(self.state.log_history)
        self.pending_evaluation = True
        try:
            with torch.random.fork_rng(devices=[]):
                metrics = self._evaluate_all(eval_dataset, ignore_keys, metric_key_prefix)
        except Stopped:
            del self.state.log_history[logged:]
            raise
        self.pending_evaluation = False
        return metrics

    def evaluate_pending(self) -> None:
        """Take the evaluation that a signal had stopped, with all that Trainer does after one."""
        if self.pending_evaluation:
            self._determine_best_metric(self._evaluate(None, None), None)
            best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _evaluate_all(
        self, eval_dataset: Any, ignore_keys: list[str] | None, metric_key_prefix: str
    ) -> dict[str, float]:
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(datasets, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        sums = torch.zeros(4, dtype=torch.float64)
        for name, dataset in datasets.items():
            metrics |= super().evaluate(
                name if eval_dataset is None else dataset, ignore_keys, f"{metric_key_prefix}_{name}"
            )
            sums += self._eval_sums
        overall = token_means(sums, metric_key_prefix)
        self.log(dict(overall))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, overall)
        return metrics | overall

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._eval_sums = torch.zeros(4, dtype=torch.float64)
        kwargs["metric_key_prefix"] = metric_key_prefix
        output: EvalLoopOutput = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        output.metrics.update(token_means(self._eval_sums, metric_key_prefix))
        return output

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert self.model is not None
        if self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        scores = model(**inputs, use_cache=False, fused_lm_head=True)
        parts = (-scores.log_probs, scores.entropy, scores.is_top1, scores.label_mask)
        # A row per conversation, so that those which fill up the last batch of several processes are dropped again.
        # (Laid end to end a batch is one row: of several processes, the rows that fill up count twice.)
        rows = torch.stack([part.float().sum(-1) for part in parts], dim=-1)
        self._eval_sums += self.accelerator.gather_for_metrics(rows).sum(0).double().cpu()
        nll, _, _, tokens = rows.sum(0)
        return nll / tokens.clamp(min=1)

    def evaluate_final_weights(self) -> dict[str, float]:
        """The metrics of the weights that the run ends with: those in its log, or else of one more evaluation."""
        step = self.state.global_step
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            step = self.state.best_global_step
        logged = [entry for entry in self.state.log_history if entry["step"] == step]
        known = {k: v for entry in logged for k, v in entry.items() if k.startswith("eval_")}
        return known if "eval_loss" in known else self.evaluate()

    # --- a checkpoint ---

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """See checkpoints.py. Trainer has no public method for a save.

        https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py#L3363
        """
        save_checkpoint(self, lambda: super(ArpoTrainer, self)._save_checkpoint(model, trial))  # type: ignore[no-untyped-call]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes one into every checkpoint, with base model None for a local path; `train` writes one at the end."""

    def save_final_model(self, dtype: torch.dtype | None) -> None:
        """Save the model and tokenizer at the root of `output_dir`, the weights in `dtype` (None: as trained)."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if dtype is None:
            self.save_model()
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:  # every process takes part in gathering the weights
            weights = self.accelerator.get_state_dict(self.model_wrapped)
            if self.args.should_save:
                tied = getattr(model, "all_tied_weights_keys", {})  # gathered, a tied head is a tensor of its own
                self._save(state_dict={name: w.to(dtype) for name, w in weights.items() if name not in tied})
        else:
            model.to(dtype)
            self.save_model()
        if self.args.should_save and hasattr(model, "peft_config"):
            model.generation_config.save_pretrained(self.args.output_dir)  # PEFT leaves its end-of-turn token out
        if self.args.should_save:  # beside an adapter of an earlier run, from_pretrained would load that one
            others = ("model*.safetensors*", "config.json") if hasattr(model, "peft_config") else ("adapter_*",)
            for path in [path for other in others for path in Path(str(self.args.output_dir)).glob(other)]:
                path.unlink()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a device's, or the CPU allocator's, refusal of memory."""
    signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in signs)


def _shape(inputs: dict[str, Any]) -> str:
    return " x ".join(str(n) for n in inputs["input_ids"].shape)


def _split_rows(batch: dict[str, Tensor]) -> list[list[int]]:
    """The token ids of each row in a batch: padded (with an attention mask) or laid end to end (position_ids)."""
    ids = batch["input_ids"].cpu()
    if "attention_mask" in batch:
        return [row[mask.bool()].tolist() for row, mask in zip(ids, batch["attention_mask"].cpu(), strict=True)]
    starts = (batch["position_ids"][0].cpu() == 0).nonzero().flatten().tolist()
    return [ids[0, a:b].tolist() for a, b in zip(starts, [*starts[1:], ids.size(1)], strict=True)]


# --- what Trainer forgets when a run is resumed ---


class _LogState(TrainerCallback, ExportableState):
    """Ends each update, and carries the half-finished log line and the token counts through a checkpoint."""

    def __init__(self, trainer: ArpoTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.trainer.end_update()

    def state(self) -> dict[str, Any]:
        window = asdict(self.trainer.window)
        return {"loss_sum": window.pop("loss"), "pending_evaluation": self.trainer.pending_evaluation, **window}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        args.eval_on_start = args.eval_on_start and not state.global_step
        # Trainer goes on with the checkpoint's save_steps, eval_steps and logging_steps, whatever the recipe says.
        state.compute_steps(args, state.max_steps)
        # A checkpoint that LLaMA-Factory or TRL wrote has no entry; Trainer's next save needs one to write into.
        callbacks = cast(
            "dict[str, dict[str, Any]]", state.stateful_callbacks
        )  # declared as the list that it was made of
        saved = dict(callbacks.setdefault(type(self).__name__, {}))
        if state.global_step and saved:
            metrics = {name: values for name, values in saved["metrics"].items() if name != "num_tokens"}
            counts = {name: saved[name] for name in ("last_logged", "seen_tokens", "trained_tokens")}
            self.trainer.window = Window(loss=saved["loss_sum"], metrics=metrics, **counts)
            self.trainer.pending_evaluation = saved.get("pending_evaluation", False)
        else:
            self.trainer.window.last_logged = state.global_step
        if state.global_step >= state.max_steps:  # killed in what follows the last step: Trainer would take one more
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self.trainer.has_stepped:  # the epoch's end came before the checkpoint
            control.should_save = control.should_evaluate = control.should_log = False


class ResumeEvaluation(TrainerCallback):
    """Takes the evaluation that a signal had stopped, before the next step. Add it last: the log must have begun."""

    def __init__(self, trainer: ArpoTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.trainer.evaluate_pending()
