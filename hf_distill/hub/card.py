"""The model card beside every saved student: who taught it, how, on what, and what came out."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from hf_distill import __version__

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
MEASURES = {
    "cross_entropy": "cross-entropy on held-out data (nats)",
    "teacher_kl": "KL(teacher \\|\\| student) (nats)",
    "agreement": "top-1 agreement with the teacher",
}
PACKAGES = ("transformers", "trl", "peft", "accelerate", "datasets", "torch")


def write_model_card(trainer, model_name: str | None = None, dataset_name: str | None = None, tags=None) -> None:
    """Write README.md into the trainer's output folder (world process zero only).

    Args:
        model_name: default: the output folder's name.
        dataset_name: the data's Hub id or path; a path of this machine is left out of the card's metadata.
        tags: more tags.
    """
    if not trainer.is_world_process_zero():
        return
    objective, teacher = trainer.objective, trainer.teacher
    papers = [] if objective is None else [leaf.paper for _, _, leaf in objective.leaves() if leaf.paper is not None]
    described = {} if teacher is None else teacher.describe()
    base = getattr(trainer.model.config, "_name_or_path", "") or None
    data = ModelCardData(
        library_name="transformers",
        base_model=base if _is_hub_id(base) else None,
        datasets=dataset_name if _is_hub_id(dataset_name) else None,
        tags=sorted(
            {*trainer._tag_names, *(paper.slug for paper in papers), *([tags] if isinstance(tags, str) else tags or ())}
        ),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=model_name or os.path.basename(os.path.normpath(trainer.args.output_dir)),
        student_parameters=trainer.accelerator.unwrap_model(trainer.model).num_parameters(),
        student_class=type(trainer.accelerator.unwrap_model(trainer.model)).__name__,
        teacher=_without_local_path(described),
        objective=_terms(objective, trainer.progress),
        papers=papers,
        dataset_name=None if dataset_name is None else os.path.basename(dataset_name),
        results=_results(trainer.state.log_history),
        steps=trainer.state.global_step,
        learning_rate=trainer.args.learning_rate,
        batch=trainer.args.per_device_train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size,
        seed=trainer.args.seed,
        versions={"hf_distill": __version__} | {name: _version(name) for name in PACKAGES},
    )
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    card.save(os.path.join(trainer.args.output_dir, "README.md"))


def described_run(trainer, model) -> dict:
    """Facts about a run: who learns from whom, the objective's terms with their present weights, versions."""
    objective, teacher = getattr(trainer, "objective", None), getattr(trainer, "teacher", None)
    leaves = [] if objective is None else [leaf for _, _, leaf in objective.leaves()]
    about = {"student": type(model).__name__, "student_parameters": sum(p.numel() for p in model.parameters())}
    about |= {} if teacher is None else _without_local_path(teacher.describe())
    about |= {"method": ", ".join(leaf.paper.title for leaf in leaves if leaf.paper is not None)} if leaves else {}
    versions = {"hf_distill": __version__} | {name: _version(name) for name in PACKAGES}
    terms = _terms(objective, 0.0 if trainer is None else trainer.progress)
    return {"about": {k: v for k, v in about.items() if v not in (None, "")}, "terms": terms, "versions": versions}


def _is_hub_id(name: str | None) -> bool:
    return bool(name) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not os.path.exists(name)


def _without_local_path(described: dict) -> dict:
    name = described.get("teacher", "")
    if os.sep in name and not _is_hub_id(name):
        described = described | {"teacher": os.path.basename(os.path.normpath(name))}
    return {k: v for k, v in described.items() if v is not None}


def _terms(objective, progress: float) -> list[dict]:
    """Each term with its weight at the end of training."""
    if objective is None:
        return []
    rows = []
    for prefix, factor, leaf in objective.leaves():
        weights = leaf.weights(progress)
        for name, divergence in leaf.logit_terms(progress).items():
            rows.append(
                {
                    "name": prefix + name,
                    "what": type(divergence).__name__,
                    "weight": factor * float(weights.get(name, 1.0)),
                }
            )
        for name in set(weights) - set(leaf.logit_terms(progress)):
            rows.append({"name": prefix + name, "what": type(leaf).__name__, "weight": factor * float(weights[name])})
    return rows


def _results(history: list[dict]) -> list[tuple[str, float]]:
    last = next((entry for entry in reversed(history) if any(k.startswith("eval_") for k in entry)), {})
    return [(label, last[f"eval_{key}"]) for key, label in MEASURES.items() if f"eval_{key}" in last]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
