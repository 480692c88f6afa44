"""Linear losses of weights that FSDP2 shards over data-parallel ranks, beside one process."""

from __future__ import annotations

import pytest

from helpers import shard_data_parallel as programs
from helpers.ranks import Ranks

pytestmark = pytest.mark.cpu_only("the ranks of these tests are processes of the CPU")
BOTH_SIZES = pytest.mark.parametrize("size", [2, 4])


@pytest.mark.parametrize(
    ("size", "policy"),
    [(2, "float32"), (4, "float32"), (2, "bfloat16"), (4, "bfloat16"), (2, "bfloat16 sums")],
)
def test_functions(ranks: Ranks, size: int, policy: str) -> None:
    ranks.run(size, programs.functions, policy)


@BOTH_SIZES
@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_modules(ranks: Ranks, size: int, policy: str) -> None:
    ranks.run(size, programs.modules, policy)


@pytest.mark.parametrize("program", ["replicas", "smaller_shards", "tensor_parallel"])
def test_other_meshes(ranks: Ranks, program: str) -> None:
    ranks.run(4, getattr(programs, program))


@BOTH_SIZES
@pytest.mark.parametrize("program", ["policies_of_one_call", "other_gradients"])
def test_one_call(ranks: Ranks, size: int, program: str) -> None:
    ranks.run(size, getattr(programs, program))


def test_sharded_classes_still_compile(ranks: Ranks) -> None:
    ranks.run(2, programs.compiled_beside)


def test_refused(ranks: Ranks) -> None:
    for found in ranks.run(2, programs.refused):
        kinds = {name: kind for name, (kind, _) in found.items()}
        assert kinds == {
            "computed": "RuntimeError",
            "shape": "ValueError",
            "compiled": "Unsupported",
            "extension": "ValueError",
        }
        assert "pass the parameter of fully_shard itself" in found["computed"][1]
        assert "cannot be gathered in compiled code" in found["compiled"][1]
        assert "all-gather extensions" in found["extension"][1]
