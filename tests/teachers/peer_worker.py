"""Learning teachers on one of two ranks; started by torchrun, read by test_peer.py.

torchrun --nproc_per_node 2 tests/teachers/peer_worker.py OUTPUT
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_distill import EMATeacher, PeerTeacher
from tests.helpers import SGD, tiny_llama
from tests.teachers.test_peer import CASES, PeerFeatures, found_by, make_trainer, mutual_trainer, state_of
from tests.training.distributed_worker import fresh_state
from tests.training.scaling_cases import Case, Recorder

RANKS = {
    "llama": replace(CASES["llama_split"], accumulation=2),
    "bert": replace(CASES["bert"], rows=7, per_device=2),
}


def average_on_ranks(folder) -> tuple[dict, dict]:
    teacher, recorder = EMATeacher(0.7), Recorder()
    settings = SGD | dict(per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)), max_steps=3)
    trainer = make_trainer(folder, teacher, callbacks=[recorder], **settings)
    trainer.train()
    return trainer, {f"average.{k}": v for k, v in teacher.averages.items()} | recorder.seen


def features_on_ranks(folder):
    """The peer's head gets no gradient: DDP would stop at the second step."""
    trainer = make_trainer(folder, PeerTeacher(tiny_llama(32, seed=2)), PeerFeatures(), max_steps=3)
    trainer.train()
    return trainer, {"loss": torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])}


def mutual_on_ranks(folder, case: Case):
    recorder = Recorder()
    trainer = mutual_trainer(case, folder, recorder)
    return trainer, found_by(trainer, recorder)


RUNS = {
    "average": average_on_ranks,
    "features": features_on_ranks,
    "llama": lambda folder: mutual_on_ranks(folder, RANKS["llama"]),
    "bert": lambda folder: mutual_on_ranks(folder, RANKS["bert"]),
}


def main(output: str) -> None:
    """One rank: every run's numbers, how far ranks are apart, and what ran."""
    facts = {}
    for name, run in RUNS.items():
        fresh_state()
        trainer, found = run(tempfile.mkdtemp())
        apart = 0.0
        for value in state_of(trainer).values():
            every = trainer.accelerator.gather(value.float().reshape(1, -1))
            apart = max(apart, (every[0] - every[1]).abs().max().item())
        facts[name] = {
            "apart": apart,
            "ranks": trainer.accelerator.num_processes,
            "wrapper": type(trainer.model_wrapped).__name__,
            "steps": trainer.state.global_step,
        }
        if trainer.accelerator.is_main_process:
            save_file({k: v.contiguous() for k, v in found.items()}, f"{output}/{name}.safetensors")
    if os.environ["RANK"] == "0":
        Path(output, "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
