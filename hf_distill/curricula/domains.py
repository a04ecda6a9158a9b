"""Data of several domains: split by a column, held out per domain, and drawn in a mixture that changes by intervals."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.utils.data import Sampler

from hf_distill.curricula.seeded import number_of
from hf_distill.objectives import LogitKD

logger = logging.getLogger(__name__)


def split_by_domain(dataset: Dataset, column: str, what: str = "train") -> dict[str, Dataset]:
    """The rows of each domain, in alphabetical order of the domains, without the column.

    Raises:
        ValueError: a stream, no such column, a row without a domain, or only one domain.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"domains are drawn by row number, which needs a datasets.Dataset, got {type(dataset).__name__} as the "
            f"{what} data: load it without streaming"
        )
    if column not in dataset.column_names:
        raise ValueError(
            f"the {what} data have no column {column!r} that names each row's domain, only "
            f"{', '.join(dataset.column_names)}: add one, or name it with --ddk_domain_column"
        )
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(dataset[column]):
        if value is None or value == "":
            raise ValueError(f"row {number} of the {what} data has no domain in column {column!r}: name or drop it")
        rows.setdefault(str(value), []).append(number)
    if len(rows) < 2:
        raise ValueError(f"column {column!r} names {', '.join(rows) or 'no domain'} only: a mixture needs two and more")
    rest = dataset.remove_columns(column)
    return {name: rest.select(rows[name]) for name in sorted(rows)}


def with_domains(domains: dict[str, Dataset], column: str) -> Dataset:
    """The inverse of `split_by_domain`: all rows, domain after domain, named in a column."""
    named = [part.add_column(column, [name] * len(part)) for name, part in domains.items() if len(part)]
    return concatenate_datasets(named)


def hold_out(domains: dict[str, Dataset], samples: int, seed: int) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """(the rest, `samples` rows) of each domain, drawn by `seed`; no row is in both.

    Raises:
        ValueError: a domain with no row left to train on.
    """
    train, held = {}, {}
    for name, dataset in domains.items():
        if len(dataset) <= samples:
            raise ValueError(
                f"domain {name!r} has {len(dataset)} rows, and ddk_eval_samples={samples} of each are held out: none "
                "is left to train on. Lower ddk_eval_samples, drop the domain, or give an eval_dataset"
            )
        draw = torch.Generator().manual_seed(number_of(seed, "held out", name))
        order = torch.randperm(len(dataset), generator=draw).tolist()
        held[name], train[name] = (dataset.select(sorted(part)) for part in (order[:samples], order[samples:]))
    logger.warning("%d rows of each domain (%s) are held out of training", samples, ", ".join(domains))
    return train, held


class DomainMixtureSampler(Sampler[int]):
    """Row numbers of one interval of training, each of a domain drawn by the interval's weights.

    Every iteration gives the present interval, from its start; `set_weights` begins the next one. Which domains are
    drawn depends on (seed, interval, weights) alone. A domain's rows come in an order drawn by (seed, domain, pass), go
    on from interval to interval where they stopped, and start over in another order when all were seen. So a list is
    drawn whole at its boundary, the same on every rank and after a resume, and no loader can have read beyond it.

    Args:
        rows: per domain, its row numbers.
        count: rows of an interval.
        seed: of all draws.
        weights: (N,) of interval 0, not negative; None is in proportion to the numbers of rows.
        state: where to keep what must last; an objective's `state` saves it with each checkpoint.

    Attributes:
        state: `weights` (N,) float32 and `drawn` (N,) of the present interval, `cursors` (N,) rows read before it, and
            its number `interval`.

    Raises:
        ValueError: a domain without rows; weights of another number of domains, negative, NaN or all 0.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        count: int,
        seed: int,
        weights: Tensor | None = None,
        state: dict[str, Tensor] | None = None,
    ):
        if empty := [number for number, own in enumerate(rows) if not len(own)]:
            raise ValueError(f"domain {empty[0]} has no rows: leave it out")
        self.rows = [torch.as_tensor(own) for own in rows]
        self.count, self.seed = count, seed
        self.state = {} if state is None else state
        self.state["interval"] = torch.tensor(0)
        self.state["cursors"] = torch.zeros(len(rows), dtype=torch.int64)
        self._begin(self.natural if weights is None else weights)

    @property
    def natural(self) -> Tensor:
        """(N,) each domain's share of all rows."""
        sizes = torch.tensor([float(len(own)) for own in self.rows])
        return sizes / sizes.sum()

    def set_weights(self, weights: Tensor) -> None:
        """End the present interval, and draw the next one by these weights (N,)."""
        drawn = self.state["drawn"]
        self.state["cursors"] = self.state["cursors"] + drawn
        self.state["interval"] = self.state["interval"] + 1
        self._begin(weights)

    def _begin(self, weights: Tensor) -> None:
        if weights.shape != (len(self.rows),) or not (weights >= 0).all() or not 0 < weights.sum() < torch.inf:
            raise ValueError(f"weights must be {len(self.rows)} numbers, not negative and not all 0, got {weights}")
        device = self.state["cursors"].device
        self.state["weights"] = weights.detach().float().to(device)
        self.state["drawn"] = torch.bincount(self._domains(), minlength=len(self.rows)).to(device)

    def _domains(self) -> Tensor:
        """(count,) the domain of each place of the present interval."""
        draw = torch.Generator().manual_seed(number_of(self.seed, "interval", int(self.state["interval"])))
        weights = self.state["weights"].cpu().double()
        return torch.multinomial(weights, self.count, replacement=True, generator=draw)

    def _stream(self, domain: int, start: int, count: int) -> Tensor:
        """Rows at places start to start + count - 1 of a domain's endless stream."""
        own, parts = self.rows[domain], []
        while count > 0:
            round_, place = divmod(start, len(own))
            draw = torch.Generator().manual_seed(number_of(self.seed, "domain", domain, round_))
            parts.append(own[torch.randperm(len(own), generator=draw)[place : place + count]])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts) if parts else own[:0]

    def __iter__(self) -> Iterator[int]:
        domains = self._domains()
        rows = torch.empty(self.count, dtype=torch.int64)
        for domain, start in enumerate(self.state["cursors"].tolist()):
            places = (domains == domain).nonzero().flatten()
            rows[places] = self._stream(domain, start, len(places))
        return iter(rows.tolist())

    def __len__(self) -> int:
        return self.count

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on."""
        return {key: self.state[key].clone() for key in ("weights", "drawn", "cursors", "interval")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.state.update({key: value.clone() for key, value in state.items()})


class MixtureObjective(LogitKD):
    """A loss on logits that also says how domains are mixed; perplexities are kept in its state.

    Logged are `ddk/r/<domain>` and `ddk/drawn/<domain>` of the present round, and `ddk/ppl_ratio/<domain>` as measured
    at its start: at a round's last step these are already the next one's.

    Args:
        domains: their names; all vectors below are in this order.
        interval: optimizer steps of a round.
    """

    def __init__(self, domains: tuple[str, ...], interval: int, **loss):
        super().__init__(**loss)
        self.domains, self.interval = tuple(domains), interval
        self.state = {name: torch.zeros(len(domains)) for name in ("student_ppl", "teacher_ppl")}

    def first_weights(self, natural: Tensor) -> Tensor:
        """(N,) how round 0 is drawn, of the domains' shares of all rows; called before anything is measured."""
        return natural

    def start(self, natural: Tensor) -> None:
        """Once, before the first step, with the first perplexities in the state."""

    def next_weights(self) -> Tensor:
        """(N,) how the coming round is drawn; `student_ppl` in the state has just been measured."""
        raise NotImplementedError(f"{type(self).__name__} must define next_weights()")

    @property
    def ratios(self) -> Tensor:
        """(N,) the student's perplexity over the teacher's, as last measured; 0 before."""
        return self.state["student_ppl"] / self.state["teacher_ppl"].clamp(min=1.0)

    def logs(self) -> dict[str, Tensor]:
        values = {"r": self.state["weights"], "ppl_ratio": self.ratios, "drawn": self.state["drawn"]}
        named = {f"ddk/{key}/{name}": v[i] for key, v in values.items() for i, name in enumerate(self.domains)}
        return named | {"ddk/interval": self.state["interval"]}
