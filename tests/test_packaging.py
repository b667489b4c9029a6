"""The four folders install as one package: `compress`, and nothing else, can be imported."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"compress": "compress"} | {f"compress.{name}": name for name in ("formats", "kernels", "eval")}


def run(*arguments: str, cwd: Path) -> str:
    """The standard output of a command that must succeed."""
    # PYTHONPATH could lead the child back to this checkout, and so hide what is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy: a build leaves a folder behind, and setuptools packs what it finds there."""
    source = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", "built", ".", cwd=source)
    (path,) = (source / "built").glob("*.whl")
    return path


def test_compress_is_the_only_top_level_name() -> None:
    assert distribution("compress-llm").read_text("top_level.txt") == "compress\n"


@pytest.mark.parametrize("name", ["formats", "kernels", "eval", "cli", "tests", "benchmarks"])
def test_a_folder_of_ours_is_no_package_of_its_own(name: str, tmp_path: Path) -> None:
    # Another distribution may own the name (there is one called kernels), so ask where it comes from.
    code = f"from importlib.util import find_spec; print(find_spec({name!r}))"
    assert str(ROOT) not in run(sys.executable, "-c", code, cwd=tmp_path)


def test_the_editable_install_reads_the_folders_of_the_checkout(tmp_path: Path) -> None:
    code = "import sys, importlib\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    files = run(sys.executable, "-c", code, *FOLDERS, cwd=tmp_path).splitlines()
    assert files == [str(ROOT / folder / "__init__.py") for folder in FOLDERS.values()]


def test_the_wheel_holds_every_file_of_the_folders_and_nothing_else(wheel: Path) -> None:
    """A subfolder missing from `packages`, or a data file missing from `package-data`, shows here."""
    ours = {
        "/".join([*package.split("."), *path.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "compress/py.typed" in ours
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == ours


def test_the_wheel_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # The first entry of the path comes before the editable install; the printed files show that it did.
    code = "import sys, importlib\nsys.path.insert(0, '.')\n"
    code += "for name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    files = run(sys.executable, "-c", code, *FOLDERS, cwd=tmp_path).splitlines()
    assert files == [str(tmp_path.joinpath(*package.split("."), "__init__.py")) for package in FOLDERS]


def test_the_launcher_runs_from_the_checkout() -> None:
    assert "quantize" in run(sys.executable, "cli.py", "--help", cwd=ROOT)


def test_help_costs_no_heavy_import(tmp_path: Path) -> None:
    code = "import sys, compress.cli; print({'torch', 'transformers', 'numba', 'lm_eval', 'numpy'} & set(sys.modules))"
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "set()\n"
