"""Tiny runs of a method, each in a forked child of a process that has imported everything, and how they compare."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from hf_distill.methods import MethodCard
from hf_distill.testing import setup_of

LIMIT = 180.0  # seconds of one run; tiny ones take a few


def import_before_forking(cards: list[MethodCard]) -> None:
    """What every run would import for itself, once; the garbage collector then leaves it alone."""
    import peft  # noqa: F401

    import hf_distill.training.trainers  # noqa: F401

    for setup in {id(setup): setup for setup in map(setup_of, cards)}.values():
        setup.student(), setup.processing_class(), setup.dataset(1)
    gc.collect()
    gc.freeze()


class RunFailed(Exception):
    """A run raised, died or hung."""


class Case:
    """One card, its tiny set-up and a folder of its own."""

    def __init__(self, card: MethodCard, folder: Path):
        self.card, self.folder = card, folder
        self.module, self.setup = card.load(), setup_of(card)
        self.config_class = card.config_class()
        folder.mkdir(parents=True, exist_ok=True)

    def arguments(self, run: str, **settings):
        plain = dict(
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            seed=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
        )
        return self.setup.arguments(str(self.folder / run), **plain | settings)

    def trainer(
        self, run: str, *, rows=17, student=None, teacher=None, callbacks=(), lora=False, eval_rows=7, **settings
    ):
        """A trainer of the method, as a user builds it."""
        return self.module.build_trainer(
            student or self.setup.student(),
            teacher or self.setup.teacher(),
            self.setup.dataset(rows),
            self.setup.config(self.config_class),
            self.arguments(run, **settings),
            eval_dataset=self.setup.dataset(eval_rows),
            processing_class=self.setup.processing_class(),
            callbacks=list(callbacks),
            peft_config=self.setup.peft_config() if lora else None,
        )

    def run(self, function: Callable, *args, ranks: int = 1, **kwargs) -> Any:
        """What `function(case, *args, **kwargs)` returns in a child; on several ranks, the list of what each returns.

        None stands for a child that was killed.

        Raises:
            RunFailed: a child raised, died otherwise, or took too long.
        """
        place = self.folder / f"results-{time.monotonic_ns()}"
        place.mkdir()
        port = _free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        children = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _child(place / str(rank), rank, ranks, port, lambda: function(self, *args, **kwargs))
            children.append(pid)
        ends = _wait(children)
        results = [torch.load(p, weights_only=False) if (p := place / str(r)).exists() else None for r in range(ranks)]
        failed = [(rank, r) for rank, r in enumerate(results) if isinstance(r, _Failure)]
        # a rank whose neighbour died fails later, of a lost connection: the first failure is the cause
        for rank, failure in sorted(failed, key=lambda pair: pair[1].when):
            where = f" on rank {rank}" if ranks > 1 else ""
            raise RunFailed(f"{function.__name__.strip('_')}{where} raised\n{failure.text}")
        hint = ": its ranks probably wait for each other" if ranks > 1 else ""
        for end, result in zip(ends, results, strict=True):
            if end == "late":
                raise RunFailed(f"{function.__name__.strip('_')} took more than {LIMIT:.0f} s and was killed{hint}")
            if result is None and end != -signal.SIGKILL:
                raise RunFailed(f"{function.__name__.strip('_')} ended with {end} and no result")
        return results if ranks > 1 else results[0]


class _Failure:
    def __init__(self, text: str):
        self.text, self.when = text, time.time()


def _child(path: Path, rank: int, ranks: int, port: int, function: Callable) -> None:
    """In the child: run, leave the result in a file, and end without running anything of the parent's."""
    code = 1
    try:
        if ranks > 1:  # what torchrun sets
            launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in launcher.items()})
        result = function()
        code = 0
        if ranks > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()
    except BaseException:
        result = _Failure(traceback.format_exc(limit=-4))
    try:
        part = path.with_suffix(".part")
        torch.save(result, part)
        os.replace(part, path)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(children: list[int]) -> list[int | str]:
    """How each child ended. Once one has failed, the others get ten more seconds."""
    ends: dict[int, int | str] = {}
    deadline = time.monotonic() + LIMIT
    while len(ends) < len(children):
        for pid in children:
            if pid in ends:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ends[pid] = os.waitstatus_to_exitcode(status)
                if ends[pid] != 0:
                    deadline = min(deadline, time.monotonic() + 10)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                ends[pid] = "late" if all(end == 0 for end in ends.values()) else -signal.SIGKILL
        time.sleep(0.02)
    return [ends[pid] for pid in children]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- comparing ------------------------------------------------------------------------------------------------------
def weights(trainer) -> dict[str, Tensor]:
    """Student and objective parts, copied."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {f"weight {name}": value.detach().clone() for name, value in model.state_dict().items()}


def objective_state(trainer) -> dict[str, Tensor]:
    """What an objective must keep, copied; preference trainers have none."""
    kept = {} if trainer.objective is None else trainer.objective.state_tensors()
    return {f"state {name}": value.clone() for name, value in kept.items()}


def outcome(trainer, before: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Weights (or how far they are from `before`), the objective's state and every logged loss."""
    values: dict[str, Any] = weights(trainer)
    if before is not None:
        values = {name: value - before[name] for name, value in values.items()}
    values |= objective_state(trainer)
    if trainer.teacher is not None:
        values |= {f"teacher {name}": value.clone() for name, value in trainer.teacher.state_tensors().items()}
    for entry in trainer.state.log_history:
        if "loss" in entry:
            values |= {f"{k} at step {entry['step']}": v for k, v in entry.items() if k.startswith("loss")}
    return values


def evaluation(trainer) -> dict[str, float]:
    """What `evaluate` measures, without what it costs."""
    cost = ("runtime", "per_second", "preparation_time", "num_tokens", "epoch", "step")
    return {name: value for name, value in trainer.evaluate().items() if not name.endswith(cost)}


def difference(ours: dict[str, Any], reference: dict[str, Any], tolerance: float = 0.0) -> str:
    """What differs most of each kind (a name's first word); "" when nothing does.

    The tolerance is relative to the reference's norm; 0 is bit for bit.
    Values far smaller than others of their kind are compared with a hundredth of the largest
    of these: they may be differences of large numbers, which rounding leaves few digits of (a key's bias in attention
    has no gradient at all).
    """
    if ours.keys() != reference.keys():
        return f"one has {sorted(ours.keys() ^ reference.keys())}, the other does not"
    pairs = {name: (_double(ours[name]), _double(reference[name])) for name in reference}
    floors: dict[str, float] = {}
    for name, (_, b) in pairs.items():
        floors[_kind(name)] = max(floors.get(_kind(name), 1e-9), 1e-2 * b.nan_to_num(0, 0, 0).norm().item())
    worst: dict[str, tuple[float, str]] = {}
    for name, (a, b) in pairs.items():
        if a.shape != b.shape:
            return f"{name} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
        if torch.equal(a, b):
            continue
        kind = _kind(name)
        off = ((a - b).norm() / max(b.norm().item(), floors[kind])).item()
        if not off <= max(tolerance, worst.get(kind, (0.0,))[0]):
            by = f"{a.item():.9g}, not {b.item():.9g}" if a.numel() == 1 else f"{off:.1e} off"
            worst[kind] = off, f"{name}: {by}"
    return "; ".join(text for _, text in worst.values())


def _kind(name: str) -> str:
    return name.split(maxsplit=1)[0].split("_")[0]


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().double()
