"""One-off passes: statistics of what the teacher says of the whole training set, taken before training and kept.

Sums are taken block by block. Each process writes its running sums after every block, so a killed pass goes on with the
blocks that nobody has finished, on as many processes as it is then given.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_distill.signals import Signals
from hf_distill.teachers.base import Teacher
from hf_distill.teachers.cache.fingerprint import teacher_fingerprint, tokenizer_fingerprint, weights_digest
from hf_distill.teachers.cache.source import prepared_by
from hf_distill.teachers.cache.store import digest, write_file
from hf_distill.training import compat
from hf_distill.training.evaluation import random_state_kept

logger = logging.getLogger(__name__)

FOLDER, DONE = "_passes", "done"  # what starts with "_" stays off the Hub
PROBES = 64

Statistics = dict[str, Tensor]


def run_pass(
    trainer,
    name: str,
    measure: Callable[[Signals], Statistics],
    *,
    needs: frozenset[str],
    block_examples: int = 512,
) -> Statistics:
    """Add up what `measure` says of the teacher's signals, over all of the trainer's training examples, each once.

    The result is kept in `<output_dir>/_passes/<name>-<key>.safetensors`; the key is that of the teacher's weights and
    of the data, of which 64 evenly spaced examples are compared, as the trainer collates them. Neither the student nor
    any random state changes. Examples that are augmented at random count as they are drawn: with a SeededAugmentation
    the result does not depend on processes and kills.

    Args:
        trainer: with its teacher, before training; its collator and `per_device_eval_batch_size` are used.
        name: of the statistics, a part of the file's name: it must change when `measure` does.
        measure: the teacher's signals of one batch -> named sums over its examples, any shapes, the same every time.
        needs: what it reads of the signals.
        block_examples: examples per block: what a kill can cost at most, per process.

    Returns:
        The sums, float64 on the CPU, the same on every process.

    Raises:
        ValueError: no teacher or one that learns or lacks `needs`; no training set with a length; sharded weights.
        FloatingPointError: a sum is NaN or infinite.
    """
    _check(trainer, name, needs, block_examples)
    with random_state_kept(trainer.args.device), torch.no_grad():
        return _Pass(trainer, name, measure, needs, block_examples).result()


def _check(trainer, name: str, needs: frozenset[str], block_examples: int) -> None:
    teacher, dataset = trainer.teacher, trainer.train_dataset
    if teacher is None:
        raise ValueError(f"the pass {name!r} asks the teacher, but the trainer has none: pass teacher=")
    if teacher.learns:
        raise ValueError(f"{teacher.name} changes while the student trains: what it says in the pass {name!r} goes out")
    if missing := needs - teacher.gives:
        raise ValueError(
            f"the pass {name!r} needs {', '.join(sorted(missing))} of its teacher, {type(teacher).__name__} gives only "
            f"{', '.join(sorted(teacher.gives)) or 'scores or text'}: use a FrozenTeacher"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        kind = type(dataset).__name__
        raise ValueError(f"the pass {name!r} needs a training set with a length, got {kind}: load it without streaming")
    if len(dataset) == 0:
        raise ValueError(f"the pass {name!r} has nothing to see: the training set is empty")
    if compat.is_sharded(trainer.accelerator):
        raise ValueError(f"the pass {name!r} needs the whole teacher on each device: launch without FSDP or DeepSpeed")
    if block_examples < 1:
        raise ValueError(f"block_examples must be at least 1, got {block_examples}")


@dataclass
class _Part:
    """Sums over the blocks in `done`."""

    sums: Statistics = field(default_factory=dict)
    done: list[int] = field(default_factory=list)

    def add(self, sums: Statistics, done: list[int]) -> None:
        self.sums = _added(self.sums, sums)
        self.done += done


class _Pass:
    """One process's share of a pass."""

    def __init__(self, trainer, name: str, measure: Callable, needs: frozenset[str], block_examples: int):
        self.trainer, self.name, self.measure, self.needs = trainer, name, measure, needs
        self.dataset = trainer.train_dataset
        self.columns = compat.used_columns(trainer)
        self.rank, self.world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        size, count = block_examples, len(self.dataset)
        self.blocks = [range(first, min(first + size, count)) for first in range(0, count, size)]
        self.folder = Path(trainer.args.output_dir) / FOLDER
        self.stem = f"{name}-{self._key(block_examples)}"

    def _collate(self, features: list[dict]) -> dict:
        if self.columns is not None:
            features = [{k: v for k, v in feature.items() if k in self.columns} for feature in features]
        collator = self.trainer.data_collator
        return dict(getattr(collator, "clean", collator)(features))  # nothing mixed

    def _key(self, block_examples: int) -> str:
        _seed(self.trainer.args.seed)
        count = len(self.dataset)
        content = hashlib.sha256()
        for i in sorted({i * (count - 1) // (PROBES - 1) for i in range(PROBES)}):
            batch = self._collate([self.dataset[i]])
            for key in sorted(k for k, v in batch.items() if torch.is_tensor(v)):
                value = batch[key].detach().cpu().contiguous()
                content.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
                content.update(value.reshape(-1).view(torch.uint8).numpy())
        facts = {
            "teacher": _facts(self.trainer.teacher),
            "tokenizer": tokenizer_fingerprint(self.trainer.processing_class),
            "prepared": prepared_by(self.trainer),
            "needs": sorted(self.needs),
            "examples": count,
            "content": content.hexdigest(),
            "block": block_examples,
        }
        return digest(json.dumps(facts, sort_keys=True, default=str).encode())

    def result(self) -> Statistics:
        path = self.folder / f"{self.stem}.safetensors"
        kept = [_read(path) if self.rank == 0 else None]
        broadcast_object_list(kept)  # not every process need see rank 0's disk
        if kept[0] is not None:
            return kept[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        sums: Statistics = {}
        for share in gather_object([self._share()]):
            sums = _added(sums, share)
        for key, value in sums.items():
            if not value.isfinite().all():
                raise FloatingPointError(f"{key!r} of the pass {self.name!r} is NaN or infinite: look at the teacher")
        if self.rank == 0:
            write_file(path, save(sums))
        self.trainer.accelerator.wait_for_everyone()
        for part in self._parts():
            self._part(part).unlink(missing_ok=True)
        return sums

    def _part(self, number: int) -> Path:
        return self.folder / f"{self.stem}.part-{number}"

    def _parts(self) -> list[int]:
        """Numbers of the part files that this process takes over: its own, and those of ranks that are no more."""
        numbers = (int(path.name.rsplit("-", 1)[1]) for path in self.folder.glob(f"{self.stem}.part-*"))
        return sorted(number for number in numbers if number % self.world == self.rank)

    def _share(self) -> Statistics:
        """This process's sums: of finished blocks that it finds, and of its share of the others."""
        own, left = _Part(), _Part()
        for number in self._parts():
            found = _read(self._part(number))
            if found is not None:
                (own if number == self.rank else left).add(found, found.pop(DONE).long().tolist())
        done = set(gather_object(own.done + left.done))
        todo = [i for i in range(len(self.blocks)) if i not in done][self.rank :: self.world]
        if done:
            logger.info("the pass %s goes on: %d of %d blocks are done", self.name, len(done), len(self.blocks))
        self._run(own, todo)
        return _added(own.sums, left.sums)

    def _run(self, own: _Part, todo: list[int]) -> None:
        args, size = self.trainer.args, self.trainer.args.per_device_eval_batch_size
        batches = [(b, list(self.blocks[b][i : i + size])) for b in todo for i in range(0, len(self.blocks[b]), size)]
        _seed(args.seed)
        loader = DataLoader(
            self.dataset,
            batch_sampler=[indices for _, indices in batches],
            collate_fn=self._collate,
            num_workers=args.dataloader_num_workers,
        )
        hidden = args.disable_tqdm or self.rank != 0 or not batches
        sums: Statistics = {}
        with tqdm(total=len(batches), desc=f"pass {self.name}", disable=hidden) as progress:
            for i, ((block, _), batch) in enumerate(zip(batches, loader, strict=True)):
                sums = _added(sums, self._measured(batch))
                if i + 1 == len(batches) or batches[i + 1][0] != block:
                    own.add({key: value.cpu() for key, value in sums.items()}, [block])
                    write_file(self._part(self.rank), save(own.sums | {DONE: torch.tensor(own.done)}))
                    sums = {}
                progress.update()

    def _measured(self, batch: dict) -> Statistics:
        device = self.trainer.args.device
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        values = self.measure(self.trainer.teacher(moved, self.needs))
        # Apple's devices have no float64
        return {key: (value.cpu() if value.device.type == "mps" else value).double() for key, value in values.items()}


def _added(sums: Statistics, more: Statistics) -> Statistics:
    if not sums or not more:
        return dict(sums or more)
    shapes, others = ({key: tuple(value.shape) for key, value in s.items()} for s in (sums, more))
    if shapes != others:
        raise ValueError(f"what a pass measures must have the same names and shapes every time: {shapes} and {others}")
    return {key: value + more[key] for key, value in sums.items()}


def _read(path: Path) -> Statistics | None:
    """None where there is no such file, or it is damaged: its blocks are then computed anew."""
    if not path.is_file():
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s) and will be computed anew", path, error)
        return None


def _facts(teacher: Teacher) -> dict:
    """What decides what a teacher says, of those inside it too."""
    model = getattr(teacher, "student", None)  # one that speaks through the student's base
    inner = [*getattr(teacher, "teachers", {}).values(), *filter(None, [getattr(teacher, "teacher", None)])]
    described = {key: value for key, value in teacher.describe().items() if key != "teacher"}
    tensors = {
        key: value.tolist() for key, value in vars(teacher).items() if torch.is_tensor(value)
    }  # an order, weights
    return teacher_fingerprint(teacher) | {
        "kind": type(teacher).__name__,
        "described": described,
        "tensors": tensors,
        "student": None if model is None else weights_digest(model),
        "cache": getattr(teacher, "manifest", {}).get("mark"),
        "inner": [_facts(part) for part in inner],
    }


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
