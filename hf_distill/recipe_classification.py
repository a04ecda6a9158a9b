"""What recipes of image and text classifiers share: flags, loading, the embedded default, and the table at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_distill import recipe as language
from hf_distill.baselines.base import Baseline
from hf_distill.curricula.images import AUGMENTATIONS
from hf_distill.evaluation import classification as measures
from hf_distill.hub.report import write_report
from hf_distill.recipe_data import labelled, splits
from hf_distill.recipe_inputs import prepare_images, prepare_texts, task_of
from hf_distill.teachers import RelabelledTeacher, Teacher
from hf_distill.tiny_classifiers import made_up_classes, tiny_classifiers
from hf_distill.training import compat
from hf_distill.training.config import DistillConfig
from hf_distill.training.labels import balanced_weights, class_counts, class_order, names_of
from hf_distill.training.saving import check_no_other_run
from hf_distill.training.trainers import teacher_from

logger = logging.getLogger(__name__)

AUTO = {"image": AutoModelForImageClassification, "text": AutoModelForSequenceClassification}
EMBEDDED_DEFAULTS = {
    "max_steps": 300,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "logging_steps": 20,
    "report_to": "none",
    "save_strategy": "no",
}


@dataclass
class ClassificationArguments(language.RecipeArguments):
    """Flags of classification recipes beside TRL's and `RecipeArguments`."""

    task: str = field(default="auto", metadata={"help": "image, text, or auto: what the dataset's columns hold."})
    image_column: str | None = field(default=None, metadata={"help": "Default: the column that holds pictures."})
    text_column: str | None = field(default=None, metadata={"help": "Default: text, sentence, sentence1, premise..."})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Second text of a pair. Default: sentence2, hypothesis, question2 where there."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: label, labels, fine_label..."})
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of classes 0, 1, ... Default: the dataset's own."}
    )
    same_label_order: bool = field(
        default=False,
        metadata={"help": "Class i means the same in dataset, student and teacher, whatever their names."},
    )
    text_length: int = field(default=128, metadata={"help": "Tokens that a text is cut to."})
    augmentation: str = field(
        default="none",
        metadata={"help": "Of training pictures: none, crop_flip (small pictures) or resized_crop_flip."},
    )
    fixed_augmentation: bool = field(
        default=False, metadata={"help": "Draw the same augmentation in every epoch, as a cached teacher needs."}
    )
    class_weights: str = field(
        default="none", metadata={"help": "balanced: the label loss of rare classes counts more (N / (C n_c))."}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of the label loss spread over all classes."})

    def __post_init__(self):
        for name, allowed in (
            ("task", ("auto", *AUTO)),
            ("augmentation", tuple(AUGMENTATIONS)),
            ("class_weights", ("none", "balanced")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie between 0 and 1, got {self.label_smoothing}")
        if self.text_length < 1:
            raise ValueError(f"text_length must be at least 1, got {self.text_length}")


@dataclass
class ClassificationSetup(language.Setup):
    """A run of a classifier, loaded. `train` has the columns labels and either pixel_values or input_ids."""

    names: list[str] = field(default_factory=list)
    data_collator: Callable | None = None
    callbacks: list = field(default_factory=list)
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    teacher_scores: dict[str, float] = field(default_factory=dict)
    teacher_reliability: measures.Reliability | None = None

    @property
    def trainer_arguments(self) -> dict:
        own = {"data_collator": self.data_collator, "callbacks": list(self.callbacks)}
        return super().trainer_arguments | own | {"compute_metrics": measures.compute_metrics}


def parse(config_class: type, method: str, argv: list[str] | None = None, *, task: str | None = None) -> tuple:
    """Flags and `--config file.yaml` as (script, recipe, args, model, config); the embedded default without flags.

    Args:
        task: of the embedded default: "image" or "text"; None is "image".
    """
    kinds = (ClassificationArguments, DistillConfig)
    script, recipe, args, model, config = language.parse_as(kinds, EMBEDDED_DEFAULTS, config_class, method, argv)
    if task is not None and recipe.task == "auto":
        recipe.task = task
    if recipe.tiny:
        args.per_device_train_batch_size = 2  # losses that compare examples need two
    return script, recipe, args, model, config


# ---- loading --------------------------------------------------------------------------------------------------------
def load_classification_setup(
    script, recipe: ClassificationArguments, args: DistillConfig, model: ModelConfig, *, keep: tuple[str, ...] = ()
) -> ClassificationSetup:
    """Models, processors and datasets of a run. Pictures keep the columns that `keep` names, where they have them.

    Raises:
        ValueError: a path that is no classifier or no data, classes that cannot be matched, pictures that the teacher
            reads otherwise and nothing that prepares them, or flags that contradict each other.
    """
    if not args.resume_from_checkpoint:
        check_no_other_run(args.output_dir)
    set_seed(args.seed)
    embedded = language.is_embedded(script, args, model) and not recipe.tiny
    if embedded:
        train, held_out, task, student, teacher, processor = _embedded(recipe, args.seed)
    else:
        train, held_out, task = _data(script, recipe, args)
        if recipe.tiny:
            tiny_classifiers(args, model, task, str(language.EMBEDDED / "tokenizer"))
        teacher = _teacher(args, task)
    train, held_out, names = labelled(train, held_out, recipe.label_column, recipe.class_names)
    if not embedded:
        student, processor = _student(recipe, args, model, task, names, teacher)
    for name, count in zip(names, class_counts(train["labels"], len(names)).tolist(), strict=True):
        if not count:
            logger.warning("no training example of the class %r", name)
    setup = ClassificationSetup(student, _matched(teacher, names, recipe), train, held_out, processor)
    setup.names, setup.embedded = names, embedded
    setup.label_smoothing = recipe.label_smoothing
    if recipe.class_weights == "balanced":
        setup.class_weights = balanced_weights(train["labels"], names)
    setup.peft_config = _peft_config(model, task, student)
    prepare_images(setup, recipe, args, keep) if task == "image" else prepare_texts(setup, recipe, args)
    return setup


def _embedded(recipe: ClassificationArguments, seed: int) -> tuple:
    from hf_distill import recipe_embedded as embedded
    from hf_distill.teachers import FrozenTeacher

    task = "image" if recipe.task == "auto" else recipe.task
    data = embedded.digits() if task == "image" else embedded.snippets()
    make = embedded.digit_models if task == "image" else embedded.snippet_models
    student, teacher, processor = make(data["train"], seed)
    return data["train"], data["test"], task, student, FrozenTeacher(teacher, processor), processor


def _data(script, recipe: ClassificationArguments, args) -> tuple[Dataset, Dataset | None, str]:
    if recipe.tiny:
        task = recipe.task if recipe.task != "auto" else "image"
        recipe.class_names = None
        given = {"image": recipe.image_column, "text": recipe.text_column, "label": recipe.label_column}
        rows = made_up_classes(task, second_text=recipe.text_pair_column)
        rows = rows.rename_columns({own: name for own, name in given.items() if own in rows.column_names and name})
        return rows, rows, task
    if script.dataset_streaming:
        raise ValueError("classification recipes read all labels first: leave out --dataset_streaming")
    train, held_out = splits(script, recipe.eval_examples, args.seed)
    return train, held_out, recipe.task if recipe.task != "auto" else task_of(train, recipe)


def _teacher(args, task: str) -> Teacher | None:
    teacher = teacher_from(None, args, auto_class=AUTO[task])
    model = getattr(teacher, "model", None)
    if model is not None and "Classification" not in type(model).__name__:
        raise ValueError(
            f"the teacher {teacher.name} is a {type(model).__name__}, no classifier: fine-tune it on the classes first"
        )
    return teacher


def _student(recipe, args, model: ModelConfig, task: str, names: list[str], teacher: Teacher | None) -> tuple:
    """The student, its classes those of the dataset in their order, and its processor or tokenizer."""
    if recipe.student_init not in ("pretrained", "from_teacher", "random"):
        raise ValueError(f"student_init must be pretrained, from_teacher or random, got {recipe.student_init!r}")
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if recipe.student_init == "from_teacher":
        student, processor = language.named_student(recipe, args, model, teacher)
        class_order(names, student.config, what="student", same_order=recipe.same_label_order)
        return student, processor
    path = model.model_name_or_path
    if path is None:
        raise ValueError("no student: give --model_name_or_path, or --student_init from_teacher")
    load = AutoImageProcessor if task == "image" else AutoTokenizer
    try:
        processor = load.from_pretrained(path, revision=model.model_revision)
        config = AutoConfig.from_pretrained(path, revision=model.model_revision)
    except OSError as error:
        raise ValueError(f"cannot load the student from {path!r}: {str(error).strip().splitlines()[0]}") from error
    if task == "text" and processor.pad_token is None:
        processor.pad_token = processor.eos_token
        labels["pad_token_id"] = processor.pad_token_id
    if recipe.student_init == "random":
        config.update(labels)
        return AUTO[task].from_config(config, dtype=torch.float32), processor
    own = names_of(config)
    if own is not None and own != names and sorted(own) == sorted(names) and not recipe.same_label_order:
        raise ValueError(
            f"the student {path} knows the dataset's classes in another order. Student: {', '.join(own)}. Dataset: "
            f"{', '.join(names)}. Give --class_names in one order, or a student without a head for them"
        )
    options = {"revision": model.model_revision, "attn_implementation": model.attn_implementation}
    student = compat.load_model(
        path,
        what="student",
        auto_class=AUTO[task],
        quantization_config=get_quantization_config(model),
        dtype=model.dtype or torch.float32,
        ignore_mismatched_sizes=True,  # a head of other classes is made anew
        **labels,
        **{k: v for k, v in options.items() if v is not None},
    )
    return student, processor


def _matched(teacher: Teacher | None, names: list[str], recipe: ClassificationArguments) -> Teacher | None:
    if teacher is None or teacher.config is None:
        return teacher
    order = class_order(names, teacher.config, what="teacher", same_order=recipe.same_label_order)
    if order is None:
        return teacher
    logger.info("the teacher's classes are taken in the dataset's order: %s", order[:20])
    return RelabelledTeacher(teacher, order, names)


def _peft_config(model: ModelConfig, task: str, student: PreTrainedModel):
    config = get_peft_config(model)
    if config is not None:
        config.task_type = "SEQ_CLS" if task == "text" else None
        if not config.modules_to_save:  # a head of new classes has to be learnt whole
            heads = [n for n in ("classifier", "score", "head") if hasattr(student, n)]
            config.modules_to_save = heads or None
    return config


# ---- the end of a run -----------------------------------------------------------------------------------------------
MEASURES = (
    ("accuracy", "accuracy"),
    ("macro_f1", "macro F1"),
    ("cross_entropy", "cross-entropy"),
    ("ece", "calibration error (15 bins)"),
    ("agreement", "agreement with the teacher"),
)


def run(setup: ClassificationSetup, trainer, args, dataset_name: str | None = None) -> dict[str, float]:
    """Evaluate, train, evaluate, save, push if asked, and print what changed. Returns the last evaluation.

    The output folder then also holds `classes.txt` (precision, recall and F1 of each class) and `reliability.png`.

    Raises:
        ValueError: --class_weights or --label_smoothing with an objective that has no label loss of `Baseline`.
    """
    weigh_labels(setup, trainer.objective)
    if setup.eval is not None and setup.teacher is not None and "logits" in setup.teacher.gives:
        setup.teacher_scores, setup.teacher_reliability = teacher_scores(trainer)
    after = language.run(setup, trainer, args, dataset_name, table=table)
    if setup.eval is not None:
        write_details(setup, trainer)
    return after


def write_details(setup: ClassificationSetup, trainer) -> None:
    """What one number hides: every class, and how far confidence can be trusted."""
    held_out = trainer.predict(setup.eval)
    if not trainer.is_world_process_zero():
        return
    logits, labels = torch.as_tensor(held_out.predictions), torch.as_tensor(held_out.label_ids)
    names = setup.student.config.id2label
    folder = Path(trainer.args.output_dir)
    classes = measures.class_table(logits, labels, [str(names[i]) for i in sorted(names)])
    (folder / "classes.txt").write_text(classes + "\n", encoding="utf-8")
    rows = {"student": measures.reliability(logits, labels)}
    rows |= {} if setup.teacher_reliability is None else {"teacher": setup.teacher_reliability}
    try:
        measures.reliability_picture(rows, str(folder / "reliability.png"), "held-out examples")
        write_report(folder)  # with the picture
    except ImportError:
        logger.info("no pictures: matplotlib is not installed (pip install 'hf-distill[report]')")


def weigh_labels(setup: ClassificationSetup, objective) -> None:
    """Give the run's class weights and label smoothing to the objective's label loss."""
    if setup.class_weights is None and not setup.label_smoothing:
        return
    leaves = [leaf for _, _, leaf in objective.leaves() if isinstance(leaf, Baseline)]
    if not leaves:
        raise ValueError(
            f"{type(objective).__name__} has no label loss that --class_weights or --label_smoothing could change: "
            "leave them out"
        )
    for leaf in leaves:
        leaf.weigh_labels(setup.class_weights, setup.label_smoothing)


def teacher_scores(trainer) -> tuple[dict[str, float], measures.Reliability]:
    """The teacher's own accuracy, macro-F1, cross-entropy and calibration on the held-out examples."""
    logits, labels = teacher_logits(trainer)
    return scores_of(logits, labels), measures.reliability(logits, labels)


@torch.no_grad()
def teacher_logits(trainer) -> tuple[Tensor, Tensor]:
    """The teacher's logits (N, C) on the held-out examples of all ranks, and the labels (N,)."""
    logits, labels = [], []
    for batch in trainer.get_eval_dataloader():
        batch = trainer._prepare_inputs(batch)
        own = trainer.teacher(batch, frozenset({"logits"})).logits
        for kept, value in ((logits, own.float()), (labels, batch["labels"])):
            kept.append(trainer.accelerator.gather_for_metrics(value.contiguous()).cpu())
    return torch.cat(logits), torch.cat(labels)


def scores_of(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Cross-entropy, calibration error, accuracy and macro-F1."""
    functions = {"cross_entropy": measures.cross_entropy, "ece": measures.expected_calibration_error}
    functions |= {"accuracy": measures.accuracy, "macro_f1": measures.macro_f1}
    return {name: function(logits, labels) for name, function in functions.items()}


def table(setup: ClassificationSetup, before: dict[str, float], after: dict[str, float]) -> str:
    """What held-out examples say of the student before and after, and of its teacher."""
    ours = language.parameters_of(setup.student)
    theirs = None if setup.teacher is None else setup.teacher.describe().get("teacher_parameters")
    lines = [f"student {ours:,} parameters" + (f", teacher {theirs:,} ({theirs / ours:.1f} times)" if theirs else "")]
    lines.append(f"{'on held-out examples':30s} {'before':>9s}    {'after':>9s} {'teacher':>9s}")
    for key, label in MEASURES:
        if f"eval_{key}" in after:
            start = f"{before[f'eval_{key}']:9.4f}" if f"eval_{key}" in before else " " * 9
            other = f"{setup.teacher_scores[key]:9.4f}" if key in setup.teacher_scores else ""
            lines.append(f"{label:30s} {start} -> {after[f'eval_{key}']:9.4f} {other}".rstrip())
    return "\n".join(lines)
