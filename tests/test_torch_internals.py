"""A canary: what Lunaris uses of torch's private API is there and has the known signature.

When a test fails here after an update of torch, `lunaris/torch_internals.py` is to be adapted.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.distributed.distributed_c10d  # noqa: F401 - reached by name below
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext, SubprocessContext

import lunaris

PACKAGE = Path(lunaris.__file__).parent
FILES = [*PACKAGE.rglob("*.py"), *PACKAGE.parent.glob("launch/**/*.py")]

_C10D = "torch.distributed.distributed_c10d"
_CHANGED = f"torch {torch.__version__} has changed {{}}: adapt lunaris/torch_internals.py"

SIGNATURES = {
    f"{_C10D}._get_default_store": [],
    f"{_C10D}._set_pg_timeout": ["timeout", "group"],
    "torch.distributed.device_mesh.DeviceMesh._unflatten": [
        "self",
        "dim",
        "mesh_sizes",
        "mesh_dim_names",
        "backend_override",
    ],
    "torch.distributed.checkpoint.DefaultSavePlanner._dedup_save_plans": ["self", "all_plans"],
    "torch.cuda.memory._dump_snapshot": ["filename", "augment_with_fx_traces"],
    "torch.amp.GradScaler._unscale_grads_": [
        "self",
        "optimizer",
        "inv_scale",
        "found_inf",
        "allow_fp16",
    ],
}
AGENT = {
    "_start_workers": (LocalElasticAgent, ["self", "worker_group"]),
    "_monitor_workers": (LocalElasticAgent, ["self", "worker_group"]),
    "_close": (PContext, ["self", "death_sig", "timeout"]),
}
# Attributes that a constructor sets.
ATTRIBUTES = {
    "_pcontext": LocalElasticAgent,
    "_remaining_restarts": SimpleElasticAgent,
    "subprocess_handlers": SubprocessContext,
}
NAMES = [
    f"{_C10D}._world.pg_map",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    "torch.ops.mkldnn._is_mkldnn_fp16_supported",
    "torch._amp_foreach_non_finite_check_and_unscale_",
    "torch.cuda.memory._record_memory_history",
    "torch.ops.aten._grouped_mm.default",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    "torch.ops.aten._scaled_dot_product_flash_attention.default",
    "torch.ops.aten._scaled_dot_product_efficient_attention.default",
    "torch.ops.aten._scaled_dot_product_cudnn_attention.default",
]


def find(path: str) -> object:
    try:
        return reduce(getattr, path.split(".")[1:], torch)
    except AttributeError:
        pytest.fail(_CHANGED.format(f"{path}, which is gone"))


@pytest.mark.parametrize("path", NAMES)
def test_name_is_there(path: str) -> None:
    find(path)


@pytest.mark.parametrize("path", SIGNATURES)
def test_function_takes_the_known_arguments(path: str) -> None:
    assert list(inspect.signature(find(path)).parameters) == SIGNATURES[path], _CHANGED.format(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", AGENT)
def test_elastic_agent_can_be_overridden(name: str) -> None:
    owner, parameters = AGENT[name]
    method = getattr(owner, name, None)
    assert method, _CHANGED.format(f"{owner.__name__}.{name}, which is gone")
    assert list(inspect.signature(method).parameters) == parameters, _CHANGED.format(name)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_elastic_agent_has_the_known_state(name: str) -> None:
    assert name in ATTRIBUTES[name].__init__.__code__.co_names, _CHANGED.format(name)


def private_names(path: Path) -> Iterator[str]:
    """Yield what a file reaches of torch's private names; `torch._foreach_*` have no other name."""
    for node in ast.walk(ast.parse(path.read_text())):
        reached = ""
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            reached = f"{node.module}." + ".".join(alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            reached = ast.unparse(node)
        public = reached.replace("._foreach_", ".").replace(".__version__", "")
        if reached.startswith(("torch.", "dist.")) and "._" in public:
            yield reached


def test_only_one_file_uses_private_names() -> None:
    found = {path.name: [*private_names(path)] for path in FILES if [*private_names(path)]}
    assert found.keys() == {"torch_internals.py"}, found
