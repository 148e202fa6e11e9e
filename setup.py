"""Build gristmill._core: one extension, baseline flags; wider instructions live in target regions chosen at run time."""

import os
import platform
import sys
import tempfile
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BASELINE = ["-march=x86-64-v2"] if platform.machine() in ("x86_64", "AMD64") else []
FLAGS = ["-O3", "-std=gnu11", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *BASELINE]
EXTRA = os.environ.get("GRISTMILL_CFLAGS", "").split()
FLAGS += EXTRA
LINK = [] if EXTRA or sys.platform != "linux" else ["-Wl,-s"]  # Python's own flags may ask for -g, which is most of the file


class BuildCore(build_ext):
    def build_extensions(self):
        if os.environ.get("GRISTMILL_OPENMP", "1") != "0" and self.compiles("-fopenmp"):
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        super().build_extensions()

    def compiles(self, flag):
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            with open(source, "w") as file:
                file.write("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([source], output_dir=folder, extra_postargs=[flag])
                self.compiler.link_executable(objects, os.path.join(folder, "probe"), extra_postargs=[flag])
            except Exception as error:  # any toolchain failure means the same: build without threads
                print(f"building without OpenMP ({error})")
                return False
        return True


SOURCES = ["src/fastcore/core.pyx", *sorted(set(glob("src/fastcore/**/*.c", recursive=True)) - {"src/fastcore/core.c"})]
DEPENDS = [*glob("src/fastcore/**/*.h", recursive=True), *glob("src/fastcore/**/*.pxi", recursive=True)]
CORE = Extension("gristmill._core", SOURCES, include_dirs=["src/fastcore"], depends=DEPENDS)
CORE.extra_compile_args, CORE.extra_link_args = FLAGS, LINK
CORE.cython_directives = {"language_level": 3, "embedsignature": True}
setup(ext_modules=[CORE], cmdclass={"build_ext": BuildCore})
