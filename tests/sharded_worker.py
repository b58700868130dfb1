"""A process of a run in which processes each hold a part of the weights, on CPUs.

accelerate offers FSDP2 on accelerators only. This runs the loop's own worker with FSDP2 over gloo.
torchrun starts it with the folder of a job.
"""

import sys
from pathlib import Path

from octomed.train import students
from octomed.train.launch import build_accelerator


def sharded_accelerator(how):
    "accelerate's handle as FSDP2's configuration gives it on accelerators."
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = build_accelerator(how)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


if __name__ == "__main__":
    students.build_accelerator = sharded_accelerator
    students.main(Path(sys.argv[1]))
