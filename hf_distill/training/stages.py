"""Training in stages that follow each other, each in a folder of its own; a restart goes on where the last run ended.

A stage is finished when its student stands in `<folder>/final`, which is renamed into place once it is complete. Every
stage starts from what the one before it saved, so that an interrupted run meets the same numbers as a whole one.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil

from accelerate import PartialState
from torch import nn

from hf_distill.training import compat
from hf_distill.training.saving import complete_checkpoints

logger = logging.getLogger(__name__)

FINAL = "final"


def finished_student(folder: str) -> str | None:
    """Where the student of a finished stage lies; None while the stage is not finished."""
    path = os.path.join(folder, FINAL)
    return path if os.path.isdir(path) else None


def check_fresh(folders: list[str]) -> None:
    """Raises ValueError where some stage was begun before: a new run would mix with another one's."""
    begun = [f for f in folders if finished_student(f) or any(complete_checkpoints(f))]
    if begun:
        raise ValueError(
            f"{begun[0]} holds another run: go on with resume_from_checkpoint=True (recipes: --resume), or choose "
            "another output_dir"
        )


def stage_arguments(args, folder: str, *, learning_rate: float | None = None, max_steps: int | None = None):
    """The run's settings for one stage. A stage is never pushed: the last one's student is, by whoever runs them."""
    args = copy.copy(args)
    args.output_dir, args.push_to_hub = folder, False
    if learning_rate is not None:
        args.learning_rate = learning_rate
    if max_steps is not None:
        args.max_steps = max_steps
    return args


def train_stage(trainer, *, resume: bool) -> str:
    """Train a stage from its newest complete checkpoint, or from its start, and save its student.

    Returns:
        The folder of the finished student.
    """
    folder = trainer.args.output_dir
    complete, partial = complete_checkpoints(folder)
    trainer.accelerator.wait_for_everyone()  # all ranks have looked
    if resume and partial and not complete and trainer.args.should_save:
        for path in partial:
            logger.warning("removing the half-written %s", path)
            shutil.rmtree(path, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=True if resume and complete else None)
    return _finish(trainer, folder)


def _finish(trainer, folder: str) -> str:
    final = os.path.join(folder, FINAL)
    part = final + ".part"
    if trainer.args.should_save:
        shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(part)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        os.replace(part, final)
    trainer.accelerator.wait_for_everyone()
    return final


def load_stage(path: str, like: nn.Module) -> nn.Module:
    """The student that a stage saved, in the type and with the attention of `like`."""
    PartialState().wait_for_everyone()
    attention = like.config._attn_implementation
    return compat.load_model(path, what="student", dtype=like.dtype, attn_implementation=attention)
