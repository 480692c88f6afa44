"""Gradients that take the memory of earlier ones."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fastdiv

pytestmark = pytest.mark.cpu_only("memory of a CPU")

ROWS, CLASSES = 512, 2048  # 4 MiB of float32
NBYTES = 4 * ROWS * CLASSES


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_(), torch.arange(ROWS)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """What a test keeps is freed when its block ends."""
    yield
    gc.collect()
    with fastdiv.warm_gradients() as memory:
        assert memory.nbytes == 0


def gradient(x: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(fastdiv.cross_entropy(x, y), x)[0]


def test_memory_is_used_again_and_the_gradient_is_right(rows: tuple[Tensor, Tensor]) -> None:
    expected = gradient(*rows)
    with fastdiv.warm_gradients():
        first = gradient(*rows)
        place = first.data_ptr()
        torch.testing.assert_close(first, expected, rtol=0, atol=0)
        first.fill_(float("nan"))
        del first
        second = gradient(*rows)
        assert second.data_ptr() == place
    # It outlives the block.
    torch.testing.assert_close(second, expected, rtol=0, atol=0)


def test_memory_that_somebody_holds_stays_his(rows: tuple[Tensor, Tensor]) -> None:
    with fastdiv.warm_gradients() as memory:
        first = gradient(*rows)
        view = first[1:]
        kept = first.clone()
        del first
        second = gradient(*rows)
        second.zero_()
        torch.testing.assert_close(view, kept[1:], rtol=0, atol=0)
        assert memory.nbytes == 0
        del second
        assert memory.nbytes == NBYTES


def test_one_gradient_of_each_size_waits(rows: tuple[Tensor, Tensor]) -> None:
    x, y = rows
    with fastdiv.warm_gradients() as memory:
        several = [gradient(x, y) for _ in range(3)]
        assert len({g.data_ptr() for g in several}) == 3
        del several
        assert memory.nbytes == NBYTES
        half = gradient(x[: ROWS // 2].detach().requires_grad_(), y[: ROWS // 2])
        del half
        assert memory.nbytes == NBYTES * 3 // 2
        memory.empty()
        assert memory.nbytes == 0


def test_four_sizes_wait() -> None:
    sizes = [ROWS + 64 * i for i in range(6)]
    with fastdiv.warm_gradients() as memory:
        for rows in sizes:
            gradient(torch.zeros(rows, CLASSES, requires_grad=True), torch.zeros(rows).long())
        assert memory.nbytes == 4 * CLASSES * sum(sizes[-4:])
        for _ in range(9):  # one size, again and again, keeps the others
            gradient(torch.zeros(sizes[-1], CLASSES, requires_grad=True), torch.arange(sizes[-1]))
        assert memory.nbytes == 4 * CLASSES * sum(sizes[-4:])


def test_blocks_nest(rows: tuple[Tensor, Tensor]) -> None:
    with fastdiv.warm_gradients() as memory:
        with fastdiv.warm_gradients():
            gradient(*rows)
        assert memory.nbytes == NBYTES
    assert memory.nbytes == 0
    gradient(*rows)
    assert memory.nbytes == 0


def test_both_gradients_and_halves() -> None:
    x, t = (torch.randn(1024, 1024, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    loss = fastdiv.kl_div(x, t, target_type="logits")
    expected = torch.autograd.grad(loss, (x, t), retain_graph=True)
    with fastdiv.warm_gradients() as memory:
        for _ in range(2):
            found = torch.autograd.grad(loss, (x, t), retain_graph=True)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            del found
        assert memory.nbytes == 2 * 1024 * 1024


def test_threads_share_it(rows: tuple[Tensor, Tensor]) -> None:
    expected = gradient(*rows)
    with fastdiv.warm_gradients() as memory, ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: gradient(*rows), range(16)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        del found
        assert memory.nbytes <= NBYTES


def test_small_gradients_are_not_kept() -> None:
    x = torch.zeros(8, 128, requires_grad=True)
    with fastdiv.warm_gradients() as memory:
        gradient(x, torch.arange(8))
        assert memory.nbytes == 0


def test_an_error_ends_the_block(rows: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(IndexError), fastdiv.warm_gradients() as memory:
        gradient(*rows)
        assert memory.nbytes == NBYTES
        gradient(rows[0], rows[1] + CLASSES)
    assert memory.nbytes == 0
