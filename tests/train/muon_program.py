"""Makes matrices that are divided over the ranks orthogonal, and compares with what one process does."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from morex.train.muon import orthogonal, orthogonal_all

SHAPES = ((8, 8), (7, 16), (1, 5), (33, 4), (2, 3), (3, 6, 5), (1, 4, 4), (5, 2, 9))


def main(copies: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (copies, dist.get_world_size() // copies), mesh_dim_names=("copies", "shards"))
    torch.manual_seed(0)
    for dtype in (None, torch.bfloat16):
        wholes = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        for dim in (0, 1):
            divided = [distribute_tensor(whole, mesh, [Replicate(), Shard(dim)]) for whole in wholes]
            found = orthogonal_all(divided, dtype)
            for whole, update, part in zip(wholes, divided, found, strict=True):
                joined = DTensor.from_local(part, mesh, update.placements, shape=whole.shape, stride=whole.stride())
                assert part.dtype == whole.dtype
                limit = 1e-12 if dtype is None else 0.0
                assert (joined.full_tensor() - orthogonal(whole, dtype)).abs().max() <= limit, (whole.shape, dim)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of the group may outlive the interpreter, which then aborts


if __name__ == "__main__":
    main(int(sys.argv[1]))
