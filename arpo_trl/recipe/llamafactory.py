"""LLaMA-Factory's keys that are no field of Recipe: other names, keys without effect, refused keys."""

import math
import shlex
from collections.abc import Mapping

from ..errors import program
from .yaml_file import Given

# Another name for a key: older names, and TRL's names for what LLaMA-Factory calls otherwise.
RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "badam_switch_block_every": "badam_switch_interval",
    "cache_path": "tokenized_path",
    "chat_template_path": "template",
    "checkpoint_dir": "adapter_name_or_path",
    "dataset_num_proc": "preprocessing_num_workers",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "name_module_trainable": "freeze_trainable_modules",
    "no_cuda": "use_cpu",
    "num_layer_trainable": "freeze_trainable_layers",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "router_aux_loss_coef": "moe_aux_loss_coef",
    "sft_packing": "packing",
    "swanlab_run_name": "run_name",
    "use_liger_kernel": "enable_liger_kernel",
}

_NO_EFFECT = {
    "max_new_tokens, num_beams and the other keys of their own say how replies are generated": """
        eval_num_beams generation_max_length generation_num_beams generation_config""",
    "transformers generates the replies, with its cache, in the dtype of the saved model": """
        infer_backend infer_dtype use_kv_cache offload_folder""",
    "export is a step of its own (arpo-trl merge)": """
        export_dir export_size export_device export_legacy_format export_hub_model_id export_quantization_bit
        export_quantization_dataset export_quantization_nsamples export_quantization_maxlen""",
    "the accuracy of each token is always logged": "compute_accuracy",
    "a loss that is not finite ends the run": "logging_nan_inf_filter",
    "SIGTERM saves a checkpoint in any case": "enable_jit_checkpoint",
    "tokens per second are always logged": "include_effective_tokens_per_second include_tokens_per_second",
    "weights are always saved as safetensors": "save_safetensors",
    "TensorBoard writes to output_dir/runs, or where TENSORBOARD_LOGGING_DIR says": "logging_dir",
    "output_dir has to be on a file system that every node sees": "data_shared_file_system",
    "transformers 5 always loads this way": "low_cpu_mem_usage",
    "padding never carries loss": "ignore_pad_token_for_loss",
    "gradient_checkpointing recomputes activations here, and enable_liger_kernel saves memory": """
        use_unsloth use_unsloth_gc recompute_granularity recompute_method recompute_num_layers""",
    "FSDP wraps the model's own layers, unless fsdp_config or the accelerate config names others": """
        fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params""",
    "KTransformers, which keeps experts in CPU memory, is not used; accelerate_configs/zero3_offload.yaml offloads a model": """
        use_kt kt_optimize_rule cpu_infer chunk_size kt_weight_path kt_expert_checkpoint_path""",
    "Megatron is not used; accelerate_configs/fsdp2.yaml splits a model, the loss is the mean over a step's labelled tokens": """
        use_mca use_megatron_bridge tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        virtual_pipeline_model_parallel_size sequence_parallel account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split bias_activation_fusion apply_rope_fusion masked_softmax_fusion
        cross_entropy_loss_fusion use_distributed_optimizer overlap_param_gather overlap_grad_reduce
        calculate_per_token_loss""",
    "transformers computes the experts; their balancing loss, which Megatron adds, needs moe_aux_loss_coef": """
        expert_model_parallel_size moe_grouped_gemm moe_token_dispatcher_type""",
    "HyperParallel is not used; accelerate_configs/fsdp2.yaml splits a model": "use_hyper_parallel hyper_parallel_args",
    "one row is not split over GPUs; accelerate_configs/zero3.yaml and enable_liger_kernel save memory": """
        sequence_parallel_size""",
    "the model is saved as Hugging Face's in any case": "export_hf_on_finish",
    "a quantized model is trained where accelerate puts it": "quantization_device_map",
    "it asks for faster kernels; enable_liger_kernel has some": "use_v1_kernels",
    "it asks for speed; nothing is computed in FP8, bf16: true computes in bfloat16": """
        fp8 fp8_backend fp8_enable_fsdp_float8_all_gather""",
    "transformers computes norms and the loss in float32 in any case": "upcast_layernorm upcast_lmhead_output",
    "accelerate launch starts the processes here; see accelerate_configs/": """
        use_ray ray_run_name ray_storage_path ray_storage_filesystem ray_num_workers ray_init_kwargs
        resources_per_worker placement_strategy master_addr master_port local_rank tpu_num_cores tpu_metrics_debug""",
    "the run is not profiled; trainer_log.jsonl has the tokens per second of each log line": """
        enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps
        profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules""",
    "a stream is read in one piece": "dataset_shards",
    "no token is added; where the tokenizer lacks the template's, the run stops and says what to do": "resize_vocab",
    "a PiSSA adapter always becomes plain LoRA when the run ends": "pissa_convert",
    "the report at the start says what is trained": "print_param_status",
    "BAdam 1.4 prints each block that it goes on to": "badam_verbose",
    "BAdam's layer mode has no masks": "badam_update_ratio badam_mask_mode",
    "only text is trained here": """
        media_dir image_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches image_resolution
        video_max_pixels video_min_pixels video_fps video_maxlen video_resolution use_audio_in_video
        audio_sampling_rate freeze_vision_tower freeze_multi_modal_projector""",
    "truncation_mode says what is cut": "reserved_label_len",
    "transformers 5 has dropped it": """
        past_index ray_scope mp_parameters half_precision_backend fp16_backend fp16_opt_level torchdynamo use_ipex
        use_mps_device use_legacy_prediction_loop include_inputs_for_metrics sortish_sampler jit_mode_eval""",
}

# Refused where they ask for something: null, false and the defaults in `HARMLESS`, LLaMA-Factory's, pass.
_REFUSED = {
    "it would be stored beside the model; run `hf auth login` instead": """
        hf_hub_token hub_token push_to_hub_token""",
    "it would be stored beside the model; log in with the hub's own tool": "ms_hub_token om_hub_token",
    "the launcher decides this; see accelerate_configs/": "parallelism_config",
    "it belongs in the accelerate config (mixed_precision: bf16); in a recipe write bf16: true": "mixed_precision",
    "only text is trained here": "visual_inputs freeze_language_model train_mm_proj_only",
    "a dataset's split is named in dataset_info.json": "split",
    "write cutoff_len, the length of prompt and reply together": "max_source_length max_target_length",
    "it belongs to stage dpo, which TRL's DPOTrainer trains": """
        pref_beta pref_ftx pref_bco_weight pref_loss dpo_beta dpo_loss dpo_ftx dpo_label_smoothing simpo_gamma
        ref_model ref_model_adapters ref_model_quantization_bit ld_alpha orpo_beta""",
    "it belongs to stage kto, which TRL's KTOTrainer trains": "kto_beta kto_chosen_weight kto_rejected_weight",
    "it belongs to stage ppo, which TRL no longer has; its GRPOTrainer and RLOOTrainer are for reinforcement learning": """
        ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model reward_model_adapters
        reward_model_quantization_bit reward_model_type ppo_logger""",
    "it belongs to an inference server; start that with the saved model": """
        vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config vllm_dtype sglang_maxlen
        sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend kt_maxlen kt_use_cuda_graph kt_mode
        kt_force_think mode""",
    "no expert is added to the model; lora_target: all adapts those that it has": """
        kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size""",
    "write packing: true": "use_packed_sequences",
    "give the model in Hugging Face's format in model_name_or_path": "megatron_pretrained_checkpoint",
    "Megatron is not used here; write what is asked for as keys of this recipe": "extra_config",
    "BAdam 1.4 saves neither the masks of its ratio mode nor where it is in them; write layer": "badam_mode",
    "write optim: adafactor": "adafactor",
    "transformers does not hand it to APOLLO": "apollo_scale_front",
    "it would be stored beside the model; set the environment variable SWANLAB_API_KEY": "swanlab_api_key",
    "no message is sent to Lark; SwanLab's own settings send one": "swanlab_lark_webhook_url swanlab_lark_secret",
    "this change of the model is not made here; save a changed model and name it in model_name_or_path": """
        train_from_scratch new_special_tokens_config init_special_tokens""",
    "each token sees all before it; remove the line": "shift_attn",
    "LLaMA-Factory 0.9.5 itself fails at it (mixture-of-depth 1.2.0, transformers 4.55 to 5.6); remove the line": """
        mixture_of_depths""",
    "add the tokens to the tokenizer and the model once (docs/templates.md has the commands), and name the new folder": """
        add_tokens add_special_tokens new_special_tokens new_normal_tokens""",
    "give the adapter's whole path in adapter_name_or_path": "adapter_folder",
    "the chat template decides this; give another with template": "tool_format eos_token pad_token",
    "rows are tokenized with their special tokens whole": "split_special_tokens",
    "it is a length of generation in LLaMA-Factory and of a row in TRL; write cutoff_len": "max_length",
    "the dataset's columns are named in dataset_info.json": "dataset_text_field",
    "loss falls on the assistant's turns; train_on_prompt and mask_history change that": """
        assistant_only_loss completion_only_loss""",
    "rows are shuffled every epoch; disable_shuffling: true keeps their order": "shuffle_dataset",
    "conversations in a packed row never see each other, which needs bfd": "packing_strategy",
    "rows reach TRL encoded": "dataset_kwargs",
    "each of its settings has a key of its own (model_revision, flash_attn, cache_dir, ...)": "model_init_kwargs",
}

# Their defaults in LLaMA-Factory (or in TRL), where these are neither null nor false.
# fmt: off
HARMLESS: dict[str, object] = {
    "assistant_only_loss": True, "badam_mode": "layer", "dpo_label_smoothing": 0.0,
    "init_special_tokens": "noise_init", "kt_maxlen": 4096, "kt_mode": "normal",
    "kt_use_cuda_graph": True, "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0, "max_length": 1024,
    "mixed_precision": "bf16_mixed", "mode": "normal", "packing_strategy": "bfd", "ppo_buffer_size": 1,
    "ppo_epochs": 4, "ppo_target": 6.0, "pref_bco_weight": 0.0, "pref_beta": 0.1, "pref_ftx": 0.0,
    "pref_loss": "sigmoid", "reward_model_type": "lora", "sglang_lora_backend": "triton", "sglang_maxlen": 4096,
    "sglang_mem_fraction": 0.7, "sglang_tp_size": -1, "simpo_gamma": 0.5, "split": "train", "vllm_gpu_util": 0.7,
    "vllm_max_lora_rank": 32, "vllm_maxlen": 4096,
}
# fmt: on

NO_EFFECT = {key: reason for reason, keys in _NO_EFFECT.items() for key in keys.split()}
REFUSED = {key: reason for reason, keys in _REFUSED.items() for key in keys.split()}

# How many GPUs share a row in Megatron (mcore_adapter's and LLaMA-Factory's bridge to it) and in sequence parallelism
_SPLITS_ROWS = """
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size sequence_parallel_size""".split()
_V1_KEYS = {"model", "train_dataset", "peft_config", "kernel_config", "quant_config", "dist_config", "model_class"}
_INFERENCE_KEYS = {"infer_backend", "infer_dtype", "do_sample", "vllm_maxlen", "vllm_enforce_eager", "sglang_maxlen"}


def recognise(given: Mapping[str, Given]) -> str | None:
    """What to write instead, where the keys are those of LLaMA-Factory's v1 form or of another command of its."""

    def value(key: str, or_else: str = "") -> str:
        return str(given[key].value) if key in given and given[key].value else or_else

    model, adapter = value("model_name_or_path"), value("adapter_name_or_path")
    if any(key.startswith(("top.", "train.")) for key in given):
        return "this is what LLaMA Board saves, no recipe; its button Preview command shows flags, which are read here"
    if _V1_KEYS & given.keys() and not model:
        found = ", ".join(f"{key}:" for key in given if key in _V1_KEYS)
        return f"this is LLaMA-Factory's v1 form ({found}), which is not read here; write its usual keys (--help all)"
    if {"task", "task_dir", "n_shot"} & given.keys() and "do_train" not in given:
        return "this is a benchmark recipe of LLaMA-Factory; benchmarks are not run here (lm-evaluation-harness runs them)"
    if not model or {"output_dir", "do_train", "dataset"} & given.keys():
        return None
    if "export_dir" in given:
        if not adapter:
            return "this is an export recipe of LLaMA-Factory without an adapter; a trained model needs no export here"
        command = f"{program()} merge {shlex.join([adapter, value('export_dir', 'OUT')])}"
        return f"this is an export recipe of LLaMA-Factory; merge the adapter with: {command}"
    if _INFERENCE_KEYS & given.keys() or ("template" in given and "stage" not in given):
        command = f"{program()} chat {shlex.quote(adapter or model)}"
        return (
            f"this is a chat or api recipe of LLaMA-Factory, which trains nothing; talk with the model by: {command}"
        )
    return None


def batch_grows(given: Mapping[str, Given]) -> str | None:
    """What to say where several GPUs would share a row: here each has its own, so that a step takes more rows."""
    values = {key: one.value for key, one in given.items()}
    names = [*_SPLITS_ROWS, *(["expert_model_parallel_size"] if values.get("use_megatron_bridge") is True else [])]
    sizes = {key: size for key in names if isinstance(size := values.get(key), int) and 1 < size < 10_000}
    times, steps = math.prod(sizes.values()), values.get("gradient_accumulation_steps") or 1
    if times == 1 or values.get("global_batch_size"):
        return None
    keeps = f"1/{times} of the GPUs keeps the batch"
    if isinstance(steps, int) and steps % times == 0:
        keeps = f"gradient_accumulation_steps: {steps // times} instead of them keeps the batch"
    return f"{', '.join(sizes)}: each GPU has rows of its own here, {times} times as many a step; {keeps}"
