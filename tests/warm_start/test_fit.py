"""Which weights go where, and what is said of those that do not fit."""

from __future__ import annotations

import pytest

from lunaris.errors import UserError
from lunaris.warm_start.fit import fit, require_fit

DENSE = {
    "embedding.weight": (10, 4),
    "blocks.0.norm.weight": (4,),
    "blocks.0.feed_forward.swiglu.gate_up.weight": (16, 4),
    "blocks.0.feed_forward.swiglu.down.weight": (4, 8),
}
MOE = {
    "embedding.weight": (10, 4),
    "blocks.0.norm.weight": (4,),
    "blocks.0.feed_forward.router.weight": (2, 4),
    "blocks.0.feed_forward.router.balance_bias": (2,),
    "blocks.0.feed_forward.experts.gate_up": (2, 4, 16),
    "blocks.0.feed_forward.experts.down": (2, 8, 4),
}


def test_a_model_fits_itself() -> None:
    for shapes in (DENSE, MOE):
        found = fit(shapes, shapes, resize=False)
        assert found.same == list(shapes) and not found.faults() and not found.upcycled


def test_a_dense_feed_forward_becomes_experts() -> None:
    found = fit(MOE, DENSE, resize=False)
    assert found.upcycled == ["blocks.0.feed_forward."] and not found.faults()
    assert found.same == ["embedding.weight", "blocks.0.norm.weight"]
    assert found.fresh == [name for name in MOE if "router" in name]
    # The other way there is nothing to take.
    back = fit(DENSE, MOE, resize=False)
    assert back.missing == [name for name in DENSE if "swiglu" in name]
    assert "blocks.0.feed_forward.experts.down" in back.left_over


def test_counts_of_a_router_may_be_absent() -> None:
    less = {name: shape for name, shape in MOE.items() if "balance_bias" not in name}
    assert not fit(MOE, less, resize=False).faults() and not fit(less, MOE, resize=False).faults()


def test_another_vocabulary_fits_by_choice() -> None:
    more = DENSE | {"embedding.weight": (12, 4)}
    found = fit(more, DENSE, resize=False)
    assert found.unfit == {"embedding.weight": ((10, 4), (12, 4))}
    with pytest.raises(UserError, match=r"init_from=x: .*init_from_resize=true.*\n.*\(10, 4\) the"):
        require_fit(found, "x", strict=True)
    assert fit(more, DENSE, resize=True).resized == ["embedding.weight"]
    wider = DENSE | {"embedding.weight": (10, 5)}
    assert fit(wider, DENSE, resize=True).unfit


def test_what_does_not_fit_is_refused_unless_it_is_not_strict() -> None:
    deeper = DENSE | {"blocks.1.norm.weight": (4,)}
    for model, source, said in [
        (deeper, DENSE, "missing there: blocks.1.norm.weight"),
        (DENSE, deeper, "left over: blocks.1.norm.weight"),
    ]:
        found = fit(model, source, resize=False)
        with pytest.raises(UserError, match=said):
            require_fit(found, "x", strict=True)
        require_fit(found, "x", strict=False)
    with pytest.raises(UserError, match="do not fit"):
        require_fit(fit({"a": (1,)}, DENSE, resize=False), "x", strict=False)
