"""A trainer whose mixture of domains changes by rounds: each round is drawn whole, learnt, and then judged."""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_distill.curricula.domains import DomainMixtureSampler, MixtureObjective, split_by_domain, with_domains
from hf_distill.heads import collect, rows_of
from hf_distill.losses import LabelCrossEntropy, run_terms
from hf_distill.losses.tile import Tile
from hf_distill.signals import SampledLogits, SparseLogits
from hf_distill.teachers.frozen import eval_mode
from hf_distill.training import compat
from hf_distill.training.checks import check_has_loss
from hf_distill.training.evaluation import random_state_kept
from hf_distill.training.trainers import DistillSFTTrainer


@dataclass(frozen=True)
class TeacherLabelCrossEntropy:
    """-log p(label) of the teacher, over the vocabulary that both models share; no gradient."""

    temperature: float = 1.0
    reads_labels: ClassVar[bool] = True

    def value(self, tile: Tile) -> Tensor:
        return -tile.log_p(self.temperature).gather(-1, tile.labels[:, None])[:, 0]

    def add_grad(self, tile: Tile, value: Tensor, row_weight: Tensor, out: Tensor) -> None:
        pass


class DomainMixtureTrainer(DistillSFTTrainer):
    """DistillSFTTrainer that draws its data domain by domain, in rounds of `objective.interval` optimizer steps.

    To transformers a round is an epoch: the `epoch` of its logs and the strategies "epoch" count rounds, while
    `num_train_epochs` still says how often as many rows are read as there are. Texts are packed within their domain,
    and a packed row counts as one draw.

    Args:
        objective: a MixtureObjective.
        domain_column: of the training data.
        eval_dataset: the validation set of each domain, by its name.

    Raises:
        ValueError: domains without a validation set or the other way round; a domain with nothing to learn, or to
            measure, once it is prepared; settings that draw rows in another way.
    """

    def __init__(
        self, model, *, objective: MixtureObjective, domain_column: str, train_dataset, eval_dataset, args, **arguments
    ):
        _check_settings(args)
        if set(eval_dataset) != set(objective.domains):
            raise ValueError(
                f"every domain needs its validation set: trained on are {', '.join(objective.domains)}, eval_dataset "
                f"has {', '.join(sorted(eval_dataset)) or 'none'}"
            )
        self.domain_column = domain_column
        unnamed = {
            name: data.remove_columns([domain_column] if domain_column in data.column_names else [])
            for name, data in eval_dataset.items()
        }
        super().__init__(
            model, objective=objective, train_dataset=train_dataset, eval_dataset=unnamed, args=args, **arguments
        )
        count = objective.interval * self.get_total_train_batch_size(self.args)
        rows = self._rows_of_domains()
        natural = torch.tensor([float(len(own)) for own in rows])
        first = objective.first_weights(natural / natural.sum())
        self.sampler = DomainMixtureSampler(rows, count, self.args.seed, first, objective.state)
        objective.state["plan"] = torch.tensor(
            [objective.interval, count, zlib.crc32("\n".join(objective.domains).encode()), *map(len, rows)]
        )
        objective.to(self.args.device)
        self.add_callback(_Rounds(self))

    def _rows_of_domains(self) -> list[list[int]]:
        rows: dict[str, list[int]] = {name: [] for name in self.objective.domains}
        for number, value in enumerate(self.train_dataset[self.domain_column]):
            rows[str(value)].append(number)
        for name, own in rows.items():
            if not own:
                raise ValueError(
                    f"domain {name!r} has no row with a label left after preparation (max_length={self.args.max_length}"
                    " is shorter than its prompts, or all is masked): drop it, or raise max_length"
                )
            for what, dataset in (
                ("training", self.train_dataset.select(own)),
                ("validation", self.eval_dataset[name]),
            ):
                try:
                    check_has_loss(dataset)
                except ValueError as error:
                    raise ValueError(f"domain {name!r}, {what} rows: {error}") from error
        return list(rows.values())

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        def prepared(part: Dataset, name: str) -> Dataset:
            return super(DomainMixtureTrainer, self)._prepare_dataset(
                part, processing_class, args, packing, formatting_func, name
            )

        if dataset_name != "train" or self.domain_column not in dataset.column_names:
            return prepared(dataset, dataset_name)
        parts = {name: prepared(d, name) for name, d in split_by_domain(dataset, self.domain_column).items()}
        if not any(map(len, parts.values())):
            return next(iter(parts.values()))  # the caller says that nothing is left
        return with_domains(parts, self.domain_column)

    # ---- drawing -----------------------------------------------------------------------------------------------------
    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    def set_initial_training_values(self, args, dataloader):
        args = copy.copy(args)
        if args.max_steps <= 0:  # in rows of the data, not in rounds
            rows, batch = len(self.train_dataset), self.get_total_train_batch_size(args)
            args.max_steps = max(math.ceil(args.num_train_epochs * rows / batch), 1)
        return super().set_initial_training_values(args, dataloader)

    def _load_objective(self, folder: str) -> dict[str, Tensor]:
        plan = self.objective.state["plan"].clone()
        tensors = super()._load_objective(folder)
        saved = self.objective.state["plan"]
        if not torch.equal(plan, saved):
            raise ValueError(
                "the checkpoint's rounds are of other data or another size (steps and rows of a round, names, rows per "
                f"domain): {saved.tolist()} there, {plan.tolist()} here. Resume with the run's data, ddk_interval and "
                "global batch"
            )
        return tensors

    # ---- judging -----------------------------------------------------------------------------------------------------
    def perplexities(self, *, teacher: bool = False) -> Tensor:
        """(N,) the student's on each domain's validation set, or (2, N) with the teacher's; the same on every rank.

        exp of the mean cross-entropy over all label tokens of the set, in eval mode; no random state moves.

        Raises:
            ValueError: a set without label tokens; a teacher that does not say how likely the labels are.
        """
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        names = tqdm(self.objective.domains, desc="perplexities", leave=False, disable=hidden)
        with compat.before_training(self), random_state_kept(self.args.device), eval_mode(self.model), torch.no_grad():
            sums = torch.stack([self._sums(name, teacher) for name in names])
        sums = self.accelerator.reduce(sums, "sum").cpu()
        for name, count in zip(self.objective.domains, sums[:, 2].tolist(), strict=True):
            if not count:
                raise ValueError(f"the validation set of domain {name!r} has no label tokens: give it other rows")
        means = sums[:, :2].T / sums[:, 2]
        if not means.isfinite().all():
            raise FloatingPointError(f"a perplexity is not finite at step {self.state.global_step}: {means.tolist()}")
        return means.exp() if teacher else means[0].exp()

    def _sums(self, name: str, teacher: bool) -> Tensor:
        """(3,) sums of the student's and the teacher's cross-entropy, and rows, of this rank's share of a set."""
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        sums = torch.zeros(3, dtype=dtype, device=self.args.device)
        unwrapped = self.accelerator.unwrap_model(self.model)
        for batch in self.get_eval_dataloader(name):
            batch = self._without_repeats(self._prepare_inputs(batch))
            sums += self._redirect(self.model, unwrapped, self._label_losses, unwrapped, batch, teacher).to(sums)
        return sums

    def _label_losses(self, model: nn.Module, batch: dict, teacher: bool) -> Tensor:
        needs = frozenset({"logits"})
        terms, theirs = {"student": (LabelCrossEntropy(), 0.0)}, None
        with self.accelerator.autocast():
            if teacher:
                theirs = self.teacher(batch, needs).logits
                if isinstance(theirs, (SparseLogits, SampledLogits)):
                    raise ValueError(
                        "a teacher cached as topk or sampled does not say how likely every label is, so it has no "
                        "perplexity: cache it in mode hidden or logits, or use the live teacher"
                    )
                terms["teacher"] = (TeacherLabelCrossEntropy(), 0.0)
            student = collect(model, batch, needs, rows_of(batch), dense=self._dense)
            found = run_terms(student.logits, theirs, terms, labels=student.labels, reduction="sum")
        zero = found["student"].new_zeros(())
        return torch.stack([found["student"], found.get("teacher", zero), zero + len(student.labels)])

    def start_mixture(self) -> None:
        """Measure both models once; nothing where a checkpoint has it."""
        state = self.objective.state
        if state["teacher_ppl"].any():
            return
        found = self.perplexities(teacher=True).to(state["student_ppl"])
        state["student_ppl"], state["teacher_ppl"] = found.unbind()
        self.objective.start(self.sampler.natural.to(found))

    def next_round(self) -> None:
        state = self.objective.state
        state["student_ppl"] = self.perplexities().to(state["student_ppl"])
        self.sampler.set_weights(self.objective.next_weights())


class _Rounds(TrainerCallback):
    """Ends a round every `interval` optimizer steps, before the step's checkpoint is written."""

    def __init__(self, trainer: DomainMixtureTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.start_mixture()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.objective.interval == 0:
            self.trainer.next_round()

    def describe(self) -> dict[str, str]:
        """The last mixture, for the model card."""
        objective = self.trainer.objective
        rows = zip(
            objective.domains, *(objective.state[k].tolist() for k in ("weights", "student_ppl", "teacher_ppl")),
            strict=True,
        )  # fmt: skip
        return {
            f"domain {name}": f"{weight:.3f} of the mixture at the end; perplexity {ours:.2f} (teacher {theirs:.2f})"
            for name, weight, ours, theirs in rows
        }


def _check_settings(args) -> None:
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy != "random":
        raise ValueError(f"train_sampling_strategy={strategy!r} orders rows itself, and so does the mixture: leave it")
    for name in ("ignore_data_skip", "auto_find_batch_size"):
        if getattr(args, name, False):
            raise ValueError(f"{name} changes where a round of the mixture begins: unset it")
