"What accelerate does not offer on processors: the loop's own worker with FSDP2 over gloo. Run by torchrun with the folder of a job."

import sys
from pathlib import Path

from octomed.train import launch as execution
from octomed.train import loop as train


def sharded(how):
    "accelerate's handle as FSDP2's configuration gives it on accelerators."
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    a = execution.accelerator_of(how)
    a.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    a.state.distributed_type = DistributedType.FSDP
    return a


if __name__ == "__main__":
    train.accelerator_of = sharded
    train.main(Path(sys.argv[1]))
