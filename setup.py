"""Builds the C library beside the package's Python files, where a C compiler is found; everything else is in pyproject.toml."""

import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path("lightning_quant/kernels/cpu")


class BuildLibrary(build_ext):
    """The library is plain C called through ctypes, so its name has no Python's tag and it links no Python."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        recipe = runpy.run_path(str(SOURCE / "build.py"))
        try:
            recipe["build"](out)
        except recipe["BuildError"] as error:
            print(f"lightning_quant: packed models will run on torch's kernels, the C library was not built: {error}", file=sys.stderr)


# optional: a missing file does not fail the installation
setup(
    ext_modules=[
        Extension(
            "lightning_quant.kernels.cpu.liblq", [str(path) for path in sorted(SOURCE.glob("*.c"))], optional=True, py_limited_api=True
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
