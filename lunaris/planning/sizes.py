"""What the sizes of activations depend on, and the shapes that several of them share. No torch.

Legend: T tokens of a micro-step, B sequences, L positions, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from lunaris.config.schema.moe import MoEConfig
from lunaris.config.schema.root import Config
from lunaris.moe.blocks import Blocks, blocks_for, capacity_of
from lunaris.planning.parameters import window_of


@dataclass(frozen=True)
class Sizes:
    """What the sizes of all parts depend on.

    length: L, which is less in the depths of multi-token prediction. sharded: parameters are
    gathered in the dtype of the products, so that autocast casts no copies. padded: experts
    multiply padded blocks of rows.
    """

    cfg: Config
    length: int
    gpu: bool
    sharded: bool
    padded: bool

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.length

    @property
    def sequences(self) -> int:
        """B."""
        return self.cfg.trainer.batch_size

    @property
    def product(self) -> int:
        """The bytes of a number in matrix products."""
        return 2 if self.cfg.trainer.half() else 4

    @property
    def half(self) -> bool:
        return self.product == 2

    def norm(self, width: int, groups: int = 1, *, cast: bool = False) -> int:
        """Return what a norm keeps of `groups` rows of `width` a token, its input included.

        cast: the input is a product's result, which a norm in half precision copies to float32.
        Without it, the float32 input is counted.
        """
        normalised = 0 if self.gpu else 4 * groups * width
        own = 4 * groups * width if (self.half or not cast) else 0
        return self.tokens * (own + normalised + 4 * groups)

    def input(self, width: int) -> int:
        """Return what a product keeps of its float32 input where nothing else keeps it."""
        return self.tokens * self.product * width

    def cast(self, width: int) -> int:
        """Return the copy that a product in half precision keeps of an input kept by others."""
        return self.tokens * 2 * width if self.half else 0

    def weights(self, elements: int) -> int:
        """Return the copies of weights that autocast makes and the backward needs."""
        return 2 * elements if self.half and not self.sharded else 0


def has_ranges(at: Sizes, layer: int) -> bool:
    """Return whether positions of a layer attend to less than all positions up to themselves."""
    window = window_of(at.cfg.attention, layer)
    return at.cfg.data.document_masking or (window is not None and window < at.length)


def attention_shape(at: Sizes, width: int, sinks: bool, ranged: bool) -> tuple[int, int, int]:
    """Return the queries and keys of a head, and their width, as the attention kernel gets them.

    width: of queries, keys and values, the widest of them. ranged: of `has_ranges`.
    """
    if not sinks:
        return at.length, at.length, width
    # A sink is a first key, and without a mask there is a first query as well.
    return at.length + (0 if ranged else 1), at.length + 1, width + 8 - width % 8


def local_experts(cfg: Config) -> int:
    """Return how many experts of a layer a process has."""
    assert isinstance(cfg.moe, MoEConfig)
    return cfg.moe.n_experts // getattr(cfg.parallelism, "expert_parallel", 1)


def expert_blocks(cfg: Config, length: int) -> Blocks:
    """Return the blocks that hold a micro-step's assignments where experts multiply padded ones.

    length: L. With expert parallelism, which knows the largest load, loads are taken to be even.
    """
    moe, sequences, local = cfg.moe, cfg.trainer.batch_size, local_experts(cfg)
    assert isinstance(moe, MoEConfig)
    assignments = length * moe.n_experts_per_token
    rows, most = sequences * assignments, sequences * length
    apart = cfg.data.document_masking and moe.capacity_scope == "document"
    if local < moe.n_experts:
        most = -(-rows // local)
    elif moe.capacity_factor is not None and not apart:
        most = sequences * capacity_of(assignments, moe.n_experts, moe.capacity_factor)
    return blocks_for(rows, local, most)
