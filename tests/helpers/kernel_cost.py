"""What a kernel costs per element and per row, counted in its machine code.

An element is one column of the rows that are read together: of a divergence it is a pair.
"""

from __future__ import annotations

from typing import NamedTuple

from helpers.cuda_binary import RESERVED_SHARED, Kernel, listings, resources
from helpers.gpu_model import GPUS
from helpers.instructions import is_edge
from helpers.launch_shapes import Launch
from helpers.machine_code import Function, Loop, Path

# A butterfly takes five steps among lanes, three among warps and one among blocks.
STEPS_OF_A_BUTTERFLY = 3


class MainLoop(NamedTuple):
    """A loop over the tiles of a row, on its aligned path."""

    loop: Loop
    path: Path  # without a rebase of the sums to a new maximum
    with_rebase: int  # instructions of the path with the least of it
    elements: int  # per iteration and thread
    gradient: bool  # written in this loop
    around: int  # instructions per stage, in the loop over the stages of a slice

    @property
    def per_element(self) -> float:
        """Instructions per element of the loop itself."""
        return self.path.length / self.elements


def size(loop: Loop) -> int:
    return len(loop.body)


class Cost(NamedTuple):
    """The figures of one kernel of a loss; the fields are those of the JSON."""

    instructions_per_element: float
    with_rebase: float
    special_per_element: float
    fixed_instructions: int
    registers: int
    blocks_per_sm: int
    bytes_in_flight_per_sm: int
    next_tile_loaded_early: bool
    predicted_share_of_copy: float
    share_with_rebase: float
    loops: list[dict[str, object]]


def main_loop(function: Function, loop: Loop, rows: int, pack: int) -> MainLoop | None:
    """Return what is counted of a loop, or None if it is not one over the tiles of a row.

    ``pack`` is how many elements of one row a load of 16 bytes has.
    """
    total = function.total(loop)
    if not total.loads or not total.exponentials:
        return None
    paths = function.shortest_paths(loop)
    gradient = any(done.stores and done.loads for done in paths)
    groups: dict[int, list[Path]] = {}
    whole = {
        done: path
        for done, path in paths.items()
        if done.loads
        and done.loads % rows == 0
        and done.stores == (done.loads // rows if gradient else 0)
        and done.exponentials >= done.loads // rows * pack
    }
    least = min((done.cold for done in whole), default=0)
    for done, path in whole.items():
        if done.cold == least:
            groups.setdefault(done.loads // rows * pack, []).append(path)
    if not groups:
        return None
    # Each element has an exponential; in a pair, each row has one if there are as many.
    most = max(groups)
    each = min(rows, max(path.work.exponentials for path in groups[most]) // most)
    outer = min((a for a in function.loops if loop.body < a.body), key=size, default=None)
    around = function.around(outer, loop) if outer else 0
    found = []
    for elements, group in groups.items():
        full = [path for path in group if path.work.exponentials >= each * elements]
        if full:
            steady = min(full, key=lambda path: path.length)
            more = [p.length for p in full if p.work.exponentials > steady.work.exponentials]
            with_rebase = min(more, default=steady.length)
            found.append(MainLoop(loop, steady, with_rebase, elements, gradient, around))
    return cheapest(found)


def main_loops(function: Function, rows: int, pack: int) -> list[MainLoop]:
    """Return the innermost loops over tiles; a loop around one of them is none."""
    found: list[MainLoop] = []
    for loop in sorted(function.loops, key=size):
        if not any(main.loop.body < loop.body for main in found):
            main = main_loop(function, loop, rows, pack)
            if main is not None:
                found.append(main)
    return sorted(found, key=lambda main: main.loop.header)


def cheapest(some: list[MainLoop]) -> MainLoop:
    return min(some, key=lambda main: main.per_element)


class Passes(NamedTuple):
    """The main loops of a kernel, by what they are for."""

    counted: dict[str, MainLoop]  # "first pass", "second pass", "gradient"
    rare: list[MainLoop]  # passes for rows close to zero


def find_passes(function: Function, mains: list[MainLoop], launch: Launch) -> Passes:
    """Tell the loops apart by their order; of alternatives, the cheapest is counted.

    Raise ValueError if a loop that the kernel must have is not found.
    """
    sweeps = [main for main in mains if not main.gradient]
    gradients = [main for main in mains if main.gradient]

    def leads_to(a: MainLoop, b: MainLoop) -> bool:
        return a is not b and b.loop.header in function.reachable(a.loop.header)

    counted, rare = {}, []
    if launch.kernel != "backward":
        first = [a for a in sweeps if not any(leads_to(b, a) for b in sweeps)]
        if any(i.opcode == "UBLKCP" for i in function.code):  # else a row is read by a warp
            first = [a for a in first if a.path.shared] or first
        last = [a for a in sweeps if a not in first and not any(leads_to(a, b) for b in sweeps)]
        if not first or (launch.passes == 2 and not last):
            raise ValueError(f"{len(sweeps)} loops over tiles for {launch.passes} passes")
        counted["first pass"] = cheapest(first)
        if launch.passes == 2:
            counted["second pass"] = cheapest(last)
        certain = first + (last if launch.passes == 2 else [])
        rare = [a for a in sweeps if a not in certain]
    if launch.kernel != "forward":
        if not gradients:
            raise ValueError("no loop over tiles that writes a gradient")
        counted["gradient"] = cheapest(gradients)
    return Passes(counted, rare)


def merges(function: Function, loop: Loop) -> bool:
    """Whether threads exchange results in a loop."""
    return any(i.opcode == "SHFL" for n in loop.body for i in function.blocks[n])


def rare_loops(function: Function, passes: Passes, mains: list[MainLoop]) -> list[Loop]:
    """Return the loops of rare passes: also of those that only add up all logits."""
    other_loads = [
        loop
        for loop in function.loops
        if function.total(loop).loads
        and not function.total(loop).stores
        and not merges(function, loop)
        and not any(main.loop.body <= loop.body for main in mains)
    ]
    found = [main.loop for main in passes.rare] + other_loads
    return [loop for loop in found if not any(loop.body < other.body for other in found)]


def fixed_instructions(function: Function, passes: Passes, mains: list[MainLoop]) -> int:
    """Return the instructions of a thread outside of the loops over tiles.

    Rare passes, with what leads to them, are left out.
    """
    looped = set().union(*(loop.body for loop in function.loops))
    avoided = {n for n in function.order if n not in looped and is_edge(function.blocks[n])}
    if "first pass" in passes.counted:
        first = passes.counted["first pass"].loop.header
        after = function.reachable(first)
        rare = [a for a in rare_loops(function, passes, mains) if a.header in after]
        for loop in rare:
            avoided |= function.detour(first, loop)

    copies = {n for n in function.order for i in function.blocks[n] if i.opcode == "UBLKCP"}

    def times(loop: Loop) -> int:
        # Loops over tiles or stages are counted elsewhere, and one thread asks for the copies.
        if copies & loop.body or any(main.loop.body <= loop.body for main in mains):
            return 0
        return STEPS_OF_A_BUTTERFLY if merges(function, loop) else 1

    return function.longest(times, avoided)


def describe(main: MainLoop, kind: str) -> dict[str, object]:
    """Return one entry of ``loops``."""
    return {
        "kind": kind,
        "instructions_per_element": round(main.per_element, 2),
        "with_rebase": round(main.with_rebase / main.elements, 2),
        "special_per_element": round(main.path.special / main.elements, 2),
        "elements_per_iteration": main.elements,
        "loads_ahead": main.path.loads_ahead,
        "reads_shared_memory": main.path.shared,
        "instructions_per_stage": main.around,
    }


def cost(launch: Launch, text: str, used: dict[str, int]) -> Cost:
    """Count the machine code of one kernel; ``used`` are its resources."""
    gpu = GPUS[launch.architecture]
    function = Function(text)
    mains = main_loops(function, launch.rows, 16 // launch.element)
    passes = find_passes(function, mains, launch)
    counted = list(passes.counted.values())
    stages = sum(main.around for main in counted) * launch.stages / launch.elements_per_thread
    per_element = sum(main.per_element for main in counted) + stages
    with_rebase = sum(main.with_rebase / main.elements for main in counted) + stages
    special = sum(main.path.special / main.elements for main in counted)
    fixed = fixed_instructions(function, passes, mains)
    spread = fixed / launch.elements_per_thread

    static = used["SHARED"] + (RESERVED_SHARED if launch.architecture < 90 else 0)
    shared = static + launch.dynamic_bytes
    blocks = gpu.blocks_per_sm(used["REG"], launch.threads, shared)
    copies = any(i.opcode == "UBLKCP" for i in function.code)
    main = counted[0]
    ahead = blocks * launch.threads * 16 * main.path.work.loads
    kinds = {main.loop: kind for kind, main in passes.counted.items()}
    kinds |= {main.loop: "rare pass" for main in passes.rare}
    return Cost(
        instructions_per_element=round(per_element, 2),
        with_rebase=round(with_rebase, 2),
        special_per_element=round(special, 2),
        fixed_instructions=fixed,
        registers=used["REG"],
        blocks_per_sm=blocks,
        bytes_in_flight_per_sm=blocks * launch.dynamic_bytes if copies else ahead,
        next_tile_loaded_early=(copies and main.path.shared) or main.path.loads_ahead,
        predicted_share_of_copy=round(
            gpu.share_of_copy(per_element + spread, special, launch.bytes_moved), 3
        ),
        share_with_rebase=round(
            gpu.share_of_copy(with_rebase + spread, special, launch.bytes_moved), 3
        ),
        loops=[describe(a, kinds.get(a.loop, "alternative")) for a in mains],
    )


def costs(file: str, launches: list[Launch]) -> dict[Launch, Cost | str]:
    """Return the cost of those launches whose kernel the file has, or why it was not found."""
    wanted: dict[Kernel, list[Launch]] = {}
    for launch in launches:
        wanted.setdefault(launch.entry, []).append(launch)
    found: dict[Launch, Cost | str] = {}
    for kernel, text in listings(file, wanted.__contains__):
        # Losses that share a kernel share its launch.
        same: dict[Launch, Cost | str] = {}
        for launch in wanted[kernel]:
            nameless = launch._replace(loss="")
            if nameless not in same:
                try:
                    same[nameless] = cost(launch, text, resources(file)[kernel])
                except ValueError as problem:
                    same[nameless] = f"{launch.entry}: {problem}"
            found[launch] = same[nameless]
    return found
