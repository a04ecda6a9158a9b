"""What classifiers read in a recipe: the columns of pictures or texts, prepared for the student and for its teacher."""

from __future__ import annotations

from datasets import Dataset, Image

from hf_distill.curricula.images import AUGMENTATIONS, NewDraws, PreparesImages, prepared, same_pixels
from hf_distill.curricula.texts import TextColumns, same_tokens
from hf_distill.teachers import PrivilegedTeacher


def task_of(dataset: Dataset, recipe) -> str:
    """ "image" or "text", by the columns. Raises ValueError where they hold neither."""
    if recipe.image_column is not None or image_columns(dataset):
        return "image"
    if recipe.text_column is not None or TextColumns.found(dataset):
        return "text"
    raise ValueError(
        f"no column of pictures or texts among {', '.join(dataset.column_names)}: name it with --image_column or "
        "--text_column"
    )


def image_columns(dataset: Dataset) -> list[str]:
    """Columns that hold pictures, one or several an example, or are called so."""
    typed = [n for n, f in dataset.features.items() if isinstance(getattr(f, "feature", f), Image)]
    return typed or [n for n in ("image", "img", "images") if n in dataset.column_names]


def prepare_images(setup, recipe, args, keep: tuple[str, ...]) -> None:
    """Pictures of both sets as each model reads them, augmented for training; columns named in `keep` stay.

    Raises:
        ValueError: no such column; no processor where the teacher reads other pictures; augmentation that a cached
            teacher has not seen.
    """
    column = recipe.image_column or _only(image_columns(setup.train), "pictures", "--image_column")
    for rows in (setup.train, setup.eval):
        if rows is not None and column not in rows.column_names:
            raise ValueError(f"no column {column!r} of pictures in the dataset, only {', '.join(rows.column_names)}")
    channels = getattr(setup.student.config, "num_channels", 3)
    teacher_processor = _teacher_processor(setup, channels)
    if teacher_processor is not None:
        setup.teacher = PrivilegedTeacher(setup.teacher, ("pixel_values",))
    augment = AUGMENTATIONS[recipe.augmentation]
    if augment is not None and not recipe.fixed_augmentation and setup.teacher is not None and setup.teacher.readers:
        raise ValueError(
            f"{setup.teacher.name} is cached, and --augmentation {recipe.augmentation} draws other pictures in every "
            "epoch: add --fixed_augmentation, and cache the same draws"
        )
    options = {"column": column, "channels": channels}
    train = PreparesImages(setup.processing_class, teacher_processor, augment=augment, seed=args.seed, **options)
    if augment is not None and not recipe.fixed_augmentation:
        if args.dataloader_persistent_workers:
            raise ValueError("lasting workers keep the first epoch's augmentation: unset dataloader_persistent_workers")
        setup.callbacks.append(NewDraws(train))
    kept = {column, "labels", *keep}
    setup.train = prepared(setup.train.select_columns([n for n in setup.train.column_names if n in kept]), train)
    if setup.eval is not None:
        held_out = PreparesImages(setup.processing_class, teacher_processor, **options)
        setup.eval = prepared(setup.eval.select_columns([n for n in setup.eval.column_names if n in kept]), held_out)
    args.remove_unused_columns = False  # the pictures are prepared from a column that no model reads


def _teacher_processor(setup, channels: int):
    """The teacher's image processor where it makes other pixels than the student's."""
    teacher = setup.teacher
    if teacher is None or teacher.readers or teacher.config is None:
        return None
    if teacher.tokenizer is None:
        ours, theirs = (getattr(c, "image_size", None) for c in (setup.student.config, teacher.config))
        if ours != theirs:
            raise ValueError(
                f"the teacher {teacher.name} reads pictures of size {theirs}, the student of size {ours}, and there is "
                "no image processor beside the teacher to prepare them: save one there"
            )
        return None
    if getattr(teacher.config, "num_channels", channels) != channels:
        raise ValueError(
            f"the teacher reads {teacher.config.num_channels} channels and the student {channels}: give both the same"
        )
    return None if same_pixels(setup.processing_class, teacher.tokenizer, channels) else teacher.tokenizer


def prepare_texts(setup, recipe, args) -> None:
    """Texts of both sets in the tokens of each model. Raises ValueError where no column of texts is found."""
    columns = TextColumns.of(setup.train, recipe.text_column, recipe.text_pair_column)
    teacher = setup.teacher
    own = teacher is not None and not teacher.readers and teacher.tokenizer is not None
    texts = columns.sample(setup.train)
    other = own and not same_tokens(setup.processing_class, teacher.tokenizer, texts)
    if other:
        setup.teacher = PrivilegedTeacher(teacher, ("input_ids",))
    theirs = teacher.tokenizer if other else None
    setup.train = columns.tokenised(setup.train, setup.processing_class, theirs, recipe.text_length)
    if setup.eval is not None:
        setup.eval = columns.tokenised(setup.eval, setup.processing_class, theirs, recipe.text_length)
    setup.data_collator = columns.collator(setup.processing_class, theirs)


def _only(names: list[str], what: str, flag: str) -> str:
    if len(names) != 1:
        raise ValueError(f"{len(names)} columns of {what} ({', '.join(names) or 'none'}): name one with {flag}")
    return names[0]
