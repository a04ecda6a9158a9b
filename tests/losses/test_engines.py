import functools
import gc
import logging
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_distill.losses import (
    Agreement,
    ForwardKL,
    GeneralizedJSD,
    HeadLogits,
    Interpolated,
    LabelCrossEntropy,
    MixtureLogits,
    ReverseKL,
    SampledLogits,
    SparseLogits,
    StudentEntropy,
    TeacherEntropy,
    run_terms,
)
from hf_distill.losses.engines import MAX_STAGES, Compiled, Eager
from tests.losses.test_fused import TERMS, Flops, gradients, heads, labels_of

ROWS = 11


def both(student, teacher, leaves, terms=TERMS, **given):
    """Values, per-row values and gradients: eager, then compiled."""
    out = []
    for engine in ("eager", "compile"):
        rows = {}
        values = run_terms(student, teacher, terms, labels=labels_of(ROWS), per_row=rows, engine=engine, **given)
        out.append((values, rows, gradients(terms, values, leaves)))
    return out


def same(eager, compiled, tolerance):
    for a, b in zip(eager[:2], compiled[:2], strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=name)
    for a, b in zip(eager[2], compiled[2], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@functools.cache
def why_not_compiled() -> str | None:
    try:
        torch.compile(lambda x: x.exp() + 1, fullgraph=True)(torch.ones(4))
    except Exception as error:  # no C++ compiler, no headers of Python...
        return " ".join(str(error).split()[:30])


@pytest.fixture
def compiler(monkeypatch):
    """Compiled stages of this test alone."""
    if reason := why_not_compiled():
        pytest.skip(f"torch.compile does not work on this machine: {reason}")
    monkeypatch.setattr(Compiled, "stages", {})
    monkeypatch.setattr(Compiled, "works", None)
    return Compiled


def test_compiled_equals_eager_for_all_terms_at_once_and_any_number_of_rows(compiler):
    leaves, student, teacher = heads(bias=True, scale=1.3, softcap=3.0, v_student=17, v_teacher=13, rows=ROWS)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tile_rows in (64, 4, 3, 5):  # the last tiles have 11, 3, 2 and 1 rows
        same(*both(student, teacher, leaves, tile_rows=tile_rows), tolerance=1e-9)
    assert compiler.works and torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_compiled_equals_eager_in_float32_and_without_a_gradient(compiler):
    leaves, student, teacher = heads(bias=False, dtype=torch.float32, rows=ROWS)
    terms = {"kl": (ForwardKL(2.0), 0.5), "js": (GeneralizedJSD(0.3, 0.7), 1.0), "label": (LabelCrossEntropy(), 1.0)}
    same(*both(student, teacher, leaves, terms), tolerance=1e-5)
    with torch.no_grad():
        for name, value in run_terms(student, teacher, terms, labels=labels_of(ROWS), engine="compile").items():
            torch.testing.assert_close(value, run_terms(student, teacher, terms, labels=labels_of(ROWS))[name])


def test_compiled_reads_every_kind_of_teacher(compiler):
    leaves, student, teacher = heads(rows=ROWS)
    log_p = teacher.dense().log_softmax(-1)
    top = log_p.topk(4)
    terms = {"kl": (ForwardKL(2.0), 0.5), "label": (LabelCrossEntropy(), 1.0), "agree": (Agreement(), 0.0)}
    other = HeadLogits(teacher.hidden.flip(0), teacher.weight.flip(0))
    for given in (
        SparseLogits(top.indices, top.values),
        SampledLogits(top.indices, top.values.exp(), top.values),
        MixtureLogits((teacher, other), torch.tensor([0.3, 0.7])),
        MixtureLogits((teacher, other), torch.tensor([0.3, 0.7]), "logit"),
    ):
        same(*both(student, given, leaves, terms), tolerance=1e-9)
    assert compiler.works and all(stage is not None for stage in compiler.stages.values())


def test_a_temperature_or_target_that_moves_compiles_once(compiler):
    leaves, student, teacher = heads(rows=ROWS)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for temperature in (3.0, 2.5, 2.1, 1.9, 1.5, 1.2):
        terms = {"kl": (ForwardKL(temperature), 0.5), "taid": (Interpolated(torch.tensor(temperature / 4)), 1.0)}
        same(*both(student, teacher, leaves, terms), tolerance=1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_settings_that_change_at_every_step_end_eager(compiler, monkeypatch, caplog):
    monkeypatch.setattr("hf_distill.losses.engines.MAX_STAGES", 2)
    leaves, student, teacher = heads(rows=ROWS)
    for beta in (0.2, 0.3, 0.4, 0.5):
        terms = {"js": (GeneralizedJSD(beta), 1.0)}
        same(*both(student, teacher, leaves, terms), tolerance=1e-9)
    assert sum(stage is not None for stage in compiler.stages.values()) == 2 < MAX_STAGES
    assert "changes at every step" in caplog.text


@dataclass(frozen=True)
class Untraceable(ReverseKL):
    def value(self, tile):
        torch._dynamo.graph_break()
        return super().value(tile)


def test_a_term_that_cannot_be_compiled_runs_eager_and_is_named(compiler, caplog):
    leaves, student, teacher = heads(rows=ROWS)
    same(*both(student, teacher, leaves, {"own": (Untraceable(), 1.0)}), tolerance=1e-9)
    assert "Untraceable" in caplog.text
    same(*both(student, teacher, leaves, {"kl": (ReverseKL(), 1.0)}), tolerance=1e-9)
    assert compiler.works


NO_COMPILER = """
import torch
from hf_distill.losses import HeadLogits, ForwardKL, ReverseKL, run_terms
torch.manual_seed(0)
head, teacher = HeadLogits(torch.randn(3, 2), torch.randn(5, 2)), torch.randn(3, 5)
for divergence in (ForwardKL(), ReverseKL()):
    terms = {"kl": (divergence, 1.0)}
    a, b = (run_terms(head, teacher, terms, engine=engine)["kl"] for engine in ("eager", "compile"))
    assert a == b and a > 0
"""


def test_without_a_compiler_everything_is_eager_and_says_so_once():
    env = os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.count("loss engine: eager, torch.compile does not work here") == 1, done.stderr


def test_an_own_divergence_that_is_no_dataclass_keeps_its_temperature(compiler):
    class Own:
        temperature = 2.0

        def value(self, tile):
            return tile.reverse_kl(self.temperature)

        def add_grad(self, tile, value, row_weight, out):
            ReverseKL(self.temperature).add_grad(tile, value, row_weight, out)

    leaves, student, teacher = heads(rows=ROWS)
    own, stock = ({"r": (d, 1.0)} for d in (Own(), ReverseKL(2.0)))
    for engine in ("eager", "compile"):
        a, b = (run_terms(student, teacher, terms, engine=engine) for terms in (own, stock))
        torch.testing.assert_close(a["r"], b["r"])
        for x, y in zip(gradients(own, a, leaves), gradients(stock, b, leaves), strict=True):
            torch.testing.assert_close(x, y)


def test_counting_operations_runs_eager(compiler):
    leaves, student, teacher = heads(rows=ROWS)
    with Flops() as flops:
        run_terms(student, teacher, {"r": (ReverseKL(), 1.0)}, engine="compile")
    assert flops.get_total_flops() == 2 * ROWS * 17 * (3 * 4 + 6) and not compiler.stages


def test_an_unknown_engine_is_refused():
    leaves, student, teacher = heads()
    with pytest.raises(ValueError, match="engine must be one of auto, eager, compile, got 'triton'"):
        run_terms(student, teacher, {"r": (ReverseKL(), 1.0)}, engine="triton")


def test_each_engine_is_logged_once(compiler, monkeypatch, caplog):
    monkeypatch.setattr("hf_distill.losses.engines._said", set())
    leaves, student, teacher = heads(rows=ROWS)
    with caplog.at_level(logging.INFO, "hf_distill"):
        for engine in ("eager", "compile", None, "compile"):
            run_terms(student, teacher, {"r": (ReverseKL(), 1.0)}, engine=engine, tile_rows=4)
    said = [record.getMessage() for record in caplog.records if "loss engine" in record.getMessage()]
    assert said == [f"loss engine: {name}, tiles of up to 4 rows" for name in ("eager", "compile")]


class Peak(TorchDispatchMode):
    """Largest sum of bytes of tensors alive at a time that were made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and not func.is_view:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _, k=key: self._remove(k))
            self.sizes = getattr(self, "sizes", {}) | {key: storage.nbytes()}
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def _remove(self, key):
        if self.alive.pop(key, None) is not None:
            self.now -= self.sizes[key]


BUDGET = 2**21


def peak(rows, teachers=1, vocabulary=2048, dtype=torch.float32):
    """Bytes beyond the gradients, and beyond some numbers per row and term, of a step whose tiles may take BUDGET."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, H := 8, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, H, dtype=dtype).requires_grad_()
    parts = tuple(HeadLogits(torch.randn(rows, 4), torch.randn(vocabulary, 4)) for _ in range(teachers))
    teacher = parts[0] if teachers == 1 else MixtureLogits(parts, torch.full((teachers,), 1 / teachers))
    terms = {"kl": (ForwardKL(2.0), 0.5), "js": (GeneralizedJSD(), 0.5), "label": (LabelCrossEntropy(), 1.0)}
    terms |= {"agree": (Agreement(), 0.0), "s": (StudentEntropy(), 0.0), "t": (TeacherEntropy(2.0), 0.0)}
    labels = torch.randint(vocabulary, (rows,))
    gc.collect()
    with Peak() as seen:
        values = run_terms(HeadLogits(hidden, weight), teacher, terms, labels=labels, tile_bytes=BUDGET)
        sum(w * values[n] for n, (_, w) in terms.items()).backward()
    return seen.most - hidden.numel() * dtype.itemsize - weight.numel() * 4 - 5 * 4 * rows * len(terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_stays_in_the_budget_and_does_not_grow_with_the_rows(dtype):
    small, large = peak(512, dtype=dtype), peak(4096, dtype=dtype)
    assert BUDGET / 2 < small < 1.2 * BUDGET
    assert large < 1.02 * small


def test_peak_memory_does_not_grow_with_the_number_of_teachers():
    two, four = peak(1024, teachers=2), peak(1024, teachers=4)
    assert two < 1.2 * BUDGET and four < 1.02 * two


def test_eager_is_what_small_vocabularies_and_cpus_get():
    from hf_distill.losses.engines import choose

    head = HeadLogits(torch.zeros(1, 2), torch.zeros(20_000, 2))
    assert choose(None, head, torch.device("cpu")) is Eager
    assert choose("auto", head, torch.device("cuda")) is Compiled
    assert choose("auto", torch.zeros(1, 20_000), torch.device("cuda")) is Eager
