"""FSDP2: Accelerate understands the configuration, and shards of a 4-bit base with fp32 adapters compute the same."""

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import get_peft_model
from tiny_models import QUANTIZATION, SETTINGS, make_base
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import StateDictType, fully_shard

from qlora.adapters import lora_config
from qlora.models import load_quantized

CONFIG = str(Path(__file__).parents[2] / "config/accelerate/fsdp2.yaml")
CARDS = 2


def test_accelerate_reads_the_configuration() -> None:
    config = load_config_from_file(CONFIG)
    assert (config.distributed_type, config.num_processes) == (DistributedType.FSDP, CARDS)


def test_the_launcher_hands_it_to_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    given = launch_command_parser().parse_args(["--config_file", CONFIG, "scripts/train_run.py"])
    arguments, _, _ = _validate_launch_command(given)
    assert arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert not plugin.cpu_offload.__dict__
    assert not plugin.cpu_ram_efficient_loading


def _compare(rank: int, base: Path) -> None:
    """One of two processes: outputs and gradients of the sharded network against those of the whole one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{base}/meet", rank=rank, world_size=CARDS)
    torch.manual_seed(0)  # FSDP2 takes each process's own part: all must start from the same adapter
    network = get_peft_model(load_quantized(base, QUANTIZATION, "cpu", "sdpa"), lora_config(SETTINGS["lora"]))
    ids = torch.arange(12)[None]
    adapters = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    whole = network(input_ids=ids, use_cache=False).logits
    whole.square().mean().backward()
    expected = {name: weight.grad.clone() for name, weight in adapters.items()}
    network.zero_grad()
    mesh = init_device_mesh("cpu", (CARDS,))
    for layer in network.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    sharded = network(input_ids=ids, use_cache=False).logits
    sharded.square().mean().backward()
    assert {weight.dtype for weight in network.parameters()} == {torch.uint8, torch.float32}
    torch.testing.assert_close(sharded, whole)
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            assert weight.to_local().numel() < weight.numel()
            torch.testing.assert_close(weight.grad.full_tensor(), expected[name])
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_shards_compute_what_the_whole_computes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_compare, args=(make_base(tmp_path / "base"),), nprocs=CARDS)
