"""The data of a recipe: from the Hub, from folders and from files."""

from __future__ import annotations

import logging
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
LABELS = ("labels", "label", "fine_label", "coarse_label", "class", "target")
IGNORED = -100
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

logger = logging.getLogger(__name__)


def splits(script, eval_examples: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """The training and the held-out rows that a run's flags name.

    Raises:
        ValueError: no such data, or no training split in it.
    """
    loaded = load_data(script.dataset_name, script.dataset_config, script.dataset_streaming)
    if not isinstance(loaded, dict):
        loaded = {script.dataset_train_split: loaded}
    if script.dataset_train_split not in loaded:
        raise ValueError(
            f"{script.dataset_name!r} has no split {script.dataset_train_split!r}, only {', '.join(loaded)}"
        )
    train = loaded[script.dataset_train_split]
    if script.dataset_test_split in loaded:
        return train, loaded[script.dataset_test_split]
    if script.dataset_streaming or not eval_examples or len(train) < 2 * eval_examples:
        return train, None
    parts = train.train_test_split(eval_examples, seed=seed)
    return parts["train"], parts["test"]


def load_data(name: str | None, config: str | None = None, streaming: bool = False):
    """A dataset from a Hub id, a folder saved by `datasets`, json/jsonl/csv/parquet/txt files, or a folder of pictures.

    Pictures lie in a folder per class, these in `train` and `test` folders or not.

    Raises:
        ValueError: nothing of that name, or no known file in the folder.
    """
    if name is None:
        raise ValueError("no data: give --dataset_name a Hub id, a folder or a file")
    path = Path(name)
    if path.is_dir() and any((path / f).exists() for f in ("dataset_info.json", "dataset_dict.json", "state.json")):
        try:
            return load_from_disk(name)
        except IndexError as error:  # how datasets says it
            raise ValueError(f"{name!r} holds an empty split, which cannot be read: save it without") from error
    if path.is_file() or path.is_dir():
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in FORMATS)
        kinds = {FORMATS.get(f.suffix) for f in files} - {None}
        if not kinds and next(_pictures(path), None) is not None:
            return dict(load_dataset("imagefolder", data_dir=name, streaming=streaming))
        if len(kinds) != 1:
            raise ValueError(
                f"{name!r} must hold files of one kind of {', '.join(FORMATS)}, found {sorted(kinds) or 'none'}"
            )
        options = {"sample_by": "document"} if kinds == {"text"} else {}
        found = load_dataset(kinds.pop(), data_files=[str(f) for f in files], streaming=streaming, **options)
        return found if isinstance(found, DatasetDict) else dict(found)
    try:
        return dict(load_dataset(name, config, streaming=streaming))
    except Exception as error:
        raise ValueError(f"cannot load dataset {name!r}: no such file or folder, and as a Hub id: {error}") from error


def _pictures(folder: Path):
    return (f for f in folder.rglob("*") if f.suffix.lower() in PICTURES)


def labelled(
    train: Dataset, held_out: Dataset | None, column: str | None = None, names: list[str] | None = None
) -> tuple[Dataset, Dataset | None, list[str]]:
    """Both sets with their classes as numbers in `labels`, without the rows of label -100, and the classes' names.

    Args:
        column: of the labels: numbers or names. None finds it by its usual names.
        names: of classes 0, 1, ...; None takes those of the dataset's ClassLabel, sorted texts, or LABEL_0, ...

    Raises:
        ValueError: no such column, labels that are no classes, or ones that `names` does not hold.
    """
    column = column or next((name for name in LABELS if name in train.column_names), None)
    if column is None or column not in train.column_names:
        raise ValueError(
            f"no column {column or 'of labels'} among {', '.join(train.column_names)}: name it with --label_column"
        )
    names = _class_names(train, column) if names is None else list(names)
    sets = [None if rows is None else _with_labels(rows, column, names) for rows in (train, held_out)]
    return *sets, names


def _class_names(train: Dataset, column: str) -> list[str]:
    own = getattr(train.features[column], "names", None)
    values = [] if own else [v for v in train[column] if v is not None and v != IGNORED]
    if not own and values and isinstance(values[0], str):
        return sorted(set(values))
    if not own and not all(isinstance(v, int) for v in values):
        raise ValueError(f"labels must be classes, as numbers or names, and {column!r} holds {values[:3]}")
    return own or [f"LABEL_{i}" for i in range(max(values, default=-1) + 1)]


def _with_labels(rows: Dataset, column: str, names: list[str]) -> Dataset:
    if column not in rows.column_names:
        raise ValueError(f"the held-out examples have no column {column!r}, only {', '.join(rows.column_names)}")
    own, places = getattr(rows.features[column], "names", None), {name: i for i, name in enumerate(names)}
    values = list(rows[column])
    # names win over numbers: two splits may number the same classes otherwise
    if own and set(own) == set(names):
        values = [v if v == IGNORED else own[v] for v in values]
    values = [places.get(v, v) if isinstance(v, str) else IGNORED if v is None else v for v in values]
    wrong = sorted({str(v) for v in values if v != IGNORED and not (isinstance(v, int) and 0 <= v < len(names))})
    if wrong:
        raise ValueError(
            f"labels {', '.join(wrong[:8])} of {column!r} are none of the {len(names)} classes {names[:12]}"
        )
    kept = [i for i, v in enumerate(values) if v != IGNORED]
    if len(kept) < len(values):
        logger.warning("%d of %d examples have no label (-100) and are left out", len(values) - len(kept), len(values))
        rows = rows.select(kept)
    return rows.remove_columns(column).add_column("labels", [values[i] for i in kept])
