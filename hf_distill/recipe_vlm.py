"""What recipes of vision-language students share: flags, loading, the embedded default, `--tiny`, the last table."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, fields

from datasets import Dataset, Image, concatenate_datasets, load_from_disk
from transformers import PreTrainedModel, ProcessorMixin, set_seed

from hf_distill.curricula.pairs import contrastive_pairs
from hf_distill.evaluation.answers import evaluate_vlm, normalised
from hf_distill.recipe import EMBEDDED, EMBEDDED_DEFAULTS, RecipeArguments, is_embedded, parse_as
from hf_distill.recipe_data import load_data, splits
from hf_distill.students import activated_parameters
from hf_distill.students.vlm import build_vlm
from hf_distill.teachers import FrozenTeacher
from hf_distill.teachers.local_text import LocalTextTeacher
from hf_distill.tiny_vlm import made_up_pairs, made_up_pictures, tiny_vlms
from hf_distill.training import compat
from hf_distill.training.config import DistillSFTConfig
from hf_distill.training.report import ReportCallback
from hf_distill.training.saving import check_no_other_run, complete_checkpoints
from hf_distill.training.trainers import teacher_from


@dataclass
class VlmRecipeArguments(RecipeArguments):
    """Flags of vision-language recipes beside TRL's."""

    vision_tower_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "CLIP or SigLIP model; with it model_name_or_path is a language model, and the student is built of "
            "both and reads what the teacher's processor makes. None: model_name_or_path is a vision-language model."
        },
    )
    caption_dataset_name: str | None = field(
        default=None, metadata={"help": "Data of the stage that trains the projector alone. Default: dataset_name."}
    )
    sparse_dataset_name: str | None = field(
        default=None, metadata={"help": "Data of the sparse stage. Default: dataset_name."}
    )
    preference_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Preference pairs. Default: the student's own wrong answers on rows of dataset_name."},
    )
    pair_rows: int = field(
        default=2000, metadata={"help": "Training rows that are asked for the student's own wrong answers."}
    )


@dataclass
class VlmSetup:
    """A run, loaded. `train`, `captions`, `sparse` and `eval` hold messages, or prompt and completion."""

    student: PreTrainedModel
    teacher: FrozenTeacher
    processor: ProcessorMixin
    train: Dataset
    captions: Dataset | None = None
    sparse: Dataset | None = None
    pairs: Dataset | None = None
    eval: Dataset | None = None
    embedded: bool = False


# every stage's own steps and learning rates come from the method's config: see `parse_vlm`
EMBEDDED_ARGUMENTS = EMBEDDED_DEFAULTS | {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 100}


def parse_vlm(config_class: type, embedded: dict, method: str, argv: list[str] | None = None) -> tuple:
    """As `recipe.parse`; `embedded` are the method's settings of the embedded default, where flags leave them alone."""
    kinds = (VlmRecipeArguments, DistillSFTConfig)
    script, recipe, args, model, config = parse_as(kinds, EMBEDDED_ARGUMENTS, config_class, method, argv)
    if is_embedded(script, args, model):
        default = {f.name: f.default for f in fields(config)}
        own_steps = args.max_steps != EMBEDDED_ARGUMENTS["max_steps"]
        for name, value in embedded.items():
            if getattr(config, name) == default[name] and not (own_steps and name.endswith("max_steps")):
                setattr(config, name, value)
    if recipe.tiny:
        for name in (f.name for f in fields(config) if f.name.endswith("_max_steps")):
            setattr(config, name, -1)
    return script, recipe, args, model, config


# ---- loading --------------------------------------------------------------------------------------------------------
def load_vlm_setup(script, recipe: VlmRecipeArguments, args: DistillSFTConfig, model) -> VlmSetup:
    """Models, processor and datasets of a run.

    Raises:
        ValueError: no student or teacher is named, a path that is no model or no data.
    """
    if not args.resume_from_checkpoint:
        check_no_other_run(args.output_dir)
    set_seed(args.seed)
    if is_embedded(script, args, model) and not recipe.tiny:
        return embedded_vlm_setup(args.output_dir, args.seed)
    if args.teacher_model_name_or_path is None or model.model_name_or_path is None:
        raise ValueError("name a teacher and a student: --teacher_model_name_or_path and --model_name_or_path")
    if recipe.tiny:
        tiny_vlms(args, model, recipe, str(EMBEDDED / "tokenizer"))
    teacher = teacher_from(None, args)
    student, processor = named_vlm(recipe, args, model, teacher)
    if recipe.tiny:
        pictures = made_up_pictures()
        return VlmSetup(student, teacher, processor, pictures, pairs=made_up_pairs(), eval=pictures)
    train, held_out = splits(script, recipe.eval_examples, args.seed)
    others = {name: getattr(recipe, f"{name}_dataset_name") for name in ("caption", "sparse", "preference")}
    others = {name: None if path is None else _training_rows(path) for name, path in others.items()}
    chats = [
        None if data is None else as_chats(data) for data in (train, others["caption"], others["sparse"], held_out)
    ]
    return VlmSetup(
        student,
        teacher,
        processor,
        chats[0],
        captions=chats[1],
        sparse=chats[2],
        pairs=others["preference"],
        eval=chats[3],
    )


def _training_rows(name: str) -> Dataset:
    loaded = load_data(name)
    return loaded.get("train", next(iter(loaded.values()))) if isinstance(loaded, dict) else loaded


def named_vlm(recipe: VlmRecipeArguments, args, model, teacher: FrozenTeacher):
    """The student and processor that the flags name; one built of parts reads what the teacher's processor makes."""
    if recipe.vision_tower_name_or_path is None:
        student = compat.load_model(model.model_name_or_path, what="student", revision=model.model_revision)
        return student, compat.load_processing_class(model.model_name_or_path, revision=model.model_revision)
    theirs = teacher.tokenizer
    if not isinstance(theirs, ProcessorMixin):
        raise ValueError(
            f"the teacher {teacher.name} has no processor, so it reads no pictures: name a vision-language model with "
            "--teacher_model_name_or_path, or leave --vision_tower_name_or_path out for a text student"
        )
    return build_vlm(
        recipe.vision_tower_name_or_path,
        model.model_name_or_path,
        tokenizer=theirs.tokenizer,
        image_processor=theirs.image_processor,
        image_size=teacher.config.vision_config.image_size,
        image_token=theirs.image_token,
        chat_template=theirs.chat_template,
        seed=args.seed,
    )


def as_chats(dataset: Dataset) -> Dataset:
    """Rows with a picture, LLaVA's `conversations` as `messages`; other columns as they are."""
    if "image" in dataset.column_names:
        kind = dataset.features["image"]
        stored = dataset.cast_column("image", Image(decode=False)).filter(
            lambda image: image is not None, input_columns="image"
        )
        dataset = stored.cast_column("image", kind)
    if "conversations" not in dataset.column_names:
        return dataset
    return dataset.map(_messages, input_columns="conversations", remove_columns="conversations")


def _messages(conversations: list[dict]) -> dict:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [(roles.get(turn["from"], turn["from"]), turn["value"]) for turn in conversations]
    return {"messages": [{"role": role, "content": said.replace("<image>", "").strip()} for role, said in turns]}


def embedded_vlm_setup(folder: str, seed: int = 0) -> VlmSetup:
    """The default without flags: scikit-learn's digits, and a teacher trained on the spot, kept in `folder`."""
    from hf_distill.embedded import digits_vqa, small_vlm

    questions, captions = digits_vqa.digits_vqa("train"), digits_vqa.digits_captions("train")
    both = concatenate_datasets([questions, captions])
    teacher, processor = small_vlm.trained_teacher(
        os.path.join(folder, "teacher"), digits_vqa.texts(), both, pixels=digits_vqa.PIXELS, patch=digits_vqa.PATCH
    )
    return VlmSetup(
        small_vlm.small_student(teacher, processor, both, seed=seed),
        FrozenTeacher(teacher, processor),
        processor,
        questions,
        captions=captions,
        eval=digits_vqa.digits_vqa("validation"),
        embedded=True,
    )


# ---- preference pairs -----------------------------------------------------------------------------------------------
def own_pairs(student: PreTrainedModel, setup: VlmSetup, rows: int, folder: str) -> Dataset:
    """The student's own wrong answers on training rows beside the right ones; kept in `folder` for a resumed run.

    Raises:
        ValueError: rows without prompt and completion; not one wrong answer.
    """
    if os.path.isdir(folder):
        return load_from_disk(folder)
    if "completion" not in setup.train.column_names:
        raise ValueError(
            f"own wrong answers need rows of prompt and completion, got {', '.join(setup.train.column_names)}: give "
            "--preference_dataset_name"
        )
    pairs = wrong_answers(student, setup.processor, setup.train.select(range(min(rows, len(setup.train)))))
    pairs.save_to_disk(folder)
    return pairs


def wrong_answers(student: PreTrainedModel, processor, dataset: Dataset, *, max_new_tokens: int = 16) -> Dataset:
    """`contrastive_pairs` of short answers: of four draws per question, the first that is wrong once normalised."""
    writer = LocalTextTeacher(student, processor, batch_size=100)
    right = lambda row: normalised(row["completion"][-1]["content"])  # noqa: E731
    wrong = lambda answer, row: normalised(answer) != right(row)  # noqa: E731
    return contrastive_pairs(dataset, writer, is_wrong=wrong, samples=4, max_new_tokens=max_new_tokens)[0]


# ---- the last stage, and the end of a run ---------------------------------------------------------------------------
def rows_of_stage(stage: str, student: PreTrainedModel, setup: VlmSetup, recipe: VlmRecipeArguments, args) -> Dataset:
    """What a stage learns from."""
    if stage == "preference":
        folder = os.path.join(args.output_dir, "pairs")
        return setup.pairs if setup.pairs is not None else own_pairs(student, setup, recipe.pair_rows, folder)
    own = {"adaptor": setup.captions, "sparse": setup.sparse}.get(stage)
    return setup.train if own is None else own


def last_stage_arguments(args: DistillSFTConfig, config, stage: str) -> DistillSFTConfig:
    """The run's settings with a stage's learning rate and steps, in the run's own folder: its student is the result."""
    args, steps = copy.copy(args), getattr(config, f"{stage}_max_steps")
    args.learning_rate = getattr(config, f"{stage}_learning_rate")
    args.max_steps = args.max_steps if steps < 0 else steps
    return args


def run_last_stage(trainer, args, dataset_name: str | None) -> PreTrainedModel:
    """Train, save the student with its card, push if asked; the student, in eval mode."""
    resume = bool(args.resume_from_checkpoint and complete_checkpoints(args.output_dir)[0])
    trainer.add_callback(ReportCallback(trainer))
    trainer.card_facts = {"dataset_name": dataset_name}
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(args.output_dir)
    trainer.create_model_card(dataset_name=dataset_name)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    return trainer.student().eval()


def evaluate(model: PreTrainedModel, setup: VlmSetup) -> dict[str, float]:
    """Both parameter counts, and held-out scores where the held-out rows are questions with short answers."""
    count = activated_parameters(model)
    scores = {"parameters": count.total, "activated": count.activated}
    if setup.eval is None or "completion" not in setup.eval.column_names:
        return scores
    kind = "is" if setup.embedded else None
    return scores | evaluate_vlm(model, setup.processor, setup.eval, object_kind=kind, batch_size=100)


def vlm_table(rows: dict[str, dict[str, float]]) -> str:
    """A line per model: both parameter counts, accuracy, and how often it sees what is not there."""
    lines = [f"{'':26s} {'parameters':>14s} {'activated':>14s} {'accuracy':>9s} {'hallucination':>14s}"]
    for name, scores in rows.items():
        shown = [f"{scores[key]:.4f}" if key in scores else "" for key in ("accuracy", "pope/hallucination_rate")]
        counts = f"{scores['parameters']:14,} {scores['activated']:14,}"
        lines.append(f"{name:26s} {counts} {shown[0]:>9s} {shown[1]:>14s}")
    return "\n".join(lines)
