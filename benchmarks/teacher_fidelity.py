"""How much of a trained teacher is left after a cache or a quantisation; bench_teacher runs it.

On held-out text: KL(teacher ‖ what is left) and top-1 agreement per token, and what a student notices: the relative
error of the gradient of the forward KL, over all of the student's parameters and the whole batch. Draws have no bias
but a standard error, the root mean square over repeated draws, which falls with the root of the tokens in a batch; a
bias stays. Two students: the teacher without its last layer, and a new small one early in its training.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from benchmarks.toy import PLAIN
from hf_distill import (
    CachedTeacher,
    DataCollatorForDistillation,
    DistillSFTConfig,
    DistillSFTTrainer,
    FrozenTeacher,
    HeadLogits,
    LogitKD,
    cache_teacher,
)
from hf_distill.embedded.corpus import PIECE_CHARACTERS, stdlib_dataset
from hf_distill.heads import collect, rows_of
from hf_distill.losses import ForwardKL, run_terms
from hf_distill.recipe import EMBEDDED, small_student
from hf_distill.signals import Logits
from hf_distill.students import from_teacher
from hf_distill.teachers import sample_logits

TEACHER = str(EMBEDDED / "teacher")
QUANTISED = {"8-bit weights": dict(load_in_8bit=True), "4-bit weights": dict(load_in_4bit=True)}


def measure(modes: dict[str, dict], *, documents: int, length: int, steps: int, draws: int) -> tuple[dict, dict]:
    """(what was measured on, {name: facts}) of caches in some modes and of quantised weights.

    Args:
        modes: name -> options of `cache_teacher`.
        documents, length: the held-out batch.
        steps: for which the new student is distilled before.
        draws: repetitions that a standard error is taken from.
    """
    teacher = FrozenTeacher.from_pretrained(TEACHER)
    collator = DataCollatorForDistillation(DataCollatorForLanguageModeling(pad_token_id=teacher.config.pad_token_id))
    data = stdlib_dataset("test", max_characters=PIECE_CHARACTERS * documents).select(range(documents))
    data = data.map(lambda row: teacher.tokenizer(row["text"], truncation=True, max_length=length))
    data = data.select_columns("input_ids")
    features = list(data)
    batch = collator(features)
    exact = teacher(batch).logits
    log_p = exact.dense().log_softmax(-1)
    layers = teacher.config.num_hidden_layers
    students = {"cut": from_teacher(teacher.model, layers - 1).float(), "new": distilled(teacher, length, steps)}
    gradients = {name: Gradient(student, batch, exact) for name, student in students.items()}

    def errors(*several: Logits) -> dict[str, float]:
        """Root mean square over what stands for the same teacher."""
        squares = {name: [g.error(logits) ** 2 for logits in several] for name, g in gradients.items()}
        return {f"gradient_error_{name}": (sum(s) / len(s)) ** 0.5 for name, s in squares.items()}

    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in modes.items():
            cache = cache_teacher(teacher, data, Path(folder) / name, collator=collator, **options)
            logits = CachedTeacher(cache.path)(batch | cache.reader(batch, features, "positions")).logits
            facts[name] = {"bytes_per_token": bytes_per_token(cache, len(log_p))}
            if options["mode"] == "sampled":
                again = [sample_logits(log_p, options["draws"], generator=_seed(i)) for i in range(draws)]
                facts[name] |= {"distinct_ids": (logits.weights > 0).sum(-1).double().mean().item()}
                facts[name] |= errors(logits, *again)
                continue
            facts[name] |= _compared(log_p, _log_probs(logits, log_p.shape[1])) | errors(logits)
            if options["mode"] == "topk":
                facts[name]["mass_left_out"] = (1 - logits.log_probs.exp().sum(-1)).mean().item()
    for name, options in QUANTISED.items():
        logits = FrozenTeacher.from_pretrained(TEACHER, **options)(batch).logits
        facts[name] = _compared(log_p, _log_probs(logits, log_p.shape[1])) | errors(logits)
    case = {"teacher": "embedded", "vocabulary": log_p.shape[1], "tokens": len(log_p)}
    case["teacher_entropy"] = -(log_p.exp() * log_p).sum(-1).mean().item()
    return case | {f"kl_of_{name}_student": gradient.kl for name, gradient in gradients.items()}, facts


def bytes_per_token(cache: CachedTeacher, tokens: int) -> float:
    """Of the documents' own bytes: keys and checksums (32 bytes a document) and a hidden cache's head are apart."""
    return sum(len(data) for key in cache.store.keys() for data in cache.store.read(key)) / tokens


def distilled(teacher: FrozenTeacher, length: int, steps: int) -> nn.Module:
    """A new small student after some steps."""
    student = small_student(teacher.config)
    if not steps:
        return student
    data = stdlib_dataset("train", max_characters=PIECE_CHARACTERS * 16 * steps).select_columns("text")
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(output_dir=folder, max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3)
        trainer = DistillSFTTrainer(
            student,
            teacher=teacher,
            objective=LogitKD(),
            args=DistillSFTConfig(**PLAIN | settings, max_length=length),
            train_dataset=data,
            processing_class=teacher.tokenizer,
        )
        trainer.train()
        return trainer.student()


class Gradient:
    """Of the forward KL by all parameters of a student, beside the one with the exact teacher."""

    def __init__(self, student: nn.Module, batch: dict, exact: Logits):
        self.student, self.batch = student.eval().requires_grad_(True), batch
        self.truth, self.kl = self._of(exact)

    def error(self, logits: Logits) -> float:
        return ((self._of(logits)[0] - self.truth).norm() / self.truth.norm()).item()

    def _of(self, logits: Logits) -> tuple[Tensor, float]:
        said = collect(self.student, self.batch, frozenset({"logits"}), rows_of(self.batch), dense=False)
        value = run_terms(said.logits, logits, {"kl": (ForwardKL(), 1.0)})["kl"]
        gradients = torch.autograd.grad(value, list(self.student.parameters()))
        return torch.cat([g.flatten() for g in gradients]).double(), value.item()


def _log_probs(logits: Logits, vocabulary: int) -> Tensor:
    """(N, V) of what is left of a teacher; where only k entries are known, the rest of the mass is spread evenly."""
    if isinstance(logits, HeadLogits):
        return logits.dense().log_softmax(-1)
    known = logits.log_probs.double()
    rest = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=1e-12) / (vocabulary - logits.shape[-1])
    return rest.log().repeat(1, vocabulary).scatter_(-1, logits.ids, known)


def _compared(log_p: Tensor, log_q: Tensor) -> dict[str, float]:
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return {"kl": kl, "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()}


def _seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)
