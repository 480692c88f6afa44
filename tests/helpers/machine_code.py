"""Machine code as nvdisasm prints it: basic blocks, loops and paths.

A path never follows BRA.DIV, which leads to code for threads of a warp that have diverged, and it
steps over a CALL, which is the slow path of a division.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from helpers.instructions import Block, Instruction, Work

LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<code>[^;]*?)\s*;|(?P<label>\.L\w+):")
TARGET = re.compile(r"\.L\w+")


@dataclass(frozen=True)
class Path:
    """Blocks that are executed one after the other."""

    blocks: tuple[Block, ...]
    work: Work
    length: int  # in instructions

    @cached_property
    def code(self) -> Block:
        return tuple(i for block in self.blocks for i in block)

    @property
    def shared(self) -> bool:
        """Whether all packs are read from shared memory."""
        return all(i.opcode == "LDS" for i in self.code if i.loads)

    @property
    def special(self) -> int:
        """How many instructions take the unit of special functions."""
        return sum(i.exponential or i.conversion for i in self.code)

    @property
    def loads_ahead(self) -> bool:
        """Whether loads precede the first exponential, and their results are used after it."""
        first = next((n for n, i in enumerate(self.code) if i.exponential), None)
        loads = [n for n, i in enumerate(self.code) if i.loads]
        if first is None or not loads or loads[-1] > first:
            return False
        loaded = set().union(*(self.code[n].first_registers for n in loads))
        return not any(i.reads(loaded) for i in self.code[loads[-1] + 1 : first])


class Loop(NamedTuple):
    """A natural loop: blocks that reach the header again, and that it dominates."""

    header: int
    body: frozenset[int]


class Function:
    """The control flow of one kernel; blocks that cannot be reached are left out."""

    def __init__(self, text: str) -> None:
        self.blocks, labels = parse_blocks(text)
        edges = [successors(n, block, labels) for n, block in enumerate(self.blocks)]
        self.order = reverse_postorder(0, edges.__getitem__)
        self.successors = {n: edges[n] for n in self.order}
        self.work = {n: Work.of(self.blocks[n]) for n in self.order}
        self.dominators = dominators(self.order, self.successors)
        # An edge to a dominator closes a loop.
        self.forward = {
            n: [s for s in following if s not in self.dominators[n]]
            for n, following in self.successors.items()
        }
        position = {n: at for at, n in enumerate(self.order)}
        for n, following in self.forward.items():
            if any(position[s] <= position[n] for s in following):
                raise ValueError("a loop has two entries: its paths cannot be counted")

    @property
    def code(self) -> Iterable[Instruction]:
        return (i for n in self.order for i in self.blocks[n])

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops, in the order of the code."""
        bodies: dict[int, set[int]] = {}
        before: dict[int, list[int]] = {n: [] for n in self.order}
        for n, following in self.successors.items():
            for s in following:
                before[s].append(n)
        for n, following in self.successors.items():
            for header in set(following) & self.dominators[n]:
                body, waiting = bodies.setdefault(header, {header}), [n]
                while waiting:
                    if (at := waiting.pop()) not in body:
                        body.add(at)
                        waiting += before[at]
        return [
            Loop(header, frozenset(bodies[header])) for header in self.order if header in bodies
        ]

    def shortest_paths(self, loop: Loop) -> dict[Work, Path]:
        """Return the shortest path once through a loop for each work.

        Loops inside are walked through once.
        """
        # Of each block: the work before it, with the length of the path and its blocks.
        found: dict[int, dict[Work, tuple[int, tuple[int, ...]]]]
        found = {n: {} for n in loop.body} | {loop.header: {Work(0, 0, 0): (0, ())}}
        closed: dict[Work, tuple[int, tuple[int, ...]]] = {}
        for n in self.order:
            if n not in loop.body:
                continue
            nexts = [found[s] for s in self.forward[n] if s in loop.body]
            if loop.header in self.successors[n]:
                nexts.append(closed)
            for before, (length, path) in found[n].items():
                done = before.plus(self.work[n])
                longer = (length + len(self.blocks[n]), (*path, n))
                for best in nexts:
                    if done not in best or longer < best[done]:
                        best[done] = longer
        return {
            done: Path(tuple(self.blocks[n] for n in path), done, length)
            for done, (length, path) in closed.items()
        }

    def reachable(self, start: int, without: Iterable[int] = ()) -> set[int]:
        """Return the blocks that follow a block, with no loop repeated."""
        avoided = set(without)
        return set(reverse_postorder(start, lambda n: set(self.forward[n]) - avoided))

    def around(self, outer: Loop, inner: Loop) -> int:
        """Return the fewest instructions of an iteration of a loop outside of one inside."""
        best = {(outer.header, False): 0}  # before a block, and whether the inner loop is behind
        closed = []
        for n in self.order:
            inside = n in inner.body
            for passed in (False, True):
                if n not in outer.body or (n, passed) not in best:
                    continue
                length = best[n, passed] + (0 if inside else len(self.blocks[n]))
                if outer.header in self.successors[n] and (passed or inside):
                    closed.append(length)
                for s in self.forward[n]:
                    key = (s, passed or inside)
                    best[key] = min(best.get(key, length), length)
        if not closed:
            raise ValueError("no path leads through a loop inside of another")
        return min(closed)

    def total(self, loop: Loop) -> Work:
        """Return the work of all blocks of a loop."""
        total = Work(0, 0, 0)
        for n in loop.body:
            total = total.plus(self.work[n])
        return total

    def longest(self, times: Callable[[Loop], int], avoided: set[int]) -> int:
        """Return the most instructions from the entry to an exit; ``times`` says how often a loop.

        Of a loop the longest way from its header back to it is counted.
        """
        length = self._longest(0, set(self.order) - avoided, self.loops, times)
        if length is None:
            raise ValueError("no path leads from the entry to an exit")
        return length

    def _longest(
        self, start: int, region: set[int], loops: list[Loop], times: Callable[[Loop], int]
    ) -> int | None:
        """Return the longest path within a region, in which a loop counts as one block."""
        outer = [a for a in loops if not any(a.body < b.body for b in loops)]
        loop_of = {n: loop for loop in outer for n in loop.body}
        best: dict[int, int] = {}
        for n in reversed(self.order):
            loop = loop_of.get(n)
            if n not in region or (loop and n != loop.header):
                continue
            body = loop.body & region if loop else {n}
            cost = len(self.blocks[n])
            if loop:
                inner = [a for a in loops if a.body < loop.body]
                cost = times(loop) * (self._longest(n, set(body), inner, times) or 0)
            after = [best[s] for b in body for s in self.forward[b] if s in best and s not in body]
            ends = any(
                start in self.successors[b] or any(i.opcode == "EXIT" for i in self.blocks[b])
                for b in body
            )
            if after or ends:
                best[n] = cost + max(after, default=0)
        return best.get(start)

    def detour(self, start: int, loop: Loop) -> set[int]:
        """Return the blocks of a detour through a loop and the exchange of its results.

        Other paths lead from the start, which precedes the loop, to an exit.
        """
        after = self.reachable(loop.header) - loop.body
        shuffles = {n for n in after if any(i.opcode == "SHFL" for i in self.blocks[n])}
        exchange = min(shuffles, key=self.order.index, default=loop.header)
        both = self.dominators[loop.header] & self.dominators[exchange]
        for n in reversed(self.order):
            if n in both - self.dominators[start]:
                others = self.reachable(start, without=[n])
                if any(i.opcode == "EXIT" for b in others for i in self.blocks[b]):
                    return self.dominated(n)
        return set()

    def dominated(self, by: int) -> set[int]:
        return {n for n in self.order if by in self.dominators[n]}


def parse_blocks(text: str) -> tuple[list[Block], dict[str, int]]:
    """Return the basic blocks of a listing, and the block at each label."""
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        if match["label"]:
            if blocks[-1]:
                blocks.append([])
            labels[match["label"]] = len(blocks) - 1
            continue
        instruction = Instruction.parse(match["code"])
        blocks[-1].append(instruction)
        if instruction.ends_block:
            blocks.append([])
    if not blocks[0]:
        raise ValueError("a listing without instructions")
    return [tuple(b) for b in blocks], labels


def successors(n: int, block: Block, labels: dict[str, int]) -> list[int]:
    """Return the blocks that may follow a block."""
    last = block[-1] if block else None
    if last is None or not last.ends_block:
        return [n + 1] if block else []
    if ".DIV" in last.name:
        return [n + 1]
    following = [n + 1] if last.conditional else []
    if last.opcode in ("EXIT", "RET"):
        return following
    targets = TARGET.findall(last.operands)
    if not targets:
        raise ValueError(f"a branch whose target is not known: {last.name} {last.operands}")
    return following + [labels[target] for target in targets]


def reverse_postorder(start: int, following: Callable[[int], Iterable[int]]) -> list[int]:
    """Return what can be reached from a block; a block precedes those that follow it."""
    seen, order = {start}, []
    stack = [(start, iter(following(start)))]
    while stack:
        n, rest = stack[-1]
        new = next((s for s in rest if s not in seen), None)
        if new is None:
            order.append(n)
            stack.pop()
        else:
            seen.add(new)
            stack.append((new, iter(following(new))))
    return order[::-1]


def dominators(order: list[int], following: dict[int, list[int]]) -> dict[int, set[int]]:
    """Return the blocks that every path from the entry to a block passes, itself included."""
    before: dict[int, list[int]] = {n: [] for n in order}
    for n in order:
        for s in following[n]:
            before[s].append(n)
    found = {n: set(order) for n in order}
    found[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for n in order[1:]:
            new = set.intersection(*(found[b] for b in before[n])) | {n}
            if new != found[n]:
                found[n], changed = new, True
    return found
