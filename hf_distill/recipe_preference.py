"""What recipes on preference pairs share: flags, loading, the embedded default, `--tiny`, the table at the end."""

from __future__ import annotations

import os
import tempfile

from datasets import Dataset

from hf_distill import recipe as language
from hf_distill.objectives import LogitKD
from hf_distill.recipe import EMBEDDED_DEFAULTS, RecipeArguments, Setup, load_language_setup
from hf_distill.students import from_teacher
from hf_distill.training.config import DistillDPOConfig, DistillSFTConfig
from hf_distill.training.trainers import DistillSFTTrainer

# about a minute on two CPU cores
EMBEDDED_ARGUMENTS = EMBEDDED_DEFAULTS | {"max_steps": 40, "learning_rate": 3e-4, "logging_steps": 5}
PROMPT, ANSWER = 64, 24  # tokens
MIMIC_STEPS = 30

__all__ = ["load_preference_setup", "parse", "run"]


def parse(config_class: type, method: str, argv: list[str] | None = None) -> tuple:
    """Flags and `--config file.yaml` as (script, recipe, args, model, config); the embedded default without flags."""
    kinds = (RecipeArguments, DistillDPOConfig)
    return language.parse_as(kinds, EMBEDDED_ARGUMENTS, config_class, method, argv)


def load_preference_setup(script, recipe: RecipeArguments, args: DistillDPOConfig, model) -> Setup:
    """Models, tokenizer and pairs of a run.

    Without flags: a student cut from the embedded teacher, which has mimicked it for a few steps, and how Python's own
    sources go on (`completion`, `chosen`) against how another place in them does (`rejected`).

    Raises:
        ValueError: as `load_language_setup`.
    """
    setup = load_language_setup(script, recipe, args, model)
    if recipe.tiny:
        setup.train = setup.eval = made_up_pairs()
    elif setup.embedded:
        setup.student = from_teacher(setup.teacher.model, "every_2").float()
        mimic(setup, args)
        setup.train = continuations(setup.train, setup.processing_class, 640)
        setup.eval = continuations(setup.eval, setup.processing_class, 100)
    return setup


def mimic(setup: Setup, args) -> None:
    """A few steps of plain distillation: a student fresh from the cut writes nothing that could be preferred."""
    with tempfile.TemporaryDirectory(prefix="hf_distill_") as folder:
        arguments = DistillSFTConfig(
            output_dir=os.path.join(folder, "mimic"),
            max_steps=MIMIC_STEPS,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            max_length=128,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            use_cpu=args.use_cpu,
            seed=args.seed,
        )
        trainer = DistillSFTTrainer(
            setup.student,
            teacher=setup.teacher,
            objective=LogitKD(),
            args=arguments,
            train_dataset=setup.train.select(range(min(len(setup.train), 16 * MIMIC_STEPS))),
            processing_class=setup.processing_class,
        )
        trainer.train()
        setup.student = trainer.student().train()


def continuations(dataset: Dataset, tokenizer, rows: int) -> Dataset:
    """The start of each text as a prompt, how it goes on, and as a bad answer how the text before it goes on."""
    found = []
    for text in dataset["text"]:
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=PROMPT + ANSWER)["input_ids"]
        prompt = tokenizer.decode(ids[:PROMPT])
        completion = tokenizer.decode(ids)[len(prompt) :]
        if len(ids) == PROMPT + ANSWER and completion.strip():
            found.append({"prompt": prompt, "completion": completion})
        if len(found) == rows:
            break
    others = [found[i - 1]["completion"] for i in range(len(found))]
    return Dataset.from_list(
        [row | {"chosen": row["completion"], "rejected": other} for row, other in zip(found, others, strict=True)]
    )


def made_up_pairs() -> Dataset:
    """Eight chats with a good and a bad answer."""
    rows = []
    for i in range(8):
        good, bad = ([{"role": "assistant", "content": text}] for text in (f"It gives {i} numbers.", "I do not know."))
        question = [{"role": "user", "content": f"What does range({i}) give?"}]
        rows.append({"prompt": question, "chosen": good, "rejected": bad, "completion": good})
    return Dataset.from_list(rows)


# ---- the end of a run -----------------------------------------------------------------------------------------------
MEASURES = (
    ("rewards/accuracies", "held-out pairs told rightly"),
    ("rewards/margins", "reward margin"),
    ("loss", "preference loss"),
    ("logps/chosen", "log-probability of good answers"),
    ("logps/rejected", "log-probability of bad answers"),
)


def run(setup: Setup, trainer, args, dataset_name: str | None = None) -> dict[str, float]:
    """As `recipe.run`, with what preference runs measure. Returns the last evaluation."""
    return language.run(setup, trainer, args, dataset_name, table=preference_table)


def preference_table(setup: Setup, before: dict[str, float], after: dict[str, float]) -> str:
    """What held-out pairs say before and after; rewards are relative to the teacher."""
    ours, theirs = language.parameters_of(setup.student), setup.teacher.describe().get("teacher_parameters")
    lines = [f"student {ours:,} parameters" + (f", teacher {theirs:,} ({theirs / ours:.1f} times)" if theirs else "")]
    for key, label in MEASURES:
        if f"eval_{key}" in after:
            start = f"{before[f'eval_{key}']:10.4f}" if f"eval_{key}" in before else " " * 10
            lines.append(f"{label:34s} {start} -> {after[f'eval_{key}']:9.4f}")
    return "\n".join(lines)
