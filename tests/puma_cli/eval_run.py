"""Runs `puma eval` several times in one process: each argument is one command line.

    torchrun --nproc-per-node 2 -m tests.puma_cli.eval_run "reconstruction --data .." "understanding .."

With KILL_AFTER=N in the environment the process kills itself, as SIGKILL does, once a run has written N rows.
"""

import os
import shlex
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from puma_cli import main
from transformers_puma.evaluation import runner


class KillingBar(tqdm):
    """A progress bar is told of every batch right after its rows are on disk."""

    def update(self, n: int = 1) -> None:
        if self.n + n >= int(os.environ["KILL_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)
        super().update(n)


if __name__ == "__main__":
    torch.set_num_threads(1)  # one process and two then sum in the same order
    if "KILL_AFTER" in os.environ:
        runner.tqdm = KillingBar
    if "WORLDS" in os.environ:
        Path(os.environ["WORLDS"], f"rank-{os.environ['RANK']}").write_text(os.environ["WORLD_SIZE"])
    for command in sys.argv[1:]:
        if status := main(["eval", *shlex.split(command)]):
            sys.exit(status)
