"""The same micro-batches on one process or two; writes weights and banks. two_rank_worker.py OUTPUT"""

import json
import os
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch
from safetensors.torch import save_file

from hf_distill.baselines import OBJECTIVES
from tests.baselines.models import labels, trainer


def main(output: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    # 14 examples, batches of 4: the last one is ragged, and repeated examples fill it up on two ranks
    crd = OBJECTIVES["crd"](labels(14), negatives=4, width=8)
    objective = (
        crd + 0.1 * OBJECTIVES["rkd"]() + OBJECTIVES["dkd"]() + OBJECTIVES["fitnet"](projector="linear", weight=1e-2)
    )
    run = trainer(
        tempfile.mkdtemp(),
        "vit",
        objective,
        n=14,
        max_steps=4,
        gradient_accumulation_steps=2 // ranks,
        train_sampling_strategy="sequential",
        learning_rate=0.05,
    )
    run.train()
    assert run.accelerator.num_processes == ranks, run.accelerator.num_processes
    mine = crd.state["student_bank"]
    every = [torch.empty_like(mine) for _ in range(ranks)]
    if ranks > 1:
        torch.distributed.all_gather(every, mine)
    if run.accelerator.is_main_process:
        weights = {n: p.detach().clone() for n, p in run.accelerator.unwrap_model(run.model).named_parameters()}
        save_file(weights | {"bank": mine, "z": crd.state["z"]}, output + ".safetensors")
        facts = {"ranks": ranks, "banks_equal": ranks == 1 or all(torch.equal(x, mine) for x in every)}
        with open(output + ".json", "w") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    main(sys.argv[1])
