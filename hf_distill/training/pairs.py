"""Checks of a student, a teacher and their data before any long work."""

from __future__ import annotations

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from hf_distill.heads import base_model_of
from hf_distill.teachers import AdapterOffTeacher, CachedTeacher, EMATeacher, FrozenTeacher, RemoteTeacher, Teacher
from hf_distill.training.checks import check_chat_templates, check_has_loss, common_vocabulary


def check_dataset(dataset, what: str) -> None:
    """There is something to train on. Raises ValueError, naming what was given."""
    if dataset is None:
        raise ValueError(f"no {what} dataset: pass {what}_dataset, or --dataset_name")
    if not isinstance(dataset, (Dataset, IterableDataset)) and not hasattr(dataset, "__getitem__"):
        raise TypeError(f"{what}_dataset must be a datasets.Dataset or IterableDataset, got {type(dataset).__name__}")
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise ValueError(f"the {what} dataset is empty: check its split and filters")


def check_columns(dataset, args) -> None:
    """The columns are some that DistillSFTTrainer understands, and not all labels are masked. Raises ValueError."""
    names = set(getattr(dataset, "column_names", None) or ())
    if isinstance(dataset, Dataset) and not names & {args.dataset_text_field, "image", "images"}:
        check_has_loss(dataset)


def check_prepared(prepared: Dataset, given: Dataset, args) -> None:
    """Preparing a dataset (templates, masks, truncation) left something to learn. Raises ValueError."""
    if len(prepared) == 0:
        raise ValueError(
            f"none of the {len(given)} examples has a label left after preparation: max_length={args.max_length} is "
            "shorter than the prompts, or the chat template marks no assistant tokens (assistant_only_loss)"
        )
    check_has_loss(prepared)


def check_pair(student: nn.Module, teacher: Teacher, processing_class, dataset, args) -> None:
    """Student and teacher mean the same by the same ids, and see conversations as the same text.

    Raises:
        ValueError: different tokenizers or chat templates, or vocabularies that cannot be compared.
    """
    if isinstance(teacher, RemoteTeacher):
        teacher.read_as(processing_class)  # and asks the server whether it cuts text alike, see RemoteTeacher.check
    head = base_model_of(student).get_output_embeddings()
    if head is None or teacher.config is None or args.teacher_adapter_off:
        return
    ours = head.weight.shape[0]
    theirs = teacher.vocabulary_size()
    tokenizers = (PreTrainedTokenizerBase, ProcessorMixin)
    if theirs is None:
        return
    if not isinstance(processing_class, tokenizers) or not isinstance(teacher.tokenizer, tokenizers):
        if ours != theirs:
            unknown = "student's" if not isinstance(processing_class, tokenizers) else "teacher's"
            raise ValueError(
                f"the student has {ours} vocabulary entries and the teacher {theirs}, and the {unknown} tokenizer is "
                "unknown, so they cannot be compared: pass processing_class= and FrozenTeacher(model, tokenizer)"
            )
        return
    common_vocabulary(processing_class, teacher.tokenizer, ours, theirs)
    example = next(iter(dataset))
    if isinstance(example, dict) and not {"image", "images", "input_ids"} & example.keys():
        check_chat_templates(processing_class, teacher.tokenizer, example, args.allow_different_chat_templates)


def check_reference(teacher: Teacher | None, args) -> None:
    """A preference run's teacher can be its reference, and stays as it is. Raises ValueError, naming what can."""
    if args.sync_ref_model:
        raise ValueError(
            "sync_ref_model moves the reference towards the student, and a teacher stays as it is: unset it"
        )
    if isinstance(teacher, CachedTeacher):
        _check_cached_reference(teacher, args)
    elif not isinstance(teacher, FrozenTeacher):
        instead = {
            AdapterOffTeacher: ". The student's own base is TRL's default: use trl.DPOTrainer with peft_config",
            EMATeacher: ". For a reference that follows the student use trl.DPOTrainer with sync_ref_model",
        }
        raise ValueError(
            "preference distillation needs a teacher model as its reference: pass teacher= a model or path, or "
            "--teacher_model_name_or_path (a FrozenTeacher, or a CachedTeacher of its scores); got "
            f"{type(teacher).__name__}{instead.get(type(teacher), '')}"
        )


def _check_cached_reference(teacher: CachedTeacher, args) -> None:
    codec = teacher.codec
    if codec.mode != "scores" or codec.per != "token" or "log_probs" not in codec.names:
        raise ValueError(
            f"the CachedTeacher {teacher.path} (mode {codec.mode!r}) does not hold how likely each answer is: build "
            'the trainer with the live teacher, then cache_teacher(teacher, trainer, folder, mode="scores") writes it'
        )
    if args.precompute_ref_log_probs:
        raise ValueError(
            "the CachedTeacher holds the reference log-probabilities already: unset precompute_ref_log_probs"
        )
    if args.deepspeed_plugin is not None:
        raise ValueError("a CachedTeacher as the reference was not tried under DeepSpeed: use DDP or FSDP")
