"""Starting workers of tests in processes of their own, alone or as ranks of one launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_worker(
    worker: str, *arguments, ranks: int = 1, timeout: float = 300, environment: dict[str, str] | None = None
) -> str:
    """What `python WORKER ARGUMENTS...` prints, from the root of the project; on several ranks, as torchrun starts it.

    It inherits nothing that another launcher left in the environment.

    Raises:
        AssertionError: it failed; with the end of what it said.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *(launcher if ranks > 1 else []), worker, *map(str, arguments)],
        env=inherited | ours | (environment or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def in_a_process(function: Callable, **arguments) -> int:
    """How a fork that runs the function ended: 0, 1, or the negative number of the signal that killed it.

    For workers: every rank calls it, so that a launcher outlives the kill of what it launched.
    """
    # each run of several ranks meets at a store of its own, not at torchrun's
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    if "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    child = os.fork()
    if child == 0:
        try:
            function(**arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
