"""Runs on written texts: killed and restarted, and over ranks. Each in a process of its own, as in resume_worker.py.

onpolicy_worker.py FOLDER      one process, or one rank of those that torchrun has started
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from tests.launching import in_a_process
from tests.training.onpolicy_runs import Seen, trainer_of
from tests.training.resume_worker import Kill

STEPS, RANKS, RANK = 8, int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
COMMON = dict(
    rows=11 * RANKS,  # three steps an epoch, the last one ragged
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    dropout=0.1,
    optim="adamw_torch",
    learning_rate=3e-2,
    max_steps=STEPS,
    save_strategy="steps",
    save_steps=2,
    logging_steps=3,
)
KINDS = {
    "mixed": dict(lmbda=0.5),
    "adaptive": dict(
        lmbda=0.6,
        lmbda_schedule="adaptive",
        lmbda_tolerance=0.0,
        replay_capacity=5,
        eval_strategy="steps",
        eval_steps=1,
    ),
}


def killed_and_resumed(folder: Path, name: str, kind: str, kill: int | None = None, resume: bool = False) -> None:
    lora = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if kind == "mixed" else None
    seen = Seen()
    trainer = trainer_of(
        folder / name, peft_config=lora, callbacks=[seen] + ([Kill(kill)] if kill else []), **COMMON | KINDS[kind]
    )
    trainer.train(resume_from_checkpoint=resume)
    if RANK == 0:
        logs = [log for log in trainer.state.log_history if "loss" in log]
        (folder / f"{name}.json").write_text(json.dumps({"logs": logs, "texts": seen.texts}))


def counted(folder: Path, name: str, **settings) -> None:
    """One window over ranks and accumulation: what every rank met, and the gradient and loss that came of it."""
    seen = Seen()
    trainer = trainer_of(folder / name, callbacks=[seen], max_steps=1, **settings)
    assert trainer.accelerator.num_processes == RANKS
    trainer.train()
    (folder / f"{name}-{RANK}.json").write_text(
        json.dumps({"batches": seen.batches, "losses": seen.losses, "logs": seen.logs, "texts": len(seen.texts)})
    )
    if RANK == 0:
        save_file(seen.gradients[0], folder / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, ends = Path(sys.argv[1]), {}
    for kind in ("mixed",) if RANKS == 1 else ("adaptive",):
        ends[kind] = in_a_process(killed_and_resumed, folder=root, name=kind, kind=kind)
        name = f"{kind}-killed"
        ends[name] = in_a_process(killed_and_resumed, folder=root, name=name, kind=kind, kill=5)
        ends[f"{kind}-resumed"] = in_a_process(killed_and_resumed, folder=root, name=name, kind=kind, resume=True)
    if RANKS > 1:
        split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=11)
        for name, more in {
            "sampled": dict(split, lmbda=0.5),
            "ragged": dict(split, lmbda=1.0, rows=7),
            "same": dict(split, lmbda=1.0, same=True, sampling_temperature=3.0),
            "greedy": dict(split, lmbda=1.0, sampling_temperature=0.0),
        }.items():
            ends[name] = in_a_process(counted, folder=root, name=name, **more)
    (root / f"ends-{RANK}.json").write_text(json.dumps(ends))
