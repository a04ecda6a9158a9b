"""The model card beside every saved student: who taught it, how, on what, and what came out."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_distill import __version__
from hf_distill.heads import base_model_of
from hf_distill.students.routers import activated_parameters, routed_blocks

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
MEASURES = {
    "cross_entropy": "cross-entropy on held-out data (nats)",
    "teacher_kl": "KL(teacher \\|\\| student) (nats)",
    "agreement": "top-1 agreement with the teacher",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "ece": "expected calibration error",
    "rewards/accuracies": "pairs whose chosen answer is rewarded more",
    "rewards/margins": "reward margin",
}
# how a saved student is loaded, by the end of its class's name: (pipeline's task, what it is given)
LOADED = {
    "ForCausalLM": ("text-generation", '"Once upon a time"'),
    "ForSequenceClassification": ("text-classification", '"some text"'),
    "ForImageClassification": ("image-classification", '"picture.png"'),
    "ForConditionalGeneration": ("image-text-to-text", 'images="picture.png", text="..."'),
}
CARD = "README.md"
MARK = "<!-- Written anew at every save by hf_distill; take this line off to keep your own text. -->"
PACKAGES = ("transformers", "trl", "peft", "accelerate", "datasets", "torch")


def is_ours(folder: str) -> bool:
    """Whether a folder's README.md may be written anew: there is none, or it is a card that still has its mark."""
    path = os.path.join(folder, CARD)
    if not os.path.exists(path):
        return True
    with open(path, encoding="utf-8") as file:
        return MARK in file.read()


def write_model_card(
    trainer, model_name: str | None = None, dataset_name: str | None = None, tags=None, folder: str | None = None
) -> None:
    """Write README.md of a student (world process zero only).

    Args:
        folder: default: the trainer's output folder.
        model_name: default: the output folder's name.
        dataset_name: the data's Hub id or path; a path of this machine is left out of the card's metadata.
        tags: more tags.
    """
    if not trainer.is_world_process_zero():
        return
    papers, model = papers_of(trainer), trainer.accelerator.unwrap_model(trainer.model)
    described = {} if trainer.teacher is None else trainer.teacher.describe()
    name = model_name or os.path.basename(os.path.normpath(trainer.args.output_dir))
    results = _results(trainer.state.log_history)
    task, example = loaded_by(model)
    adapter = hasattr(model, "peft_config") and not trainer.args.merge_adapter
    base = getattr(trainer.model.config, "_name_or_path", "") or None
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base if _is_hub_id(base) else None,
        datasets=dataset_name if _is_hub_id(dataset_name) else None,
        pipeline_tag=task,
        model_name=name,
        eval_results=[_eval_result(task, dataset_name, key, label, value) for key, label, value in results] or None,
        tags=sorted(
            {*trainer._tag_names, *(paper.slug for paper in papers), *([tags] if isinstance(tags, str) else tags or ())}
        ),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=name,
        student_parameters=model.num_parameters(),
        student_class=type(base_model_of(model)).__name__,
        sparse=_sparse(model),
        task=task,
        example=example,
        teacher=_without_local_path(described),
        objective=terms_of(trainer),
        found=findings_of(trainer),
        papers=papers,
        dataset_name=None if dataset_name is None else os.path.basename(dataset_name),
        results=[(label, value) for _, label, value in results],
        steps=trainer.state.global_step,
        learning_rate=trainer.args.learning_rate,
        batch=trainer.args.per_device_train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size,
        seed=trainer.args.seed,
        max_length=getattr(trainer.args, "max_length", None),
        cost=_cost(trainer),
        versions={"hf_distill": __version__} | {name: _version(name) for name in PACKAGES},
        mark=MARK,
    )
    folder = folder or trainer.args.output_dir
    os.makedirs(folder, exist_ok=True)
    card.save(os.path.join(folder, CARD))


def _cost(trainer) -> dict[str, str]:
    """What training took as far as it is known: time, tokens, machine, memory."""
    history = trainer.state.log_history
    found = {}
    seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)
    if seconds is not None:
        found["time"] = f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    tokens = next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), None)
    if tokens is not None:
        found["tokens read"] = f"{int(tokens):,}"
    on_gpu = trainer.args.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else trainer.args.device.type.upper()
    found["machine"] = f"{trainer.args.world_size} x {device}"
    if on_gpu:
        found["peak memory"] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on one device"
    return found


def described_run(trainer, model) -> dict:
    """Facts about a run: who learns from whom, the objective's terms with their present weights, versions."""
    teacher = getattr(trainer, "teacher", None)
    about = {"student": type(base_model_of(model)).__name__}
    about |= {"student_parameters": sum(p.numel() for p in model.parameters())} | _sparse(model)
    about |= {} if teacher is None else _without_local_path(teacher.describe())
    about |= {"method": ", ".join(paper.title for paper in papers_of(trainer))} | findings_of(trainer)
    versions = {"hf_distill": __version__} | {name: _version(name) for name in PACKAGES}
    about = {key: value for key, value in about.items() if value not in (None, "")}
    return {"about": about, "terms": terms_of(trainer), "versions": versions}


def papers_of(trainer) -> list:
    """MethodCards of a trainer's objective, or its own where it has no objective; each once."""
    objective = getattr(trainer, "objective", None)
    found = [getattr(trainer, "paper", None)]
    found += [] if objective is None else [objective.paper, *(leaf.paper for _, _, leaf in objective.leaves())]
    return list({paper.slug: paper for paper in found if paper is not None}.values())


def findings_of(trainer) -> dict[str, str]:
    """What callbacks that `describe` themselves have found out about the run."""
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    return {k: v for c in callbacks if hasattr(c, "describe") for k, v in c.describe().items()}


def terms_of(trainer) -> list[dict]:
    """What the loss is made of, with present weights."""
    if getattr(trainer, "objective", None) is not None:
        return _terms(trainer.objective, trainer.progress)
    args = getattr(trainer, "args", None)
    kinds = getattr(args, "loss_type", None)
    if kinds is None:
        return []
    names = ", ".join([kinds] if isinstance(kinds, str) else kinds)
    rows = [{"name": "preference", "what": f"{names}, beta {args.beta}", "weight": 1.0}]
    if getattr(args, "aux_loss_coef", 0):
        rows.append({"name": "balance", "what": f"of both answers, {args.aux_loss_form}", "weight": args.aux_loss_coef})
    return rows


def loaded_by(model) -> tuple[str | None, str]:
    """The pipeline task of a student and an example of its input; (None, "") for other classes."""
    kind = type(base_model_of(model)).__name__
    found = next((value for end, value in LOADED.items() if kind.endswith(end)), (None, ""))
    if found[0] == "image-text-to-text" and getattr(model.config, "vision_config", None) is None:
        return None, ""  # an encoder-decoder of texts
    return found


def _sparse(model) -> dict:
    """Experts and activated parameters of a routed student; nothing of a dense one."""
    blocks = list(routed_blocks(model).values())
    if not blocks:
        return {}
    count = activated_parameters(model)
    shapes = sorted({(block.num_experts, block.top_k) for block in blocks})
    experts = "; ".join(f"{experts} experts, {top_k} active" for experts, top_k in shapes)
    return {"sparse_layers": f"{len(blocks)} ({experts})", "activated_parameters": count.activated}


def _eval_result(task: str | None, dataset_name: str | None, key: str, label: str, value: float) -> EvalResult:
    name = "held-out part of the training data" if dataset_name is None else os.path.basename(dataset_name)
    return EvalResult(
        task_type=task or "other",
        dataset_type=dataset_name if _is_hub_id(dataset_name) else "other",
        dataset_name=name,
        metric_type=key,
        metric_name=label.replace("\\", ""),
        metric_value=round(value, 6),
    )


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


def _results(history: list[dict]) -> list[tuple[str, str, float]]:
    last = next((entry for entry in reversed(history) if any(k.startswith("eval_") for k in entry)), {})
    return [(key, label, last[f"eval_{key}"]) for key, label in MEASURES.items() if f"eval_{key}" in last]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
