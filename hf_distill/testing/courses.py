"""Promises about the course of training. Each check yields what differs, and nothing when its promise is kept."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from hf_distill.testing.runs import Case, RunFailed, difference, evaluation, objective_state, outcome, weights
from hf_distill.training.callbacks import DistillCallback
from hf_distill.training.saving import KEY


# ---- exact resume ----------------------------------------------------------------------------------------------------
def exact_resume(case: Case) -> Iterator[str]:
    for ranks in (1, 2):
        how = "in one process" if ranks == 1 else "on two ranks"
        whole = case.run(_training, f"whole-{ranks}", ranks=ranks)
        if case.run(_training, f"killed-{ranks}", kill=5, ranks=ranks) not in (None, [None, None]):
            yield f"the run {how} was to be killed at step 5, but went on: does it pass `callbacks` on?"
            continue
        resumed = case.run(_training, f"killed-{ranks}", resume=True, ranks=ranks)
        if text := difference(_on_all_ranks(resumed), _on_all_ranks(whole)):
            yield f"killed and resumed {how}, it is not the uninterrupted run: {text}"
        if ranks == 1 and (text := difference(case.run(_training, "whole-1", resume=True), whole)):
            yield f"resumed after its end, it goes on: {text}"


def _on_all_ranks(results: dict | list[dict]) -> dict:
    if isinstance(results, dict):
        return results
    return {f"{name} of rank {rank}": value for rank, result in enumerate(results) for name, value in result.items()}


def _training(case: Case, run: str, *, kill: int | None = None, resume: bool = False) -> dict:
    """Seven steps with dropout, a checkpoint every two (in mid-epoch) and a log every three."""
    trainer = case.trainer(
        run,
        student=case.setup.student(**case.setup.dropout),
        callbacks=[] if kill is None else [_Kill(kill)],
        max_steps=7,
        logging_steps=3,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return outcome(trainer)


class _Kill(TrainerCallback):
    """As a machine that loses its power: nothing is cleaned up."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


# ---- distributed -----------------------------------------------------------------------------------------------------
def distributed(case: Case) -> Iterator[str]:
    (first, names, moved), (second, _, _) = case.run(_on_two_ranks, ranks=2)
    if not moved:
        yield "two ranks ran four steps and no weight of the student moved"
    if not names:
        yield "no term was seen: does it pass `callbacks` on?"
    if len(names) > 1:
        yield f"terms are not the same in every step (a term in warm-up is `0 * term`): {sorted(names)}"
    if text := difference(second, first):
        yield f"ranks end different: {text}"


def _on_two_ranks(case: Case) -> tuple[dict, set, bool]:
    seen = _Names()
    trainer = case.trainer("ranks", rows=19, max_steps=4, callbacks=[seen])
    if trainer.accelerator.num_processes != 2:
        raise RunFailed(f"asked for 2 processes, the trainer sees {trainer.accelerator.num_processes}")
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = any(not torch.equal(value, after[name]) for name, value in before.items())
    return after | objective_state(trainer), seen.names, moved


class _Names(DistillCallback):
    """Sets of terms seen. Ranks that differ are stopped at once: later they would wait for each other without end."""

    def __init__(self):
        self.names: set[tuple[str, ...]] = set()

    def on_distill_loss(self, args, state, control, *, student, teacher, terms, **kwargs):
        of_ranks = [None, None]
        torch.distributed.all_gather_object(of_ranks, sorted(terms))
        if of_ranks[0] != of_ranks[1]:
            raise RuntimeError(f"terms are {of_ranks[0]} on rank 0 and {of_ranks[1]} on rank 1; they must be the same")
        self.names.add(tuple(sorted(terms)))


# ---- frozen teacher --------------------------------------------------------------------------------------------------
def frozen_teacher(case: Case) -> Iterator[str]:
    yield from case.run(_teacher_moves)
    yield from (f"under LoRA, {problem}" for problem in case.run(_teacher_moves, lora=True))


def _teacher_moves(case: Case, lora: bool = False) -> list[str]:
    """A plain model as the teacher, given in train mode and with gradients on, as users have it."""
    student, teacher = case.setup.student(), case.setup.teacher().train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    base = {id(p): p.detach().clone() for p in student.parameters()}
    trainer = case.trainer("lora" if lora else "full", student=student, teacher=teacher, lora=lora, max_steps=2)
    own = weights(trainer)
    trainer.train()
    problems = []
    if not getattr(trainer.teacher, "learns", False):
        problems += [f"teacher weight {n} moved" for n, v in teacher.state_dict().items() if not v.equal(before[n])]
        problems += [f"teacher weight {n} has a gradient" for n, p in teacher.named_parameters() if p.grad is not None]
        problems += [f"teacher weight {n} needs a gradient" for n, p in teacher.named_parameters() if p.requires_grad]
    moved = {n for n, value in weights(trainer).items() if not torch.equal(value, own[n])}
    if not [name for name in moved if KEY not in name]:
        problems.append("the student did not learn")
    if lora:
        still = {id(p): p for p in student.parameters()}
        if any(not torch.equal(still[i], value) for i, value in base.items() if i in still):
            problems.append("the student's base weights moved")
        trainer.save_model()
        whole = case.setup.peft_config().modules_to_save or ()
        problems += [
            f"the saved adapter holds {key}"
            for key in _adapter_keys(case.folder / "lora")
            if "lora" not in key and not {*whole} & {*key.split(".")}
        ]
    return problems[:3]


def _adapter_keys(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


# ---- quiet evaluation ------------------------------------------------------------------------------------------------
def quiet_evaluation(case: Case) -> Iterator[str]:
    yield from case.run(_evaluated)
    quiet = case.run(_with_evaluation, "no")
    if text := difference(case.run(_with_evaluation, "steps"), quiet):
        yield f"trained with an evaluation at every step, the student is another one: {text}"


def _evaluated(case: Case) -> list[str]:
    trainer = case.trainer("evaluated", max_steps=2, student=case.setup.student(**case.setup.dropout))
    trainer.train()
    before = _everything(trainer)
    numbers = [evaluation(trainer) for _ in range(2)]
    problems = []
    if text := difference(_everything(trainer), before):
        problems.append(f"evaluation changed something: {text}")
    if text := difference(*numbers):
        problems.append(f"evaluating twice gives two results: {text}")
    return problems


def _everything(trainer) -> dict:
    values = outcome(trainer)
    values["torch's random state"] = torch.get_rng_state()
    values["numpy's random state"] = np.random.get_state()[1].astype(np.int64)
    values["python's random state"] = torch.tensor(random.getstate()[1])
    return values


def _with_evaluation(case: Case, strategy: str) -> dict:
    trainer = case.trainer(
        f"evaluates-{strategy}",
        max_steps=4,
        eval_strategy=strategy,
        eval_steps=1,
        student=case.setup.student(**case.setup.dropout),
    )
    trainer.train()
    return outcome(trainer)
