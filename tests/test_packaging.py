"""Every kind of install, in environments made for the purpose, from a copy of the checkout.

The environments share the libraries of the running one (torch is large): a .pth file appends its site-packages to their
`sys.path`. Import hooks of editable installs do not come along, so nothing here tests the running install by mistake.
"""

from __future__ import annotations

import email
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from llm2_fast.version import __version__
from test_layers import find_imports, find_modules

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = "llm2_fast_C" + sysconfig.get_config_var("EXT_SUFFIX")
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input")
# Offline: what a build needs is in the running environment, what the package needs is shared with it.
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# LlamaForCausalLM lives in one of the modules that make transformers probe for the package `kernels`.
IMPORT_CHECK = """
import importlib.util, json
from transformers import LlamaForCausalLM
import llm2_fast, llm2_fast.kernels, llm2_fast_C
origins = {module.__name__: module.__file__ for module in (llm2_fast, llm2_fast.kernels, llm2_fast_C)}
kernels = importlib.util.find_spec("kernels")
print(json.dumps(origins | {"kernels": kernels and kernels.origin}))
"""

# The first line: an extension installed in the shared environment must not stand in for the one removed.
IMPORT_ALL_WITHOUT_EXTENSION = """
import sys; sys.modules["llm2_fast_C"] = None
import llm2_fast, llm2_fast.cli, llm2_fast.ops
print({name: getattr(llm2_fast, name) for name in llm2_fast.__all__})
print(llm2_fast.__file__)
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Standard output of a command that must succeed, run with this environment's tools first on PATH."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLM2_FAST"))}
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment.get("PATH", os.defpath)])
    completed = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True)
    if completed.returncode != 0:
        raise AssertionError(f"{command} exited {completed.returncode}:\n{completed.stdout}\n{completed.stderr}")
    return completed.stdout


def copy_checkout(destination: Path) -> Path:
    """A copy of the files that git tracks or would track, links kept as links."""
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listing.split("\0")):
        source, target = ROOT / name, destination / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return destination


class Environment:
    """A virtual environment that sees the libraries of the running one after its own."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.site_packages = Path(
            run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
        )
        shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.site_packages / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")

    def pip_install(self, *arguments: str | Path, cwd: Path) -> None:
        run(self.python, *PIP, "install", "--ignore-installed", *OFFLINE, *arguments, cwd=cwd)

    def import_check(self, cwd: Path) -> dict[str, Path | None]:
        """Where the modules come from when Python starts in `cwd`."""
        origins = json.loads(run(self.python, "-c", IMPORT_CHECK, cwd=cwd).splitlines()[-1])
        return {name: path and Path(path) for name, path in origins.items()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copy that is built and installed; its C++ build folder serves every install from it."""
    return copy_checkout(tmp_path_factory.mktemp("build") / "llm2_fast")


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in which nothing is ever built."""
    return copy_checkout(tmp_path_factory.mktemp("source") / "llm2_fast")


@pytest.fixture(scope="module")
def plain(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("plain") / "venv")
    environment.pip_install(".", cwd=checkout)
    return environment


@pytest.fixture(scope="module")
def editable(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("editable") / "venv")
    environment.pip_install("-e", ".", cwd=checkout)
    return environment


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", folder, ".", cwd=checkout)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ".", cwd=checkout)
    (path,) = folder.glob("*.tar.gz")
    return path


def list_files(root: Path, folder: str) -> set[str]:
    """The files below a folder of a checkout, links followed, relative to its root."""
    walk = os.walk(root / folder, followlinks=True)
    return {Path(parent, name).relative_to(root).as_posix() for parent, _, names in walk for name in names}


def package_files(unbuilt: Path) -> set[str]:
    """What an install has to contain beside the extension: modules, kernels included, and data."""
    files = list_files(unbuilt, "llm2_fast")
    assert "llm2_fast/kernels/__init__.py" in files
    return {name for name in files if name.endswith((".py", "/py.typed")) or name.startswith("llm2_fast/data/")}


def test_plain_install_from_elsewhere(plain: Environment, tmp_path: Path) -> None:
    origins = plain.import_check(tmp_path)
    assert origins["llm2_fast"] == plain.site_packages / "llm2_fast" / "__init__.py"
    assert origins["llm2_fast.kernels"] == plain.site_packages / "llm2_fast" / "kernels" / "__init__.py"
    assert origins["llm2_fast_C"] == plain.site_packages / EXTENSION
    assert origins["kernels"] is None or plain.site_packages not in origins["kernels"].parents


def test_plain_install_from_the_repository_root(plain: Environment, unbuilt: Path) -> None:
    """The folder `llm2_fast` shadows the installed package, and still finds its kernels and the extension."""
    origins = plain.import_check(unbuilt)
    assert origins["llm2_fast"] == unbuilt / "llm2_fast" / "__init__.py"
    assert origins["llm2_fast.kernels"] == unbuilt / "llm2_fast" / "kernels" / "__init__.py"
    assert origins["llm2_fast_C"] == plain.site_packages / EXTENSION
    assert origins["kernels"] == unbuilt / "kernels" / "__init__.py"


@pytest.mark.parametrize("from_root", [True, False], ids=["from_root", "from_elsewhere"])
def test_editable_install(editable: Environment, checkout: Path, tmp_path: Path, from_root: bool) -> None:
    origins = editable.import_check(checkout if from_root else tmp_path)
    assert origins["llm2_fast"] == checkout / "llm2_fast" / "__init__.py"
    assert origins["llm2_fast.kernels"] == checkout / "llm2_fast" / "kernels" / "__init__.py"
    assert origins["llm2_fast_C"] == checkout / EXTENSION
    if not from_root:
        assert origins["kernels"] is None or checkout not in origins["kernels"].parents


@pytest.mark.parametrize("kind", ["plain", "editable"])
def test_command_line_starts(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    environment: Environment = request.getfixturevalue(kind)
    assert "demo" in run(environment.bin / "llm2-fast", "--help", cwd=tmp_path)


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile, unbuilt: Path) -> None:
    info = f"llm2_fast-{__version__}.dist-info"
    names = {name for name in wheel.namelist() if not name.startswith(f"{info}/")}
    assert names == package_files(unbuilt) | {EXTENSION}
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_bytes(wheel.read(f"llm2_fast-{__version__}.dist-info/METADATA"))
    assert metadata["Name"] == "llm2-fast"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required >= {"numpy", "safetensors", "torch", "transformers", "triton"}
    assert not required & {"accelerate", "gguf", "peft", "pytest"}, "belongs to an extra"
    extras = {"bench", "demo", "eval", "lint", "lm-eval", "ray", "test", "train"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_package_imports_without_the_extension(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    wheel.extractall(environment.site_packages)
    (environment.site_packages / EXTENSION).unlink()
    origin = run(environment.python, "-c", IMPORT_ALL_WITHOUT_EXTENSION, cwd=tmp_path).splitlines()[-1]
    assert Path(origin) == environment.site_packages / "llm2_fast" / "__init__.py"


def test_sdist_holds_all_sources(sdist: Path, unbuilt: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert not any(member.issym() for member in archive.getmembers())
    native = list_files(unbuilt, "csrc")
    assert native, "the checkout has no C++ sources"
    assert native | package_files(unbuilt) | {"CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py"} <= names


def test_sdist_builds_in_isolation(sdist: Path, tmp_path: Path) -> None:
    """From the declared build requirements alone: no torch, nothing of the checkout."""
    try:
        run(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    except AssertionError:
        try:
            run(sys.executable, *PIP, "download", "--no-deps", "--dest", tmp_path / "probe", "ninja", cwd=tmp_path)
        except AssertionError as error:
            pytest.skip(f"no package index can be reached: {str(error).splitlines()[-1]}")
        raise
    environment = Environment(tmp_path / "venv")
    (path,) = tmp_path.glob("*.whl")
    environment.pip_install(path, cwd=tmp_path)
    origins = environment.import_check(tmp_path)
    assert origins["llm2_fast"] == environment.site_packages / "llm2_fast" / "__init__.py"
    assert origins["llm2_fast_C"] == environment.site_packages / EXTENSION


def test_a_failed_build_is_an_error(unbuilt: Path, tmp_path: Path) -> None:
    """A stand-in for cmake fails."""
    environment = Environment(tmp_path / "venv")
    cmake = environment.bin / "cmake"
    cmake.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    cmake.chmod(0o755)
    build = ("setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    with pytest.raises(AssertionError, match="building llm2_fast_C failed"):
        run(environment.python, *build, cwd=unbuilt)


def test_every_imported_package_is_declared() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*pyproject["dependencies"], *itertools.chain(*pyproject["optional-dependencies"].values())]
    known = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in declared}
    known |= {"llm2_fast", "llm2_fast_C", *sys.stdlib_module_names}
    imports = {
        target.split(".")[0]: f"{path}:{line}"
        for name, path in find_modules(ROOT).items()
        for target, line in find_imports(name, path)
    }
    assert {name: where for name, where in imports.items() if name not in known} == {}


def test_build_requirements_agree() -> None:
    """pyproject.toml, its extra `test` and the Makefile each have to name them."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    required = set(pyproject["build-system"]["requires"])
    assert required <= set(pyproject["project"]["optional-dependencies"]["test"])
    (line,) = re.findall(r"^BUILD_REQUIREMENTS := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(line.replace("'", "").split()) == required
