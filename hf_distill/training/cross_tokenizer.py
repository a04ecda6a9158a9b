"""What DistillSFTTrainer does where student and teacher have different tokenizers: align answers, read both."""

from __future__ import annotations

import copy

from accelerate import PartialState
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_distill.baselines.cross_tokenizer import ULD
from hf_distill.curricula.alignment import COLUMN, AlignedCollator, align_answers, check_offsets
from hf_distill.heads import base_model_of
from hf_distill.objectives import Objective
from hf_distill.teachers import Teacher
from hf_distill.teachers.own_tokens import OwnTokensTeacher


def uld_of(objective: Objective) -> ULD | None:
    """The part of an objective that reads a teacher with another tokenizer.

    Raises:
        ValueError: other parts that need a teacher, or two of them.
    """
    leaves = [leaf for _, _, leaf in objective.leaves()]
    found = [leaf for leaf in leaves if isinstance(leaf, ULD)]
    if not found:
        return None
    others = [type(leaf).__name__ for leaf in leaves if leaf is not found[0] and leaf.uses_teacher]
    if others:
        raise ValueError(
            f"ULD reads the teacher in its own tokens, {', '.join(others)} in the student's: add only objectives that "
            "need no teacher (NextToken, BalanceLoss)"
        )
    return found[0]


class AcrossTokenizers:
    """A run's teacher, settings, data and collator where the teacher has tokens of its own.

    Raises:
        ValueError: packing, on-policy text, a collator of one's own, a tokenizer without offsets, a teacher that
            cannot (see OwnTokensTeacher).
    """

    def __init__(self, uld: ULD, student: nn.Module, teacher: Teacher, processing_class, args, data_collator):
        _refuse(args, data_collator)
        self.teacher = OwnTokensTeacher(teacher)
        theirs = getattr(teacher.tokenizer, "tokenizer", teacher.tokenizer)
        self.tokenizers = (processing_class, theirs)
        for who, tokenizer in zip(("student", "teacher"), self.tokenizers, strict=True):
            check_offsets(tokenizer, who)
        ours = base_model_of(student).get_output_embeddings().weight.shape[0]
        uld.match(*(t.get_vocab() for t in self.tokenizers), (ours, teacher.vocabulary_size()))
        self.settings = dict(
            max_length=args.max_length,
            teacher_max_length=uld.teacher_max_length,
            skip_eos=uld.skip_eos,
            text_field=args.dataset_text_field,
            num_proc=args.dataset_num_proc,
        )
        self.args = copy.copy(args)
        self.args.dataset_kwargs = (args.dataset_kwargs or {}) | {"skip_prepare_dataset": True}
        pads = [DataCollatorForLanguageModeling(_padding(tokenizer)) for tokenizer in self.tokenizers]
        self.collator = AlignedCollator(*pads, vocabulary=ours)

    def align(self, dataset):
        """A dataset, a dict of them, or None; what is aligned already stays."""
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self.align(one) for name, one in dataset.items()}
        if COLUMN in (getattr(dataset, "column_names", None) or ()):
            return dataset
        with PartialState().main_process_first():
            aligned = align_answers(dataset, *self.tokenizers, **self.settings)
        if not len(aligned):
            raise ValueError(
                f"none of the {len(dataset)} answers is left after alignment: max_length="
                f"{self.settings['max_length']} is shorter than the prompts"
            )
        return aligned


def _padding(tokenizer) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)  # attention leaves it out, so any id will do


def _refuse(args, data_collator) -> None:
    wrong = {
        "packing": args.packing or args.padding_free,
        "lmbda or seq_kd": args.writes_text,
        "a data_collator": data_collator is not None,
        "assistant_only_loss": args.assistant_only_loss,
    }
    reasons = {
        "packing": "aligned answers are padded: set packing and padding_free to False",
        "lmbda or seq_kd": "answers are aligned once, before training: leave them unset",
        "a data_collator": "ULD pads both sides itself: leave it out",
        "assistant_only_loss": "the last message is the answer: leave it unset, or use one row per answer",
    }
    for name, given in wrong.items():
        if given:
            raise ValueError(f"{name} does not go with a teacher of another tokenizer; {reasons[name]}")
