"""The kernels of linear layers in sparse storage; what layers make of them is tested in tests/sparsifier."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_stored import main


@pytest.mark.parametrize("seed", range(3))
def test_random_products_are_those_of_the_dense_weight(seed):
    main(60, seed)


@pytest.mark.parametrize(("isa", "flag"), [("generic", ""), ("avx2", " fma "), ("avx512", " avx512bw ")])
def test_every_instruction_set_of_this_machine(isa, flag):
    if flag not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {isa}")
    command = [sys.executable, str(Path(__file__).parent / "fuzz_stored.py"), "40", "7"]
    environment = {**os.environ, "GRANET_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
