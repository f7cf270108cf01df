"""The kernels' sources and flags, and how a C++ compiler makes one shared library of them.

Only the headers of torch are needed, and nothing is linked but a stub with the name of torch's library: the symbols are
those of torch's Stable ABI, so one library serves every Python and every torch from 2.10 on. This module imports the
standard library alone, because wheels are built with it before granet is installed.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    "-std=gnu++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
# The instruction set is a property of one file each; everything else is compiled for any machine of the architecture.
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", *_AVX2, "-mprefer-vector-width=512")
ISA_FLAGS = {
    "bfloat16_avx2.cpp": _AVX2,
    "bfloat16_avx512.cpp": _AVX512,
    "bfloat16_avx512bf16.cpp": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "kernels_avx2.cpp": _AVX2,
    "kernels_avx512.cpp": _AVX512,
    "reduced_avx2.cpp": _AVX2,
    "reduced_avxvnni.cpp": (*_AVX2, "-mavxvnni"),
    "reduced_avx512.cpp": _AVX512,
    "reduced_avx512vnni.cpp": (*_AVX512, "-mavx512vnni"),
    "reduced_avx512bf16.cpp": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
}
# For a library that leaves the machine it was compiled on: it brings what only newer systems have (portable.cpp).
PORTABLE = ("-DGRANET_PORTABLE", "-include", "portable.h")
_LOCAL = "{ local: *; };\n"


class EngineUnavailable(RuntimeError):  # noqa: N818 - the name describes a state of the machine
    """The native kernels cannot be used on this machine. The message says why, and what to do."""


def compiler() -> str:
    """Returns the path of the C++ compiler ($CXX, else g++, else c++). Raises EngineUnavailable if there is none."""
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "c++"):
        path = shutil.which(name)
        if path:
            return path
    if named:
        raise EngineUnavailable(
            f"CXX={named} cannot be found: set CXX to a C++ compiler, or unset it to use g++ or c++"
        )
    raise EngineUnavailable(
        "no C++ compiler found, so sparse layers run on torch's dense kernels; "
        "install one (Debian, Ubuntu: apt install g++) to make them faster"
    )


def ask(cxx: str, question: str) -> str:
    """Returns what the compiler answers to --version or -dumpmachine. Raises EngineUnavailable."""
    try:
        done = subprocess.run([cxx, question], capture_output=True, text=True, check=False)
    except OSError as error:
        raise EngineUnavailable(f"the C++ compiler {cxx} cannot be run: {error}") from error
    if done.returncode:
        raise EngineUnavailable(
            f"{cxx} is not a C++ compiler: {cxx} {question} ends with status {done.returncode}. "
            "Set CXX to one, or unset it to use g++ or c++"
        )
    return done.stdout.strip()


def architecture(cxx: str) -> str:
    """Returns the processor that a compiler compiles for: x86_64, aarch64, ... Raises EngineUnavailable."""
    first = ask(cxx, "-dumpmachine").partition("-")[0]
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(first, first)


def sources(processor: str) -> list[Path]:
    """Returns the source files for a processor: only x86-64 has those with its instruction sets."""
    return [s for s in sorted(SOURCES.glob("*.cpp")) if processor == "x86_64" or s.name not in ISA_FLAGS]


def compile_library(cxx: str, target: Path, headers: Path, extra: tuple[str, ...] = (), portable: bool = False) -> None:
    """Compiles the kernels into the shared library ``target``, and writes its digest beside it (``.sha256``).

    Args:
        cxx: the compiler; it may be one for another processor.
        target: the library; its folder also takes the temporary files, and it is replaced as a whole.
        headers: torch's folder ``include``.
        extra: further flags, for compiling and linking.
        portable: whether the library will be used on other machines.

    Raises:
        EngineUnavailable: with what the compiler said.
    """
    flags = (*FLAGS, *extra)
    general = PORTABLE if portable else ()
    renamed = (f"-ffile-prefix-map={SOURCES}=granet", f"-ffile-prefix-map={headers}=torch")
    includes = (f"-I{headers}", f"-I{SOURCES}")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def run(*arguments: str) -> None:
            done = subprocess.run([cxx, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                raise EngineUnavailable(f"the sparse kernels do not compile with {cxx}: {done.stderr[-2000:]}")

        def compile_one(source: Path) -> str:
            compiled = f"{folder}/{source.stem}.o"
            own = ISA_FLAGS.get(source.name, general)
            run(*flags, *renamed, *includes, *own, "-c", str(source), "-o", compiled)
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources(architecture(cxx))))
        # Python loads torch's library for itself alone, so ours must name it; the stub has the name and nothing else.
        stub, nothing, script = (f"{folder}/{name}" for name in ("libtorch_cpu.so", "nothing.cpp", "local.map"))
        Path(nothing).write_text("")
        run("-shared", "-fPIC", nothing, "-Wl,-soname,libtorch_cpu.so", "-o", stub)
        Path(script).write_text(_LOCAL)
        narrow = (f"-Wl,--version-script={script}", "-Wl,--build-id=none", "-s") if portable else ()
        linked = f"{folder}/engine.so"
        run("-shared", *extra, *narrow, *objects, "-Wl,--no-as-needed", stub, "-o", linked)
        digest = Path(f"{folder}/digest")
        digest.write_text(hashlib.sha256(Path(linked).read_bytes()).hexdigest() + "\n")
        for path, mode, name in ((Path(linked), 0o700, target), (digest, 0o600, target.with_suffix(".sha256"))):
            path.chmod(mode)  # whatever the umask: what others can write to is not loaded
            path.replace(name)
