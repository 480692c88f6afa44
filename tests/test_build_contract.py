"""What the build promises: vector code in the kernels, none outside of them, one set of losses.

A missing flag does not fail a build and changes no result: it only makes everything slower.  So the
machine code is read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import fastdiv
import fastdiv._C as native
from fastdiv import reference
from helpers.cases import LOSSES, PUBLIC_LOSSES
from helpers.checkout import ROOT
from helpers.programs import FEW_LOSSES, POLICY_COUNT

pytestmark = pytest.mark.cpu_only("its machine code")

WIDTH = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
ARITHMETIC = re.compile(r"\bv?(?:add|sub|mul|div|max|min|fn?m(?:add|sub)\d+)(ps|ss)\b")
HALVES = re.compile(r"\bvcvt(?:ph2ps|ps2ph)\b.*%ymm")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")

DIRECT = " of well-separated rows"

# Where the loops are, and the least number of packed instructions for each scalar one.  A loop has
# a scalar copy of itself for the last few columns, so a function that is all loop is near 1.  The
# two passes of the forward take whole vectors, and then add up their lanes.  Measured (GCC 12,
# baseline, AVX2 and AVX-512): 0.83 and more in FirstPass, 0.46 in sum_terms_of, 0.73 elsewhere.
# Without -fopenmp-simd or -fno-trapping-math some fall below, as a test shows.
LOOPS = {
    "FirstPass": 0.7,
    "sum_terms_of": 0.4,
    "backward_row_of": 0.7,
    "grad_x": 0.7,
    "grad_t": 0.7,
    "load_widened": 0.7,
    "store_narrowed": 0.7,
}


def disassemble(path: Path) -> dict[str, list[str]]:
    """Instructions of every function of an object file or library, by demangled name."""
    if not shutil.which("objdump"):
        pytest.skip("needs objdump (binutils)")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in output.splitlines():
        if match := FUNCTION.match(line):
            name = match[1]
        elif name:
            functions[name].append(line)
    return functions


def policy_of(name: str, loop: str) -> str:
    """What the template arguments of the loop say: the loss and its target, or the 16-bit type.

    With DIRECT, where the loop takes the textbook's terms.
    """
    text = name[name.index(f"{loop}<") + len(loop) + 1 :]
    kind = r"fastdiv::(Direct|Stable)Pair<float(?:, fastdiv::ExactMath)?>, (?:(?:true|false), )?"
    pair = re.match(kind, text)
    text = text[pair.end() :] if pair else text
    suffix = DIRECT if pair and pair[1] == "Direct" else ""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "<") - (c == ">")
        if depth < 0 or (c == "," and depth == 0):
            return re.sub(r"fastdiv::|\((fastdiv::)?Target\)", "", text[:i]).strip() + suffix
    raise AssertionError(f"cannot read {name}")


def count_loops(path: Path, isa: str) -> dict[tuple[str, str], Counter[str]]:
    """Packed and scalar single precision arithmetic of every (loop, policy of float)."""
    loop = re.compile(rf"fastdiv::{isa}::(?:\w+<.*>::)?({'|'.join(LOOPS)})<")
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for name, code in disassemble(path).items():
        match = loop.search(name)
        if not match or "float" not in name:
            continue
        counter = counts[match[1], policy_of(name, match[1])]
        for line in code:
            counter["packed"] += bool(HALVES.search(line))
            if found := ARITHMETIC.search(line):
                packed = found[1] == "ps" and WIDTH[isa] in line
                counter["packed"] += packed
                counter["scalar"] += found[1] == "ss"
    # A name without arithmetic is a wrapper whose loop was inlined elsewhere, or moves bits only.
    return {k: c for k, c in counts.items() if c["packed"] + c["scalar"] > 5 or "Half" in k[1]}


def too_scalar(counts: dict[tuple[str, str], Counter[str]]) -> list[str]:
    return [
        f"{loop}<{policy}>: {c['packed']} packed, {c['scalar']} scalar"
        for (loop, policy), c in counts.items()
        if c["packed"] < LOOPS[loop] * c["scalar"] or not c["packed"]
    ]


def without_direct_terms() -> set[str]:
    """Return the policies that set ``kDirectTerms`` to false."""
    text = "".join(path.read_text() for path in (ROOT / "csrc/losses").glob("*.h"))
    policies = [s for s in text.split("\nstruct ")[1:] if "kDirectTerms = false" in s]
    return {s.split()[0] for s in policies}


BUILT = Path(native.__file__)


@pytest.mark.parametrize("isa", native.built_cpu_isas())
def test_every_kernel_is_vectorised(isa: str) -> None:
    counts = count_loops(BUILT, isa)
    names = {name for _, name in counts if "Half" not in name}
    policies = {name for name in names if DIRECT not in name}
    assert len(policies) == POLICY_COUNT, sorted(policies)
    divergences = {p for p in policies if re.match(r"\w+(Div|Distance)<float, ", p)}
    direct = {p for p in divergences if p.split("<")[0] not in without_direct_terms()}
    assert names - policies == {p + DIRECT for p in direct}
    for policy in policies:
        loops = {loop for loop, p in counts if p == policy}
        assert "FirstPass" in loops, policy
        assert ("WithStats" in policy) != bool(loops & {"backward_row_of", "grad_x"}), (
            policy,
            loops,
        )
    assert {loop for loop, p in counts if p == "Half"} == {"load_widened", "store_narrowed"}
    assert not too_scalar(counts)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-fno-trapping-math", "-fopenmp-simd"])
def test_a_missing_flag_is_noticed(flag: str, tmp_path: Path) -> None:
    """On AVX-512, where the least is lost."""
    flags = set(compiler_flags()) - {flag, "-Werror=unknown-pragmas"}
    options = ["-fPIC", "-w", f"-I{ROOT / 'csrc'}", *FEW_LOSSES]
    source, target = ROOT / "csrc/cpu/rows_avx512.cpp", tmp_path / "rows.o"
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    subprocess.run([compiler, *sorted(flags), *options, "-c", source, "-o", target], check=True)
    assert too_scalar(count_loops(target, "avx512"))


def test_wide_instructions_stay_in_their_rooms() -> None:
    """Else a machine without AVX would meet them outside the kernels that dispatch guards."""
    rooms = {"avx512": {"%ymm", "%zmm", "%k1"}, "avx2": {"%ymm"}}
    for name, code in disassemble(BUILT).items():
        # A few clones of lambdas keep their mangled name.
        room = re.search(r"fastdiv::(avx\w+)::|7fastdiv\d(avx2|avx512)(?=\d)", name)
        text = "\n".join(code)
        for register in {"%ymm", "%zmm", "%k1"} - rooms.get(
            room[1] or room[2] if room else "", set()
        ):
            assert register not in text, f"{register} in {name}"
        if not room:
            assert not re.search(r"\tv(?:add|mov|mul|pxor|sub|xor)\w*\s", text), f"AVX in {name}"


def test_nothing_else_is_exported() -> None:
    """A weak symbol could be merged with that of another library, compiled for another machine."""
    command = ["nm", "-D", "-C", "--defined-only", str(BUILT)]
    if not shutil.which("nm"):
        pytest.skip("needs nm (binutils)")
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not [line for line in lines if "fastdiv::" in line]
    assert any("PyInit__C" in line for line in lines)


def compiler_flags() -> list[str]:
    """The flags of the C++ compiler that setup.py writes out, in the order it does."""
    text = (ROOT / "setup.py").read_text()
    of_the_extension = text[text.index("def extension(") : text.index("return CppExtension(")]
    return re.findall(r'"(-[^"]+)"', of_the_extension)


def test_flags() -> None:
    flags = compiler_flags()
    for flag in (
        "-fno-trapping-math",
        "-fno-math-errno",
        "-fopenmp-simd",
        "-fvisibility=hidden",
        "-Werror=unknown-pragmas",
        "--param=vect-max-peeling-for-alignment=0",
    ):
        assert flag in flags
    for flag in (
        "-ffast-math",
        "-Ofast",
        "-funsafe-math-optimizations",
        "-ffinite-math-only",
        "-fopenmp",
        "-march=native",
        "-fassociative-math",
    ):
        assert flag not in flags


def test_denormals_are_not_switched_off() -> None:
    """As linking with -ffast-math would, for the whole process."""
    code = "import torch, fastdiv._C; assert (torch.tensor(1e-40) / 2).item() > 0"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- one set of losses ----------------------------------------------------------------------------


def test_registry_reference_cases_and_names_agree() -> None:
    """A loss that is forgotten in one of the places is missing in the others."""
    registry = set(native.loss_names())
    divergences = {n for n in registry if n in reference.DIVERGENCES}
    assert divergences == set(reference.DIVERGENCES)
    divergences -= {"reverse_skew_kl_div"}  # an option of skew_kl_div
    public = set(PUBLIC_LOSSES)
    linear = {n for n in public if n.startswith("linear_")}
    public -= linear
    assert {n.removeprefix("linear_") for n in linear} < public
    assert {c.name for c in LOSSES} == public
    assert divergences == {c.name for c in LOSSES if c.divergence}
    for name in divergences:
        assert {c.target for c in LOSSES if c.name == name} == {"logits", "log_probs", "probs"}
    # What is left of the registry: forms of the other public functions.
    forms = {
        "cross_entropy": {"cross_entropy", "smoothed_cross_entropy", "soft_cross_entropy"},
        "entropy": {"entropy"},
        "log_prob": {"log_prob"},
        "log_prob_and_entropy": {"log_prob_and_entropy"},
        **dict.fromkeys(
            ("topk_js_div", "topk_kl_div", "topk_reverse_kl_div"), set(reference.NAMED.values())
        ),
    }
    assert set(forms) == public - divergences
    kernels = set.union(*forms.values())
    statistics = {f"{n}_stats" for n in forms["cross_entropy"]}
    assert registry == set(reference.DIVERGENCES) | kernels | statistics


def test_every_function_has_its_module() -> None:
    modules = {n.removesuffix("Loss").lower() for n in fastdiv.nn.__all__}
    linear = {n for n in fastdiv.__all__ if n.startswith("linear_")}
    assert {m for m in modules if m.startswith("linear")} == {n.replace("_", "") for n in linear}
    modules = {m for m in modules if not m.startswith("linear")}
    for name in {c.name for c in LOSSES} - {"log_prob", "log_prob_and_entropy"}:
        assert name.replace("_", "") in modules
    assert modules - {c.name.replace("_", "") for c in LOSSES} == {"distillation", "labelsmoothing"}


def test_names_of_probability_vectors() -> None:
    """Those of the functions of logits where there is one, and SciPy's."""
    assert {n for n in fastdiv.__all__ if not callable(getattr(fastdiv, n))} == {"nn", "stats"}
    others = {"information_content", "jensenshannon"}
    assert set(fastdiv.stats.__all__) - others <= {c.name for c in LOSSES}
    assert others < set(fastdiv.stats.__all__)
