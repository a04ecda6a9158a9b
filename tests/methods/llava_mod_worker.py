"""Runs of LLaVA-MoD's stages that are killed, resumed or spread over two ranks; started by test_llava_mod_runs.py.

Every run is a forked child of this process, which has imported everything once.

python tests/methods/llava_mod_worker.py OUTPUT
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from hf_distill.methods import _llava_mod_stages
from hf_distill.methods.llava_mod import CARD, STAGES, LlavaModConfig, distill
from hf_distill.testing.runs import Case, difference, import_before_forking
from hf_distill.training.saving import complete_checkpoints
from tests.helpers import SGD, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.students.moe_models import dense_model

RATES = {f"{stage}_learning_rate": 1e-2 for stage in STAGES}


class Kill(TrainerCallback):
    """Ends the process at a step of a stage, as a machine that loses its power; step None is after the last one."""

    def __init__(self, stage: str, step: int | None):
        self.stage, self.step = stage, step

    def _at(self, args) -> bool:
        return args.output_dir.endswith(self.stage)

    def on_step_end(self, args, state, control, **kwargs):
        if self._at(args) and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, args, state, control, **kwargs):
        if self._at(args) and self.step is None:
            os.kill(os.getpid(), signal.SIGKILL)


def pipeline(case: Case, run: str, *, kill=None, resume=False, text=False, fsdp2=False, **settings) -> dict:
    """All stages; the final weights, and how often each stage's trainer began."""
    folder = case.folder / run
    plain = dict(max_length=None, max_steps=4, per_device_train_batch_size=2, gradient_checkpointing=False)
    plain |= dict(save_strategy="steps", save_steps=2, learning_rate=1e-2)
    if fsdp2:
        plain |= dict(fsdp=True, fsdp_config=fsdp2_config())
    args = sft_arguments(folder, **plain | settings)
    if fsdp2:
        ask_for_shards()
    begun = Begun()
    shared = dict(callbacks=[begun] + ([Kill(*kill)] if kill else []), resume_from_checkpoint=resume)
    config = LlavaModConfig(router_std=0.5, **RATES)
    if text:
        student = distill(
            dense_model("qwen3"), tiny_llama(hidden=32, seed=7), text_dataset(12), config, args,
            preference_dataset=text_pairs(12), processing_class=tiny_tokenizer(), **shared,
        )  # fmt: skip
    else:
        setup = case.setup
        student = distill(
            setup.dense(attention_dropout=0.1), setup.teacher(), setup.dataset(16), config, args,
            preference_dataset=setup.pairs(16), processing_class=setup.processing_class(), **shared,
        )  # fmt: skip
    weights = {f"weight {name}": value.clone() for name, value in student.state_dict().items()}
    return {
        "weights": weights,
        "begun": begun.stages,
        "kind": type(student).__name__,
        "ranks": sorted(begun.ranks),
        "groups": begun.groups,
    }


def ask_for_shards() -> None:
    """accelerate shards on GPU processes only; the test asks for the same code on the CPU, for each settings object."""
    own = _llava_mod_stages.preference_arguments

    def preference_arguments(*args):
        made = own(*args)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return made

    _llava_mod_stages.preference_arguments = preference_arguments
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class Begun(TrainerCallback):
    def __init__(self):
        self.stages: dict[str, int] = {}  # the step each began at
        self.ranks: set[int] = set()
        self.groups: dict[str, list[str]] = {}  # what FSDP shards by itself, per stage

    def on_train_begin(self, args, state, control, **kwargs):
        self.stages[os.path.basename(args.output_dir)] = state.global_step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.ranks.add(torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
        self.groups[os.path.basename(args.output_dir)] = sorted(
            {type(module).__name__.removeprefix("FSDP") for module in model.modules() if isinstance(module, FSDPModule)}
        )


def text_pairs(rows: int) -> Dataset:
    pairs = [{"prompt": f"w{i} w2", "chosen": f" w{i + 1} w4 w5", "rejected": f" w{i + 3} w6"} for i in range(rows)]
    return Dataset.from_list(pairs)


def fsdp2_config() -> dict:
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    }


# ---- what is asked of them ------------------------------------------------------------------------------------------
def killed(case: Case, whole: dict, name: str, kill: tuple, **settings) -> dict:
    """A run killed at `kill` and started again, against the whole one."""
    dead = case.run(pipeline, name, kill=kill, **settings)
    finished = [stage for stage in STAGES if any((case.folder / name).glob(f"*_{stage}/final"))]
    unfinished = next((case.folder / name).glob(f"*_{kill[0]}"))
    left = [os.path.basename(path) for path in complete_checkpoints(str(unfinished))[0]]
    again = case.run(pipeline, name, resume=True, **settings)
    return {
        "died": dead is None,
        "finished": finished,
        "left": left,
        "begun": again["begun"],
        "difference": difference(again["weights"], whole["weights"]),
    }


def half_written(case: Case, whole: dict) -> dict:
    """Killed while the first checkpoint of a stage, and while its final student was written."""
    folder = case.folder / "half"
    case.run(pipeline, "half", kill=("sparse", 1))
    (folder / "2_sparse" / "checkpoint-2").mkdir()
    (folder / "2_sparse" / "final.part").mkdir()
    (folder / "2_sparse" / "final.part" / "config.json").write_text("{")
    again = case.run(pipeline, "half", resume=True)
    left = [path.name for path in (folder / "2_sparse").iterdir() if path.name.endswith(".part")]
    return {"begun": again["begun"], "left": left, "difference": difference(again["weights"], whole["weights"])}


def on_two_ranks(case: Case, name: str, one: dict, fsdp2: bool) -> dict:
    """2 ranks x 2 examples, against one process with the same micro-batches."""
    first, _ = case.run(pipeline, name, ranks=2, fsdp2=fsdp2, **ONCE)
    return {
        "ranks": first["ranks"],
        "groups": first["groups"],
        "difference": difference(first["weights"], one["weights"], 1e-5),
    }


ONCE = SGD | dict(save_strategy="no", max_steps=3)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    case = Case(CARD, Path(folder) / "runs")
    import_before_forking([CARD])
    facts: dict[str, dict] = {}

    def fact(name: str, function, *args, **kwargs) -> None:
        try:
            facts[name] = function(*args, **kwargs)
        except Exception:
            facts[name] = {"error": traceback.format_exc()}

    whole = case.run(pipeline, "whole")
    for stage in STAGES:
        fact(f"killed in {stage}", killed, case, whole, stage, (stage, 3))
    fact("killed at the end", killed, case, whole, "end", ("sparse", None))
    fact("half-written", half_written, case, whole)
    fact("again", lambda: {"begun": case.run(pipeline, "whole", resume=True)["begun"]})
    text = case.run(pipeline, "text", text=True)
    fact("text", killed, case, text, "text-killed", ("sparse", 3), text=True)
    one = case.run(pipeline, "one", gradient_accumulation_steps=2, **ONCE)
    start = case.setup.dense().state_dict()
    facts["moved"] = {"kind": one["kind"], "vision": _moved(one, start, "vision_tower"), "rest": _moved(one, start, "")}
    fact("ddp", on_two_ranks, case, "ddp", one, False)
    fact("fsdp2", on_two_ranks, case, "fsdp2", one, True)
    Path(folder, "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _moved(run: dict, start: dict, part: str) -> bool:
    own = {name.removeprefix("weight "): value for name, value in run["weights"].items()}
    return any(part in name and name in own and not torch.equal(own[name], value) for name, value in start.items())


if __name__ == "__main__":
    main(sys.argv[1])
