"""TGeo-KD: a small network decides, example by example, how much a student follows its teacher and how much the label.

The network (the controller) reads where student, teacher, label and the class's average teacher stand to each other. It
is trained by bilevel optimisation: its weights move so that one step of the student, weighted by it, lowers the loss on
examples held out from the training set (10%; never the evaluation set).

    accelerate launch recipes/tgeo_kd.py --model_name_or_path ... --teacher_model_name_or_path ... --dataset_name ...

Paper: the official code computes the ratio under no_grad, so its controller never learns; here it does. It also gives
probabilities to the cross-entropy and averages the teacher over the batch; here logits, and the training set's table.
Paper: the inner passes run in eval mode, so that dropout does not blur the difference that the controller learns from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, kl_div

from hf_distill.baselines.contrastive import gather_rows
from hf_distill.curricula.passes import run_pass
from hf_distill.heads import base_model_of, model_inputs
from hf_distill.losses.precision import exactly
from hf_distill.methods._card import MethodCard
from hf_distill.signals import Signals
from hf_distill.training.inner import HeldOut, InnerObjective, OwnAdam, Run, split_off
from hf_distill.training.saving import KEY

CARD = MethodCard(
    slug="tgeo_kd",
    title="Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation",
    arxiv="2312.15112",
    year=2024,
    kind="logits",
    modality="image",
    citation="""@inproceedings{hu2024less,
  title = {Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation},
  author = {Chengming Hu and Haolun Wu and Xuan Li and Chen Ma and Xi Chen and Boyu Wang and Jun Yan and Xue Liu},
  booktitle = {International Conference on Learning Representations}, year = {2024}
}""",
)

HYPERGRADIENTS = ("unrolled", "finite_difference")
STATISTICS = ("alpha_mean", "alpha_min", "alpha_max", "alpha_teacher_right", "alpha_teacher_wrong")


@dataclass
class TGeoKDConfig:
    """Numbers are those of the official code's arguments, where not said otherwise."""

    temperature: float = field(default=1.5, metadata={"help": "Softmax temperature of the teacher term."})
    tgeo_controller_lr: float = field(
        default=0.1, metadata={"help": "Learning rate of the controller's Adam; 5e-3 moves it more gently (ours)."}
    )
    tgeo_controller_weight_decay: float = field(
        default=0.05,
        metadata={"help": "L2 of the controller's Adam; in our trial only 0 left ratios that differ (ours)."},
    )
    tgeo_max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "Longest gradient of the controller, so that its sigmoid keeps off 0 and 1 (ours)."},
    )
    tgeo_hidden: list[int] = field(
        default_factory=lambda: [32, 16], metadata={"help": "Widths of the controller's hidden layers."}
    )
    tgeo_val_fraction: float = field(
        default=0.1, metadata={"help": "Share of the training set held out for the controller."}
    )
    tgeo_outer_every: int = field(default=1, metadata={"help": "Optimizer steps per step of the controller."})
    tgeo_hypergradient: str = field(
        default="unrolled",
        metadata={
            "help": "unrolled (differentiates the student's step) or finite_difference (forwards only, less memory; "
            "in full precision)."
        },
    )

    def __post_init__(self):
        for name in ("temperature", "tgeo_controller_lr", "tgeo_max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        decay = self.tgeo_controller_weight_decay
        if not 0 <= decay < math.inf:
            raise ValueError(f"tgeo_controller_weight_decay must not be negative, got {decay}")
        if not 0 < self.tgeo_val_fraction < 1:
            raise ValueError(f"tgeo_val_fraction must lie between 0 and 1, got {self.tgeo_val_fraction}")
        for name, numbers in (("tgeo_outer_every", [self.tgeo_outer_every]), ("tgeo_hidden", self.tgeo_hidden)):
            if any(number < 1 for number in numbers):
                raise ValueError(f"{name} must be at least 1, got {numbers}")
        how = self.tgeo_hypergradient
        if how not in HYPERGRADIENTS:
            raise ValueError(f"tgeo_hypergradient must be one of {', '.join(HYPERGRADIENTS)}, got {how!r}")


# ---- pure functions --------------------------------------------------------------------------------------------------
@exactly
def teacher_class_average(teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """(C, C): row c is the mean of softmax(teacher), temperature 1, over class c's examples; uniform without any."""
    return _averaged(*class_sums(teacher_logits, labels).values())


@exactly
def class_sums(teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Per class the sum (C, C) of the teacher's probabilities, and the number (C,) of examples; these add up."""
    probabilities, classes = teacher_logits.detach().softmax(-1), teacher_logits.shape[-1]
    sums = probabilities.new_zeros(classes, classes).index_add_(0, labels, probabilities)
    return {"sums": sums, "counts": torch.bincount(labels, minlength=classes)}


def _averaged(sums: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), 1 / len(counts))


@exactly
def tgeo_state(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, class_average: Tensor) -> Tensor:
    """(B, 9C) what the controller reads, without a gradient: the paper's four points and the squares between them.

    [S, T, G, A, (A-S)², (G-S)², (T-S)², (T-G)², (A-G)²], with S and T the probabilities at temperature 1, G the one-hot
    label, A the teacher's average of its class. Element-wise squares (option 3 of the official code).
    """
    s, t = student_logits.detach().softmax(-1), teacher_logits.detach().softmax(-1)
    g = nn.functional.one_hot(labels, s.shape[-1]).to(s)
    a = class_average.to(s)[labels]
    edges = [(a - s) ** 2, (g - s) ** 2, (t - s) ** 2, (t - g) ** 2, (a - g) ** 2]
    return torch.cat([s, t, g, a, *edges], -1)


def tgeo_inner_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: Tensor | float, temperature: float = 1.5
) -> Tensor:
    """mean_i [alpha_i · T² · KL(p_t ‖ p_s) + (1 - alpha_i) · CE]; differentiable by alpha (B,) or a number, twice."""
    kd, ce = _per_example(student_logits, teacher_logits, labels, temperature)
    return (alpha * kd + (1 - alpha) * ce).mean()


@exactly
def _per_example(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> tuple:
    """(B,) T² · KL, and (B,) cross-entropy."""
    q, p = (z.div(temperature).log_softmax(-1) for z in (student_logits, teacher_logits.detach()))
    kd = temperature**2 * kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return kd, cross_entropy(student_logits, labels, reduction="none")


def tgeo_hypergradient(
    student: nn.Module,
    inputs: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    val_inputs: Tensor,
    val_labels: Tensor,
    alpha: Tensor,
    temperature: float = 1.5,
    lr: float = 0.1,
    *,
    hypergradient: str = "unrolled",
) -> tuple[Tensor, Tensor]:
    """The held-out loss after one plain gradient step of the student, and its gradient by alpha.

    theta' = theta - lr · grad tgeo_inner_loss(alpha); L = CE(student(val_inputs; theta'), val_labels).

    Args:
        student: a module, student(inputs) -> logits. It is left as it was; its mode decides about dropout.
        alpha: (B,).
        hypergradient: "unrolled" differentiates through the step; "finite_difference" compares the examples' losses at
            theta ± eps · v, v the gradient of L at theta', eps = 0.01 / |v|.

    Returns:
        (L, dL/dalpha (B,)).
    """
    loss, (gradient,) = window_hypergradient(
        lambda weights, x: functional_call(student, weights, (x,)),
        {name: p for name, p in student.named_parameters() if p.requires_grad},
        [(inputs, teacher_logits, labels, alpha)],
        [(val_inputs, val_labels)],
        temperature=temperature,
        lr=lr,
        hypergradient=hypergradient,
    )
    return loss, gradient


def window_hypergradient(
    logits_of: Callable[[dict, object], Tensor],
    parameters: dict[str, Tensor],
    window: list[tuple],
    held_out: list[tuple],
    *,
    temperature: float,
    lr: float,
    hypergradient: str = "unrolled",
    total: Callable = lambda *tensors: list(tensors),
) -> tuple[Tensor, list[Tensor]]:
    """`tgeo_hypergradient` over several micro-batches and ranks, as if they were one batch.

    The step theta' is that of all of them. Only its last part, d theta'/d alpha along v = dL/dtheta', knows of single
    examples, so each micro-batch's graph is built alone and freed.

    Args:
        window: (inputs, teacher_logits, labels, alpha) of each micro-batch.
        held_out: (inputs, labels) of each.
        total: tensors -> the list of their sums over all ranks.
    """
    names, weights = list(parameters), [p.detach().requires_grad_() for p in parameters.values()]
    some = weights[0]

    def gradients(loss: Tensor, by: list[Tensor], **graph) -> list[Tensor]:
        found = torch.autograd.grad(loss, by, allow_unused=True, **graph)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, by, strict=True)]

    def terms(at: list[Tensor], inputs, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _per_example(logits_of(dict(zip(names, at, strict=True)), inputs), teacher_logits, labels, temperature)

    def inner(at: list[Tensor], inputs, teacher_logits, labels, alpha) -> Tensor:
        kd, ce = terms(at, inputs, teacher_logits, labels)
        return (alpha * kd + (1 - alpha) * ce).sum() / count

    sizes = [sum(len(batch[-1]) for batch in batches) for batches in (window, held_out)]
    count, held_count = total(some.new_tensor(sizes))[0].clamp(min=1).unbind()
    slope = [torch.zeros_like(p) for p in weights]
    for batch in window:
        slope = [a + b for a, b in zip(slope, gradients(inner(weights, *batch), weights), strict=True)]
    moved = [(p - lr * g).detach().requires_grad_() for p, g in zip(weights, total(*slope), strict=True)]
    outer, v = some.new_zeros(()), [torch.zeros_like(p) for p in weights]
    for inputs, labels in held_out:
        logits = logits_of(dict(zip(names, moved, strict=True)), inputs)
        loss = cross_entropy(logits.to(some.dtype), labels, reduction="sum") / held_count
        v = [a + b for a, b in zip(v, gradients(loss, moved), strict=True)]
        outer = outer + loss.detach()
    outer, *v = total(outer, *v)
    eps = 0.01 / torch.stack([x.square().sum() for x in v]).sum().sqrt().clamp(min=1e-12)
    out = []
    for *batch, alpha in window:
        if hypergradient == "unrolled":
            alpha = alpha.detach().requires_grad_()
            slope = gradients(inner(weights, *batch, alpha), weights, create_graph=True)
            along = sum((a * b).sum() for a, b in zip(slope, v, strict=True))
            out.append(-lr * torch.autograd.grad(along, alpha)[0])
        else:
            with torch.no_grad():
                ends = [terms([p + e * x for p, x in zip(weights, v, strict=True)], *batch) for e in (eps, -eps)]
            above, below = (kd - ce for kd, ce in ends)
            out.append(-lr / count * (above - below) / (2 * eps))
    return outer, out


# ---- the objective ---------------------------------------------------------------------------------------------------
class TGeoKD(InnerObjective):
    """The student's loss under the present controller, and the controller's step. Needs one label per example."""

    needs = frozenset({"logits"})
    per = "sample"
    paper = CARD

    def __init__(self, config: TGeoKDConfig | None = None):
        super().__init__()
        self.config = config or TGeoKDConfig()
        self.held_out: HeldOut | None = None  # set by build_trainer, as what follows
        self.held_out_examples = self.micro_batch = 1
        self._seen: list[Tensor] = []  # statistics of each micro-batch since the last optimizer step

    def setup(self, student: nn.Module, teacher) -> None:
        base = base_model_of(student)
        attention = getattr(base.config, "_attn_implementation", None) or ""
        if "flash" in attention or "flex" in attention:
            raise ValueError(
                f"TGeo-KD differentiates the student twice, which {attention} cannot: load the student with "
                'attn_implementation="sdpa"'
            )
        classes, c = base.config.num_labels, self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            widths = [9 * classes, *c.tgeo_hidden]
            layers = [
                m for i, o in zip(widths, widths[1:], strict=False) for m in (nn.Linear(i, o), nn.LeakyReLU(0.01))
            ]
            controller = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.adam = OwnAdam(
            self.state,
            "controller",
            dict(controller.named_parameters()),
            lr=c.tgeo_controller_lr,
            weight_decay=c.tgeo_controller_weight_decay,
            max_norm=c.tgeo_max_grad_norm,
        )
        self._controller = (controller.to("meta"),)  # in a tuple: only its shape, it is no part of the model
        self.state["class_average"] = torch.full((classes, classes), 1 / classes)
        self.state["statistics"] = torch.full((len(STATISTICS),), torch.nan)
        self.state["loss_outer"] = torch.tensor(torch.nan)

    def ratio(self, state: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """alpha (B,) of a `tgeo_state`, under the controller's present weights where none are given."""
        weights = self.adam.tensors() if weights is None else weights
        return functional_call(self._controller[0], weights, (state.float(),)).squeeze(-1).sigmoid()

    def other_terms(self, student: Signals, teacher: Signals, progress: float) -> dict[str, Tensor]:
        labels = _classes(student.labels)
        state = tgeo_state(student.logits, teacher.logits, labels, self.state["class_average"])
        alpha = self.ratio(state).detach()
        if self.training:
            self._seen.append(_statistics(alpha, teacher.logits.argmax(-1) == labels))
        kd, ce = _per_example(student.logits, teacher.logits, labels, self.config.temperature)
        return {"tgeo": (alpha * kd + (1 - alpha) * ce).mean()}

    def before_step(self, batches: list[dict], run: Run) -> None:
        if self.held_out is None:
            raise ValueError("TGeoKD has no held-out examples: make its trainer with tgeo_kd.build_trainer")
        if run.step % self.config.tgeo_outer_every:
            return
        start = run.step // self.config.tgeo_outer_every * self.held_out_examples
        with run.quiet(), sdpa_kernel(SDPBackend.MATH):
            held = self.held_out.batches(start, self.held_out_examples, self.micro_batch, run)
            states, window = [], []
            for batch in batches:
                theirs = run.teacher(batch, frozenset({"logits"})).logits
                with torch.no_grad():
                    ours, labels = run.signals(batch).logits, _classes(batch["labels"])
                states.append(tgeo_state(ours, theirs, labels, self.state["class_average"]))
                window.append((batch, theirs, labels, self.ratio(states[-1])))
            outer, slopes = window_hypergradient(
                lambda weights, batch: functional_call(run.student, weights, (), model_inputs(batch)).logits,
                {n: p for n, p in run.student.named_parameters() if p.requires_grad and not n.startswith(KEY)},
                window,
                [(batch, _classes(batch["labels"])) for batch in held],
                temperature=self.config.temperature,
                lr=run.learning_rate,
                hypergradient=self.config.tgeo_hypergradient,
                total=run.sum,
            )
            leaves = self.adam.leaves()
            gradients = [torch.zeros_like(leaf) for leaf in leaves.values()]
            for state, slope in zip(states, slopes, strict=True):
                own = torch.autograd.grad((self.ratio(state, leaves) * slope.float()).sum(), list(leaves.values()))
                gradients = [a + b for a, b in zip(gradients, own, strict=True)]
        self.adam.step(dict(zip(leaves, run.sum(*gradients), strict=True)))
        self.state["loss_outer"] = outer.float()

    def after_step(self, terms: dict[str, Tensor], progress: float) -> None:
        rows = self._seen or [self.state["statistics"].new_tensor([0, 0, torch.inf, -torch.inf, 0, 0])]
        n, total, low, high, right, of_right = gather_rows(torch.stack(rows)).unbind(-1)
        n, total, right, of_right = (x.sum() for x in (n, total, right, of_right))
        wrong = (total - of_right) / (n - right)
        self.state["statistics"] = torch.stack([total / n, low.min(), high.max(), of_right / right, wrong])
        self._seen = []

    def logs(self) -> dict[str, float]:
        values = [*self.state["statistics"].tolist(), self.state["loss_outer"].item()]
        named = zip((*STATISTICS, "loss_outer"), values, strict=True)
        return {name: value for name, value in named if value == value}  # no wrong teacher, no step yet


def _statistics(alpha: Tensor, right: Tensor) -> Tensor:
    values = (len(alpha), alpha.sum(), alpha.min(), alpha.max(), right.sum(), alpha[right].sum())
    return torch.stack([torch.as_tensor(value).to(alpha) for value in values])


def _classes(labels: Tensor | None) -> Tensor:
    if labels is None or labels.dim() != 1 or labels.is_floating_point():
        shape = "none" if labels is None else f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"TGeo-KD needs one class per example in labels (B,), got {shape}")
    return labels


def build_trainer(student, teacher, train_dataset, config: TGeoKDConfig, args, **trainer_arguments):
    """A trainer for this method. Part of `train_dataset` is held out; the teacher runs over the rest once.

    Raises:
        ValueError: finite differences in half precision, where they are lost in rounding; a data set without a length.
    """
    from hf_distill.training.trainers import trainer_for

    if config.tgeo_hypergradient == "finite_difference" and args is not None and (args.bf16 or args.fp16):
        raise ValueError("finite differences are lost in half precision: set bf16 and fp16 off, or use unrolled")
    rest, part = split_off(train_dataset, config.tgeo_val_fraction, args.seed)
    objective = TGeoKD(config)
    trainer = trainer_for(args)(
        student, teacher=teacher, objective=objective, args=args, train_dataset=rest, **trainer_arguments
    )
    args = trainer.args
    objective.held_out, objective.micro_batch = HeldOut(trainer, part), args.per_device_train_batch_size
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    objective.held_out_examples = min(window, len(part))
    found = run_pass(
        trainer, "tgeo_kd", lambda t: class_sums(t.logits, _classes(t.labels)), needs=frozenset({"logits"})
    )
    objective.state["class_average"] = _averaged(found["sums"], found["counts"]).to(objective.state["class_average"])
    return trainer


def distill(student, teacher, train_dataset, config, args, *, resume_from_checkpoint=None, **trainer_arguments):
    """Train, and give back the clean student."""
    trainer = build_trainer(student, teacher, train_dataset, config, args, **trainer_arguments)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer.student()
