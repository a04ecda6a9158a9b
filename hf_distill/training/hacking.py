"""Watching a run for teacher hacking: distances on fixed sequences at every evaluation, and what is done about it."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os

import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_distill.evaluation.hacking import (
    check_reaction,
    check_settings,
    distance_named,
    fit_power_law,
    hacking_verdict,
    picture,
)
from hf_distill.heads import collect, rows_of
from hf_distill.losses import observe
from hf_distill.teachers import Teacher
from hf_distill.teachers.frozen import eval_mode, load_teacher
from hf_distill.training import compat
from hf_distill.training.checks import check_has_loss
from hf_distill.training.evaluation import random_state_kept
from hf_distill.training.pairs import check_pair

logger = logging.getLogger(__name__)

MEASURES = ("proxy", "golden")
LOG, PICTURE = "hacking.json", "hacking.png"


def student_distance(trainer, reference: Teacher, sequences: Dataset, divergence) -> tuple[float, float]:
    """How far a trainer's student is from a reference along sequences, without a gradient or a trace.

    Args:
        reference: a teacher that gives logits, prepared.
        sequences: `input_ids` and `labels`, -100 where nothing is measured.
        divergence: a Divergence.

    Returns:
        Per token (sum ÷ tokens) and per sequence (sum ÷ sequences), over all ranks, the same on each.
    """
    args, accelerator = trainer.args, trainer.accelerator
    tile_bytes = None if args.tile_megabytes is None else args.tile_megabytes * 2**20
    totals = torch.zeros(3, dtype=torch.float32 if args.device.type == "mps" else torch.float64, device=args.device)

    def summed(model, batch: dict) -> torch.Tensor:
        with accelerator.autocast():
            theirs = reference(batch, frozenset({"logits"})).logits
            ours = collect(model, batch, frozenset({"logits"}), rows_of(batch), dense=trainer._dense).logits
        values = observe(ours, theirs, {"distance": divergence}, tile_bytes=tile_bytes, engine=args.loss_engine)
        values = values["distance"].to(totals)
        documents = batch["document_example"].shape[0]
        return torch.stack([values.sum(), totals.new_tensor(len(values)), totals.new_tensor(documents)])

    with torch.no_grad(), compat.before_training(trainer), random_state_kept(args.device), eval_mode(trainer.model):
        loader = trainer._get_dataloader(
            sequences, description="Hacking", batch_size=args.eval_batch_size, sampler_fn=trainer._get_eval_sampler
        )
        unwrapped = accelerator.unwrap_model(trainer.model)
        for batch in loader:
            batch = trainer._without_repeats(trainer._prepare_inputs(batch))
            totals += trainer._redirect(trainer.model, unwrapped, summed, unwrapped, batch)
    total, tokens, documents = (accelerator.reduce(totals, "sum") / trainer.get_tp_size()).tolist()
    return total / max(tokens, 1), total / max(documents, 1)


@contextlib.contextmanager
def _without_readers(trainer):
    """Sequences that a cached teacher has not seen are not looked up in its cache."""
    own = trainer.data_collator
    trainer.data_collator = copy.copy(own)
    trainer.data_collator.readers = ()
    try:
        yield
    finally:
        trainer.data_collator = own


class TeacherHackingCallback(TrainerCallback):
    """Measures the proxy and, with an oracle, the golden distance at every evaluation, and tells hacking from them.

    Logged: `hacking/proxy` and `hacking/golden` (nats per token, and `_per_sequence`), `hacking/powerlaw_exponent` and
    `hacking/powerlaw_residual` of the proxy, `hacking/flag` and `hacking/overfitting` (0 or 1). The run's log is the
    only record, so a resumed run goes on with it, and all ranks hold the same. At the end, and when hacking is found,
    `hacking.json` and `hacking.png` are written to the output folder, which its report shows.

    With an oracle the flag is `hacking_verdict`'s, without one that of `fit_power_law`; once up it stays up.

    Args:
        trainer: a DistillSFTTrainer or DistillTrainer of a language model, with its teacher.
        sequences: the fixed sequences of the proxy, best drawn from the teacher: `input_ids` and `labels` (-100 where
            nothing is measured). A cached teacher must have them in its cache.
        oracle: what stands for the truth: a Hub id, folder, model or Teacher, of the same vocabulary. A quantised
            oracle is then the truth. None leaves the golden distance out.
        oracle_sequences: those of the golden distance, best drawn from the oracle.
        divergence: "forward_kl", "reverse_kl" or "jeffreys".
        fit_points, tolerance, patience: of `fit_power_law`.
        patience, min_rel_increase: of `hacking_verdict`.
        skip_steps: evaluations up to this step are left out of the law (warm-up; 100 in the paper), always step 0.
        on_detect: what a flag does: "warn", "stop" training, or "switch_to_on_policy".
        online_ratio: share of on-policy batches after a switch.

    Raises:
        ValueError: settings out of range, no teacher or one without logits, sequences without labels, an oracle with
            another vocabulary, a switch with a trainer that cannot generate.

    Example:
        >>> trainer.add_callback(TeacherHackingCallback(trainer, answers))  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer,
        sequences: Dataset,
        *,
        oracle=None,
        oracle_sequences: Dataset | None = None,
        divergence: str = "forward_kl",
        fit_points: int | None = None,
        tolerance: float = 0.1,
        patience: int = 2,
        min_rel_increase: float = 0.02,
        skip_steps: int = 100,
        on_detect: str = "warn",
        online_ratio: float = 1.0,
        data_source: str | None = None,
    ):
        check_settings(tolerance=tolerance, patience=patience, min_rel_increase=min_rel_increase, fit_points=fit_points)
        check_reaction(on_detect, online_ratio, trainer)
        if (oracle is None) != (oracle_sequences is None):
            raise ValueError("oracle and oracle_sequences go together: give both, or neither")
        if trainer.teacher is None or "logits" not in trainer.teacher.gives:
            raise ValueError("the proxy is the distance from the teacher's logits, and this trainer's gives none")
        self.trainer, self.divergence, self.data_source = trainer, distance_named(divergence), data_source
        self.fit_points, self.tolerance, self.patience = fit_points, tolerance, patience
        self.min_rel_increase, self.skip_steps = min_rel_increase, skip_steps
        self.on_detect, self.online_ratio = on_detect, online_ratio
        self.references = {"proxy": (trainer.teacher, _checked(sequences, "sequences"))}
        if oracle is not None:
            self.references["golden"] = (
                prepared_oracle(trainer, oracle, oracle_sequences),
                _checked(oracle_sequences, "oracle_sequences"),
            )

    # ---- what was measured -------------------------------------------------------------------------------------------
    @property
    def history(self) -> dict[str, list]:
        """{"step", "proxy", "golden" (with an oracle), "flag"} of all evaluations so far."""
        entries = [e for e in self.trainer.state.log_history if "hacking/proxy" in e]
        names = [*self.references, "flag"]
        return {"step": [e["step"] for e in entries]} | {n: [e[f"hacking/{n}"] for e in entries] for n in names}

    def law(self, history: dict[str, list] | None = None) -> dict | None:
        """`fit_power_law` of the proxy after warm-up; None while there are too few evaluations to judge."""
        history = history or self.history
        points = zip(history["step"], history["proxy"], strict=True)
        kept = [(step, value) for step, value in points if step > self.skip_steps and value > 0]
        if len(kept) < max(self.fit_points or 4, 2):
            return None
        return fit_power_law(*zip(*kept, strict=True), self.fit_points, self.tolerance, self.patience)

    def verdict(self, history: dict[str, list] | None = None) -> dict | None:
        """`hacking_verdict` of the run so far; None without an oracle or an evaluation."""
        history = history or self.history
        if "golden" not in history or not history["step"]:
            return None
        return hacking_verdict(
            history["step"], history["proxy"], history["golden"], self.patience, self.min_rel_increase
        )

    @property
    def flag_step(self) -> int | None:
        """The step at which hacking was found; None while it was not."""
        history = self.history
        return next((s for s, flag in zip(history["step"], history["flag"], strict=True) if flag), None)

    def summary(self) -> str:
        """The verdict in words."""
        history, flag = self.history, self.flag_step
        if not history["step"]:
            return "not measured: there was no evaluation"
        verdict = self.verdict()
        if verdict is None:
            if flag is not None:
                return f"suspected from step {flag} on: the proxy left the power law of its first evaluations"
            return "no sign of it in the proxy" if self.law() else "too few evaluations to judge without an oracle"
        best = history["step"].index(verdict["best_step"])
        rise = f"the golden distance is {history['golden'][best]:.4f} at step {verdict['best_step']}, its lowest, and "
        rise += f"{history['golden'][-1]:.4f} at the end; the proxy {history['proxy'][best]:.4f} and "
        rise += f"{history['proxy'][-1]:.4f}"
        if flag is not None:
            return f"found at step {flag}: {rise}"
        return f"not found{', but ordinary overfitting' if verdict['overfitting'] else ''}: {rise}"

    def describe(self) -> dict[str, str]:
        """For the model card and the report."""
        return {"teacher hacking": self.summary()} | ({"data source": self.data_source} if self.data_source else {})

    # ---- events ------------------------------------------------------------------------------------------------------
    def on_evaluate(self, args, state, control, **kwargs):
        history = self.history
        if history["step"] and history["step"][-1] == state.global_step:  # several evaluation sets: once a step
            return
        logs = self._measured()
        history["step"].append(state.global_step)
        for name in self.references:
            history[name].append(logs[f"hacking/{name}"])
        law, verdict = self.law(history), self.verdict(history)
        if law is not None:
            logs |= {
                "hacking/powerlaw_exponent": law["exponent"],
                "hacking/powerlaw_residual": law["residuals"][-1],
            }
        found = law is not None and law["flag_step"] is not None
        if verdict is not None:
            found = verdict["hacking"]
            logs["hacking/overfitting"] = float(verdict["overfitting"])
        before = any(history["flag"])
        self.trainer.log(logs | {"hacking/flag": float(found or before)})
        if found and not before:
            self._react(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            logger.info("teacher hacking: %s", self.summary())
            self._write(args)

    def _measured(self) -> dict[str, float]:
        logs = {}
        for name, (reference, sequences) in self.references.items():
            quiet = _without_readers if name == "golden" else lambda trainer: contextlib.nullcontext()
            with quiet(self.trainer):
                per_token, per_sequence = student_distance(self.trainer, reference, sequences, self.divergence)
            logs |= {f"hacking/{name}": per_token, f"hacking/{name}_per_sequence": per_sequence}
        return logs

    def _react(self, args, state, control) -> None:
        if state.is_world_process_zero:
            logger.warning("teacher hacking %s", self.summary())
            self._write(args)
        if self.on_detect == "stop":
            control.should_training_stop = True
        elif self.on_detect == "switch_to_on_policy":
            self.trainer.set_lmbda(self.online_ratio)

    def _write(self, args) -> None:
        history = self.history
        if not history["step"]:
            return
        os.makedirs(args.output_dir, exist_ok=True)
        told = {"summary": self.summary(), "flag_step": self.flag_step, "verdict": self.verdict(), "law": self.law()}
        with open(os.path.join(args.output_dir, LOG), "w", encoding="utf-8") as file:
            json.dump(told | {"history": history}, file, indent=1)
        try:
            picture({"this run": history}, os.path.join(args.output_dir, PICTURE), title=self.summary())
        except ImportError as error:
            logger.info("no picture of hacking: %s", error)


def prepared_oracle(trainer, oracle, sequences) -> Teacher:
    """An oracle in its place, checked against the student.

    Raises:
        ValueError: another vocabulary, or a cache, which cannot be asked about what the student is measured on.
    """
    oracle = load_teacher(oracle)
    if oracle.readers:
        raise ValueError(f"the oracle {oracle.name} is a cache: give the model itself")
    if "logits" not in oracle.gives:
        raise ValueError(f"the oracle must give logits, {type(oracle).__name__} does not: give a model")
    check_pair(trainer.model, oracle, trainer.processing_class, sequences, trainer.args)
    oracle.attach(trainer.model)
    oracle.check()
    oracle.prepare(trainer.accelerator)
    return oracle


def _checked(sequences: Dataset, what: str) -> Dataset:
    if not isinstance(sequences, Dataset) or not {"input_ids", "labels"} <= set(sequences.column_names):
        found = getattr(sequences, "column_names", type(sequences).__name__)
        raise ValueError(f"{what} must be a datasets.Dataset with input_ids and labels, got {found}")
    check_has_loss(sequences)
    return sequences


__all__ = ["TeacherHackingCallback", "student_distance"]
