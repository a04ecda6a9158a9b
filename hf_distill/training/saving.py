"""Saving and resuming: the student leaves clean, and a killed run goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import os
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_distill.heads import base_model_of
from hf_distill.hub.card import is_ours, write_model_card
from hf_distill.training import compat

logger = logging.getLogger(__name__)

KEY = "distill_objective"
FILE = KEY + ".safetensors"
TRAINER_STATE = "trainer_state.json"
DISK_SIGNS = (
    "No space left",
    "File too large",
    "Disk quota exceeded",
    "PytorchStreamWriter",
    "inline_container",
    "iostream",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class DiskFullError(OSError):
    """A save that did not fit; the message says what was written and where to go on."""


def complete_checkpoints(output_dir: str) -> tuple[list[str], list[str]]:
    """Checkpoint folders, newest first: (complete, half-written). `trainer_state.json` is what a save writes last."""
    complete, partial = [], []
    if os.path.isdir(output_dir):
        names = [
            n
            for n in os.listdir(output_dir)
            if n.startswith(PREFIX_CHECKPOINT_DIR + "-") and n.split("-")[-1].isdigit()
        ]
        for name in sorted(names, key=lambda n: -int(n.split("-")[-1])):
            folder = os.path.join(output_dir, name)
            (complete if _is_complete(folder) else partial).append(folder)
    return complete, partial


def check_no_other_run(output_dir: str) -> None:
    """Raises ValueError when a folder has checkpoints: a new run would mix with another one's."""
    found = sum(complete_checkpoints(output_dir), [])
    if found:
        raise ValueError(
            f"{output_dir} holds another run ({os.path.basename(found[0])}): go on with resume_from_checkpoint=True "
            "(recipes: --resume), or choose another output_dir"
        )


def _is_complete(folder: str) -> bool:
    try:
        with open(os.path.join(folder, TRAINER_STATE), encoding="utf-8") as file:
            json.load(file)
        return True
    except (OSError, ValueError):
        return False


def _holds_optimizer(folder: str) -> bool:
    """optimizer.pt of one process or DDP, optimizer.bin / optimizer_0 of FSDP, global_step<N> of DeepSpeed."""
    return any(name.startswith(("optimizer", "global_step")) for name in os.listdir(folder))


class SavesObjective:
    """Trainer hooks that write and read checkpoints."""

    _in_checkpoint = False
    card_facts: dict = {}  # keywords of create_model_card that the cards of every save are written with

    @contextlib.contextmanager
    def _clean_student(self):
        """The model without the objective hung on it, for the length of a save or a load."""
        model = self.accelerator.unwrap_model(self.model)
        objective = model._modules.pop(KEY, None)
        try:
            yield
        finally:
            if objective is not None:
                model._modules[KEY] = objective

    def student(self, *, merge: bool | None = None) -> nn.Module:
        """The trained student, clean and in eval mode: objective, hooks and replaced forwards off, its head thawed.

        Call it when training is over.

        Args:
            merge: fold a LoRA adapter into the weights for good, so that `save_model` writes a plain model; None takes
                `args.merge_adapter`.
        """
        model = self.accelerator.unwrap_model(self.model)
        model._modules.pop(KEY, None)
        base = base_model_of(model)
        for module in {model, base}:
            if not hasattr(module, "_hf_hook"):  # accelerate's autocast and TRL's fused head
                module.__dict__.pop("forward", None)
                module.__dict__.pop("_original_forward", None)
        if hasattr(base, "disable_input_require_grads"):
            base.disable_input_require_grads()
        if getattr(base, "is_activation_checkpointing", False):
            base.activation_checkpointing_disable()
        if self._frozen_head is not None:
            self._frozen_head.requires_grad_(True)
        if (self.args.merge_adapter if merge is None else merge) and hasattr(model, "merge_and_unload"):
            self._refuse_sharded_merge()
            model = self.model = self.model_wrapped = model.merge_and_unload()
            if self.teacher is not None:
                self.teacher.detach()
        return model.eval()

    @contextlib.contextmanager
    def _merged_student(self):
        """For the length of a final save: a merged copy of a LoRA student in place of the model."""
        if self._in_checkpoint or not self.args.merge_adapter or not hasattr(self.model, "merge_and_unload"):
            yield
            return
        own, self.model = self.model, copy.deepcopy(self.model).merge_and_unload()
        try:
            yield
        finally:
            self.model = own

    def _refuse_sharded_merge(self) -> None:
        if compat.is_sharded(self.accelerator):
            raise ValueError(
                "an adapter cannot be merged while the model is sharded: leave merge_adapter off, then load the saved "
                "adapter with AutoPeftModelForCausalLM and call merge_and_unload()"
            )

    # ---- saving ------------------------------------------------------------------------------------------------------
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        own = {}
        if state_dict is not None:  # FSDP and DeepSpeed hand over the gathered whole
            own = {k.split(KEY + ".", 1)[1]: v for k, v in state_dict.items() if KEY + "." in k}
            state_dict = {k: v for k, v in state_dict.items() if KEY + "." not in k}
        elif self.objective is not None:
            own = self.objective.state_dict()
        self._check_finite()
        if self.args.should_save:
            self._check_space(output_dir)
            # left from before, these would make a half-written checkpoint look complete, a merged model an adapter
            stale = (TRAINER_STATE,) if self._in_checkpoint else ADAPTER_FILES if self.args.merge_adapter else ()
            for name in stale:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(output_dir, name))
        ours = is_ours(output_dir)
        with self._clean_student(), self._merged_student(), _named_disk_errors(output_dir):
            super()._save(output_dir, state_dict=state_dict)
            if ours:  # asked before: PEFT writes one of its own
                write_model_card(self, folder=output_dir, **self.card_facts)
            generation = getattr(base_model_of(self.model), "generation_config", None)
            if self.args.should_save and generation is not None:  # PEFT leaves it out
                generation.save_pretrained(output_dir)
            if self._in_checkpoint and self.args.should_save:
                save_file(self._resume_tensors(own), os.path.join(output_dir, FILE))

    def _resume_tensors(self, parameters: dict) -> dict[str, torch.Tensor]:
        tensors = {f"parameter.{k}": v for k, v in parameters.items()}
        if self.objective is not None:
            tensors |= {f"state.{k}": v for k, v in self.objective.state_tensors().items()}
        if self.teacher is not None:
            tensors |= {f"teacher.{k}": v for k, v in self.teacher.state_tensors().items()}
        if self._log_sums is not None:
            tensors |= {f"log_sum.{k}": v for k, v in zip(self._names, self._log_sums.unbind(), strict=True)}
        tensors["log_steps"] = torch.tensor([self._log_steps, self._globalstep_last_logged])
        tensors["tokens"] = self._tokens
        tensors["tr_loss"] = self._tr_loss_of_ranks
        tensors |= {f"running.{k}": v for k, v in self._running_tensors().items()}
        return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}

    def _save_checkpoint(self, model, trial) -> None:
        self._check_finite()
        self._wrote_checkpoints = True
        self._tr_loss_of_ranks = self.accelerator.gather(self._tr_loss.detach().float().reshape(1))
        self._in_checkpoint = True
        try:
            with _named_disk_errors(self.args.output_dir):
                super()._save_checkpoint(model, trial)
        finally:
            self._in_checkpoint = False

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # every rank's file stands before rank 0 writes trainer_state.json, which marks the checkpoint as complete
        self.accelerator.wait_for_everyone()

    def _check_space(self, output_dir: str) -> None:
        """Raises OSError before anything is written when it cannot fit."""
        trainable = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        weights = trainable
        if self.args.merge_adapter or not hasattr(self.model, "get_base_model"):
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        needed = weights + (2 * trainable if self._in_checkpoint and not self.args.save_only_model else 0)
        if self._in_checkpoint and self.teacher is not None:
            needed += sum(t.numel() * t.element_size() for t in self.teacher.state_tensors().values())
        place = output_dir
        while not os.path.isdir(place):
            place = os.path.dirname(os.path.abspath(place))
        free = shutil.disk_usage(place).free
        if needed > free:
            raise DiskFullError(
                errno.ENOSPC,
                f"saving needs about {needed / 2**20:.0f} MiB and {place} has {free / 2**20:.0f} MiB left: nothing was "
                "written. Free some space or lower save_total_limit, then go on with resume_from_checkpoint",
            )

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **kwargs) -> None:
        """Write the card of the output folder; what is named here stands in the cards of later saves, too."""
        given = {"model_name": model_name, "dataset_name": dataset_name, "tags": tags}
        self.card_facts = self.card_facts | {k: v for k, v in given.items() if v is not None}
        with self._clean_student():
            write_model_card(self, **self.card_facts)

    # ---- resuming ----------------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As the parent's. `True` takes the newest complete checkpoint of the output folder.

        Raises:
            ValueError: the output folder holds another run; nothing to resume from.
        """
        if self.args.merge_adapter:
            self._refuse_sharded_merge()
        return super().train(resume_from_checkpoint=self._checkpoint_to_resume(resume_from_checkpoint), **kwargs)

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        complete, partial = complete_checkpoints(self.args.output_dir)
        if isinstance(asked, str) and asked.lower() in ("true", "last"):
            asked = True
        if not asked:
            if not self._wrote_checkpoints:
                check_no_other_run(self.args.output_dir)
            return None
        if asked is True:
            if not complete:
                raise ValueError(
                    f"no complete checkpoint in {self.args.output_dir}"
                    + (f" ({len(partial)} half-written): " if partial else ": ")
                    + "start without resume_from_checkpoint in an empty folder"
                )
            if partial and int(partial[0].split("-")[-1]) > int(complete[0].split("-")[-1]):
                logger.warning("%s is half-written; going on from %s, the last complete one", partial[0], complete[0])
            chosen = complete[0]
        else:
            chosen = str(asked)
            if not _is_complete(chosen):
                beside, _ = complete_checkpoints(os.path.dirname(os.path.abspath(chosen)))
                hint = f"; the last complete one is {(beside or complete)[0]}" if beside or complete else ""
                raise ValueError(f"{chosen} is not a complete checkpoint (no readable {TRAINER_STATE}){hint}")
        if not _holds_optimizer(chosen):
            raise ValueError(
                f"{chosen} holds no optimizer state (it was written with save_only_model), so the run cannot go on as "
                f"it was. To train on from its weights, give {chosen} as the model and another output_dir"
            )
        self._wrote_checkpoints = True
        for folder in partial:
            if self.args.should_save:
                logger.warning("removing the half-written %s", folder)
                shutil.rmtree(folder, ignore_errors=True)
        return chosen

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if compat.is_sharded(self.accelerator):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            with self._clean_student(), self._names_of(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed = self._load_objective(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if compat.is_sharded(self.accelerator):
            super()._load_best_model()
        else:
            with self._clean_student(), self._names_of(self.state.best_model_checkpoint):
                super()._load_best_model()
        self._load_objective(self.state.best_model_checkpoint)

    def _names_of(self, folder: str):
        model = self.accelerator.unwrap_model(self.model)
        return contextlib.nullcontext() if hasattr(model, "get_base_model") else compat.own_names(model, folder)

    def _load_objective(self, folder: str) -> dict[str, torch.Tensor]:
        """Parameters and state of the objective from a checkpoint; returns the trainer's own running values."""
        path = os.path.join(folder, FILE)
        if not os.path.isfile(path):
            raise ValueError(f"{folder} has no {FILE}: it was not written by a distillation trainer")
        tensors = load_file(path)
        if self.objective is None:
            return tensors
        if not compat.is_sharded(self.accelerator):
            own, saved = self.objective.state_dict(), _under(tensors, "parameter.")
            if own.keys() != saved.keys() or any(own[k].shape != saved[k].shape for k in own):
                raise ValueError(
                    f"the checkpoint's objective has parameters {_shapes(saved)}, this one {_shapes(own)}: resume with "
                    "the objective, student and teacher the run was started with"
                )
            self.objective.load_state_dict(saved)
        self.objective.load_state_tensors(_under(tensors, "state."))
        if self.teacher is not None:
            self.teacher.load_state_tensors(_under(tensors, "teacher."))
        return tensors

    def _running_tensors(self) -> dict[str, torch.Tensor]:
        """What else a trainer sums between two logs, the same on every rank."""
        return {}

    def _restore_running_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `_running_tensors` gave."""

    def _restore_running_values(self) -> None:
        """At the start of training, after the trainer zeroed its own: what was summed but not logged at the save."""
        if self._resumed is None:
            return
        tensors, self._resumed = self._resumed, None
        device = self.args.device
        self._resumed_sums = {k: v.to(device) for k, v in _under(tensors, "log_sum.").items()}
        self._log_steps, self._globalstep_last_logged = tensors["log_steps"].tolist()
        self._tokens = tensors["tokens"].to(device)
        self._restore_running_tensors(_under(tensors, "running."))
        losses = tensors["tr_loss"]
        same_ranks = len(losses) == self.accelerator.num_processes
        loss = losses[self.accelerator.process_index] if same_ranks else losses.mean()
        self._tr_loss = loss.to(device=device, dtype=self._tr_loss.dtype)


def _under(tensors: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _shapes(tensors: dict) -> str:
    named = [f"{k} {tuple(v.shape)}" for k, v in list(tensors.items())[:8]]  # a peer has hundreds
    return ", ".join(named + ["..."] * (len(tensors) > 8)) or "none"


@contextlib.contextmanager
def _named_disk_errors(folder: str):
    """A save that failed for want of space named as such, whichever library met it."""
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # safetensors gives the system's message, torch.save only that its writer failed
        if not full and not any(sign in text for sign in DISK_SIGNS):
            raise
        complete = complete_checkpoints(os.path.dirname(os.path.abspath(folder)))[0] or complete_checkpoints(folder)[0]
        last = f"the last complete checkpoint is {complete[0]}" if complete else "no complete checkpoint exists yet"
        reason = text.splitlines()[0]
        raise DiskFullError(
            errno.ENOSPC, f"writing {folder} failed, probably for want of space ({reason}); {last}"
        ) from error
