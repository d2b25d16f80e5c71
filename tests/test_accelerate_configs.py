"""The installed accelerate reads every shipped config as intended."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def launched(config: Path, *flags: str) -> Namespace:
    """Return the arguments of `accelerate launch` after it has read the config."""
    command = ["--config_file", str(config), "--main_process_port", "0", *flags, "-m", "arpo_trl", "recipe.yaml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    return args


def test_the_configs_that_the_docs_name_exist():
    names = {"cpu", "single_gpu", "multi_gpu", "fsdp2", "zero2", "zero3", "zero3_offload", "multi_node"}
    assert {config.stem for config in CONFIGS} == names


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_key_is_one_that_accelerate_launch_knows(config: Path):
    loaded = load_config_from_file(str(config))  # raises on an unknown key of the top level, not of the inner ones
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(loaded.fsdp_config) | set(loaded.deepspeed_config) <= set(known)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_header_has_three_lines_and_its_own_command(config: Path):
    header = config.read_text(encoding="utf-8").splitlines()[:4]
    assert [line.startswith("#") for line in header] == [True, True, True, False]
    assert re.search(rf"accelerate launch (-q )?--config_file accelerate_configs/{config.name} ", header[2])


def test_cpu_and_single_gpu_start_one_plain_process():
    cpu, gpu = (launched(ROOT / "accelerate_configs" / name) for name in ("cpu.yaml", "single_gpu.yaml"))
    assert (cpu.use_cpu, cpu.num_processes, cpu.mixed_precision) == (True, 1, "no")
    assert (gpu.use_cpu, gpu.num_processes, gpu.mixed_precision) == (False, 1, "bf16")
    assert not any([cpu.multi_gpu, cpu.use_fsdp, cpu.use_deepspeed, gpu.multi_gpu, gpu.use_fsdp, gpu.use_deepspeed])


def test_multi_node_takes_rank_and_address_from_the_command_line():
    config = ROOT / "accelerate_configs" / "multi_node.yaml"
    args = launched(config, "--machine_rank", "1", "--main_process_ip", "10.0.0.7", "--num_processes", "8")
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "4", 1)
    assert (args.rdzv_backend, args.rdzv_endpoint.split(":")[0]) == ("static", "10.0.0.7")


def test_fsdp2_gathers_checkpoints_into_one_model():
    args = launched(ROOT / "accelerate_configs" / "fsdp2.yaml")
    with patch.dict(os.environ, prepare_multi_gpu_env(args)):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


@pytest.mark.parametrize(
    ("name", "stage", "device"), [("zero2", 2, "none"), ("zero3", 3, "none"), ("zero3_offload", 3, "cpu")]
)
def test_zero_leaves_batch_and_clipping_to_the_recipe(name: str, stage: int, device: str):
    args = launched(ROOT / "accelerate_configs" / f"{name}.yaml")
    assert load_config_from_file(args.config_file).distributed_type == DistributedType.DEEPSPEED
    args.deepspeed_fields_from_accelerate_config = ""  # launch_command sets it between the two steps taken here
    with patch.dict(os.environ, prepare_deepspeed_cmd_env(args)[1]):
        config = DeepSpeedPlugin().deepspeed_config
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (
        stage,
        device,
        device,
    )
    assert zero["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
