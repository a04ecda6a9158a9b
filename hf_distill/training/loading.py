"""What a trainer is given, as it needs it: settings of its kind, the teacher and the student that they name."""

from __future__ import annotations

import os
from dataclasses import fields

from torch import nn
from transformers import TrainingArguments, set_seed

from hf_distill.objectives import Objective
from hf_distill.teachers import AdapterOffTeacher, RemoteTeacher, Teacher, load_teacher
from hf_distill.teachers.cached import is_cache
from hf_distill.training import compat
from hf_distill.training.checks import check_adapter, check_processes


def arguments_as(kind: type, args, model):
    """The run's settings as `kind`; plain TrainingArguments are taken over, None gives defaults.

    Raises:
        RuntimeError: the launcher promised other processes than there are; said before anything is loaded.
    """
    args = _as(kind, args, model)
    check_processes(args.world_size)
    return args


def _as(kind: type, args, model):
    if isinstance(args, kind):
        return args
    if args is None:
        name = model if isinstance(model, str) else type(model).__name__
        return kind(output_dir=f"{os.path.basename(name)}-distilled")
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args must be {kind.__name__} or TrainingArguments, got {type(args).__name__}")
    known = {f.name for f in fields(kind) if f.init}
    given = {k: getattr(args, k) for k in (f.name for f in fields(args) if f.init) if k in known}
    return kind(**given)


def teacher_from(teacher, args, quantization_config=None, *, auto_class=None) -> Teacher | None:
    """The teacher of a run: what was passed, or what the settings name.

    Args:
        auto_class: which `AutoModel...` loads it from a path; None reads the class from the checkpoint.

    Raises:
        ValueError: both are given and differ; no teacher where the path is wrong.
    """
    if args.teacher_adapter_off:
        if isinstance(teacher, AdapterOffTeacher):  # already made, by a recipe
            return teacher
        if teacher is not None or args.teacher_model_name_or_path is not None:
            raise ValueError("teacher_adapter_off takes the student's base as the teacher: give no other teacher")
        return AdapterOffTeacher(dense_logits=args.dense_logits)
    if teacher is None and args.teacher_model_server_url is not None:
        return _served(args, quantization_config)
    if teacher is None:
        teacher = args.teacher_model_name_or_path
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    options = {"dense_logits": args.dense_logits}
    if isinstance(teacher, (str, os.PathLike)):
        options |= {
            "revision": args.teacher_model_revision,
            "load_in_8bit": args.teacher_load_in_8bit,
            "load_in_4bit": args.teacher_load_in_4bit,
            "quantization_config": quantization_config,
            "trust_remote_code": bool(getattr(args, "trust_remote_code", False)),
            **(args.teacher_model_init_kwargs or {}),
        }
        if args.teacher_dtype is not None:
            options["dtype"] = args.teacher_dtype
        if auto_class is not None and not is_cache(teacher):
            options["auto_class"] = auto_class
    elif args.teacher_load_in_8bit or args.teacher_load_in_4bit or quantization_config is not None:
        raise ValueError("the teacher was passed as a model: quantise it when loading, or pass its path")
    return load_teacher(teacher, **options)


def _served(args, quantization_config) -> RemoteTeacher:
    """The teacher behind teacher_model_server_url."""
    if args.teacher_model_name_or_path is None:
        raise ValueError(
            "teacher_model_server_url needs the name that the server gives the model: --teacher_model_name_or_path"
        )
    names = ("teacher_model_revision", "teacher_load_in_8bit", "teacher_load_in_4bit", "teacher_dtype")
    asked = [name for name in names if getattr(args, name)] + ["quantization_config"] * (
        quantization_config is not None
    )
    if asked:
        raise ValueError(f"{', '.join(asked)} is the server's matter (teacher_model_server_url): leave it out")
    return RemoteTeacher(
        args.teacher_model_server_url,
        args.teacher_model_name_or_path,
        k=args.teacher_top_k,
        store=args.teacher_store or os.path.join(args.output_dir, "teacher_answers"),
        **(args.teacher_model_init_kwargs or {}),
    )


def require_teacher(objective: Objective | None, teacher: Teacher | None, args) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective (for example LogitKD()), got {type(objective).__name__}")
    if objective.uses_teacher and teacher is None:
        raise ValueError(
            f"{type(objective).__name__} needs a teacher: pass teacher=, or --teacher_model_name_or_path, "
            "or teacher_adapter_off with a LoRA student"
        )
    if args.measure_teacher_fidelity and getattr(teacher, "quantised_from", None) is None:
        raise ValueError(
            "measure_teacher_fidelity compares a quantised teacher with its full precision, but "
            f"{getattr(teacher, 'name', 'no teacher')} was not loaded quantised from a path: add teacher_load_in_4bit, "
            "teacher_load_in_8bit or teacher_quantization_config, or leave it 0"
        )


def load_student(model: nn.Module | str, args, processing_class, quantization_config, peft_config=None) -> tuple:
    """The student and its tokenizer or processor: loaded where a Hub id or folder is given, in float32 as TRL does.

    Raises:
        ValueError: it is no model; or it is a sparse one whose experts and routers `peft_config` would leave frozen.
    """
    if not isinstance(model, (str, os.PathLike)):
        check_adapter(model, peft_config)
        return model, processing_class
    path, trust = os.fspath(model), bool(getattr(args, "trust_remote_code", False))
    processing_class = processing_class or compat.load_processing_class(path, trust_remote_code=trust)
    options = {"quantization_config": quantization_config, "dtype": "float32", "trust_remote_code": trust}
    if getattr(args, "model_init_kwargs", None):
        options |= args.model_init_kwargs
        args.model_init_kwargs = None  # TRL's trainers take them for a path only
    set_seed(args.seed)
    model = compat.load_model(path, what="student", **options)
    check_adapter(model, peft_config)
    return model, processing_class
