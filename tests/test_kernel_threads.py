"""How the threads of kernels wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

RUN = """
import numba, numpy
from sq_stream.formats.blocks import Q8_0
from sq_stream.kernels.codec import encode
encode(numpy.ones((2, 32), numpy.float32), Q8_0)
print(numba.threading_layer())
"""


@pytest.mark.parametrize(
    ("variables", "turns"), [({}, 3000), ({"GOMP_SPINCOUNT": "50"}, 50), ({"OMP_WAIT_POLICY": "passive"}, 0)]
)
def test_they_leave_the_processor_to_others_soon(variables: dict[str, str], turns: int) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = kept | {"OMP_DISPLAY_ENV": "verbose"} | variables
    run = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True)
    if run.stdout.strip() != "omp":
        pytest.skip(f"kernels run on {run.stdout.strip()} here, not on OpenMP")
    (shown,) = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)
    assert int(shown) == turns
