"""The kernels in fresh processes, where nothing is loaded yet, and compilers that do as they are told."""

import os
import subprocess
import sys

from granet import native

LOAD = """
import logging; logging.basicConfig()
import torch
from granet import native
print(native.ready(), native.available(), hasattr(torch.ops.granet, "select_pass"))
"""


def run(code, **environment):
    """The exit status of a program, and what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr


def loaded(cache, **environment):
    """What `ready` and `available` say in a fresh process, whether the kernels are there, and what it wrote."""
    status, out, err = run(LOAD, GRANET_CACHE=str(cache), **environment)
    assert status == 0 and "Traceback" not in err, err
    return out, err


def compiler_that_fails(folder):
    """The path of a program that knows its version and cannot compile."""
    return _program(folder / "broken", "echo 'out of luck' >&2\nexit 1\n")


def compiler_that_remembers(folder, library):
    """The path of a program that compiles nothing anew: like ccache, it copies the library that was made before."""
    return _program(folder / "remembering", f'while [ "$1" != -o ]; do shift; done\ncp "{library}" "$2"\n')


def _program(path, last):
    """A program that is asked for its version and processor as the compiler of this machine is."""
    known = f'case $1 in --version | -dumpmachine) exec {native.compiler()} "$1";; esac'
    path.write_text(f"#!/bin/sh\n{known}\n{last}")
    path.chmod(0o755)
    return str(path)
