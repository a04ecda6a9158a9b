"""How classification methods are compared: one run of a row, its measures, and a record that survives a kill.

Every row of a table trains the same students (initialisation and order by seed) for as many steps on the same examples.
Its learning rate, and what else it may choose, is tried on a held-out part of the training split with seed 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback

from hf_distill import DataCollatorForDistillation, DistillConfig, DistillTrainer, FrozenTeacher, Signals
from hf_distill.evaluation.classification import accuracy, agreement, expected_calibration_error, macro_f1
from hf_distill.evaluation.comparison import Run
from hf_distill.methods import METHODS
from hf_distill.objectives import Objective
from hf_distill.teachers.base import teacher_batch


# ---- a teacher's answers, kept in memory ----------------------------------------------------------------------------
class Remembered(FrozenTeacher):
    """A frozen teacher whose signals for a fixed set of images are computed once per process and kept in memory.

    Looked up by content, so order and batches make no difference; other images run through the model.
    """

    def __init__(self, model: PreTrainedModel, pixel_values: Tensor, *, name: str):
        super().__init__(model, name=name)
        self.pixel_values = pixel_values
        self.places = {_key(row): i for i, row in enumerate(pixel_values)}
        self.kept: dict[str, Tensor | list[Tensor]] = {}

    @torch.no_grad()
    def __call__(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        own = teacher_batch(batch)
        places = [self.places.get(_key(row)) for row in own["pixel_values"]]
        if None in places or "attentions" in needs:
            return super().__call__(batch, needs)
        if new := (needs | {"logits"}) - self.kept.keys():  # as the model itself, which gives logits in any case
            self._compute(new)
        index = torch.tensor(places)
        return Signals(
            logits=self.kept["logits"][index],
            labels=batch.get("labels"),
            hidden_states=tuple(x[index] for x in self.kept["hidden_states"]) if "hidden_states" in needs else (),
            features={n.split(":", 1)[1]: self.kept[n][index] for n in needs if n.startswith("features:")},
            batch=own,
        )

    def _compute(self, needs: frozenset[str]) -> None:
        parts = [super(Remembered, self).__call__({"pixel_values": x}, needs) for x in self.pixel_values.split(100)]
        for need in needs:
            if need == "logits":
                self.kept[need] = torch.cat([p.logits for p in parts])
            elif need == "hidden_states":
                self.kept[need] = [torch.cat(xs) for xs in zip(*(p.hidden_states for p in parts), strict=True)]
            else:
                self.kept[need] = torch.cat([p.features[need.split(":", 1)[1]] for p in parts])


def _key(row: Tensor) -> int:
    return hash(row.contiguous().numpy().tobytes())


# ---- what is compared -----------------------------------------------------------------------------------------------
@dataclass
class Task:
    """Data, teacher and student of a table.

    Args:
        make_student: seed -> the untrained student.
        tune, validation: parts of the training split, to choose settings on.
        tests: name -> examples; the first is the one that counts.
        facts: shown with the table: teacher, data.
    """

    teacher: FrozenTeacher
    make_student: Callable[[int], PreTrainedModel]
    train: Dataset
    tune: Dataset
    validation: Dataset
    tests: dict[str, Dataset]
    facts: dict
    collator: Callable | None = None
    processing_class: object = None


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        slug: of a method, whose `build_trainer` is used; or a name for the objective.
        objective: (settings, train set) -> objective, for rows that are no method.
        settings: keyword arguments of the method's Config, or of the objective.
        choices: changes of the settings that are tried at the best learning rate; the first is none.
        needs_index: batches carry each example's row of the train set.
        prepare: changes the train set (columns, augmentation); called as prepare(train, task).
        like: a row whose learning rate and changes it takes, in place of choosing: a control that differs in one thing.
        make_teacher: (task, seed) -> another teacher.
        extra: (trainer, task) -> more measures, taken after training.
        stretch: times the table's steps, for a control that is given as much time as slower rows take.
        note: what a reader must know.
    """

    slug: str
    objective: Callable[..., Objective] | None = None
    settings: dict = field(default_factory=dict)
    choices: tuple[dict, ...] = ({},)
    needs_index: bool = False
    prepare: Callable | None = None
    make_teacher: Callable | None = None
    extra: Callable | None = None
    stretch: float = 1.0
    like: str = ""
    note: str = ""

    @property
    def is_there(self) -> bool:
        return self.objective is not None or self.slug in METHODS


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other.

    Args:
        task: (data folder, work folder) -> Task.
        rates: learning rates that every row chooses from.
        tune_share: share of the steps that a choice is tried for.
    """

    title: str
    task: Callable[[Path, Path], Task]
    rows: dict[str, Row]
    steps: int
    rates: tuple[float, ...]
    batch: int = 64
    weight_decay: float = 5e-4
    tune_share: float = 0.3
    measures: tuple[str, ...] = ("accuracy", "macro_f1", "ece")


# ---- one run --------------------------------------------------------------------------------------------------------
def build(task: Task, table: Table, row: Row, changes: dict, rate: float, seed: int, train: Dataset, steps: int, out):
    """The trainer of one run."""
    settings = row.settings | changes
    if row.prepare is not None:
        train = row.prepare(train, task)
    collator, columns = task.collator, ()
    if row.needs_index:
        train, columns = train.add_column("index", list(range(len(train)))), ("index",)
        collator = DataCollatorForDistillation(_default(collator), labels_of="samples", example_columns=columns)
    teacher = task.teacher if row.make_teacher is None else row.make_teacher(task, seed)
    args = DistillConfig(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=rate,
        seed=seed,
        per_device_train_batch_size=table.batch,
        weight_decay=table.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    student = task.make_student(seed)
    common = dict(data_collator=collator, processing_class=task.processing_class)
    if row.objective is not None:
        objective = row.objective(settings, train)
        trainer = DistillTrainer(
            student, teacher=teacher, objective=objective, args=args, train_dataset=train, **common
        )
    else:
        module = importlib.import_module(f"hf_distill.methods.{row.slug}")
        config = module.CARD.config_class()(**settings)
        trainer = module.build_trainer(student, teacher, train, config, args, **common)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _default(collator: Callable | None) -> Callable:
    from transformers import default_data_collator

    return collator or default_data_collator


def train_once(task: Task, table: Table, row: Row, changes: dict, rate: float, seed: int, *, tuning: bool) -> Run:
    """One student, trained and measured; on the validation part where settings are chosen, else on the tests."""
    steps = max(round(table.steps * row.stretch * (table.tune_share if tuning else 1.0)), 1)
    out = tempfile.mkdtemp(prefix="evidence-")
    try:
        trainer = build(task, table, row, changes, rate, seed, task.tune if tuning else task.train, steps, out)
        start, busy = time.perf_counter(), time.process_time()
        trainer.train()
        run = Run("", rate, seed, steps, time.perf_counter() - start, time.process_time() - busy)
        extra = {} if row.extra is None or tuning else row.extra(trainer, task)
        student = trainer.student()
        if tuning:
            run.validation = measured(student, task, task.validation)["accuracy"]
            return run
        for i, (name, test) in enumerate(task.tests.items()):
            values = measured(student, task, test)
            run.test |= {key if i == 0 else f"{name} {key}": value for key, value in values.items()}
        run.test |= extra
        return run
    finally:
        shutil.rmtree(out, ignore_errors=True)


# ---- measures -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def predictions(model: PreTrainedModel, task: Task, data: Dataset) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of a model in eval mode."""
    model.eval()
    collate, logits, labels = _default(task.collator), [], []
    for start in range(0, len(data), 100):
        batch = collate([data[i] for i in range(start, min(start + 100, len(data)))])
        labels.append(batch.pop("labels"))
        names = ("pixel_values", "input_ids", "attention_mask", "token_type_ids")
        logits.append(model(**{k: v for k, v in batch.items() if k in names}).logits)
    return torch.cat(logits), torch.cat(labels)


def measured(student: PreTrainedModel, task: Task, data: Dataset) -> dict[str, float]:
    logits, labels = predictions(student, task, data)
    teacher, _ = predictions(task.teacher.model, task, data)
    return {
        "accuracy": accuracy(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "ece": expected_calibration_error(logits, labels),
        "agreement": agreement(logits, teacher),
    }


# ---- records --------------------------------------------------------------------------------------------------------
class Records:
    """One small file per run, so that a killed evidence run goes on and processes can share the work.

    Args:
        folder: of one table.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, asked: dict) -> dict | None:
        """What was recorded under a name for exactly these settings."""
        path = self._path(name, asked)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, asked: dict, found: dict) -> None:
        path = self._path(name, asked)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        part.replace(path)

    @contextlib.contextmanager
    def claimed(self, name: str, asked: dict):
        """True inside it for one living process at a time."""
        path = self._path(name, asked).with_suffix(".claim")
        owner = path.read_text() if path.is_file() else ""
        if owner and not _alive(owner):
            path.unlink(missing_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            yield False
            return
        os.write(handle, str(os.getpid()).encode())
        os.close(handle)
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)

    def _path(self, name: str, asked: dict) -> Path:
        key = hashlib.blake2b(json.dumps([name, asked], sort_keys=True, default=str).encode(), digest_size=6)
        plain = "".join(c if c.isalnum() else "_" for c in name)
        return self.folder / f"{plain}-{key.hexdigest()}.json"


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
