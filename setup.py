"""Builds fastdiv._C with whatever torch this environment has; metadata is in pyproject.toml."""

import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def installed_torch() -> bool:
    """Whether torch can be imported, also from inside an isolated build.

    Pip hides site-packages from an isolated build, which would then download a torch of several
    gigabytes beside the one that is already there.
    """
    site_packages = Path(sysconfig.get_path("purelib"))
    if (site_packages / "torch").is_dir() and str(site_packages) not in sys.path:
        sys.path.append(str(site_packages))
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def extension():
    """The one extension module: CPU kernels, ops and the pybind11 module."""
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp"))
    flags = ["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # The build contract of the kernels, which tests/test_vectorised.py holds to account: scalar
    # loops under `omp simd` become vector code only with these.  Never -ffast-math: it breaks rows
    # with NaN or infinity, and switches denormals off for the whole process.
    flags += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-Werror=unknown-pragmas"]
    if platform.system() == "Linux":
        # No peeling for alignment: the order of a row's sums must not depend on its address.
        flags += ["--param=vect-max-peeling-for-alignment=0"]
    return CppExtension(
        "fastdiv._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],  # stable ABI of torch 2.11
        extra_compile_args={"cxx": flags},
        depends=sorted(str(p) for e in ("*.h", "*.inl") for p in (ROOT / "csrc").rglob(e)),
    )


if installed_torch():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Keeps the objects, so that an editable rebuild compiles only what changed."""

        def initialize_options(self):
            super().initialize_options()
            self.build_temp = f"build/temp.{sys.implementation.cache_tag}"

    setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
else:
    # Asked for its requirements before anything is built, setuptools reads them here.
    setup(setup_requires=["torch>=2.11", "numpy"])
