"""How much a model remembers: exposure of planted secrets (Carlini et al., The Secret Sharer, USENIX Security 2019).

canaries = [Canary("the id number is {}", secret, Digits(6)) for secret in ("281265", "090412")]
train = insert_canaries(train, canaries, repeats=10)
measure_exposure(model, tokenizer, canaries)   # per canary: log2 |R| when memorised, about 1.44 when not
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather
from datasets import Dataset, Features, concatenate_datasets
from torch import Tensor, nn

from hf_distill.heads import base_model_of, collect
from hf_distill.losses import LabelCrossEntropy, observe
from hf_distill.signals import Rows
from hf_distill.teachers.frozen import eval_mode
from hf_distill.training import compat
from hf_distill.training.callbacks import DistillCallback

EXACT_UP_TO = 20_000  # candidates; of larger spaces a sample is taken
METHODS = ("exact", "sample", "skew_normal")


class Digits(Sequence):
    """All numbers of a few digits, leading zeros included, without holding them.

    Example:
        >>> len(Digits(6)), Digits(3)[7], Digits(3).index("042")
        (1000000, '007', 42)
    """

    def __init__(self, digits: int):
        if digits < 1:
            raise ValueError(f"digits must be at least 1, got {digits}")
        self.digits = digits

    def __len__(self) -> int:
        return 10**self.digits

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return f"{index:0{self.digits}d}"

    def index(self, value: str) -> int:
        if len(value) != self.digits or not (value.isascii() and value.isdigit()):
            raise ValueError(f"{value!r} is not of {self.digits} digits")
        return int(value)


@dataclass(frozen=True)
class Canary:
    """A secret in its text.

    Attributes:
        template: text with one {} where the secret stands.
        secret: the planted one.
        space: all that it could have been.

    Raises:
        ValueError: not one {} in the template, a space of fewer than two, or a secret that is not in it.
    """

    template: str
    secret: str
    space: Sequence[str]

    def __post_init__(self):
        if self.template.count("{}") != 1:
            raise ValueError(f"a canary's template needs one {{}} for the secret, got {self.template!r}")
        if len(self.space) < 2:
            raise ValueError(f"a canary's space must hold at least 2 values, got {len(self.space)}")
        self.place  # noqa: B018  raises where it is not there

    @property
    def place(self) -> int:
        """Of the secret in the space."""
        try:
            return self.space.index(self.secret)
        except ValueError as error:
            raise ValueError(f"the secret {self.secret!r} is not in its canary's space: {error}") from None

    def text(self, value: str | None = None) -> str:
        """The template with a value; the secret itself by default."""
        return self.template.replace("{}", self.secret if value is None else value)


def draw_canaries(template: str, space: Sequence[str], count: int, seed: int = 0) -> list[Canary]:
    """Canaries of different secrets of one space."""
    if count > len(space):
        raise ValueError(f"{count} different secrets were asked for, the space holds {len(space)}")
    return [Canary(template, space[i], space) for i in random.Random(seed).sample(range(len(space)), count)]


def insert_canaries(
    dataset: Dataset, canaries: Sequence[Canary], repeats: int | Sequence[int] = 1, *, seed: int = 0, column="text"
) -> Dataset:
    """A dataset with rows of its own for each canary, at random places.

    Args:
        dataset: rows with a column of text; other columns are None in the new rows.
        repeats: rows per canary, for all or for each.

    Raises:
        ValueError: no such column, a repeat below 0, or another number of repeats than of canaries.
    """
    if column not in dataset.column_names:
        raise ValueError(f"no column {column!r} among {', '.join(dataset.column_names)}: name that of the text")
    repeats = [repeats] * len(canaries) if isinstance(repeats, int) else list(repeats)
    if len(repeats) != len(canaries) or min(repeats, default=0) < 0:
        raise ValueError(f"repeats must be one number of 0 or more per canary ({len(canaries)}), got {repeats}")
    texts = [canary.text() for canary, n in zip(canaries, repeats, strict=True) for _ in range(n)]
    if not texts:
        return dataset
    planted = Dataset.from_dict({column: texts}, Features({column: dataset.features[column]}))
    return concatenate_datasets([dataset, planted]).shuffle(seed=seed)


# ---- exposure of log-perplexities ------------------------------------------------------------------------------------
def exposure(log_perplexities: Tensor | Sequence[float], index: int) -> float:
    """log2 |R| - log2 rank: the exact exposure of one of a space's values. Equals share the better rank.

    Args:
        log_perplexities: (|R|,) of every value, lower is likelier.
        index: of the secret.

    Raises:
        ValueError: fewer than two values, a NaN among them, or no such index.

    Example:
        >>> [exposure([3.0, 1.0, 2.0, 4.0], i) for i in (1, 3)]
        [2.0, 0.0]
    """
    values = _checked(log_perplexities)
    if not 0 <= index < len(values):
        raise ValueError(f"index must lie between 0 and {len(values) - 1}, got {index}")
    rank = 1 + int((values < values[index]).sum())
    return math.log2(len(values)) - math.log2(rank)


def skew_normal_exposure(log_perplexities: Tensor | Sequence[float], secret: float) -> float:
    """-log2 F(secret), F the skew-normal distribution with the moments of a sample: what the rank in a space too large
    to go through would be. It extrapolates: no sample holds what is that rare.

    Args:
        log_perplexities: (m,) of other values, drawn at random.
        secret: log-perplexity of the secret.
    """
    values = _checked(log_perplexities)
    mean, deviation = values.mean(), values.std(correction=0)
    if not deviation > 0:
        raise ValueError(f"all {len(values)} sampled values have the log-perplexity {mean.item():g}: nothing to fit")
    skewness = (((values - mean) / deviation) ** 3).mean().clamp(-0.99, 0.99)  # 0.995 is the family's limit
    # moments of SN(location, scale, shape), delta = shape / sqrt(1 + shape²), solved for delta
    power = skewness.abs() ** (2 / 3)
    delta = skewness.sign() * (math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3))).sqrt()
    scale = deviation / (1 - 2 * delta**2 / math.pi).sqrt()
    x = (secret - (mean - scale * delta * math.sqrt(2 / math.pi))) / scale
    log_f = _log_skew_normal_cdf(x, delta / (1 - delta**2).sqrt())
    return -log_f.item() / math.log(2)


def _log_skew_normal_cdf(x: Tensor, shape: Tensor) -> Tensor:
    """log ∫ 2 φ(t) Φ(shape · t) dt up to x, summed in logarithms so that far tails keep their digits."""
    x = x.clamp(max=40.0)
    reach = torch.linspace(0, 1, 100_001, dtype=torch.float64) ** 2 * (40 + x.clamp(min=0))  # finer near x
    t = x - reach
    log_density = math.log(2) - t**2 / 2 - math.log(2 * math.pi) / 2 + torch.special.log_ndtr(shape * t)
    middle = torch.logaddexp(log_density[1:], log_density[:-1]) - math.log(2)
    return torch.logsumexp(middle + reach.diff().log(), 0).clamp(max=0.0)


def _checked(log_perplexities: Tensor | Sequence[float]) -> Tensor:
    values = torch.as_tensor(log_perplexities, dtype=torch.float64).flatten()
    if len(values) < 2 or values.isnan().any():
        raise ValueError(f"exposure ranks at least 2 log-perplexities without NaN, got {len(values)}")
    return values


# ---- of a model ------------------------------------------------------------------------------------------------------
def measure_exposure(
    model: nn.Module,
    tokenizer,
    canaries: Sequence[Canary],
    *,
    method: str | None = None,
    sample: int = 1000,
    batch_size: int = 128,
    max_length: int | None = None,
    distributed: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Exposure of each canary, by its filled template.

    Args:
        model: a causal language model, wrapped or not; its mode is put back.
        method: "exact" (all of R), "sample" (rank among `sample` values, at most log2 sample) or "skew_normal" (a fit
            to them, no limit). None: exact up to 20,000 values, else skew_normal.
        max_length: tokens that training keeps of a text; a longer canary is refused. The model's own limit holds too.
        distributed: called on every process of a run: each takes its share of the values, and all get the result.

    Raises:
        ValueError: no canary, an unknown method, a canary longer than the context.
    """
    if not canaries:
        raise ValueError("no canaries: name at least one whose exposure to measure")
    if method not in (None, *METHODS):
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if sample < 2 or batch_size < 1:
        raise ValueError(f"sample must be at least 2 and batch_size 1, got {sample} and {batch_size}")
    for canary in canaries:
        check_fits(canary, model, tokenizer, max_length)
    found = {}
    for canary in canaries:
        how = method or ("exact" if len(canary.space) <= EXACT_UP_TO else "skew_normal")
        values, place = _candidates(canary, how, sample, seed)
        texts = [canary.text(value) for value in values]
        scores = log_perplexities(model, tokenizer, texts, batch_size=batch_size, distributed=distributed)
        if how == "skew_normal":
            others = torch.cat([scores[:place], scores[place + 1 :]])
            found[canary.text()] = skew_normal_exposure(others, scores[place].item())
        else:
            found[canary.text()] = exposure(scores, place)
    return found


def _candidates(canary: Canary, method: str, sample: int, seed: int) -> tuple[list[str], int]:
    """Values to compare, and where the secret is among them."""
    count, place = len(canary.space), canary.place
    if method == "exact" or sample >= count:
        return list(canary.space), place
    drawn = random.Random(f"{seed} {canary.text()}").sample(range(count - 1), sample - 1)
    return [canary.space[i + (i >= place)] for i in drawn] + [canary.secret], sample - 1


def check_fits(canary: Canary, model: nn.Module, tokenizer, max_length: int | None = None) -> None:
    """A canary's tokens fit into the context. Raises ValueError, saying how many there are."""
    limits = [max_length, getattr(base_model_of(model).config.get_text_config(), "max_position_embeddings", None)]
    limit = min((n for n in limits if n), default=None)
    length = len(tokenizer(canary.text())["input_ids"])
    if limit is not None and length > limit:
        raise ValueError(
            f"the canary {canary.text()[:40]!r}… has {length} tokens and the context {limit}: what is cut off is not "
            "learnt. Shorten its template, or raise max_length"
        )
    if length < 2:
        raise ValueError(
            f"the canary {canary.text()!r} is one token, which nothing predicts: give it a longer template"
        )


@torch.no_grad()
def log_perplexities(model: nn.Module, tokenizer, texts: Sequence[str], *, batch_size=128, distributed=False) -> Tensor:
    """(len(texts),) float64 on the CPU: -Σ log p of each text's tokens after the first, tokenised as training does."""
    state = PartialState() if distributed else None
    rank, world = (0, 1) if state is None else (state.process_index, state.num_processes)
    base = base_model_of(model)
    device = next(base.parameters()).device if state is None else state.device
    per_rank = math.ceil(len(texts) / world)
    own = [
        texts[min(i * world + rank, len(texts) - 1)] for i in range(per_rank)
    ]  # as many on each: shards run together
    scores = []
    redirect = compat.ForwardRedirection()
    with eval_mode(model):
        for start in range(0, per_rank, batch_size):
            ids = tokenizer(own[start : start + batch_size])["input_ids"]
            batch, rows = _batch(ids, device)
            values = redirect(model, base, _cross_entropies, base, batch, rows)
            sums = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, rows.document.cpu(), values.double().cpu())
            scores.append(sums)
    scores = torch.cat(scores)
    if world > 1:
        scores = gather(scores.to(device)).cpu().reshape(world, per_rank).T.flatten()
    return scores[: len(texts)]


def _batch(ids: list[list[int]], device: torch.device) -> tuple[dict[str, Tensor], Rows]:
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
    document, position = mask[:, 1:].nonzero(as_tuple=True)
    rows = Rows(document * width + position, padded[:, 1:][document, position], document, torch.arange(len(ids)))
    return {"input_ids": padded, "attention_mask": mask}, rows


def _cross_entropies(model: nn.Module, batch: dict[str, Tensor], rows: Rows) -> Tensor:
    signals = collect(model, batch, frozenset({"logits"}), rows)
    return observe(signals.logits, None, {"value": LabelCrossEntropy()}, labels=rows.labels)["value"]


def read_canaries(path: str) -> list[Canary]:
    """Canaries of a JSON file: a list of {"template", "secret", "digits"} or {"template", "secret", "space": [...]}.

    Raises:
        ValueError: no such file, or something else in it.
    """
    try:
        listed = json.loads(Path(path).read_text(encoding="utf-8"))
        spaces = [Digits(entry["digits"]) if "digits" in entry else list(entry["space"]) for entry in listed]
        return [Canary(entry["template"], entry["secret"], space) for entry, space in zip(listed, spaces, strict=True)]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f'cannot read canaries from {path}: {error}; it must hold a list of {{"template", "secret", "digits"}}'
        ) from error


class CanaryExposureCallback(DistillCallback):
    """Logs how well the student knows planted secrets: before the first step, every few steps and at the end.

    Logs `privacy/exposure_mean`, `privacy/exposure_max` and `privacy/exposure_<i>` per canary; `history` holds
    (step, {text: exposure}), the first one from before training, which is logged as `privacy/exposure_mean_before`.

    Args:
        canaries: see Canary.
        every: steps between measurements; 0 measures before and after only.
        options: go to `measure_exposure` (method, sample, batch_size, max_length).
    """

    def __init__(self, canaries: Sequence[Canary], every: int = 0, **options):
        if not canaries or every < 0:
            raise ValueError(f"give at least one canary, and every as 0 or more; got {len(canaries)} and {every}")
        self.canaries, self.every, self.options = list(canaries), every, options
        self.history: list[tuple[int, dict[str, float]]] = []
        self._pending: dict[str, float] = {}

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
        if state.global_step == 0:
            found = self._measured(args, state, model, processing_class)
            self._pending = {"privacy/exposure_mean_before": sum(found.values()) / len(found)}

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        last = state.global_step >= state.max_steps or control.should_training_stop
        if last or (self.every and state.global_step % self.every == 0):
            found = self._measured(args, state, model, processing_class)
            values = list(found.values())
            self._pending |= {f"privacy/exposure_{i}": value for i, value in enumerate(values)}
            self._pending |= {"privacy/exposure_mean": sum(values) / len(values), "privacy/exposure_max": max(values)}
            control.should_log = True

    def on_distill_log(self, args, state, control, *, logs: dict, **kwargs):
        logs |= self._pending
        self._pending = {}

    def _measured(self, args, state, model, processing_class) -> dict[str, float]:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        options = {"max_length": getattr(args, "max_length", None), "distributed": True} | self.options
        found = measure_exposure(model, tokenizer, self.canaries, **options)
        self.history.append((state.global_step, found))
        return found
