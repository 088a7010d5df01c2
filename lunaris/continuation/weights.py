"""The check of `init_from` before a run is launched. No torch where there is none to check."""

from __future__ import annotations

from lunaris.config.schema.root import Config
from lunaris.runs.facts import checkpoint_folders
from lunaris.runs.run_dir import RunDir


def check_weights(cfg: Config) -> None:
    """Raise UserError where the weights that a new run starts from do not fit; write nothing."""
    if cfg.init_from is not None and not checkpoint_folders(RunDir(cfg.out_dir).checkpoints):
        from lunaris.config.instantiate import instantiate_component
        from lunaris.data.prepare.build import make_ready
        from lunaris.run import bare_model
        from lunaris.warm_start.begin import plan_start, shapes_of
        from lunaris.warm_start.source import find

        data = instantiate_component("data", cfg.data)
        make_ready(data)
        shapes = shapes_of(bare_model(cfg, data.vocab_size).state_dict())
        plan_start(cfg, find(str(cfg.init_from)), shapes, data)
