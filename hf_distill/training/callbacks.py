"""Callbacks: Hugging Face's, plus the events it lacks (signals, terms, generated text)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import torch
from transformers import TrainerCallback

from hf_distill.losses import Agreement, Divergence, ForwardKL
from hf_distill.signals import Signals
from hf_distill.teachers.frozen import eval_mode
from hf_distill.teachers.peer import EMATeacher
from hf_distill.training.fidelity import measure_teacher


class DistillCallback(TrainerCallback):
    """A TrainerCallback with distillation's own events. Give those you need; all get `args, state, control`.

    Signals are the step's own tensors: read them, do not keep them. `dispatch(event, **values)`, set by the trainer,
    tells all other DistillCallbacks of an event (a callback that generates text announces it with `on_generate`).

    Attributes:
        observed: values (divergences or metrics of `hf_distill.losses`) to measure on every training row beside the
            objective's logit terms, at no further projection; their means are logged under these names.
        eval_observed: the same for every evaluation, with its prefix; of teachers that give all they need.
    """

    observed: dict[str, Divergence] = {}
    eval_observed: dict[str, Divergence] = {}

    dispatch: Callable = staticmethod(lambda event, **values: None)

    def on_teacher_forward(self, args, state, control, *, teacher: Signals, batch: dict, **kwargs) -> None:
        """After each teacher forward (training and evaluation)."""

    def on_distill_loss(
        self, args, state, control, *, student: Signals, teacher: Signals | None, terms, **kwargs
    ) -> None:
        """After the terms of a training micro-batch; `terms` is {name: Term(value, weight, per)}."""

    def on_distill_step(self, args, state, control, *, terms: dict, objective, **kwargs) -> None:
        """After each optimizer step, with the global unweighted mean of every term, the same on all ranks."""

    def on_distill_log(self, args, state, control, *, logs: dict, accelerator, **kwargs) -> None:
        """Before training values are logged, on every rank: add your own to `logs`."""

    def on_distill_evaluate(self, args, state, control, *, metrics: dict, prefix: str, **kwargs) -> None:
        """Before an evaluation is logged, on every rank: add your own to `metrics`, under `<prefix>_<name>`. Also gets
        model, processing_class and accelerator."""

    def on_generate(self, args, state, control, *, prompts: list[str], completions: list[str], **kwargs) -> None:
        """After text was generated for training or for samples."""


class TeacherAgreementCallback(DistillCallback):
    """Logs how far the student is from its teacher on training batches: `agreement` (top-1) and `teacher_kl`.

    Both are means over all rows since the last log, measured in the projection of the objective's own logit terms; an
    objective without any measures nothing.
    """

    observed = {"agreement": Agreement(), "teacher_kl": ForwardKL()}


class EMATeacherCallback(TrainerCallback):
    """Keeps an EMATeacher's average of the model that any transformers Trainer trains, after every optimizer step.

    Our own trainers do this for their teacher themselves, and save it with each checkpoint; this is for other trainers,
    whose checkpoints do not hold the average: resumed, it starts from the weights of the checkpoint.
    `with teacher.averaged(): trainer.save_model(folder)` writes it.

    Args:
        teacher: an EMATeacher.

    Raises:
        ValueError: at the start of training, where the trainer already keeps this teacher.
    """

    def __init__(self, teacher: EMATeacher):
        self.teacher = teacher

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.teacher.student is None:
            self.teacher.attach(model)
        elif self.teacher.student is not model or hasattr(model, "distill_objective"):
            raise ValueError("this EMATeacher is kept by its trainer already: leave EMATeacherCallback out")

    def on_step_end(self, args, state, control, **kwargs):
        self.teacher.after_step(state.global_step)


class SampleCompletionsCallback(DistillCallback):
    """Writes what the student answers to a few prompts at every evaluation, to `samples.jsonl` in the output folder.

    Greedy, so that it draws nothing from the random state. With a `reference` model its answers stand beside.

    Args:
        prompts: texts to continue.
        max_new_tokens: length of the answers.
        reference: another model (the teacher) with the same tokenizer, answered once.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 48, reference=None):
        if not prompts:
            raise ValueError("SampleCompletionsCallback needs at least one prompt")
        self.prompts, self.max_new_tokens, self.reference = list(prompts), max_new_tokens, reference
        self._reference_texts: list[str] | None = None
        self._last_step: int | None = None

    def on_evaluate(self, args, state, control, model=None, processing_class=None, **kwargs):
        if self._last_step == state.global_step:  # several evaluation sets: once a step
            return
        self._last_step = state.global_step
        texts = self.complete(model, processing_class)
        if self.reference is not None and self._reference_texts is None:
            self._reference_texts = self.complete(self.reference, processing_class)
        self.dispatch("on_generate", prompts=self.prompts, completions=texts)
        if not state.is_world_process_zero:
            return
        os.makedirs(args.output_dir, exist_ok=True)
        with open(os.path.join(args.output_dir, "samples.jsonl"), "a", encoding="utf-8") as file:
            for i, (prompt, text) in enumerate(zip(self.prompts, texts, strict=True)):
                line = {"step": state.global_step, "prompt": prompt, "student": text}
                if self._reference_texts is not None:
                    line["teacher"] = self._reference_texts[i]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    @torch.no_grad()
    def complete(self, model, processing_class) -> list[str]:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        texts = []
        with eval_mode(model):
            for prompt in self.prompts:
                inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
                out = model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
                texts.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return texts


class StepCallback(TrainerCallback):
    """The trainer's own hook at the end of an optimizer step; stands before all other callbacks."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.checked = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore_running_values()
        if args.measure_teacher_fidelity and state.global_step == 0:
            self.trainer.log(measure_teacher(self.trainer))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.checked:
            self.trainer._check_peer_learns()
            self.checked = True

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._after_optimizer_step()
