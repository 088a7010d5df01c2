"""Prints as JSON the elements of each parameter that rank 0 of 4 holds, for each list of overrides.

The process group is torch's fake one: no other process exists, collectives do nothing.
"""

from __future__ import annotations

import json
import os
import sys

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


def main() -> None:
    """Wrap the model of every config of argv[1] and print what rank 0 holds."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    from lunaris.config.compose import compose
    from lunaris.config.instantiate import instantiate_component
    from lunaris.model.layers import local_part
    from lunaris.precision import Precision
    from lunaris.run import bare_model

    found = []
    for overrides in json.loads(sys.argv[1]):
        cfg = compose(overrides)
        parallelism = instantiate_component("parallelism", cfg.parallelism)
        precision = Precision(cfg.trainer.precision, parallelism.device)
        model = parallelism.wrap(bare_model(cfg, 97), precision=precision, seed=1, compile=False)
        found.append({name: local_part(p).numel() for name, p in model.named_parameters()})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
