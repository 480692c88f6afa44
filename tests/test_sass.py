"""The counter of machine code, on snippets written by hand: it must be able to fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sass
from helpers.cuda_binary import tool
from helpers.instructions import Work
from helpers.kernel_cost import Cost, MainLoop, cost, main_loops
from helpers.launch_shapes import Launch
from helpers.machine_code import Function

pytestmark = pytest.mark.cpu_only("no GPU is used")

LOAD = "LDG.E.128 R4, desc[UR6][R2.64]"
SECOND_LOAD = "LDG.E.128 R8, desc[UR6][R2.64+0x10]"
MAXIMUM = "FMNMX R20, R20, R4, !PT"
EXPONENTIAL = "MUFU.EX2 R12, R13"
SUM = "FADD R21, R21, R12"
STORE = "STG.E.128 desc[UR6][R2.64], R4"
# Eight elements of bf16.
TILE = [LOAD, MAXIMUM, *[EXPONENTIAL, SUM] * 8]


def listing(*lines: str) -> str:
    """Return what nvdisasm prints of these instructions and labels."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * n:04x}*/                   {line} ;"
        for n, line in enumerate(lines)
    )


def branch(label: str, guard: str = "") -> str:
    return f"{guard} BRA `({label})".strip()


def kernel(*body: str) -> Function:
    """Return a function with one loop at .L_x_0."""
    again = branch(".L_x_0", "@P1")
    return Function(listing("MOV R20, RZ", ".L_x_0:", *body, again, "EXIT"))


def only_loop(function: Function, rows: int = 1) -> MainLoop:
    (main,) = main_loops(function, rows, pack=8)
    return main


def test_a_loop_is_counted() -> None:
    main = only_loop(kernel(*TILE))
    assert main.elements == 8
    assert main.path.length == len(TILE) + 1  # the branch
    assert main.per_element == (len(TILE) + 1) / 8
    assert not main.gradient and not main.path.shared


def test_one_more_instruction_counts() -> None:
    before, after = only_loop(kernel(*TILE)), only_loop(kernel(*TILE, SUM))
    assert after.per_element - before.per_element == 1 / 8


def test_a_cold_branch_is_left_out() -> None:
    """Rows off alignment take two loads and a join, which must not look like 16 elements."""
    join = ["SHF.R.U64 R4, R4, R28, R5"] * 4
    cold = [".L_x_1:", LOAD, SECOND_LOAD, *join, branch(".L_x_2")]
    edge = [".L_x_3:", *["@!P2 LDG.E.U16 R4, desc[UR6][R2.64]"] * 8, ".L_x_2:"]
    hot = [branch(".L_x_1", "@P0"), branch(".L_x_3", "@P2"), LOAD, branch(".L_x_2")]
    main = only_loop(kernel(*hot, *cold, *edge, *TILE[1:]))
    assert main.elements == 8 and main.path.work.loads == 1
    assert main.path.length == len(hot) + len(TILE)


def test_a_rebase_is_counted_apart() -> None:
    rebase = [branch(".L_x_1", "@!P0"), "FADD R8, R8, -R16", EXPONENTIAL, "FMUL R9, R9, R12"]
    main = only_loop(kernel(LOAD, MAXIMUM, *rebase, ".L_x_1:", *TILE[2:]))
    assert main.path.length == len(TILE) + 2
    assert main.with_rebase == len(TILE) + 1 + len(rebase)
    assert main.path.work.exponentials == 8


def test_the_short_way_past_the_exponentials_is_no_path() -> None:
    main = only_loop(kernel(LOAD, branch(".L_x_1", "@P0"), *TILE[1:], ".L_x_1:"))
    assert main.path.length == len(TILE) + 2


@pytest.mark.parametrize("before", [[], ["IADD3 R3, R3, 0x1, RZ"]])
def test_a_spin_loop_inside_is_walked_once(before: list[str]) -> None:
    """A thread waits for its tile in shared memory; both loops may begin at the same place."""
    spin = [".L_x_1:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3", branch(".L_x_1", "@!P0")]
    tile = ["LDS.128 R4, [R2]", *TILE[1:]]
    main = only_loop(kernel(*before, *spin, *tile))
    assert main.path.length == len(before) + len(spin) - 1 + len(tile) + 1
    assert main.path.shared


def test_all_targets_of_a_table_are_followed() -> None:
    table = 'BRX R4 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)'
    ways = [".L_x_1:", SUM, "EXIT", ".L_x_2:", SUM, SUM, "EXIT"]
    function = Function(listing(table, *ways))
    assert function.longest(lambda loop: 1, avoided=set()) == 4
    assert len(function.order) == 3


def test_of_nested_loops_the_inner_is_counted() -> None:
    inner = [".L_x_1:", *TILE, branch(".L_x_1", "@P0")]
    main = only_loop(kernel("IADD3 R3, R3, 0x1, RZ", *inner))
    assert main.path.length == len(TILE) + 1
    assert main.around == 2  # the addition, and the branch to .L_x_0


def test_stages_are_spread_over_their_elements() -> None:
    stage = [".L_x_0:", SUM, SUM, SUM, ".L_x_1:", *TILE, branch(".L_x_1", "@P0")]
    text = listing("MOV R20, RZ", *stage, branch(".L_x_0", "@P1"), "EXIT")
    found = cost(launch()._replace(stages=4), text, USED)
    assert found.instructions_per_element == round((len(TILE) + 1) / 8 + 4 * 4 / 64, 2)
    assert found.fixed_instructions == 2


def test_a_divergent_handler_is_left_out() -> None:
    shuffles = ["BRA.DIV UR4, `(.L_x_9)", "SHFL.BFLY PT, R5, R4, R3, 0x1f", ".L_x_8:"]
    handler = [".L_x_9:", "WARPSYNC.COLLECTIVE R5, `(.L_x_7)", ".L_x_7:", branch(".L_x_8")]
    function = Function(listing(*shuffles, "EXIT", *handler))
    assert sum(len(function.blocks[n]) for n in function.order) == 3


def test_two_rows_have_two_loads_for_a_pair() -> None:
    pairs = [LOAD, SECOND_LOAD, *[EXPONENTIAL, SUM] * 16]
    assert only_loop(kernel(*pairs), rows=2).elements == 8
    assert only_loop(kernel(*pairs)).elements == 16
    assert main_loops(kernel(*TILE), rows=2, pack=8) == []


def test_a_gradient_is_written_for_every_load() -> None:
    main = only_loop(kernel(*TILE, STORE))
    assert main.gradient and main.path.length == len(TILE) + 2
    # The way around the store is shorter, and not counted.
    assert only_loop(kernel(*TILE, branch(".L_x_1", "@P0"), STORE, ".L_x_1:")).path.work == Work(
        1, 1, 8
    )


def test_whether_the_next_tile_is_loaded_early() -> None:
    assert not only_loop(kernel(*TILE)).path.loads_ahead
    # The maximum is of registers that an earlier iteration loaded.
    ahead = [LOAD, "FMNMX R20, R20, R16, !PT", *TILE[2:], "MOV R16, R4"]
    assert only_loop(kernel(*ahead)).path.loads_ahead
    assert not only_loop(kernel(*ahead[1:-1], LOAD, "MOV R16, R4")).path.loads_ahead


def test_the_longest_path_counts_loops_as_told() -> None:
    function = kernel(*TILE)
    assert function.longest(lambda loop: 0, avoided=set()) == 2  # MOV and EXIT
    assert function.longest(lambda loop: 3, avoided=set()) == 2 + 3 * (len(TILE) + 1)
    fork = [branch(".L_x_1", "@P0"), SUM, SUM, "EXIT", ".L_x_1:", "EXIT"]
    assert Function(listing(*fork)).longest(lambda loop: 1, avoided=set()) == 4


def test_what_cannot_be_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="two entries"):
        entries = [branch(".L_x_1", "@P0"), ".L_x_0:", SUM, ".L_x_1:", SUM, branch(".L_x_0", "@P1")]
        Function(listing(*entries, "EXIT"))
    with pytest.raises(ValueError, match="not known"):
        Function(listing("BRX R4 -0x10", "EXIT"))
    with pytest.raises(ValueError, match="without instructions"):
        Function("")


def launch(kernel: str = "forward", passes: int = 1) -> Launch:
    """Return the launch of a loss of one row of bf16, in blocks of 256 threads."""
    return Launch(
        loss="made up",
        policy="MadeUp<float>",
        target="none",
        dtype="bf16",
        kernel=kernel,
        architecture=90,
        element=2,
        rows=1,
        passes=passes,
        classes=32768,
        threads=256,
        blocks=2,
        stages=1,
        dynamic_bytes=0,
    )


USED = {"REG": 40, "STACK": 0, "LOCAL": 0, "SHARED": 3072}


def test_cost_of_a_forward() -> None:
    text = listing("MOV R20, RZ", ".L_x_0:", *TILE, branch(".L_x_0", "@P1"), "EXIT")
    found = cost(launch(), text, USED)
    assert found.instructions_per_element == found.with_rebase == 2.38
    assert found.fixed_instructions == 2
    assert found.blocks_per_sm == 6
    assert found.bytes_in_flight_per_sm == 6 * 256 * 16
    assert found.predicted_share_of_copy == 0.92


def test_a_second_pass_is_added() -> None:
    first = [".L_x_0:", *TILE, branch(".L_x_0", "@P1")]
    # One for rows that are close, and a cheaper one for others.
    close = [".L_x_1:", *TILE, *[SUM] * 80, branch(".L_x_1", "@P1"), "EXIT"]
    apart = [".L_x_2:", *TILE, SUM, branch(".L_x_2", "@P1"), "EXIT"]
    text = listing("MOV R20, RZ", *first, branch(".L_x_2", "@P0"), *close, *apart)
    found = cost(launch(passes=2), text, USED)
    assert found.instructions_per_element == round((2 * (len(TILE) + 1) + 1) / 8, 2)
    assert [loop["kind"] for loop in found.loops] == ["first pass", "alternative", "second pass"]


def test_a_rare_pass_costs_nothing() -> None:
    """A row that is close takes another pass, and an exchange of what it adds up."""
    first = [".L_x_0:", *TILE, branch(".L_x_0", "@P1"), "SHFL.BFLY PT, R5, R4, R3, 0x1f"]
    rare = [branch(".L_x_9", "@P2"), branch(".L_x_2", "@P3"), ".L_x_1:", *TILE]
    merge = [branch(".L_x_1", "@P1"), ".L_x_2:", "SHFL.BFLY PT, R5, R4, R3, 0x1f", *[SUM] * 50]
    text = listing("MOV R20, RZ", *first, *rare, *merge, ".L_x_9:", SUM, "EXIT")
    found = cost(launch(), text, USED)
    assert found.instructions_per_element == 2.38
    assert [loop["kind"] for loop in found.loops] == ["first pass", "rare pass"]
    assert found.fixed_instructions == len(["MOV", "SHFL", "BRA", "FADD", "EXIT"])


@pytest.mark.parametrize(
    ("kernel", "passes", "why"),
    [
        ("backward", 1, "no loop over tiles that writes a gradient"),
        ("forward", 2, "1 loops over tiles for 2 passes"),
    ],
)
def test_a_loop_that_is_not_found_is_an_error(kernel: str, passes: int, why: str) -> None:
    text = listing("MOV R20, RZ", ".L_x_0:", *TILE, branch(".L_x_0", "@P1"), "EXIT")
    with pytest.raises(ValueError, match=why):
        cost(launch(kernel, passes), text, USED)


def test_a_pass_without_exponentials_is_an_error() -> None:
    text = listing("MOV R20, RZ", ".L_x_0:", LOAD, SUM, branch(".L_x_0", "@P1"), "EXIT")
    with pytest.raises(ValueError, match="0 loops over tiles"):
        cost(launch(), text, USED)


def test_the_program_fails_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("cuobjdump", "--version")  # skips the test where it is missing
    (tmp_path / "empty.c").write_text("int nothing;")
    subprocess.run(["cc", "-c", "empty.c"], cwd=tmp_path, check=True)
    monkeypatch.setattr(sys, "argv", ["sass.py", str(tmp_path / "empty.o")])
    with pytest.raises(SystemExit, match="not contain device code"):
        sass.main()


def test_fields_of_the_json_are_distinct() -> None:
    assert not set(Launch._fields) & set(Cost._fields)
