"""Two processes under FSDP2 hold a share of the model each, also while the reference runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[2] / "benchmarks" / "bench_sharding.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's memory")
def test_no_process_holds_the_whole_model() -> None:
    """Before, both did while the reference ran: 415 MiB here, and 1388 MiB in training."""
    ended = subprocess.run([sys.executable, COMMAND], cwd=COMMAND.parent, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    *processes, share, bound = json.loads(ended.stdout.splitlines()[-1])["results"]
    assert len(processes) == 2
    for process in processes:
        for stage in ("reference_mib", "train_mib"):
            assert 0.9 * share[stage] < process[stage] < bound[stage], (stage, process)
