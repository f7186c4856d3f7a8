"""Prints the bytes of weights that the first of 8 ranks holds, when two copies are divided over four each.

The other ranks are not there: a process group that exchanges nothing stands for them.
"""

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import morex
from morex.sections.train import TrainConfig
from morex.train.parallel import parallelise
from morex.train.ranks import Ranks

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
model = morex.build_model(morex.load_config("mor-expert").model)
parallelise(model, TrainConfig(shards=4), Ranks(0, 8), "cpu")
held = [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]
print(sum(part.nbytes for part in held))
