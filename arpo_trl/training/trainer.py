"""`ArpoTrainer`: TRL's `SFTTrainer` and what is changed in it, each change with its reason."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..errors import RunFailed
from ..machine import is_out_of_memory
from ..model.base_files import BaseFiles
from ..model.methods.moe import router_loss_kept
from ..model.optimizer_settings import read_settings, restore_settings
from ..model.split import Split, float32_masters
from ..model.token_scores import Objective, score_labelled_positions_only
from ..model.weights import Model, without_adapter
from ..terminal import progress, progress_of_files
from .checkpoints import CheckpointWriter, checkpoint_bytes, saved_bytes
from .failures import describe_not_finite, describe_out_of_memory, find_sources
from .loss import Batch, count_tokens, mask_repeated_rows, token_means
from .order import Endless, EpochOrder
from .preference import PairCollator, count_pairs, metric_names
from .reference import Preference
from .signals import Stopped
from .window import Speed, Window, mfu_per_token

EvalDataset: TypeAlias = str | Dataset | dict[str, Dataset]


class ArpoTrainer(SFTTrainer):
    """`SFTTrainer` whose checkpoints are complete or marked, whose runs resume exactly, and which stops at a NaN.

    Evaluation averages over tokens and keeps no logits. transformers averages over batches: a batch of two short replies
    weighs as much as one of two long ones, so the loss depends on the batch size. Here `eval_loss` is the mean of -log p
    over all labelled tokens of a dataset, without what the training loss adds (DFT, label smoothing, the routers'
    loss), and `eval_perplexity` is its exponential; `eval_entropy` and `eval_mean_token_accuracy` are over the same
    tokens. With several datasets, `eval_<name>_loss` is the loss of each and `eval_loss` that of all of them together.

    Args:
        on_save_error: "stop" ends the run if a checkpoint can't be written, "continue" continues without it.
        objective: The training loss, if it is not one of TRL's.
        reference: The model that `objective` compares with, if any.
        preference: The loss of `stage: dpo`, if the rows are pairs.
        split: How the launch splits the model.
        **kwargs: As `trl.SFTTrainer`.
    """

    args: SFTConfig
    model: Model

    def __init__(
        self,
        *,
        args: SFTConfig,
        on_save_error: str = "stop",
        objective: Objective | None = None,
        reference: PreTrainedModel | None = None,
        preference: Preference | None = None,
        split: Split = Split("DDP"),  # noqa: B008 (a tuple)
        **kwargs: Any,
    ) -> None:
        args = copy.copy(args)
        # Only a complete checkpoint may replace an older one, so that CheckpointWriter deletes instead of Trainer.
        save_total_limit, args.save_total_limit = args.save_total_limit, None
        # Trainer would replace a NaN loss by the running average and log 0; training_step raises instead.
        args.logging_nan_inf_filter = False
        self.window, self.speed, self.preference = Window(), Speed(), preference
        with router_loss_kept(kwargs["model"].config):
            super().__init__(args=args, **kwargs)
        self.rows = kwargs["train_dataset"]  # before TRL packs them, to name the rows of a batch that fails
        self.batches: list[Batch] = []  # of the update in progress
        self._sums: list[Tensor] = []  # of each batch, see _score
        self.last_batch = ""  # "training batch of 2 x 100 tokens"
        self._eval_sums = self._no_sums()
        self._advance: Callable[[float], None] = lambda _: None
        self.collate_rows = self.data_collator
        if preference:
            self.data_collator = PairCollator(self.collate_rows)
        self.pending_evaluation = self.has_stepped = False
        # by tensor, context or sequence parallelism (Ulysses)
        self.shares_rows = getattr(self.accelerator.parallelism_config, "non_data_parallel_size", 1) > 1
        self.add_callback(_LogState(self))
        if isinstance(self.train_dataset, IterableDataset):
            self.train_dataset = Endless(self.train_dataset)
        model = self.accelerator.unwrap_model(self.model)
        expected_bytes = checkpoint_bytes(model, args, split)
        self.checkpoints = CheckpointWriter(save_total_limit, on_save_error, expected_bytes, split.saves_together)
        model.register_forward_hook(torch.compiler.disable(self._score))
        if objective or self.accelerator.device.type not in ("cuda", "xpu"):
            score_labelled_positions_only(
                without_adapter(model), objective, reference and reference.to(self.accelerator.device)
            )
        _compute_outputs_in_float32(self.accelerator)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line's figures. On resume, Trainer resets its average loss, and TRL its metrics; ours continue."""
        if "loss" in logs:
            self._metrics["train"].clear()  # trl 1.16, sft_trainer.py#L1697: they would replace ours
            logs |= self.window.take(self.state.global_step) | self.speed.take(self.window)
        super().log(logs, start_time)

    # --- a step ---

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. An out-of-memory error is replaced by one that names the keys to change."""
        try:
            return super().train(*args, **kwargs)
        except Stopped:
            if self.pending_evaluation and self.state.global_step:
                self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise RunFailed(describe_out_of_memory(self, self.last_batch)) from error
            raise

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        """Return the recipe's sampler, in an order that a resumed run repeats.

        Trainer creates it nowhere else: https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py#L1071
        """
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        if sampler is None or isinstance(sampler, BatchRebalanceSampler):
            return sampler
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochOrder(sampler, seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """Return the batches of an update, and the number of their labelled tokens on all processes.

        No batch if the run is to stop: at the start of a resume, Trainer asks for one before it checks that.
        """
        if self.control.should_training_stop:
            return [], None
        batches = map(self._without_repeated_rows, epoch_iterator)  # counts their tokens after this
        return super().get_batch_samples(batches, num_batches, device)

    def _without_repeated_rows(self, batch: Batch) -> Batch:
        """Mask the rows that accelerate repeats, on several processes, to fill an epoch's last batches."""
        args, rows = self.args, self.train_dataset
        ends = args.world_size > 1 and self.accelerator.gradient_state.end_of_dataloader and "labels" in batch
        if ends and not self.shares_rows and isinstance(rows, Dataset) and not args.dataloader_drop_last:
            # Not gradient_state.remainder: accelerate 1.15 does not set it if a resumed run skips batches.
            remainder = len(rows) % (args.per_device_train_batch_size * args.world_size)
            earlier = args.process_index * args.per_device_train_batch_size
            if remainder:
                sides = 2 if self.preference else 1
                mask_repeated_rows(batch, sides * (remainder - earlier), args.packing)
        return batch

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | int | None:
        """The labelled tokens of an update on all processes, or its pairs: each of them weighs the same in the loss."""
        if not self.preference or not batch_samples:
            return super()._get_num_items_in_batch(batch_samples, device)
        pairs = torch.stack([count_pairs(batch) for batch in batch_samples]).sum().to(device)
        return cast(Tensor, self.accelerator.reduce(pairs))

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run one forward and backward. Raises RunFailed if the loss is not finite."""
        self.batches.append(inputs)
        self.last_batch = f"training batch of {_shape(inputs)} tokens"
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if not torch.isfinite(loss):
            raise self._not_finite("loss", float(loss))
        self._sums[-1] = torch.stack([loss.float(), count_tokens(inputs).to(loss), *self._sums[-1]])
        return loss

    def _score(self, model: nn.Module, args: object, output: Any) -> None:
        """Sum the entropy, the correct first guesses and the labelled tokens of a training batch.

        A forward hook of the model, because TRL's loss returns its sum alone. Label smoothing runs the model a second
        time for these, so the last pass counts.
        """
        if model.training and hasattr(output, "label_mask"):
            sums = [scores.detach().float().sum() for scores in (output.entropy, output.is_top1, output.label_mask)]
            if self.aux_loss_enabled:
                sums.append(output.aux_loss.detach().float())
            del self._sums[len(self.batches) - 1 :]
            self._sums.append(torch.stack(sums))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """As Trainer's, which calls it before each step of the optimizer; ends the update.

        Trainer has no public method: https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py#L1940
        """
        get_norm: Callable[..., Tensor | float | None] = super()._get_grad_norm
        norm = get_norm(model, grad_norm)
        self._end_update(norm)
        return norm

    def _end_update(self, norm: Tensor | float | None) -> None:
        """Add the batches of an update to the window. `norm`: of its gradients, before they are clipped.

        Raises:
            RunFailed: the gradient is not finite.
        """
        if norm is None:  # DeepSpeed's ZeRO-0 in float32 has none and has taken its step: a NaN is in the weights now
            norm = torch.nn.utils.get_total_norm([p.detach() for p in self.model.parameters() if p.requires_grad])
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)  # of FSDP's shards
        sums = self.accelerator.reduce(torch.stack(self._sums))  # shape (batches, 5 or more)
        # With float16, infinite gradients are expected: the scaler skips the step and lowers its scale.
        if self.accelerator.scaler is None and not math.isfinite(value):
            raise self._not_finite("gradient", value)
        window = self.window
        for loss, seen, entropy, top1, labelled, *rest in sums.double().tolist():
            window.loss_sum += loss / self.args.world_size
            window.seen_tokens += int(seen)
            window.trained_tokens += int(labelled)
            values = {"entropy": entropy / max(labelled, 1), "mean_token_accuracy": top1 / max(labelled, 1)}
            if self.aux_loss_enabled:
                values["aux_loss"] = rest.pop(0) / self.args.world_size
            if self.preference:
                window.add_pairs(metric_names(self.preference.recipe), rest)
            for name, value in values.items():
                window.metrics.setdefault(name, []).append(value)
        self.has_stepped = True
        self.forget_batches()

    def forget_batches(self) -> None:
        """Forget the batches of the update in progress."""
        self.batches.clear()
        self._sums.clear()

    def _not_finite(self, what: str, value: float) -> RunFailed:
        sources = find_sources(self.rows, self.batches)
        return RunFailed(f"step {self.state.global_step + 1}: {describe_not_finite(self.model, what, value, sources)}")

    # --- a resume ---

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As Trainer's. Remembers the optimizer's settings, before a checkpoint's are loaded."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.optimizer is not None:
            self.settings = read_settings(self.optimizer)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states, and keep the recipe's settings: Trainer would resume with those of the checkpoint.

        Trainer has no public method: https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py#L3894
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.optimizer is not None:
            restore_settings(self.optimizer, self.lr_scheduler, self.settings)

    # --- an evaluation ---

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        self.last_batch = f"evaluation batch of {_shape(inputs)} tokens"
        outputs = super().prediction_step(model, inputs, *args, **kwargs)
        self._advance(1)
        return outputs

    def evaluate(
        self,
        eval_dataset: EvalDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`. The steps after it draw the same random numbers as without it."""
        logged, began = len(self.state.log_history), time.monotonic()
        self.pending_evaluation = True
        try:
            with torch.random.fork_rng(devices=[]):
                metrics = self._evaluate_all(eval_dataset, ignore_keys, metric_key_prefix)
        except Stopped:
            del self.state.log_history[logged:]
            raise
        self.pending_evaluation = False
        self.speed.leave_out(time.monotonic() - began)
        return metrics

    def evaluate_pending(self) -> None:
        """Repeat the evaluation that a signal stopped, with all that Trainer does after one.

        https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py#L2276 (no public method)
        """
        if self.pending_evaluation:
            self._determine_best_metric(self._evaluate(None, None), None)
            best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _evaluate_all(
        self, eval_dataset: EvalDataset | None, ignore_keys: list[str] | None, metric_key_prefix: str
    ) -> dict[str, float]:
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        sums = self._no_sums()
        for name in self.eval_dataset:
            metrics |= super().evaluate(name, ignore_keys, f"{metric_key_prefix}_{name}")
            sums = sums + self._eval_sums
        overall = self._means(sums, metric_key_prefix)
        self.log(dict(overall))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, overall)
        return metrics | overall

    def evaluation_loop(
        self, dataloader: DataLoader[Batch], *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self._eval_sums = self._no_sums()
        kwargs["metric_key_prefix"] = metric_key_prefix
        with progress("evaluating", len(dataloader), self.is_world_process_zero()) as self._advance:
            output: EvalLoopOutput = super().evaluation_loop(dataloader, *args, **kwargs)
        assert output.metrics is not None
        output.metrics.update(self._means(self._eval_sums, metric_key_prefix))
        return output

    def _no_sums(self) -> Tensor:
        """Return what an evaluation without a batch sums: dataloader_drop_last may drop all rows."""
        size = len(metric_names(self.preference.recipe)) + 2 if self.preference else 4
        return torch.zeros(size, dtype=torch.float64)

    def _means(self, sums: Tensor, prefix: str) -> dict[str, float]:
        return self.preference.means(sums, prefix) if self.preference else token_means(sums, prefix)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.preference:
            return self._compare(self.preference, model, inputs, num_items_in_batch)
        if self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        scores = model(**inputs, use_cache=False, fused_lm_head=True)
        parts = (-scores.log_probs, scores.entropy, scores.is_top1, scores.label_mask)
        # One row per conversation, so that those which fill the last batch of several processes are dropped again.
        # (A padding-free batch is one row: with several processes, the rows that fill it count twice. So they do if
        # processes share rows: each has a part of every row, or all have the same.)
        rows = torch.stack([part.float().sum(-1) for part in parts], dim=-1)
        gather = self.accelerator.gather if self.shares_rows else self.accelerator.gather_for_metrics
        self._eval_sums = self._eval_sums + gather(rows).sum(0).double().cpu()
        nll, _, _, tokens = rows.sum(0)
        return nll / tokens.clamp(min=1)

    def _compare(self, preference: Preference, model: nn.Module, batch: Batch, pairs: Tensor | int | None) -> Tensor:
        """The loss of a batch of pairs: in training its part of the update's mean over pairs, times the processes."""
        scores, aux_loss = preference.score(model, batch, self.accelerator, self.aux_loss_enabled)
        if not self.model.training:
            # A row per pair, so that those which fill up the last batch of several processes are dropped again.
            rows = self.accelerator.gather_for_metrics(scores.rows())
            self._eval_sums = self._eval_sums + rows.sum(0).double().cpu()
            return scores.loss.mean()
        self._sums[-1] = torch.cat([self._sums[-1], scores.sums()])
        loss: Tensor = (scores.loss * scores.real).sum() / torch.as_tensor(pairs).clamp(min=1) * self.args.world_size
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / self.current_gradient_accumulation_steps
        return loss

    def evaluate_final_weights(self) -> dict[str, float]:
        """Return the metrics of the final weights: from the log, or else of another evaluation."""
        step = self.state.global_step
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            step = self.state.best_global_step
        logged = [entry for entry in self.state.log_history if entry["step"] == step]
        known = {k: v for entry in logged for k, v in entry.items() if k.startswith("eval_")}
        return known if "eval_loss" in known else self.evaluate()

    # --- a checkpoint ---

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Save through `CheckpointWriter`. Trainer has no public method for a save.

        https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/trainer.py#L3363
        """
        folder = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        with progress_of_files(
            f"saving {folder.name}", folder, self.checkpoints.expected_bytes, self.args.should_save
        ):
            self.checkpoints.save(self, lambda: super(ArpoTrainer, self)._save_checkpoint(model, trial))  # type: ignore[no-untyped-call]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: TRL writes one into every checkpoint, with base model None for a local path. `train` writes ours."""

    def save_final_model(self, base: BaseFiles | None) -> None:
        """Save the model and tokenizer at the root of `output_dir`, as the base's files are (None: as trained)."""
        model, output_dir = self.accelerator.unwrap_model(self.model), Path(str(self.args.output_dir))
        if base is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            weights = self.accelerator.get_state_dict(self.model_wrapped)  # a collective; None on ZeRO-3's others
            masters = float32_masters(model, base.dtype_of) if self.is_deepspeed_enabled else {}
            if self.args.should_save:
                tied = getattr(model, "all_tied_weights_keys", {})  # gathered, a tied head is a separate tensor
                # the part of save_model that writes gathered weights: transformers 5.24, trainer.py#L4139
                complete = {name: w for name, w in (weights | masters).items() if name not in tied}
                self._save(state_dict={name: w.to(base.dtype_of(name)) for name, w in complete.items()})
        else:
            if base is not None:
                base.cast(model)
            with progress_of_files("saving the model", output_dir, saved_bytes(model), self.args.should_save):
                self.save_model()
        if not self.args.should_save:
            return
        if base is not None:
            base.restore_configs(output_dir)
        others = ["adapter_*"]  # of an earlier run, which from_pretrained would load
        if isinstance(model, PeftModel):
            model.generation_config.save_pretrained(self.args.output_dir)  # PEFT omits it, with its end-of-turn token
            others = ["model*.safetensors*", "config.json"]
        for path in [path for other in others for path in output_dir.glob(other)]:
            path.unlink()


def _compute_outputs_in_float32(accelerator: Accelerator) -> None:
    """Under FSDP 2, keep the model's outputs and the sums of gradients in float32.

    accelerate 1.15 rounds each token's log-probability to bfloat16 (7.68 to 7.6875).
    https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/dataclasses.py
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def _shape(inputs: Batch) -> str:
    return " x ".join(str(n) for n in inputs["input_ids"].shape)


class _LogState(TrainerCallback, ExportableState):
    """Keeps the unfinished log line and the token counts in checkpoints, as Trainer does not."""

    def __init__(self, trainer: ArpoTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        if not self.trainer.speed.started:
            self.trainer.speed.start(self.trainer.window, mfu_per_token(self.trainer))

    def state(self) -> dict[str, object]:
        return {**asdict(self.trainer.window), "pending_evaluation": self.trainer.pending_evaluation}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        args.eval_on_start = args.eval_on_start and not state.global_step
        # Trainer uses the checkpoint's save_steps, eval_steps and logging_steps instead of the recipe's.
        state.compute_steps(args, state.max_steps)
        # A checkpoint written by LLaMA-Factory or TRL has no entry, which Trainer's next save needs.
        callbacks = cast("dict[str, dict[str, Any]]", state.stateful_callbacks)
        saved = dict(callbacks.setdefault(type(self).__name__, {}))
        if state.global_step and saved:
            self.trainer.pending_evaluation = saved.pop("pending_evaluation", False)
            self.trainer.window = Window(**saved)
        else:
            self.trainer.window.last_logged = state.global_step
        if state.global_step >= state.max_steps:  # killed after the last step: Trainer would take another
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not self.trainer.has_stepped:  # the checkpoint was saved after the epoch's end
            control.should_save = control.should_evaluate = control.should_log = False
