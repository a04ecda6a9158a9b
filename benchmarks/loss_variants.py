"""The same losses on hidden states and heads, in the ways people write them; bench_loss and bench_memory run them.

Each variant is a function (inputs, loss) -> scalar, mean over rows; the backward pass is autograd's. `Floor` is no
loss: only the matrix products that any exact one needs, into reused buffers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import Absent
from hf_distill.losses import ForwardKL, GeneralizedJSD, HeadLogits, LabelCrossEntropy, ReverseKL, run_terms

LOSSES = ("CE", "fKL", "rKL", "JSD", "CE+fKL+rKL")
TERMS = {
    "CE": LabelCrossEntropy(),
    "fKL": ForwardKL(),
    "rKL": ReverseKL(),
    "JSD": GeneralizedJSD(0.5),
}
BETAS = {"fKL": 0.0, "rKL": 1.0, "JSD": 0.5}  # TRL's and Liger's numbering
CHECKPOINTED_ROWS = 256


@dataclass
class Inputs:
    """Random rows and heads of both models; logits have a standard deviation of 2."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.student_head

    def gradients(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(value, self.trained)

    def of_rows(self, rows: int) -> Inputs:
        """The first rows, under the same heads."""
        hidden = self.student_hidden.detach()[:rows].requires_grad_()
        return Inputs(hidden, self.student_head, self.teacher_hidden[:rows], self.teacher_head, self.labels[:rows])

    def double(self) -> Inputs:
        hidden, head = (x.detach().double().requires_grad_() for x in self.trained)
        return Inputs(hidden, head, self.teacher_hidden.double(), self.teacher_head.double(), self.labels)


def make_inputs(
    rows: int, vocabulary: int, student_hidden: int, teacher_hidden: int, *, device="cpu", dtype=torch.float32, seed=0
) -> Inputs:
    draw = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        # drawn in place, so that making inputs leaves no high-water mark above them
        return torch.empty(shape, device=device, dtype=dtype).normal_(0, scale, generator=draw)

    return Inputs(
        normal(rows, student_hidden).requires_grad_(),
        normal(vocabulary, student_hidden, scale=2 * student_hidden**-0.5).requires_grad_(),
        normal(rows, teacher_hidden),
        normal(vocabulary, teacher_hidden, scale=2 * teacher_hidden**-0.5),
        torch.randint(vocabulary, (rows,), device=device, generator=draw),
    )


def parts_of(loss: str) -> list[str]:
    return loss.split("+")


def uses_teacher(loss: str) -> bool:
    return loss != "CE"


# ---- the floor ------------------------------------------------------------------------------------------------------
class Floor:
    """The products of an exact gradient: logits, d hidden and d head of the student, logits of the teacher."""

    def __init__(self, inputs: Inputs, teacher: bool):
        self.inputs, self.teacher = inputs, teacher
        rows, vocabulary = inputs.student_hidden.shape[0], inputs.student_head.shape[0]
        self.student_logits = inputs.student_hidden.new_empty(rows, vocabulary)
        self.teacher_logits = torch.empty_like(self.student_logits) if teacher else None
        self.d_hidden, self.d_head = (torch.empty_like(x) for x in inputs.trained)

    @torch.no_grad()
    def __call__(self) -> None:
        x = self.inputs
        torch.mm(x.student_hidden, x.student_head.T, out=self.student_logits)
        if self.teacher:
            torch.mm(x.teacher_hidden, x.teacher_head.T, out=self.teacher_logits)
        torch.mm(self.student_logits, x.student_head, out=self.d_hidden)
        torch.mm(self.student_logits.T, x.student_hidden, out=self.d_head)


# ---- as users write them --------------------------------------------------------------------------------------------
def dense_loss(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, part: str) -> Tensor:
    """One loss on full logits, sum over rows."""
    if part == "CE":
        return F.cross_entropy(student_logits, labels, reduction="sum")
    if part == "fKL":
        return F.kl_div(F.log_softmax(student_logits, -1), F.softmax(teacher_logits, -1), reduction="sum")
    student, teacher = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    if part == "rKL":
        return F.kl_div(teacher, student, reduction="sum", log_target=True)
    half = student.new_tensor(0.5).log()  # the JSD of TRL's GKDTrainer
    mixture = torch.logsumexp(torch.stack([student + half, teacher + half]), dim=0)
    to_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    to_student = F.kl_div(mixture, student, reduction="none", log_target=True)
    return (0.5 * to_teacher + 0.5 * to_student).sum()


def _dense_rows(student_hidden, student_head, teacher_hidden, teacher_head, labels, loss: str) -> Tensor:
    at_least_float = student_head.dtype if student_head.dtype == torch.float64 else torch.float32
    student = (student_hidden @ student_head.T).to(at_least_float)
    teacher = None
    if uses_teacher(loss):
        with torch.no_grad():
            teacher = (teacher_hidden @ teacher_head.T).to(at_least_float)
    return sum(dense_loss(student, teacher, labels, part) for part in parts_of(loss))


def naive(x: Inputs, loss: str) -> Tensor:
    rows = x.labels.shape[0]
    return _dense_rows(x.student_hidden, x.student_head, x.teacher_hidden, x.teacher_head, x.labels, loss) / rows


def checkpointed(x: Inputs, loss: str) -> Tensor:
    """The naive loss in chunks of rows, each computed again in the backward pass."""
    total = 0.0
    for a in range(0, x.labels.shape[0], CHECKPOINTED_ROWS):
        rows = slice(a, a + CHECKPOINTED_ROWS)
        hidden, teacher, labels = x.student_hidden[rows], x.teacher_hidden[rows], x.labels[rows]
        chunk = (hidden, x.student_head, teacher, x.teacher_head, labels, loss)
        total = total + checkpoint(_dense_rows, *chunk, use_reentrant=False)
    return total / x.labels.shape[0]


# ---- peers ----------------------------------------------------------------------------------------------------------
def trl_chunked(x: Inputs, loss: str) -> Tensor:
    """TRL's tiles; several losses are as many calls, since it has no combined one."""
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError as error:
        raise Absent(f"this trl has no chunked kernels ({error})") from error
    total = 0.0
    for part in parts_of(loss):
        if part == "CE":
            log_probs = ChunkedLogProbFunction.apply(
                x.student_hidden, x.student_head, None, x.labels, 1.0, 32768, None, 1.0, ()
            )[0]
            total = total - log_probs.mean()
        else:
            divergence, _ = ChunkedDivergenceFunction.apply(
                x.student_hidden, x.student_head, None, x.teacher_hidden, x.teacher_head, None, BETAS[part]
            )
            total = total + divergence.mean()
    return total


def liger(x: Inputs, loss: str) -> Tensor:
    """Liger's fused Triton losses; several losses are as many calls."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError as error:
        raise Absent("liger-kernel is not installed") from error
    if not x.student_head.is_cuda:
        raise Absent("its Triton kernels need a GPU")
    total = 0.0
    for part in parts_of(loss):
        if part == "CE":
            total = total + LigerFusedLinearCrossEntropyLoss()(x.student_head, x.student_hidden, x.labels)
        else:
            divergence = LigerFusedLinearJSD(jsd_beta=BETAS[part])
            total = total + divergence(x.student_hidden, x.student_head, x.teacher_hidden, x.teacher_head)
    return total


# ---- ours -----------------------------------------------------------------------------------------------------------
ENGINES = ("eager", "compile")


class EngineWarnings(logging.Handler):
    """What the losses warned of: an engine that fell back to another must not be timed under its own name."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("hf_distill.losses").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


engine_warnings = EngineWarnings()


def ours(x: Inputs, loss: str, engine: str = "eager", **options) -> Tensor:
    """All parts in one call; `options` go to run_terms."""
    student = HeadLogits(x.student_hidden, x.student_head)
    teacher = HeadLogits(x.teacher_hidden, x.teacher_head) if uses_teacher(loss) else None
    terms = {part: (TERMS[part], 1.0) for part in parts_of(loss)}
    value = sum(run_terms(student, teacher, terms, labels=x.labels, engine=engine, **options).values())
    if engine != "eager" and engine_warnings.texts:
        raise Absent(f"fell back: {engine_warnings.texts[0]}")
    return value


EAGER = "ours (eager)"
VARIANTS: dict[str, Callable[[Inputs, str], Tensor]] = {
    "naive": naive,
    "checkpointed": checkpointed,
    "TRL chunked": trl_chunked,
    "Liger": liger,
    **{f"ours ({engine})": partial(ours, engine=engine) for engine in ENGINES},
}
