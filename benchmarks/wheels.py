"""Download the wheels that benchmarks/gpu.sh installs without a network, 48 MB at most.

python benchmarks/wheels.py --python 3.12

The wheels are for Linux on x86_64 and for the --python of the GPU machine; versions follow
requirements.txt. Packages of IMAGE are skipped, and so are those that --have names, for example
"$(pip list --format=freeze)" of that machine. Packages are taken in order of importance, each with
its dependencies, as long as the next one fits. A test imports every part of benchmarks/gpu.py with
IMAGE and these wheels alone. With the 18 MB of the repository the wheels fit into 64 MiB.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ROOTS = [  # most important first; no GPU part needs the other requirements
    *("transformers", "accelerate", "peft", "bitsandbytes", "pytest", "hypothesis"),
    *("deepspeed", "datasketch", "datasets", "trl", "liger-kernel", "tensorboard"),
]
BOUNDS = [  # in addition to requirements.txt
    *("pytest>=9,<10", "hypothesis>=6.150,<7", "trl==1.16.0", "liger-kernel==0.8.5"),
]
# What an image for scientific PyTorch holds, with its dependencies: Transformers, Accelerate, and
# packages that are too large to carry (SciPy, pandas, PyArrow). The other names are dependencies of
# these that the wheels need, too.
IMAGE = {
    *("torch", "triton", "numpy", "scipy", "pandas", "pyarrow", "matplotlib", "setuptools"),
    *("transformers", "accelerate", "huggingface-hub", "tokenizers", "safetensors", "jinja2"),
    *("filelock", "fsspec", "packaging", "psutil", "pyyaml", "requests", "tqdm", "xxhash"),
    *("typing-extensions", "pillow"),
}
UNUSED = {  # dependencies that these parts never import, by the package that requires them
    "huggingface-hub": {"hf-xet"},
    "tensorboard": {"grpcio", "tensorboard-data-server", "werkzeug", "pillow", "markdown"},
}
CUDA_LIBRARY = re.compile(r"lib\w+_(cuda|rocm|xpu)(\d+)\.so$")  # bitsandbytes ships one per version
TAGS = [f"manylinux_2_{minor}_x86_64" for minor in range(40, 4, -1)]
TAGS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def main() -> None:
    settings = arguments()
    folder = Path(settings.out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bounds = read_bounds()
    have = IMAGE | {
        canonicalize_name(re.split(r"[=<> @]", line)[0]) for line in settings.have.splitlines()
    }
    taken: set[str] = set()
    left_out = []
    for root in ROOTS:
        with tempfile.TemporaryDirectory() as name:
            new = closure(root, Path(name), bounds, have | taken, settings)
            size = sum(file.stat().st_size for file in Path(name).glob("*.whl"))
            if size + size_of(folder) > settings.limit_mb * 1e6:
                left_out.append(root)
                print(f"left out: {root}, {size / 1e6:.1f} MB with its dependencies", flush=True)
                continue
            for file in Path(name).glob("*.whl"):
                shutil.move(file, folder)
            taken |= new
            print(
                f"{root}: {size / 1e6:.1f} MB, {', '.join(sorted(new)) or 'already there'}",
                flush=True,
            )
    print(f"{size_of(folder) / 1e6:.1f} MB in {folder}, {len(taken)} wheels")
    left_out += [name for name in bounds if name not in {*taken, *have, *left_out}]
    print(f"not included: {', '.join(left_out)}")
    for file, missing in files_that_need(left_out).items():
        print(f"skipped or incomplete without {', '.join(missing)}: {file}")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", default=str(ROOT / "benchmarks/wheels"), help="Output folder; replaced."
    )
    parser.add_argument("--python", default="3.12", help="Python version of the GPU machine.")
    parser.add_argument(
        "--cuda", nargs="+", default=["126", "128", "130", "132"], help="CUDA versions to keep."
    )
    parser.add_argument(
        "--have", default="", help="Installed packages, one package==version per line."
    )
    parser.add_argument("--limit_mb", type=float, default=48.0, help="Maximum size in MB.")
    return parser.parse_args(argv)


def read_bounds() -> dict[str, str]:
    """{name: requirement}, as pip reads it."""
    lines = (ROOT / "requirements.txt").read_text().splitlines() + BOUNDS
    wanted = [line for line in lines if line and line[0] not in "#-"]
    return {canonicalize_name(Requirement(line).name): line for line in wanted}


def closure(
    root: str, folder: Path, bounds: dict[str, str], have: set[str], settings: argparse.Namespace
) -> set[str]:
    """Fetch the root and its dependencies beyond `have` into `folder`; return their names."""
    waiting, found = {root: bounds.get(root, root)}, set()
    while waiting:
        name, requirement = waiting.popitem()
        if name in have or name in found:
            continue
        wheel = fetch(requirement, folder, settings.python)
        if name == "bitsandbytes":
            keep_libraries(wheel, set(settings.cuda))
        found.add(name)
        for need in needs_of(name, required_by(wheel), settings.python):
            waiting[need.name] = bounds.get(need.name, f"{need.name}{need.specifier}")
    return found


def fetch(requirement: str, folder: Path, python: str) -> Path:
    """Fetch the wheel of one package. DeepSpeed has no wheel and is built here, pure Python."""
    before = set(folder.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    if canonicalize_name(Requirement(requirement).name) == "deepspeed":
        call = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, requirement]
    else:
        target = ["--python-version", python, "--implementation", "cp"]
        target += [word for tag in TAGS for word in ("--platform", tag)]
        call = ["download", "--no-deps", "--only-binary=:all:", *target, "-d", folder, requirement]
    subprocess.run([*pip, *map(str, call)], check=True)
    (wheel,) = set(folder.glob("*.whl")) - before
    return wheel


def required_by(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+dist-info/METADATA", n))
        about = Parser().parsestr(archive.read(name).decode())
    return about.get_all("Requires-Dist") or []


def needs_of(package: str, lines: list[str], python: str) -> list[Requirement]:
    """What a package needs on the GPU machine, from the lines Requires-Dist of its metadata."""
    target = default_environment() | {"sys_platform": "linux", "platform_machine": "x86_64"}
    target |= {"platform_system": "Linux", "python_version": python, "extra": ""}
    target["python_full_version"] = f"{python}.0"
    wanted = []
    for line in lines:
        need = Requirement(line)
        need.name = canonicalize_name(need.name)
        if need.name in UNUSED.get(package, ()):
            continue
        if need.marker is None or need.marker.evaluate(target):
            wanted.append(need)
    return wanted


def keep_libraries(wheel: Path, versions: set[str]) -> None:
    """Drop libraries of other CUDA versions and vendors: three quarters of bitsandbytes."""

    def kept(name: str) -> bool:
        library = CUDA_LIBRARY.search(name)
        return library is None or library[1] == "cuda" and library[2] in versions

    smaller = wheel.with_suffix(".part")
    with (
        zipfile.ZipFile(wheel) as old,
        zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new,
    ):
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines()
                data = "\n".join(line for line in lines if kept(line.split(",")[0])).encode()
            if kept(info.filename):
                new.writestr(info.filename, data)
    smaller.replace(wheel)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def files_that_need(packages: list[str]) -> dict[str, list[str]]:
    """{test or benchmark: missing packages that it imports directly}."""
    found: dict[str, list[str]] = {}
    for file in sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]):
        for package in packages:
            if re.search(
                rf"^\s*(import|from) {package.replace('-', '_')}\b", file.read_text(), re.M
            ):
                found.setdefault(str(file.relative_to(ROOT)), []).append(package)
    return found


if __name__ == "__main__":
    main()
