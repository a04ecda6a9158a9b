"""Engines: how the values and the gradient of one block of rows are computed. One definition, eager or compiled."""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_distill.losses.sparse import SparseTile
from hf_distill.losses.tile import Divergence, MixtureTile, Tile
from hf_distill.signals import Finish, HeadLogits, SampledLogits, SparseLogits

logger = logging.getLogger(__name__)

ENGINES = ("auto", "eager", "compile")
COMPILE_FROM = 16_384  # entries of the vocabulary; below, compiling takes longer than a short run gains
CACHE_BYTES = 2**20  # of a CPU core: what a block's temporaries should stay in
MAX_STAGES = 32  # a setting that changes at every step must not compile for ever


@dataclass(frozen=True)
class Plan:
    """Terms with their temperatures taken out, so that one that moves at every step is a number and not code.

    Attributes:
        divergences: one per term, at temperature 1.
        slots: per term, which of `inverse` its tile's logits are multiplied by.
        moving: per term, whether it has a gradient; one of weight 0.0 is only measured.
        inverse: 0-d tensors, 1 / temperature; the first is None and stands for 1.
        temperatures: the same as floats.
    """

    divergences: tuple[Divergence, ...]
    slots: tuple[int, ...]
    moving: tuple[bool, ...]
    inverse: tuple[Tensor | None, ...]
    temperatures: tuple[float, ...]

    @classmethod
    def of(
        cls, divergences: Sequence[Divergence], moving: Sequence[bool], dtype: torch.dtype, device: torch.device
    ) -> Plan:
        temperatures, slots, bare = [1.0], [], []
        for divergence in divergences:
            temperature = float(getattr(divergence, "temperature", 1.0))
            if temperature == 1.0 or not dataclasses.is_dataclass(divergence):  # others temper for themselves
                temperature = 1.0
            else:
                divergence = replace(divergence, temperature=1.0)
            if temperature not in temperatures:
                temperatures.append(temperature)
            slots.append(temperatures.index(temperature))
            bare.append(divergence)
        inverse = (None, *(torch.full((), 1 / t, dtype=dtype, device=device) for t in temperatures[1:]))
        return cls(tuple(bare), tuple(slots), tuple(moving), inverse, tuple(temperatures))


@dataclass(frozen=True)
class Block:
    """Some rows of both models, as a stage reads them.

    Attributes:
        student: (rows, V) product of hidden rows and head, or logits.
        finish: what makes logits of it.
        teacher, teacher_finish: the same of the teacher, over the vocabulary both share; None if it has none.
        mixtures: per slot of the plan, log-probabilities of several teachers' mixture.
        sparse: a teacher known on some entries only.
        labels: (rows,) or None.
        common: entries of the vocabulary both share.
        finite: no logit can be -inf.
    """

    student: Tensor
    finish: Finish
    teacher: Tensor | None
    teacher_finish: Finish | None
    mixtures: tuple[Tensor | None, ...] | None
    sparse: SparseLogits | SampledLogits | None
    labels: Tensor | None
    common: int
    finite: bool

    def tile(self, logits: Tensor, slot: int, inverse: Tensor | None) -> Tile:
        """The tile of one temperature, from the student's finished logits."""
        student = logits if inverse is None else logits * inverse
        tile = Tile(student, labels=self.labels, finite=self.finite)
        if self.sparse is not None:
            return SparseTile(tile, self.sparse)
        if self.teacher is None and self.mixtures is None:
            return tile
        full = None if student.shape[-1] == self.common else tile
        student = student[:, : self.common]
        if self.mixtures is not None:
            return MixtureTile(student, self.mixtures[slot], self.labels, full=full, finite=self.finite)
        teacher = self.teacher_finish(self.teacher.to(logits.dtype))
        if inverse is not None:
            teacher = teacher * inverse
        return Tile(student, teacher, self.labels, full=full, finite=self.finite)


def stage(
    divergences: tuple[Divergence, ...],
    slots: tuple[int, ...],
    moving: tuple[bool, ...],
    inverse: tuple[Tensor | None, ...],
    block: Block,
    dtype: torch.dtype,
    weights: Tensor,
    out: Tensor | None,
) -> Tensor:
    """Values (K, rows) of a block; with `out`, the gradient of Σ_k weights_k · value_k by the product is put there.

    `out` may be the block's own product: it is written when nothing reads it any more.
    """
    logits = block.finish(block.student.to(dtype))
    tiles: list[Tile | None] = [None] * len(inverse)
    g = None if out is None else torch.zeros_like(logits)
    values = []
    for k, (divergence, slot) in enumerate(zip(divergences, slots, strict=True)):
        tile = tiles[slot] = tiles[slot] or block.tile(logits, slot, inverse[slot])
        values.append(divergence.value(tile))
        if g is not None and moving[k]:
            weight = weights[k] if inverse[slot] is None else weights[k] * inverse[slot]
            tile.add_grad(divergence, values[k], weight, g)
    if out is not None:
        out.copy_(block.finish.chain(logits, g))
    return torch.stack(values)


def cut(divergence: Divergence, rows: slice | Tensor) -> Divergence:
    """For some of the rows: what its `row_fields` name is cut to them."""
    fields = {name: getattr(divergence, name) for name in getattr(divergence, "row_fields", ())}
    own = {name: x[rows] for name, x in fields.items() if x is not None}
    return replace(divergence, **own) if own else divergence


class Eager:
    """The stage as it stands."""

    @staticmethod
    def block_bytes(budget: int, device: torch.device) -> int:
        """Size of one temporary; ten to twenty of them are alive at a time. A GPU has no use for small ones."""
        return min(budget // 128, CACHE_BYTES) if device.type == "cpu" else budget // 32

    def __init__(self, plan: Plan, dtype: torch.dtype):
        self.plan, self.dtype = plan, dtype

    def __call__(self, rows: slice, block: Block, weights: Tensor, out: Tensor | None) -> Tensor:
        plan = self.plan
        divergences = tuple(cut(divergence, rows) for divergence in plan.divergences)
        return stage(divergences, plan.slots, plan.moving, plan.inverse, block, self.dtype, weights, out)


class Compiled:
    """The stage through torch.compile: one function per kind of terms and block, for any number of rows.

    Where torch.compile does not work, or cannot read a term, it says so once and stays eager.
    """

    stages: dict[tuple, object] = {}  # of the process: kind -> compiled stage, None where it cannot be compiled
    works: bool | None = None  # None until it was tried

    @staticmethod
    def block_bytes(budget: int, device: torch.device) -> int:
        """Size of one temporary; fused, there are hardly any."""
        return min(budget // 16, 4 * CACHE_BYTES) if device.type == "cpu" else budget // 8

    def __init__(self, plan: Plan, dtype: torch.dtype):
        self.plan, self.dtype, self.eager, self.key = plan, dtype, Eager(plan, dtype), None

    def __call__(self, rows: slice, block: Block, weights: Tensor, out: Tensor | None) -> Tensor:
        # torch.compile takes a size of 1 for a constant, and does not run below a counter of operations
        if block.student.shape[0] < 2 or torch._C._len_torch_dispatch_stack():
            return self.eager(rows, block, weights, out)
        plan = self.plan
        if self.key is None:
            self.key = (_kind(plan.divergences), plan.slots, plan.moving, _kind(block), weights.dtype, out is None)
        function = self._function()
        if function is None:
            return self.eager(rows, block, weights, out)
        divergences = tuple(cut(divergence, rows) for divergence in plan.divergences)
        _mark_rows(block)
        for divergence in divergences:
            _mark_rows(tuple(getattr(divergence, name) for name in getattr(divergence, "row_fields", ())))
        weights = weights.contiguous()  # a slice's stride would be one more thing to compile for
        torch._dynamo.mark_dynamic(weights, 1)
        if out is not None:
            torch._dynamo.mark_dynamic(out, 0)
        try:
            values = function(divergences, plan.slots, plan.moving, plan.inverse, block, self.dtype, weights, out)
        except torch._dynamo.exc.TorchDynamoException as error:
            return self._give_up(error)(rows, block, weights, out)
        Compiled.works = True
        return values

    def _function(self):
        if Compiled.works is False:
            return None
        if self.key not in self.stages:
            if len(self.stages) == MAX_STAGES:
                logger.warning(
                    "loss engine: eager from here on; %d kinds of loss were compiled, so some setting of a divergence "
                    "changes at every step (give it as a 0-d tensor)", MAX_STAGES,
                )  # fmt: skip
            # a code object of its own: torch.compile counts and searches what it compiled per code object
            code = stage.__code__.replace(co_name=f"stage_{len(self.stages)}")
            own = types.FunctionType(code, stage.__globals__)
            compile = torch.compile(own, fullgraph=True, dynamic=None)
            self.stages[self.key] = compile if len(self.stages) < MAX_STAGES else None
        return self.stages[self.key]

    def _give_up(self, error: Exception) -> Eager:
        reason = " ".join(str(error).split("\n\n")[0].split())
        if not Compiled.works and isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
            Compiled.works = False
            logger.warning("loss engine: eager, torch.compile does not work here (%s)", reason)
        else:
            terms = self.plan.divergences
            logger.warning("loss engine: eager for %s, which torch.compile cannot read (%s)", terms, reason)
        self.stages[self.key] = None
        return self.eager


def choose(engine: str | None, student: Tensor | HeadLogits, device: torch.device) -> type[Eager] | type[Compiled]:
    """The engine of a name of ENGINES. "auto" compiles projections of a large vocabulary on a GPU; on a CPU, blocks
    that stay in the cache leave compiling next to nothing to gain.

    Raises:
        ValueError: another name.
    """
    if engine not in (None, *ENGINES):
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine in (None, "auto"):
        large = isinstance(student, HeadLogits) and student.shape[-1] >= COMPILE_FROM
        engine = "compile" if large and device.type != "cpu" else "eager"
    return Compiled if engine == "compile" and not torch.compiler.is_compiling() else Eager


_said: set[str] = set()


def say(engine: Eager | Compiled, rows: int) -> None:
    """Log once per process which engine runs."""
    name = "eager" if isinstance(engine, Eager) or Compiled.works is False else "compile"
    if name not in _said:
        _said.add(name)
        logger.info("loss engine: %s, tiles of up to %d rows", name, rows)


def _kind(x):
    """What of an argument decides the compiled code: all but the values of tensors and the number of rows."""
    if isinstance(x, Tensor):
        return "tensor", x.dtype, x.device, x.shape[1:], x.ndim
    if isinstance(x, tuple):
        return tuple(_kind(y) for y in x)
    if dataclasses.is_dataclass(x):
        return type(x), tuple(_kind(getattr(x, f.name)) for f in dataclasses.fields(x))
    return x if x is None or isinstance(x, (str, int, float)) else type(x)


def _mark_rows(x) -> None:
    if isinstance(x, Tensor):
        torch._dynamo.mark_dynamic(x, 0)
    elif isinstance(x, tuple):
        for y in x:
            _mark_rows(y)
    elif isinstance(x, (Block, SparseLogits, SampledLogits)):  # a Finish has no rows
        for f in dataclasses.fields(x):
            _mark_rows(getattr(x, f.name))
