"""Checks across keys and groups, on the login node, before anything starts. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import OmegaConf

if TYPE_CHECKING:
    from omegaconf import DictConfig


def validate(cfg: DictConfig, *, check_data: bool = True) -> None:
    """Raise UserError for the first fault of a composed config."""
    OmegaConf.to_object(cfg)
