"""Parts of an objective that learn by an optimizer of their own: a controller, an adversary.

Their weights and moments are plain tensors of the objective's `state`, so they are saved, resumed and moved with it and
never reach the student's export. They step once per optimizer step, on all micro-batches of its window and all ranks,
before the student does.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_distill.heads import collect, rows_of
from hf_distill.objectives import Objective
from hf_distill.signals import Signals
from hf_distill.training import compat
from hf_distill.training.evaluation import random_state_kept


class InnerObjective(Objective):
    """An objective with a part that has an optimizer of its own; see `OwnAdam`."""

    def before_step(self, batches: list[dict], run: Run) -> None:
        """Step the own part. Called once per optimizer step, before its first forward, with gradients on.

        Args:
            batches: this rank's micro-batches of the window; fewer than other ranks', or none, at a ragged end, so what
                is summed over ranks must be summed in any case.
            run: the models and the ranks. Work inside `run.quiet()`, and take gradients with `torch.autograd.grad`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define before_step(batches, run)")


@dataclass(frozen=True)
class Run:
    """What an inner step works with.

    Attributes:
        student: the model without DDP's wrapper: its hooks see nothing of an inner step.
        teacher: the run's.
        step: optimizer steps done.
        progress: their share of all steps.
        learning_rate: the student's at the coming step.
        seed: the run's.
    """

    student: nn.Module
    teacher: object
    step: int
    progress: float
    learning_rate: float
    seed: int
    accelerator: object

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    def signals(self, batch: dict, needs: frozenset[str] = frozenset({"logits"})) -> Signals:
        """The student's, under the run's autocast."""
        with self.accelerator.autocast():
            return collect(self.student, batch, needs, rows_of(batch), dense=True)

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor (any shapes) added up over all ranks, in one exchange; the same on every rank, no gradient."""
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        if self.ranks > 1:
            flat = self.accelerator.reduce(flat, "sum")
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    @contextlib.contextmanager
    def quiet(self, *, training: bool = False, frozen: bool = False) -> Iterator[None]:
        """Nothing of what the student does inside is left behind: BatchNorm's statistics, modes, the random state.

        Random numbers inside (dropout, a data set's augmentation) are those of (seed, step, rank).

        Args:
            training: in train mode (dropout, statistics of the batch), else in eval mode.
            frozen: its parameters need no gradient.
        """
        modules, parameters = list(self.student.modules()), [p for p in self.student.parameters() if p.requires_grad]
        modes = [(module, module.training) for module in modules]
        tracking = [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
        with random_state_kept(self.accelerator.device):
            _seed(self.seed, self.step, self.rank)
            try:
                self.student.train(training)
                for module in tracking if training else ():
                    module.track_running_stats = False
                for parameter in parameters if frozen else ():
                    parameter.requires_grad_(False)
                yield
            finally:
                for parameter in parameters:
                    parameter.requires_grad_(True)
                for module in tracking:
                    module.track_running_stats = True
                for module, mode in modes:
                    module.training = mode


def _seed(*parts: int) -> None:
    number = _number(*parts)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _number(*parts: int) -> int:
    """32 bits that these numbers decide."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest(), "little")


class OwnAdam:
    """Tensors of an objective's `state` and the Adam that moves them.

    The update is torch.optim.Adam's; weight decay is its L2 kind.

    Args:
        state: the objective's; entries `<name>.<tensor>`, `….mean`, `….square` and `<name>.steps` are put there.
        tensors: the start values, by name.
        lr, weight_decay: Adam's.
        max_norm: gradients longer than this together are shortened to it; None leaves them.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        name: str,
        tensors: dict[str, Tensor],
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
    ):
        self.state, self.name, self.names = state, name, tuple(tensors)
        self.lr, self.weight_decay, self.max_norm = lr, weight_decay, max_norm
        state[f"{name}.steps"] = torch.zeros((), dtype=torch.int64)
        for key, tensor in tensors.items():
            state[f"{name}.{key}"] = tensor.detach().clone()
            for moment in ("mean", "square"):
                state[f"{name}.{key}.{moment}"] = torch.zeros_like(tensor)

    def tensors(self) -> dict[str, Tensor]:
        """The present values, without a gradient."""
        return {key: self.state[f"{self.name}.{key}"] for key in self.names}

    def leaves(self) -> dict[str, Tensor]:
        """The present values as leaves of a graph, for one inner step."""
        return {key: tensor.detach().requires_grad_() for key, tensor in self.tensors().items()}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor]) -> None:
        """One step along gradients that are the same on every rank."""
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        scale = 1.0 if self.max_norm is None else (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        steps = self.state[f"{self.name}.steps"] = self.state[f"{self.name}.steps"] + 1
        for key, tensor in self.tensors().items():
            entry = f"{self.name}.{key}"
            gradient = gradients[key] * scale + self.weight_decay * tensor
            mean = self.state[entry + ".mean"] = self.state[entry + ".mean"].lerp(gradient, 1 - 0.9)
            square = self.state[entry + ".square"] = self.state[entry + ".square"].lerp(gradient.square(), 1 - 0.999)
            size = (square / (1 - 0.999**steps)).sqrt() + 1e-8
            self.state[entry] = tensor - self.lr * mean / (1 - 0.9**steps) / size


# ---- examples that the student is not trained on ---------------------------------------------------------------------
def split_off(dataset, fraction: float, seed: int) -> tuple:
    """(the rest, the part): a share of the rows, at least one, drawn by `seed`; both in the data set's order.

    Raises:
        ValueError: a data set without a length, or with fewer than two rows.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"a part of the training set is held out, which needs its length, got {type(dataset).__name__}: load it "
            "without streaming"
        )
    if len(dataset) < 2:
        raise ValueError(f"a part of the training set is held out, which needs at least 2 rows, got {len(dataset)}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    size = min(max(round(fraction * len(dataset)), 1), len(dataset) - 1)
    part, rest = sorted(order[:size]), sorted(order[size:])
    if isinstance(dataset, Dataset):
        return dataset.select(rest), dataset.select(part)
    return torch.utils.data.Subset(dataset, rest), torch.utils.data.Subset(dataset, part)


class HeldOut:
    """An endless stream of held-out examples: round after round, each in an order drawn by (seed, round).

    What stands at a position depends on nothing else, so there is no state to resume.

    Args:
        trainer: whose collator, columns and seed are used.
        dataset: the held-out rows.
    """

    def __init__(self, trainer, dataset):
        self.dataset, self.collate, self.seed = dataset, trainer.data_collator, trainer.args.seed
        self.columns = compat.used_columns(trainer)

    def indices(self, start: int, count: int) -> list[int]:
        """Row numbers at positions start to start + count - 1."""
        size, orders, out = len(self.dataset), {}, []
        for position in range(start, start + count):
            number, place = divmod(position, size)
            if number not in orders:
                draw = torch.Generator().manual_seed(_number(self.seed, number))
                orders[number] = torch.randperm(size, generator=draw).tolist()
            out.append(orders[number][place])
        return out

    def batches(self, start: int, count: int, size: int, run: Run) -> list[dict]:
        """This rank's share of these positions, collated in batches of `size`, on its device."""
        own = self.indices(start, count)[run.rank :: run.ranks]
        out = []
        for i in range(0, len(own), size):
            rows = [self.dataset[j] for j in own[i : i + size]]
            if self.columns is not None:
                rows = [{k: v for k, v in row.items() if k in self.columns} for row in rows]
            out.append(send_to_device(dict(self.collate(rows)), run.accelerator.device))
        return out
