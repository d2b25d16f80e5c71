"""LLaMA-Factory's keys that are no field of Recipe: other names, keys without effect, refused keys."""

from collections.abc import Mapping

from .yaml_file import Given

# Another name for a key: older names, and TRL's names for what LLaMA-Factory calls otherwise.
RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "chat_template_path": "template",
    "dataset_num_proc": "preprocessing_num_workers",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "router_aux_loss_coef": "moe_aux_loss_coef",
    "use_liger_kernel": "enable_liger_kernel",
}

_NO_EFFECT = {
    "generation happens after training, in the program that serves the model": """
        do_sample temperature top_p top_k num_beams max_new_tokens repetition_penalty length_penalty
        skip_special_tokens eval_num_beams generation_max_length generation_num_beams generation_config
        infer_backend infer_dtype use_kv_cache offload_folder""",
    "export is a step of its own (scripts/merge_lora.py)": """
        export_dir export_size export_device export_legacy_format export_hub_model_id export_quantization_bit
        export_quantization_dataset export_quantization_nsamples export_quantization_maxlen""",
    "tokens per second are always logged": "include_effective_tokens_per_second include_tokens_per_second",
    "weights are always saved as safetensors": "save_safetensors",
    "TensorBoard writes to output_dir/runs, or where TENSORBOARD_LOGGING_DIR says": "logging_dir",
    "output_dir has to be on a file system that every node sees": "data_shared_file_system",
    "transformers 5 always loads this way": "low_cpu_mem_usage",
    "padding never carries loss": "ignore_pad_token_for_loss",
    "a PiSSA adapter always becomes plain LoRA when the run ends": "pissa_convert",
    "the report at the start says what is trained": "print_param_status",
    "transformers 5 has dropped it": """
        past_index ray_scope mp_parameters half_precision_backend fp16_backend fp16_opt_level torchdynamo use_ipex
        use_mps_device use_legacy_prediction_loop include_inputs_for_metrics sortish_sampler jit_mode_eval""",
}

# Refused where they ask for something: null, false and the defaults in `HARMLESS`, LLaMA-Factory's, pass.
_REFUSED = {
    "it would be stored beside the model; run `hf auth login` instead": """
        hf_hub_token hub_token push_to_hub_token""",
    "it would be stored beside the model; log in with the hub's own tool": "ms_hub_token om_hub_token",
    "the launcher decides this; see accelerate_configs/": """
        local_rank parallelism_config tpu_num_cores tpu_metrics_debug fsdp_min_num_params use_ray
        fsdp_transformer_layer_cls_to_wrap ray_run_name ray_storage_path ray_storage_filesystem ray_num_workers
        ray_init_kwargs resources_per_worker placement_strategy""",
    "only text is trained here": """
        media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels
        video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower
        freeze_multi_modal_projector freeze_language_model train_mm_proj_only image_resolution video_resolution""",
    "it belongs to another stage than sft; TRL has trainers of its own for those": """
        pref_beta pref_ftx pref_bco_weight pref_loss dpo_beta dpo_loss dpo_ftx dpo_label_smoothing simpo_gamma
        kto_beta kto_chosen_weight kto_rejected_weight ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
        ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model
        reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha""",
    "replies are not generated during training; set do_eval: true for the loss, generate with the saved model": """
        do_predict predict_with_generate""",
    "it belongs to an inference server; start that with the saved model": """
        vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen
        sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend""",
    "KTransformers is not used here; accelerate_configs/zero3_offload.yaml trains large models in CPU memory": """
        use_kt kt_optimize_rule kt_maxlen kt_use_cuda_graph kt_mode kt_force_think cpu_infer chunk_size mode""",
    "Megatron is not used here; see accelerate_configs/fsdp2.yaml": "use_mca",
    "Unsloth is not used here; gradient_checkpointing and enable_liger_kernel save memory too": """
        use_unsloth use_unsloth_gc""",
    "this optimizer is not offered; `optim` takes any of transformers' (adamw_8bit, adafactor, galore, apollo)": """
        use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
        badam_mask_mode badam_verbose use_adam_mini use_muon""",
    "write optim: adafactor": "adafactor",
    "transformers does not hand it to APOLLO": "apollo_scale_front",
    "write report_to: swanlab; SwanLab reads the rest from its environment variables": """
        use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key
        swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret""",
    "finetuning_type is full, freeze or lora here": "use_llama_pro module_dropout oft_rank oft_block_size oft_target",
    "this loss is not offered; there are the usual one and use_dft_loss": """
        use_asft_loss asft_alpha use_eaft_loss eaft_alpha""",
    "this change of the model is not made here; save a changed model and name it in model_name_or_path": """
        shift_attn mixture_of_depths train_from_scratch new_special_tokens_config init_special_tokens
        use_v1_kernels upcast_layernorm upcast_lmhead_output""",
    "add the tokens to the tokenizer and the model once, save both, and name that folder in model_name_or_path": """
        add_tokens add_special_tokens resize_vocab""",
    "FP8 is the launcher's: mixed_precision: fp8 in the accelerate config": """
        fp8 fp8_backend fp8_enable_fsdp_float8_all_gather""",
    "a quantized model is trained where accelerate puts it": "quantization_device_map",
    "give the adapter's whole path in adapter_name_or_path": "adapter_folder",
    "the chat template decides this; give another with template": "tool_format enable_thinking eos_token pad_token",
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

HARMLESS = {
    "assistant_only_loss": True,
    "enable_thinking": True,
    "fp8_backend": "auto",
    "freeze_multi_modal_projector": True,
    "freeze_vision_tower": True,
    "init_special_tokens": "noise_init",
    "local_rank": -1,
    "packing_strategy": "bfd",
}

NO_EFFECT = {key: reason for reason, keys in _NO_EFFECT.items() for key in keys.split()}
REFUSED = {key: reason for reason, keys in _REFUSED.items() for key in keys.split()}

_V1_KEYS = {"model", "train_dataset", "peft_config", "kernel_config", "quant_config", "dist_config", "model_class"}
_TRAINING_KEYS = {"output_dir", "do_train", "do_eval", "do_predict", "dataset", "stage"}


def recognise(given: Mapping[str, Given]) -> str | None:
    """What to write instead, where the keys are those of LLaMA-Factory's v1 form or of another command of its."""

    def value(key: str, or_else: str) -> str:
        return str(given[key].value) if key in given and given[key].value else or_else

    if _V1_KEYS & given.keys() and "model_name_or_path" not in given:
        found = ", ".join(f"{key}:" for key in given if key in _V1_KEYS)
        return (
            f"this is LLaMA-Factory's v1 form ({found}), which is not read here; write its usual keys, recipes/KEYS.md"
        )
    model, adapter = value("model_name_or_path", "MODEL"), value("adapter_name_or_path", "")
    trains = {"output_dir", "do_train", "dataset"} & given.keys()
    if "export_dir" in given and not trains:
        if not adapter:
            return "this is an export recipe of LLaMA-Factory without an adapter; a trained model needs no export here"
        command = f"python scripts/merge_lora.py {adapter} {value('export_dir', 'OUT')}"
        return f"this is an export recipe of LLaMA-Factory; merge the adapter with: {command}"
    if {"task", "task_dir", "n_shot"} & given.keys() and "do_train" not in given:
        return "this is a benchmark recipe of LLaMA-Factory; benchmarks are not run here (lm-evaluation-harness runs them)"
    if given and "model_name_or_path" in given and not _TRAINING_KEYS & given.keys():
        command = f"python scripts/chat.py {adapter or model}"
        if {
            "infer_backend",
            "do_sample",
            "infer_dtype",
            "vllm_maxlen",
            "vllm_enforce_eager",
            "template",
        } & given.keys():
            return f"this is a chat or api recipe of LLaMA-Factory, which trains nothing; talk with the model by: {command}"
    return None
