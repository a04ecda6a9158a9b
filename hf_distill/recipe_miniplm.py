"""What the recipe of MiniPLM loads, and how it trains students on what was selected."""

from __future__ import annotations

import copy
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, set_seed

from hf_distill.curricula.corpus import Corpus
from hf_distill.methods.miniplm import CARD, MiniPLMConfig, Selection, retokenised
from hf_distill.objectives import NextToken
from hf_distill.recipe import (
    EMBEDDED,
    EMBEDDED_DEFAULTS,
    RecipeArguments,
    Setup,
    is_embedded,
    named_student,
    parameters_of,
    parse_as,
    run,
    small_student,
)
from hf_distill.recipe_data import splits
from hf_distill.teachers import FrozenTeacher
from hf_distill.teachers.cache.fingerprint import tokenizer_digest
from hf_distill.tiny import model_type_of, tiny_arguments, tiny_model, tiny_models
from hf_distill.training.config import DistillSFTConfig
from hf_distill.training.saving import check_no_other_run
from hf_distill.training.trainers import DistillSFTTrainer, teacher_from

QUICK = {"miniplm_length": 128, "miniplm_batch_size": 16}  # of the embedded default, where no flag says otherwise


@dataclass
class MiniPLMArguments(RecipeArguments):
    """Flags of this recipe."""

    reference_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Small model with the teacher's tokenizer, trained on other data of the kind."}
    )
    more_students: list[str] = field(
        default_factory=list,
        metadata={"help": "Trained after model_name_or_path on the same selection, each in a folder of its name."},
    )
    scores_dir: str | None = field(
        default=None, metadata={"help": "Where scores are kept. Default: <output_dir>/miniplm/scores."}
    )


@dataclass
class Loaded:
    """A corpus, the two models that score it, and held-out text."""

    train: Dataset
    eval: Dataset | None
    teacher: FrozenTeacher
    reference: FrozenTeacher | str
    embedded: bool = False


def parse(argv: list[str] | None = None) -> tuple:
    """(script, recipe, args, model, config)."""
    embedded = EMBEDDED_DEFAULTS | {"max_steps": 80}
    script, recipe, args, model, config = parse_as(
        (MiniPLMArguments, DistillSFTConfig), embedded, MiniPLMConfig, "miniplm", argv
    )
    plain = MiniPLMConfig()
    if recipe.tiny or is_embedded(script, args, model):
        quick = QUICK | ({"miniplm_length": 32} if recipe.tiny else {})
        for name, value in quick.items():
            if getattr(config, name) == getattr(plain, name):
                setattr(config, name, value)
    return script, recipe, args, model, config


def load(script, recipe: MiniPLMArguments, args: DistillSFTConfig, model) -> Loaded:
    """What a run's flags name; `--tiny` and the embedded default make it up.

    Raises:
        ValueError: no reference, no data.
    """
    from hf_distill.embedded.corpus import stdlib_dataset

    if not args.resume_from_checkpoint:
        check_no_other_run(args.output_dir)
    set_seed(args.seed)
    held_out = stdlib_dataset("validation", max_characters=60_000).select_columns("text")
    if recipe.tiny:
        named = recipe.reference_model_name_or_path
        recipe.more_students = []
        tiny_models(args, model, str(EMBEDDED / "tokenizer"))
        tiny_arguments(args, model)
        teacher = teacher_from(None, args)
        model_of = tiny_model(model_type_of(named), len(teacher.tokenizer), teacher.tokenizer, seed=3)
        reference = FrozenTeacher(model_of, teacher.tokenizer, name=f"a random {model_of.config.model_type}")
        return Loaded(held_out.select(range(4)), None, teacher, reference)
    if is_embedded(script, args, model):
        teacher = FrozenTeacher.from_pretrained(str(EMBEDDED / "teacher"))
        train = _with_noise(stdlib_dataset("train", max_characters=450_000).select_columns("text"))
        apart = len(train) // 4  # the reference must not have seen what it scores
        reference = _small_reference(train.select(range(apart)), teacher, args)
        return Loaded(train.select(range(apart, len(train))), held_out, teacher, reference, embedded=True)
    if recipe.reference_model_name_or_path is None:
        raise ValueError("no reference: give --reference_model_name_or_path a small model with the teacher's tokenizer")
    train, held_out = splits(script, recipe.eval_examples, args.seed)
    return Loaded(train, held_out, teacher_from(None, args), recipe.reference_model_name_or_path)


def _with_noise(data: Dataset) -> Dataset:
    """Every third document with its characters shuffled: what a selection should leave out."""

    def spoil(row: dict, i: int) -> dict:
        return {"text": "".join(random.Random(i).sample(row["text"], len(row["text"])))} if i % 3 == 0 else row

    return data.map(spoil, with_indices=True)


def _small_reference(data: Dataset, teacher: FrozenTeacher, args: DistillSFTConfig) -> FrozenTeacher:
    own = copy.deepcopy(args)
    own.output_dir, own.max_steps = os.path.join(args.output_dir, "reference"), 60
    own.push_to_hub, own.packing = False, True
    trainer = DistillSFTTrainer(
        small_student(teacher.config, seed=1),
        objective=NextToken(),
        args=own,
        train_dataset=data,
        processing_class=teacher.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return FrozenTeacher(trainer.student(), teacher.tokenizer, name="a small Llama trained on other files")


def students(recipe: MiniPLMArguments, args: DistillSFTConfig, model, loaded: Loaded):
    """(student, its tokenizer, its folder) of every student that the flags name, one after the other."""
    if loaded.embedded:
        yield small_student(loaded.teacher.config, args.seed), loaded.teacher.tokenizer, Path(args.output_dir)
        return
    for name in filter(None, [model.model_name_or_path, *recipe.more_students]):
        own = copy.copy(model)
        own.model_name_or_path = name
        folder = Path(args.output_dir)
        if name != model.model_name_or_path:
            folder /= os.path.basename(os.path.normpath(name))
        yield (*named_student(recipe, args, own, loaded.teacher), folder)


def train(
    student: PreTrainedModel, tokenizer, folder: Path, data: Dataset, loaded: Loaded, args, dataset_name: str
) -> dict[str, float]:
    """Plain pre-training; the last evaluation."""
    own = copy.deepcopy(args)
    own.output_dir, own.teacher_model_name_or_path = str(folder), None
    if "input_ids" in data.column_names and tokenizer_digest(tokenizer) != tokenizer_digest(loaded.teacher.tokenizer):
        data = retokenised(data, loaded.teacher.tokenizer, tokenizer, own.max_length)
    objective = NextToken()
    objective.paper = CARD
    trainer = DistillSFTTrainer(
        student,
        objective=objective,
        args=own,
        train_dataset=data,
        eval_dataset=loaded.eval,
        processing_class=tokenizer,
    )
    setup = Setup(student, None, data, loaded.eval, tokenizer)
    return run(setup, trainer, own, dataset_name, table=table)


def random_part(loaded: Loaded, made: Selection, config: MiniPLMConfig, seed: int) -> Dataset:
    """As many chunks as were kept, whatever their scores."""
    corpus = Corpus(loaded.train, loaded.teacher.tokenizer, length=config.miniplm_length)
    chunks = [unit.ids for _, _, units in corpus.shards(512, lambda _: True) for unit in units]
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))[: len(made.indices)]
    return Dataset.from_dict({"input_ids": [chunks[i] for i in order.sort().values]})


def table(setup: Setup, before: dict[str, float], after: dict[str, float]) -> str:
    lines = [f"student {parameters_of(setup.student):,} parameters, {len(setup.train):,} rows"]
    if "eval_cross_entropy" in after:
        start = f"{before['eval_cross_entropy']:.4f} -> " if before else ""
        lines.append(f"cross-entropy on held-out text {start}{after['eval_cross_entropy']:.4f}")
    return "\n".join(lines)


def described(made: Selection, dataset_name: str | None) -> str:
    """The selection, for a student's card."""
    f = made.facts
    ratio = f["config"]["miniplm_ratio"]
    return f"{dataset_name or 'not named'}, {ratio:g} of it by MiniPLM ({f['teacher']} beside {f['reference']})"
