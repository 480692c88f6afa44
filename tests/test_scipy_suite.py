"""The tests that SciPy ships for its functions pass on ours of the same name.

They run in a process of their own, for SciPy's conftest sets up pytest, hypothesis and torch as it
likes.  Left out is what says nothing about our functions:

- the messages of errors; their types are compared (``scipy_on_fastdiv.raises``);
- ``test_marray.py`` and every array library but NumPy and torch, which ours do not take;
- ``pdist`` with "jensenshannon", which calls SciPy's own C++; with "test_jensenshannon" it calls
  ours, and those tests are here.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import scipy

import fastdiv

pytest.importorskip("scipy.stats.tests", reason="SciPy was installed without its tests")

ARRAYS = {
    "scipy.stats.tests.test_entropy": 15,
    "scipy.stats.tests.test_axis_nan_policy": 150,
    "scipy.stats.tests.test_device_dtype": 4,  # since SciPy 1.16
    "scipy.spatial.tests.test_distance": 3,
}
TENSORS = {"scipy.stats.tests.test_entropy": 15}


@pytest.mark.slow
@pytest.mark.cpu_only("SciPy's tests make arrays")
@pytest.mark.parametrize(
    ("modules", "library"), [(ARRAYS, "numpy"), (TENSORS, "torch")], ids=["arrays", "tensors"]
)
def test_tests_of_scipy(modules: dict[str, int], library: str, tmp_path: Path) -> None:
    """Of each module as many as it has at least, so that none is lost by a new name."""
    modules = {m: least for m, least in modules.items() if importlib.util.find_spec(m)}
    paths = [Path(__file__).parent, Path(fastdiv.__file__).parents[1], os.environ.get("PYTHONPATH")]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path), "SCIPY_XSLOW": "1"}
    if library == "torch":
        env["SCIPY_ARRAY_API"] = '["torch"]'
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = "-q -c pytest.ini -p no:cacheprovider -p helpers.scipy_on_fastdiv --rootdir".split()
    options.append(str(Path(scipy.__file__).parents[1]))
    report = tmp_path / "report.xml"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", "--pyargs", *modules],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-9000:] + run.stderr[-3000:]
    passed = collections.Counter(
        next(module for module in modules if case.get("classname", "").startswith(module))
        for case in ElementTree.parse(report).iter("testcase")
        if not len(case)  # neither skipped nor failed
    )
    assert all(passed[module] >= least for module, least in modules.items()), passed
