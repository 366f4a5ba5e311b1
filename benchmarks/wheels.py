"""The wheels that benchmarks/gpu.sh installs where there is no network, in one folder of at most 60 MB.

python benchmarks/wheels.py --python 3.12

Downloaded for Linux on x86_64 and the --python of the machine with the GPU, whatever runs here; the
versions are those of requirements.txt. What a PyTorch image has (torch, Triton, NumPy) is not taken,
nor what --have names, for example "$(pip list --format=freeze)" of that machine. Roots are taken in
the order of their worth, each with its dependencies, until the next would not fit.
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
ROOTS = [  # by worth: without the first nothing of kd runs; what else is required no GPU part needs
    *("transformers", "accelerate", "peft", "bitsandbytes", "pytest", "hypothesis"),
    *("deepspeed", "trl", "liger-kernel", "tensorboard"),
]
BOUNDS = [  # beside requirements.txt
    *("pytest>=9,<10", "hypothesis>=6.150,<7", "trl==1.16.0", "liger-kernel==0.8.5"),
]
IMAGE = {"torch", "triton", "numpy", "setuptools", "jinja2", "markupsafe", "sympy"}
UNUSED = {  # dependencies that these parts never import, by the package that asks for them
    "huggingface-hub": {"hf-xet"},
    "tensorboard": {"grpcio", "tensorboard-data-server", "werkzeug", "pillow", "markdown"},
    "trl": {"datasets", "pandas", "pyarrow"},  # its loss kernel alone: with its trainers 69 MB more
}
CUDA_LIBRARY = re.compile(r"lib\w+_(cuda|rocm|xpu)(\d+)\.so$")  # bitsandbytes has one for each
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
                print(f"left out: {root}, {size / 1e6:.1f} MB with what it needs", flush=True)
                continue
            for file in Path(name).glob("*.whl"):
                shutil.move(file, folder)
            taken |= new
            print(
                f"{root}: {size / 1e6:.1f} MB, {', '.join(sorted(new)) or 'is there'}", flush=True
            )
    print(f"{size_of(folder) / 1e6:.1f} MB in {folder}, {len(taken)} wheels")
    left_out += [name for name in bounds if name not in {*taken, *have, *left_out}]
    print(f"left out in all: {', '.join(left_out)}")
    for file, missing in files_that_need(left_out).items():
        print(f"not run, or not in full, without {', '.join(missing)}: {file}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/wheels"), help="made anew")
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU")
    parser.add_argument("--cuda", nargs="+", default=["126", "128", "130", "132"], help="of torch")
    parser.add_argument("--have", default="", help="package==version a line: what is there")
    parser.add_argument("--limit_mb", type=float, default=60.0, help="of all wheels, in 1e6 bytes")
    return parser.parse_args()


def read_bounds() -> dict[str, str]:
    """{name: requirement} as pip takes it."""
    lines = (ROOT / "requirements.txt").read_text().splitlines() + BOUNDS
    wanted = [line for line in lines if line and line[0] not in "#-"]
    return {canonicalize_name(Requirement(line).name): line for line in wanted}


def closure(
    root: str, folder: Path, bounds: dict[str, str], have: set[str], settings: argparse.Namespace
) -> set[str]:
    """Names of the root and of all it needs beyond `have`, whose wheels are then in `folder`."""
    waiting, found = {root: bounds.get(root, root)}, set()
    while waiting:
        name, requirement = waiting.popitem()
        if name in have or name in found:
            continue
        wheel = fetch(requirement, folder, settings.python)
        if name == "bitsandbytes":
            keep_libraries(wheel, set(settings.cuda))
        found.add(name)
        for need in needs_of(wheel, settings.python):
            if need.name not in UNUSED.get(name, ()):
                waiting[need.name] = bounds.get(need.name, f"{need.name}{need.specifier}")
    return found


def fetch(requirement: str, folder: Path, python: str) -> Path:
    """The wheel of one package; DeepSpeed has none and is built here, in pure Python."""
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


def needs_of(wheel: Path, python: str) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+dist-info/METADATA", n))
        about = Parser().parsestr(archive.read(name).decode())
    target = default_environment() | {"sys_platform": "linux", "platform_machine": "x86_64"}
    target |= {"platform_system": "Linux", "python_version": python, "extra": ""}
    target["python_full_version"] = f"{python}.0"
    wanted = []
    for line in about.get_all("Requires-Dist") or []:
        need = Requirement(line)
        need.name = canonicalize_name(need.name)
        if need.marker is None or need.marker.evaluate(target):
            wanted.append(need)
    return wanted


def keep_libraries(wheel: Path, versions: set[str]) -> None:
    """Drop the libraries of other CUDA versions and makers, three quarters of bitsandbytes."""

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
    """{test or benchmark: packages it imports by itself} of those left out."""
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
