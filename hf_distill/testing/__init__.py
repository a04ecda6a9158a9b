"""The promises every method keeps, as a harness for our own methods and for those of other packages.

    from hf_distill.methods import cards
    from hf_distill.testing import check_methods

    def test_my_method():
        check_methods([card for card in cards() if card.slug == "my_method"])

Each promise is one process that imports everything once and forks a child for every run of every card (a trainer's
imports cost 10 s, a tiny run less than one); runs on two ranks are two such children. It needs os.fork (Linux, macOS)
and uses the CPU only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from hf_distill.methods import MethodCard
from hf_distill.testing.setups import SETUPS, TinyImage, TinySequence, TinyText, setup_of

PROMISES = {
    "interface": "its config has help, parses from command line and YAML, refuses NaN; distill gives a clean model",
    "exact_scaling": "loss, gradients, state and evaluation do not depend on batch x accumulation x ranks x ragged end",
    "no_wide_logits": "no tensor of rows x vocabulary in a training step or an evaluation (language models)",
    "clean_student": "what is saved loads, matches and runs in a process without hf_distill (or with its students)",
    "exact_resume": "killed mid-epoch and restarted, weights, state and logs are bit for bit the uninterrupted run's",
    "distributed": "two ranks train with the same terms and end equal",
    "frozen_teacher": "the teacher neither moves nor gets a gradient (unless it `learns`); nor, under LoRA, the base",
    "quiet_evaluation": "evaluation changes no weight, state or random state",
}

__all__ = ["PROMISES", "SETUPS", "TinyImage", "TinySequence", "TinyText", "check_methods", "setup_of"]


def check_methods(cards: Iterable[MethodCard], *, promises: Iterable[str] | None = None) -> None:
    """Take methods through the promises.

    Args:
        cards: ours or a plug-in's.
        promises: names of PROMISES; None takes all.

    Raises:
        AssertionError: what was broken, by card and promise, after everything ran.
        LookupError: a card that there is no set-up for.
        ValueError: no cards, two of one slug, or an unknown promise.
    """
    cards, promises = list(cards), list(PROMISES if promises is None else promises)
    if unknown := [name for name in promises if name not in PROMISES]:
        raise ValueError(f"unknown promise {', '.join(unknown)}; choose of {', '.join(PROMISES)}")
    if not cards or len({card.slug for card in cards}) < len(cards):
        raise ValueError(f"cards must be at least one and have different slugs, got {[card.slug for card in cards]}")
    if not hasattr(os, "fork"):
        raise OSError("check_methods forks its runs, which this system cannot: use Linux or macOS")
    for card in cards:
        setup_of(card)
    broken = []
    for promise in promises:
        with tempfile.TemporaryDirectory(prefix="hf_distill_") as folder:
            broken += [f"{slug} / {promise}: {problem}" for slug, problem in _run(promise, cards, Path(folder))]
    if broken:
        raise AssertionError(f"{len(broken)} broken promises of methods:\n" + "\n".join(broken))


def _run(promise: str, cards: list[MethodCard], folder: Path) -> list[tuple[str, str]]:
    """(slug, problem) of one promise, from a process of its own."""
    listed = [asdict(card) | {"module": card.load().__name__} for card in cards]
    (folder / "cards.json").write_text(json.dumps(listed), encoding="utf-8")
    command = [sys.executable, "-m", "hf_distill.testing", promise, str(folder / "cards.json"), str(folder)]
    with open(folder / "output", "w+", encoding="utf-8") as output:
        process = subprocess.run(command, env=_environment(), stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        output.seek(0)
        tail = output.read()[-3000:]
    report = folder / "report.json"
    problems = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    found = [(slug, problem) for slug, list_ in problems.items() for problem in list_]
    missing = [card.slug for card in cards if card.slug not in problems]
    return found + [(slug, f"not checked: the process ended with {process.returncode}\n{tail}") for slug in missing]


def _environment() -> dict[str, str]:
    """This process's, with its import path, and nothing that changes results or asks the network."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in launcher and not name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_"))
    }
    return kept | {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",
    }
