import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not os.environ.get("GRANET_SANITIZE"), reason="compiles for minutes: set GRANET_SANITIZE=1 to run it"
)
def test_kernels_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    """Compiles the kernels anew with the sanitizers, which stop the process at the first fault."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        if not Path(found.stdout.strip()).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        runtimes.append(found.stdout.strip())
    environment = {
        **os.environ,
        "GRANET_CACHE": str(tmp_path),
        "GRANET_CXXFLAGS": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    folder = Path(__file__).parent
    scripts = {
        "fuzz_layers.py": ["20", "3"],
        "fuzz_models.py": ["2"],
        "fuzz_reduced.py": ["2"],
        "fuzz_saved.py": ["3", "200"],
        "fuzz_stored.py": ["100"],
    }
    for script, arguments in scripts.items():
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(folder / script), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
