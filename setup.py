"""Builds fastdiv._C with the torch that build_backend.py finds; metadata is in pyproject.toml.

The CUDA kernels are built too if nvcc is found in CUDA_HOME, on PATH, in the PyPI packages, or in
/usr/local/cuda, in this order.  Torch itself need not have CUDA: the kernels are plain objects that
link against nothing of torch's.

Environment variables:
    FASTDIV_CUDA_ARCHS: architectures such as "90" or "80;90;100+PTX" or "none".  By default
        those of this machine's GPUs or, without any, 80, 90 and 100 with PTX for newer ones.
    FASTDIV_NVCC_FLAGS: further flags of nvcc.
    MAX_JOBS: files that nvcc compiles at a time.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from build_backend import TORCH, torch_is_installed

ROOT = Path(__file__).parent


def find_nvcc() -> str | None:
    """Path of the CUDA compiler, if one is to be used."""
    if os.environ.get("FASTDIV_CUDA_ARCHS") == "none":
        return None
    folders = [os.environ[v] + "/bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    folders += [os.environ.get("PATH", ""), *map(str, sorted(packages.glob("cu*/bin")))]
    folders.append("/usr/local/cuda/bin")
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        print(
            "fastdiv: no nvcc in CUDA_HOME, on PATH, from PyPI or in /usr/local/cuda: "
            "building for CPU only"
        )
    return nvcc


def architectures(nvcc: str) -> list[str]:
    """Return what to compile for: "90", or with PTX for newer GPUs "90+PTX"; at least 80."""
    if wanted := os.environ.get("FASTDIV_CUDA_ARCHS"):
        return [a.replace(".", "") for a in re.split("[;, ]+", wanted.strip(";, "))]
    codes = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    known = [n for n in map(int, re.findall(r"sm_(\d+)\b", codes)) if n >= 80]
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True).stdout
        gpus = {int(a + b) for a, b in re.findall(r"^(\d+)\.(\d)$", answer, re.MULTILINE)}
        here = [str(n) for n in sorted(gpus) if n in known]
        if known and any(n > max(known) for n in gpus):  # newer than the toolkit
            here.append(f"{max(known)}+PTX")
        if gpus:
            return here
    built = [str(n) for n in (80, 90, 100) if n in known]
    return [*built[:-1], *(f"{a}+PTX" for a in built[-1:])]


class CudaObjects:
    """The objects of csrc/cuda, compiled by nvcc apart from everything of torch's."""

    def __init__(self, nvcc: str, archs: list[str], folder: Path) -> None:
        self.nvcc, self.folder = nvcc, folder
        codes = [(a.removesuffix("+PTX"), "sm") for a in archs]
        codes += [(a.removesuffix("+PTX"), "compute") for a in archs if a.endswith("+PTX")]
        self.flags = [
            *("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"),
            *(f"-gencode=arch=compute_{n},code={kind}_{n}" for n, kind in codes),
            f'-DFD_CUDA_ARCHITECTURES="{" ".join(archs)}"',
            *shlex.split(os.environ.get("FASTDIV_NVCC_FLAGS", "")),
        ]
        if cxx := os.environ.get("CXX"):
            self.flags += ["-ccbin", shlex.split(cxx)[0]]
        parts = [(ROOT / "csrc" / part).glob("*.*h") for part in ("common", "losses", "cuda")]
        self.headers = max(p.stat().st_mtime for part in parts for p in part)

    def build(self) -> list[str]:
        """Compiles what has changed; returns the paths."""
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(self.compile, sorted((ROOT / "csrc/cuda").glob("*.cu"), key=str)))

    def compile(self, source: Path) -> str:
        """One file."""
        target = self.folder / f"{source.name}.o"
        command = [self.nvcc, *self.flags, "-c", str(source), "-o", str(target)]
        note = target.with_suffix(".command")  # by what the object was made
        newest = max(self.headers, source.stat().st_mtime)
        if not (
            target.exists()
            and target.stat().st_mtime > newest
            and note.exists()
            and note.read_text() == shlex.join(command)
        ):
            print(shlex.join(command), flush=True)
            subprocess.run(command, check=True)
            note.write_text(shlex.join(command))
        return str(target)

    def libraries(self) -> list[str]:
        """Where the CUDA runtime is, to be linked in, so that no other version can come between."""
        dry = [self.nvcc, "-dryrun", "-c", str(ROOT / "csrc/cuda/gpu.cu")]
        output = subprocess.run(dry, capture_output=True, text=True, check=True).stderr
        (line,) = re.findall(r"LIBRARIES=(.*)", output)
        return re.findall(r'"-L([^"]+)"', line)


def extension(cuda: bool):
    """Return the extension module: CPU kernels, ops and the pybind11 module, and CUDA kernels."""
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.cpp"))
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # stable ABI of torch 2.11
    if cuda:
        macros.append(("FD_WITH_CUDA", "1"))
    else:
        sources.remove("csrc/ops/cuda.cpp")
    flags = ["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
    # The build contract of the kernels, which tests/test_build_contract.py holds to account: scalar
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
        define_macros=macros,
        extra_compile_args={"cxx": flags},
        depends=sorted(str(p) for e in ("*.h", "*.inl") for p in (ROOT / "csrc").rglob(e)),
    )


if torch_is_installed():
    from torch.utils.cpp_extension import BuildExtension

    nvcc = find_nvcc()
    archs = architectures(nvcc) if nvcc else []
    if nvcc and not archs:
        print("fastdiv: no GPU of this machine is of sm_80 or later: building for CPU only")

    class Build(BuildExtension):
        """Keeps the objects, so that an editable rebuild compiles only what changed."""

        def initialize_options(self):
            super().initialize_options()
            self.build_temp = f"build/temp.{sys.implementation.cache_tag}"

        def build_extensions(self):
            if archs:
                cuda = CudaObjects(nvcc, archs, ROOT / self.build_temp / "cuda")
                (module,) = self.extensions
                module.extra_objects += cuda.build()
                module.library_dirs += cuda.libraries()
                module.libraries += ["cudart_static", "dl", "rt", "pthread"]
                # A CUDA torch's libtorch brings the one symbol of libtorch_cuda that we use.
                module.extra_link_args += ["-Wl,--no-as-needed", "-ltorch"]
            super().build_extensions()

    setup(ext_modules=[extension(bool(archs))], cmdclass={"build_ext": Build})
else:

    class NoBuild(build_ext):
        """An sdist gets by without torch; a wheel without kernels would only be slow, silently."""

        def run(self):
            raise SystemExit("fastdiv is compiled against torch {}.{} or newer".format(*TORCH))

    setup(ext_modules=[Extension("fastdiv._C", [])], cmdclass={"build_ext": NoBuild})
