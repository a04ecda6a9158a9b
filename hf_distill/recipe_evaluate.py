"""`hf-distill evaluate`: how far a student is from its teacher, whether it knows when it is right, what it costs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig

from hf_distill import recipe as language
from hf_distill import recipe_classification as classes
from hf_distill import recipe_vlm as vlm
from hf_distill.baselines.probe import model_of
from hf_distill.evaluation.classification import Reliability, reliability_picture
from hf_distill.evaluation.extraction import extractor_of
from hf_distill.evaluation.fidelity import answer_fidelity, measure_tokens, token_fidelity
from hf_distill.evaluation.generated import AnswerSettings, greedy_texts, questions_of
from hf_distill.evaluation.lm_eval_tasks import check_tasks, lm_eval_scores
from hf_distill.evaluation.speed import forward_cost, tokens_per_second
from hf_distill.heads import model_inputs
from hf_distill.methods.fidelity import compare, markdown_table, write_report
from hf_distill.objectives import LogitKD
from hf_distill.teachers import FrozenTeacher
from hf_distill.teachers.base import teacher_batch
from hf_distill.training import compat
from hf_distill.training.checks import check_processes
from hf_distill.training.labels import class_order
from hf_distill.training.trainers import DistillSFTTrainer, DistillTrainer

TASKS = ("language", "vlm", "image", "text")
LABELS = dict(language.MEASURES) | dict(classes.MEASURES) | {"exact_match": "generated answers that are right"}
COST = ("runtime", "per_second", "preparation_time")


@dataclass
class EvaluateArguments(AnswerSettings):
    """What `hf-distill evaluate` adds to a recipe's flags."""

    fidelity: bool = field(
        default=False,
        metadata={"help": "Also how closely the student imitates its teacher: fidelity.json and a table, fidelity.md."},
    )
    control_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "With --fidelity: a student trained on the labels alone, to tell what the teacher gained."},
    )
    lm_eval_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "Tasks of lm-evaluation-harness (pip install 'hf-distill[lm-eval]'), for the student."},
    )
    lm_eval_limit: int | None = field(default=None, metadata={"help": "Examples per task. Default: all."})
    lm_eval_include_path: str | None = field(default=None, metadata={"help": "Folder of task files of your own."})
    speed_rows: int = field(
        default=4,
        metadata={
            "help": "Rows on which language models' tokens per second are measured; 0 leaves speed and memory out."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.speed_rows < 0:
            raise ValueError(f"speed_rows must be 0 or more, got {self.speed_rows}")
        if self.lm_eval_limit is not None and self.lm_eval_limit < 1:
            raise ValueError(f"lm_eval_limit must be at least 1, got {self.lm_eval_limit}")
        if self.control_model_name_or_path is not None and not self.fidelity:
            raise ValueError("--control_model_name_or_path is compared in the fidelity report: add --fidelity")


def main(flags: list[str]) -> dict:
    """Evaluate on the test split (without one, on the train split); print a table, write evaluation.json and a picture.

    Args:
        flags: `--task language|vlm|image|text` (default language), and those of a recipe of that task.

    Raises:
        ValueError: no student or no data, an empty set, models or classes that do not fit.
        ImportError: --lm_eval_tasks without lm-eval.
    """
    task, flags = _task(flags)
    found = {"language": _language, "vlm": _vlm}.get(task, _classes)(task, flags)
    if found is None:
        return {}
    metrics, diagrams, folder = found
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        print(f"{LABELS.get(name, name.replace('_', ' ')):36s} {shown}")
    print(f"written to {folder / 'evaluation.json'}")
    try:
        reliability_picture(diagrams, str(folder / "reliability.png"), "held-out")
    except ImportError:
        print("no reliability picture: matplotlib is not installed (pip install 'hf-distill[report]')")
    return metrics


def _task(flags: list[str]) -> tuple[str, list[str]]:
    if "--task" not in flags:
        return "language", flags
    place = flags.index("--task")
    task = flags[place + 1] if place + 1 < len(flags) else None
    if task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {task!r}")
    return task, flags if task in ("image", "text") else flags[:place] + flags[place + 2 :]


# ---- models that write ----------------------------------------------------------------------------------------------
def _language(task: str, flags: list[str]) -> tuple | None:
    script, recipe, args, model, settings = language.parse(EvaluateArguments, "evaluate", flags)
    if settings.lm_eval_tasks:
        check_tasks(settings.lm_eval_tasks, settings.lm_eval_include_path)
    check_processes(args.world_size)
    setup = language.load_language_setup(script, recipe, args, model)
    trainer, rows = _trainer_of_text(setup, setup.processing_class, args), _held_out(setup)
    result, diagram = _tokens_and_answers(trainer, rows, settings)
    result |= _sizes(setup)
    if settings.speed_rows and isinstance(setup.teacher, FrozenTeacher) and "input_ids" in trainer.eval_dataset[0]:
        result |= _speed(trainer, setup, settings.speed_rows) | _cost(trainer, only_memory=True)
    if settings.lm_eval_tasks:
        limits = {"limit": settings.lm_eval_limit, "include_path": settings.lm_eval_include_path}
        batch = args.per_device_eval_batch_size
        own = (trainer.student(), trainer.processing_class, settings.lm_eval_tasks)
        result |= {f"lm_eval/{k}": value for k, value in lm_eval_scores(*own, batch_size=batch, **limits).items()}
    return (result, {"student": diagram}, args.output_dir) if trainer.is_world_process_zero() else None


def _vlm(task: str, flags: list[str]) -> tuple | None:
    script, recipe, args, model, settings = vlm.parse_vlm(EvaluateArguments, {}, "evaluate", flags)
    if settings.lm_eval_tasks:
        raise ValueError("--lm_eval_tasks are for language models: leave it out with --task vlm")
    check_processes(args.world_size)
    setup = vlm.load_vlm_setup(script, recipe, args, model)
    trainer, rows = _trainer_of_text(setup, setup.processor, args), _held_out(setup)
    result, diagram = _tokens_and_answers(trainer, rows, settings)
    result |= _sizes(setup) | (_cost(trainer) if settings.speed_rows else {})
    return (result, {"student": diagram}, args.output_dir) if trainer.is_world_process_zero() else None


def _held_out(setup):
    """The rows to evaluate on. Raises ValueError where there are none."""
    rows = setup.train if setup.eval is None else setup.eval
    if not len(rows):
        raise ValueError("the evaluation set is empty: check --dataset_test_split, --eval_examples and filters")
    return rows


def _trainer_of_text(setup, processing_class, args, student=None) -> DistillSFTTrainer:
    rows = _held_out(setup)
    return DistillSFTTrainer(
        student or setup.student,
        teacher=setup.teacher,
        objective=LogitKD(),
        args=_quiet(args),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processing_class,
    )


def _tokens_and_answers(trainer, rows, settings: EvaluateArguments) -> tuple[dict[str, float], Reliability]:
    questions = questions_of(rows) if settings.generate else None
    found, diagram = measure_tokens(trainer)
    if settings.fidelity:
        control = None
        if settings.control_model_name_or_path is not None:
            control = compat.load_model(settings.control_model_name_or_path, what="control", dtype=torch.float32)
            control = DistillSFTTrainer(
                control,
                teacher=trainer.teacher,
                objective=LogitKD(),
                args=trainer.args,
                train_dataset=rows,
                eval_dataset=rows,
                processing_class=trainer.processing_class,
            )
        report = compare(trainer, control, rows, settings)
        write_report(report, trainer.args.output_dir)
        if trainer.is_world_process_zero():
            print(markdown_table(report))
        scores = report["student"]
        if settings.generate:
            found |= {"exact_match": scores["student_accuracy"], "teacher_exact_match": scores["teacher_accuracy"]}
    elif questions is not None:
        found |= _exact_match(trainer, questions, settings)
    return found, diagram


def _exact_match(trainer, questions, settings: EvaluateArguments) -> dict[str, float]:
    """Shares of right answers, of both models where the teacher writes."""
    extract = extractor_of(settings.answer_extractor)
    gold = [extract(text) for text in questions.references]
    if None in gold:
        raise ValueError(
            f"no answer was found in the reference {questions.references[gold.index(None)]!r}: choose another "
            "--answer_extractor"
        )
    theirs = model_of(trainer.teacher)
    models = {"exact_match": (trainer.student(), trainer.processing_class)}
    if theirs is not None:
        models["teacher_exact_match"] = (theirs, trainer.teacher.tokenizer or trainer.processing_class)
    options = dict(batch_size=trainer.args.per_device_eval_batch_size, max_new_tokens=settings.answer_tokens)
    found = {}
    for name, (model, processing_class) in models.items():
        texts = greedy_texts(model, processing_class, questions.prompts, images=questions.images, **options)
        found[name] = sum(extract(text) == answer for text, answer in zip(texts, gold, strict=True)) / len(gold)
    return found


# ---- classifiers ----------------------------------------------------------------------------------------------------
def _classes(task: str, flags: list[str]) -> tuple | None:
    script, recipe, args, model, settings = classes.parse(EvaluateArguments, "evaluate", flags, task=task)
    given = {"lm_eval_tasks": settings.lm_eval_tasks, "generate": settings.generate}
    given["control_model_name_or_path"] = settings.control_model_name_or_path
    if refused := [name for name, value in given.items() if value]:
        raise ValueError(f"--{', --'.join(refused)}: for models that write, not for --task {task}")
    setup = classes.load_classification_setup(script, recipe, args, model)
    if not (recipe.tiny or setup.embedded) and recipe.student_init == "pretrained":
        _check_classes(model, setup.names, recipe.same_label_order)
    rows = _held_out(setup)
    arguments = setup.trainer_arguments | {"eval_dataset": rows}
    trainer = DistillTrainer(
        setup.student, teacher=setup.teacher, objective=LogitKD(), args=_quiet(args), train_dataset=rows, **arguments
    )
    held_out = trainer.predict(rows, metric_key_prefix="eval")
    metrics = {k.removeprefix("eval_"): v for k, v in held_out.metrics.items() if not k.endswith(COST)}
    logits, labels = torch.as_tensor(held_out.predictions), torch.as_tensor(held_out.label_ids)
    theirs, _ = classes.teacher_logits(trainer)
    scores, reliability = classes.scores_of(theirs, labels), classes.measures.reliability
    result = {name: metrics[name] for name, _ in classes.MEASURES if name in metrics}
    result |= {"teacher_kl": metrics["teacher_kl"]} | {f"teacher_{name}": value for name, value in scores.items()}
    diagrams: dict[str, Reliability] = {"student": reliability(logits, labels), "teacher": reliability(theirs, labels)}
    result |= _sizes(setup) | (_cost(trainer) if settings.speed_rows else {})
    if settings.fidelity:
        report = _class_fidelity(logits, theirs, labels, settings.topk)
        write_report(report, args.output_dir)
        if trainer.is_world_process_zero():
            print(markdown_table(report))
    return (result, diagrams, args.output_dir) if trainer.is_world_process_zero() else None


def _check_classes(model, names: list[str], same_order: bool) -> None:
    """The student as it is saved knows the dataset's classes: a head made anew would be measured untrained."""
    config = AutoConfig.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    class_order(names, config, what="student", same_order=same_order)


def _class_fidelity(ours, theirs, labels, topk: list[int]) -> dict:
    """The report of a classifier: each example is one token over the classes, and the answer is its class."""
    counted = torch.ones(len(labels), dtype=torch.bool)
    found = token_fidelity(ours, theirs, counted, [k for k in topk if k <= ours.shape[1]])
    answers = answer_fidelity(ours.argmax(-1).tolist(), theirs.argmax(-1).tolist(), labels.tolist())
    found |= answers | {"ece": classes.measures.expected_calibration_error(ours, labels)}
    return {"student": found, "control": None, "examples": len(labels), "warnings": []}


# ---- what it costs --------------------------------------------------------------------------------------------------
def _quiet(args):
    args.report_to, args.eval_strategy, args.save_strategy = [], "no", "no"
    return args


def _sizes(setup) -> dict[str, float]:
    """Parameters and bytes of weights, and how many times the teacher's are the student's."""
    student = setup.student
    sizes = {"parameters": language.parameters_of(student), "weight_bytes": student.get_memory_footprint()}
    teacher = model_of(setup.teacher)
    if teacher is None:
        return sizes
    sizes |= {"teacher_parameters": teacher.num_parameters(), "teacher_weight_bytes": teacher.get_memory_footprint()}
    return sizes | {"times_smaller": sizes["teacher_parameters"] / sizes["parameters"]}


def _cost(trainer, only_memory: bool = False) -> dict[str, float]:
    """Latency and memory of one forward pass of an evaluation batch; memory is weights and what the pass makes."""
    theirs = model_of(trainer.teacher)
    if theirs is None:
        return {}
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    models = {"student": trainer.student(), "teacher": theirs}
    inputs = {"student": model_inputs(batch), "teacher": model_inputs(teacher_batch(batch))}
    found = forward_cost(models, inputs, rounds=1 if only_memory else 5)
    memory = {who: models[who].get_memory_footprint() + own["activation_bytes"] for who, own in found.items()}
    result = {f"{who}_memory_bytes": value for who, value in memory.items()}
    result["times_less_memory"] = memory["teacher"] / memory["student"]
    if only_memory:
        return result
    result |= {f"{who}_forward_ms": 1e3 * own["seconds"] for who, own in found.items()}
    return result | {"times_faster": found["teacher"]["seconds"] / found["student"]["seconds"]}


def _speed(trainer, setup, count: int) -> dict[str, float]:
    """Tokens per second of both models on the longest rows, one beside the other."""
    rows = sorted((row["input_ids"] for row in trainer.eval_dataset.select_columns("input_ids")), key=len)[-count:]
    width = min(len(rows[0]), 256)
    ids = torch.tensor([row[:width] for row in rows])
    models = {"student": trainer.student(), "teacher": setup.teacher.model}
    speed = tokens_per_second(models, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, rounds=3)
    found = {f"{who}_tokens_per_second_{task}": value for who, own in speed.items() for task, value in own.items()}
    return found | {"times_faster": speed["student"]["read"] / speed["teacher"]["read"]}
