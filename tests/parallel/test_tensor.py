"""Two processes, each with its share of a model, give the whole model's logits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from fathom.parallel.plan import summed
from fathom.parallel.tensor import Ranks
from tests.oracle import draw_weights, our_model, relative_error
from tests.parallel.test_plan import RAW, logits, ranks_of

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_two_processes_are_one_model() -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    path = {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.test_tensor"],
            env={**os.environ, **where, **path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [float(process.communicate(timeout=120)[0]) for process in processes]
    print(f"\ntwo processes against one model: {max(errors):.1e}")
    assert max(errors) < 2e-5


def main() -> None:
    """One of the processes: says how far all of them together are from the whole."""
    torch.set_num_threads(1)
    ranks = Ranks("cpu")
    whole = our_model(RAW, draw_weights(RAW, 5))
    model = ranks_of(whole, ranks.count)[ranks.rank]
    summed(model, ranks.sum)
    print(relative_error(ranks.gathered(logits(model)), logits(whole)))
    ranks.leave()


if __name__ == "__main__":
    main()
