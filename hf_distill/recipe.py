"""What recipes share: flags, loading models and data, the embedded default, `--tiny`, and the table at the end."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from hf_distill.recipe_data import load_data, splits
from hf_distill.teachers import AdapterOffTeacher, FrozenTeacher, Teacher
from hf_distill.tiny import made_up_rows, tiny_arguments, tiny_models
from hf_distill.training import compat
from hf_distill.training.config import DistillSFTConfig
from hf_distill.training.report import ReportCallback
from hf_distill.training.saving import KEY, check_no_other_run
from hf_distill.training.trainers import teacher_from

EMBEDDED = Path(__file__).parent / "embedded"

__all__ = ["RecipeArguments", "Setup", "load_data", "load_language_setup", "parse", "run"]


@dataclass
class RecipeArguments:
    """Flags of every recipe beside TRL's."""

    student_init: str = field(
        default="pretrained",
        metadata={
            "help": "pretrained: weights of model_name_or_path. from_teacher: chosen layers of the teacher. "
            "random: model_name_or_path's config, untrained."
        },
    )
    student_layers: str = field(
        default="every_2",
        metadata={"help": "Layers kept with --student_init from_teacher: every_N, first_N, last_N, a count, or 0,3,7."},
    )
    eval_examples: int = field(
        default=500, metadata={"help": "Held-out examples cut from the training set where there is no test split."}
    )
    tiny: bool = field(
        default=False,
        metadata={
            "help": "Same settings, same code, on random 2-layer models of the same families and eight made-up rows; "
            "two steps. To see whether a configuration runs at all."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest complete checkpoint of output_dir."})


@dataclass
class Setup:
    """A run, loaded."""

    student: PreTrainedModel
    teacher: Teacher
    train: Dataset
    eval: Dataset | None
    processing_class: object
    peft_config: object = None
    embedded: bool = False

    @property
    def trainer_arguments(self) -> dict:
        names = {"eval_dataset": "eval", "processing_class": "processing_class", "peft_config": "peft_config"}
        return {argument: getattr(self, name) for argument, name in names.items()}


def parse(config_class: type, method: str, argv: list[str] | None = None) -> tuple:
    """Flags and `--config file.yaml` as (script, recipe, args, model, config); the embedded default without flags."""
    return parse_as((RecipeArguments, DistillSFTConfig), EMBEDDED_DEFAULTS, config_class, method, argv)


def parse_as(
    kinds: tuple[type, type], embedded: dict, config_class: type, method: str, argv: list[str] | None
) -> tuple:
    """`parse` for other kinds of (recipe, training) arguments, with what the embedded default sets of the latter."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = TrlParser((_Script, *kinds, ModelConfig, config_class))
    script, recipe, args, model, config = parser.parse_args_and_config(argv)
    given = {a.split("=")[0].lstrip("-").replace("-", "_") for a in argv if a.startswith("--")}
    if is_embedded(script, args, model):
        for name, value in embedded.items():  # every flag that was given wins
            if name not in given:
                setattr(args, name, value)
    if args.output_dir is None or (args.output_dir == "trainer_output" and "output_dir" not in given):
        args.output_dir = os.path.join("runs", method)
    if recipe.tiny:
        tiny_arguments(args, model)
    if recipe.resume or (args.resume_from_checkpoint or "").lower() in ("true", "last"):
        args.resume_from_checkpoint = True
    return script, recipe, args, model, config


@dataclass
class _Script(ScriptArguments):
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder saved by datasets, or json/jsonl/csv/parquet/txt file(s) or folder of them."},
    )


def is_embedded(script, args, model) -> bool:
    """Whether no model and no data are named."""
    named = (script.dataset_name, args.teacher_model_name_or_path, model.model_name_or_path)
    return not any(named) and not args.teacher_adapter_off


# about a minute on two CPU cores
EMBEDDED_DEFAULTS = {
    "max_steps": 150,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "max_length": 128,
    "logging_steps": 10,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",  # only the student at the end, so that it can be run again
}


# ---- loading --------------------------------------------------------------------------------------------------------
def load_language_setup(
    script, recipe: RecipeArguments, args: DistillSFTConfig, model: ModelConfig, make_student=None
) -> Setup:
    """Models, tokenizer and datasets of a run; `make_student` stands for the student that the flags name.

    Raises:
        ValueError: a path that is no model or no data, or flags that contradict each other.
    """
    if not args.resume_from_checkpoint:
        check_no_other_run(args.output_dir)
    set_seed(args.seed)
    if recipe.tiny:
        tiny_models(args, model, str(EMBEDDED / "tokenizer"))
    elif is_embedded(script, args, model):
        return embedded_setup(args.seed)
    teacher = teacher_from(None, args)
    student, processing_class = (make_student or named_student)(recipe, args, model, teacher)
    train, held_out = (made_up_rows(),) * 2 if recipe.tiny else splits(script, recipe.eval_examples, args.seed)
    if isinstance(teacher, AdapterOffTeacher) and not model.use_peft:
        raise ValueError("--teacher_adapter_off needs --use_peft: the teacher is the adapter's base")
    return Setup(student, teacher, train, held_out, processing_class, get_peft_config(model))


def embedded_setup(seed: int = 0) -> Setup:
    """The default of recipes without flags: the embedded teacher, a small untrained student, Python's own sources."""
    from hf_distill.embedded.corpus import stdlib_dataset

    teacher = FrozenTeacher.from_pretrained(str(EMBEDDED / "teacher"))
    train = stdlib_dataset("train").select_columns("text")
    return Setup(
        small_student(teacher.config, seed),
        teacher,
        train,
        stdlib_dataset("validation", max_characters=60_000).select_columns("text"),
        teacher.tokenizer,
        embedded=True,
    )


def small_student(teacher_config, seed: int = 0) -> PreTrainedModel:
    """An untrained Llama about a tenth of the embedded teacher's size, with its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=teacher_config.vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.05,  # learns faster at this size than the default 0.02
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=teacher_config.bos_token_id,
        eos_token_id=teacher_config.eos_token_id,
        pad_token_id=teacher_config.pad_token_id,
    )
    return LlamaForCausalLM(config)


def named_student(recipe: RecipeArguments, args, model: ModelConfig, teacher: Teacher | None):
    if recipe.student_init not in ("pretrained", "from_teacher", "random"):
        raise ValueError(f"student_init must be pretrained, from_teacher or random, got {recipe.student_init!r}")
    if recipe.student_init == "from_teacher":
        from hf_distill.students import from_teacher

        if not isinstance(teacher, FrozenTeacher):
            raise ValueError(
                "--student_init from_teacher cuts the student from a teacher's weights: name a model with "
                f"--teacher_model_name_or_path, got {'none' if teacher is None else type(teacher).__name__}"
            )
        student = from_teacher(teacher.model, _layers(recipe.student_layers)).float()
        return student, teacher.tokenizer
    if model.model_name_or_path is None:
        raise ValueError("no student: give --model_name_or_path, or --student_init from_teacher")
    tokenizer = compat.load_processing_class(model.model_name_or_path, revision=model.model_revision)
    if recipe.student_init == "random":
        config = AutoConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer
    options = {"revision": model.model_revision, "attn_implementation": model.attn_implementation}
    student = compat.load_model(
        model.model_name_or_path,
        what="student",
        quantization_config=get_quantization_config(model),
        dtype=model.dtype or torch.float32,
        **{k: v for k, v in options.items() if v is not None},
    )
    return student, tokenizer


def _layers(text: str) -> str | int | list[int]:
    if "," in text:
        return [int(part) for part in text.split(",")]
    return int(text) if text.isdigit() else text


# ---- the end of a run -----------------------------------------------------------------------------------------------
MEASURES = (
    ("cross_entropy", "cross-entropy on held-out text"),
    ("teacher_kl", "KL(teacher || student)"),
    ("agreement", "top-1 agreement"),
)


def run(setup: Setup, trainer, args, dataset_name: str | None = None, *, table=None) -> dict[str, float]:
    """Evaluate, train, evaluate, save, push if asked, and print what changed. Returns the last evaluation.

    Args:
        table: (setup, before, after) -> the text to print; None is that of language models.
    """
    if trainer.is_world_process_zero():
        logging.basicConfig(format="%(message)s")
        logging.getLogger("hf_distill").setLevel(logging.INFO)
    trainer.add_callback(ReportCallback(trainer))
    trainer.card_facts = {"dataset_name": dataset_name}
    before = trainer.evaluate() if setup.eval is not None and not args.resume_from_checkpoint else {}
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate() if setup.eval is not None else {}
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    if trainer.is_world_process_zero():
        print((table or language_table)(setup, before, after))
        print(f"student saved in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    return after


def parameters_of(student: PreTrainedModel) -> int:
    """Without what the objective has hung on it for training."""
    return sum(p.numel() for name, p in student.named_parameters() if f"{KEY}." not in name)


def language_table(setup: Setup, before: dict[str, float], after: dict[str, float]) -> str:
    """What held-out text says of the student before and after."""
    ours, theirs = parameters_of(setup.student), setup.teacher.describe().get("teacher_parameters")
    lines = [f"student {ours:,} parameters" + (f", teacher {theirs:,} ({theirs / ours:.1f} times)" if theirs else "")]
    for key, label in MEASURES:
        if f"eval_{key}" in after:
            start = f"{before[f'eval_{key}']:10.4f}" if f"eval_{key}" in before else " " * 10
            lines.append(f"{label:34s} {start} -> {after[f'eval_{key}']:8.4f}")
    return "\n".join(lines)
