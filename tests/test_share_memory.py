"""Whether two tensors share memory, against the addresses of all of their bytes."""

from __future__ import annotations

import itertools
import random

import torch
from torch import Tensor

from fastdiv._engine.in_place import share_memory, shares_with_itself


def bytes_of(v: Tensor) -> list[range]:
    """Of every element."""
    size = v.element_size()
    places = itertools.product(*map(range, v.shape))
    firsts = (v.data_ptr() + size * sum(map(int.__mul__, i, v.stride())) for i in places)
    return [range(first, first + size) for first in firsts]


def test_share_memory_is_exact() -> None:
    chance = random.Random(0)
    buffer = torch.zeros(400, device="cpu")
    sources = (buffer, buffer, buffer.view(torch.bfloat16), torch.zeros(400, device="cpu"))
    strides, answers = (0, 1, 2, 3, 4, 5, 6, 7, 12, 20, 24), []

    def view() -> Tensor:
        dims = chance.randint(0, 3)
        sizes = [chance.choice((0, 1, 1, 2, 2, 3, 3, 4, 4)) for _ in range(dims)]
        steps = [chance.choice(strides) for _ in range(dims)]
        return chance.choice(sources).as_strided(sizes, steps, chance.randint(0, 8))

    for _ in range(3000):
        a, b = view(), view()
        of_a, of_b = ([*itertools.chain(*bytes_of(v))] for v in (a, b))
        expected = bool({*of_a} & {*of_b})
        assert share_memory(a, b) is share_memory(b, a) is expected, (a.stride(), b.stride())
        assert shares_with_itself(a) is (len(of_a) != len({*of_a})), (a.shape, a.stride())
        answers.append(expected)
    assert answers.count(True) > 300 and answers.count(False) > 300


def test_what_takes_too_long_to_tell_is_taken_for_shared() -> None:
    buffer = torch.empty(1 << 20, dtype=torch.uint8, device="cpu")
    sizes = (60,) * 6
    a = buffer.as_strided(sizes, (2 * 1009, 2 * 1013, 2 * 1019, 2 * 1021, 2 * 1031, 2 * 1033))
    b = buffer.as_strided(sizes, (2 * 1039, 2 * 1049, 2 * 1051, 2 * 1061, 2 * 1063, 2 * 1069), 1)
    assert share_memory(a, b)  # one has the even bytes, the other the odd ones
