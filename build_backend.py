"""The build backend of pyproject.toml: setuptools', which asks for torch where it compiles.

An sdist needs no torch.  A wheel needs its headers; they are those of the torch that is installed
already, even where pip isolates the build and would download another, of several gigabytes.
"""

import re
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

TORCH = (2, 11)  # the first with all of the stable ABI that csrc uses


def torch_is_installed() -> bool:
    """Whether there is a torch to compile against; makes it importable in an isolated build."""
    site_packages = sysconfig.get_path("purelib")
    if site_packages not in sys.path:
        sys.path.append(site_packages)
    try:
        numbers = re.findall(r"\d+", version("torch"))
    except PackageNotFoundError:
        return False
    return tuple(map(int, numbers[:2])) >= TORCH


def get_requires_for_build_wheel(config_settings=None):
    """Return what pip installs before it builds."""
    requirements = build_meta.get_requires_for_build_wheel(config_settings)
    if not torch_is_installed():
        requirements += ["torch>={}.{}".format(*TORCH), "numpy"]
    return requirements


get_requires_for_build_editable = get_requires_for_build_wheel
