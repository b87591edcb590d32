"""Builds the extension module `llm2_fast_C` with CMake. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """An extension module that is a target of the same name in CMakeLists.txt."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Builds `CMakeExtension`s, incrementally: one build folder per Python, shared by all kinds of install."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = ROOT / "build" / f"{ext.name}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        output_dir = build_dir / "lib"
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        # Every path is passed each time: one cached from an isolated build environment would no longer exist.
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build_dir), "--target", ext.name], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"building {ext.name} failed; the messages above say why") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(output_dir / target.name, target)


def find_tool(name: str) -> str:
    """Path of a build tool: this environment's if it has one, else the one on PATH."""
    search_path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    path = shutil.which(name, path=search_path)
    if path is None:
        raise CompileError(f"{name} is needed to build the extension and was not found (pip install {name})")
    return path


setup(ext_modules=[CMakeExtension("llm2_fast_C")], cmdclass={"build_ext": CMakeBuild})
