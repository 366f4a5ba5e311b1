"""The GPUs that the driver lists: which build of torch fits them, and whether this torch can.

python -m kd.gpu index
python -m kd.gpu check

launch/setup.sh calls both: the first prints the index of the build before torch is installed, the
second checks the build after it. The file imports torch only where it is needed. It also says
whether Triton can compile its kernels here.
"""

import argparse
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass

from kd.distributed import local_rank, print_rank0

INDEX = "https://download.pytorch.org/whl/"
OLDEST_DRIVER = {12: (525, 60, 13), 13: (580, 65, 6)}  # on Linux, by the major version of CUDA


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi describes it."""

    name: str
    driver: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name}, driver {self.driver}"


@dataclass(frozen=True)
class Build:
    """A CUDA build of torch: the GPUs that it has kernels for."""

    name: str
    oldest: tuple[int, int]
    newest: tuple[int, int]

    def fits(self, gpu: Gpu) -> bool:
        """Whether the build runs on a GPU with its present driver."""
        driver = numbers(gpu.driver) >= OLDEST_DRIVER[int(self.name[2:4])]
        return driver and self.oldest <= gpu.capability <= self.newest


# The best first. The last torch with cu128 is 2.11; it serves new GPUs under an older driver.
# Source: the support matrix in PyTorch's RELEASE.md (2.11 to 2.13).
BUILDS = (
    Build("cu130", (7, 5), (12, 9)),
    Build("cu126", (5, 0), (9, 0)),
    Build("cu128", (7, 5), (12, 9)),
)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a dotted version."""
    return tuple(int(part) for part in version.split("."))


def listed_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none without a driver, and none that the user has hidden."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    query = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
    return [Gpu(name, driver, numbers(capability)) for name, driver, capability in rows]


def torch_index() -> str | None:
    """The index with the build of torch for this machine; None: the package index as it is.

    TORCH_INDEX in the environment replaces the choice. Raises ValueError if no build fits.
    """
    if chosen := os.environ.get("TORCH_INDEX"):
        return chosen
    gpus = listed_gpus()
    if not gpus:
        return None
    for build in BUILDS:
        if all(build.fits(gpu) for gpu in gpus):
            return INDEX + build.name
    wanted = ", ".join(
        f"{build.name} (compute capability {build.oldest[0]}.{build.oldest[1]} or newer, driver "
        f"{'.'.join(map(str, OLDEST_DRIVER[int(build.name[2:4])]))} or newer)"
        for build in BUILDS
    )
    raise ValueError(
        f"found {gpus[0]}, compute capability {'.'.join(map(str, gpus[0].capability))}; no build "
        f"of torch fits, wanted one of {wanted}: update the driver, or name the index of another "
        "build in TORCH_INDEX"
    )


def check_gpus() -> None:
    """Raise ValueError if the driver lists GPUs, and the installed torch can use none of them."""
    gpus = listed_gpus()
    if not gpus:
        return
    import torch

    reason = why_unusable(
        gpus, torch.version.cuda, torch.cuda.is_available(), torch.cuda.get_arch_list()
    )
    if reason:
        raise ValueError(
            f"found {len(gpus)} GPU{'s' if len(gpus) > 1 else ''} ({gpus[0]}), which torch "
            f"{torch.__version__} cannot use: {reason}; run bash launch/setup.sh, which installs a "
            "build that fits, or compute on the CPU: use_cpu: true in training, otherwise "
            "CUDA_VISIBLE_DEVICES=-1"
        )


def device() -> str:
    """The device of this rank for evaluation and generation.

    Raises ValueError if there are GPUs that the installed torch cannot use.
    """
    import torch

    check_gpus()
    return f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"


def why_unusable(
    gpus: list[Gpu], cuda: str | None, available: bool, architectures: list[str]
) -> str | None:
    """Why a torch with this CUDA version and these architectures can use no GPU; None if it can."""
    if cuda is None:
        return "it is a build without CUDA"
    if not available:
        oldest = OLDEST_DRIVER.get(numbers(cuda)[0], (0,))
        if numbers(gpus[0].driver) < oldest:
            return f"CUDA {cuda} needs driver {'.'.join(map(str, oldest))} or newer"
        return "CUDA does not start (python -c 'import torch; torch.zeros(1).cuda()' says why)"
    if not any(has_kernels(gpu.capability, architectures) for gpu in gpus):
        found = ".".join(map(str, gpus[0].capability))
        return f"it has kernels for {', '.join(architectures)}, not for compute capability {found}"
    return None


def has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a build runs on a GPU: code of the same major version, or PTX, none of them newer.

    `architectures` are those of torch.cuda.get_arch_list(), such as sm_80 or compute_120.
    """
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")  # sm_90a, sm_100f
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "compute" and (major, minor) <= capability:
            return True
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return False


@functools.cache
def triton_compiles() -> bool:
    """Whether Triton can compile kernels here; prints a note where it is installed and cannot.

    Triton builds a small C module for each machine, with a C compiler and Python's headers.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    problem = why_no_c_module()
    if problem:
        print_rank0(
            f"note: {problem}; the loss and AWQ layers use PyTorch's operators, which are slower"
        )
    return problem is None


def why_no_c_module() -> str | None:
    """Why a C module for this Python cannot be compiled; None if it can."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        return "Triton needs a C compiler (apt-get install gcc), and there is none"
    headers = sysconfig.get_paths()["include"]
    check = [compiler, "-x", "c", "-fsyntax-only", f"-I{headers}", "-"]
    done = subprocess.run(check, input="#include <Python.h>\n", capture_output=True, text=True)
    if done.returncode:
        return f"Triton needs Python.h (apt-get install python3-dev), and it is not in {headers}"
    return None


def main() -> None:
    """Print the index, or check the GPUs; a mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m kd.gpu")
    parser.add_argument("action", choices=["index", "check"])
    try:
        if parser.parse_args().action == "index":
            print(torch_index() or "")
        else:
            check_gpus()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
