"""Which engine runs, and how large its blocks are."""

import logging

import pytest
import torch

from hf_distill.losses import ForwardKL, HeadLogits, LabelCrossEntropy, ReverseKL
from hf_distill.losses import engines as module
from hf_distill.losses.engines import CACHE_BYTES, COMPILE_FROM, Compiled, Eager, Plan, choose, say

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def head(vocabulary: int) -> HeadLogits:
    return HeadLogits(torch.zeros(1, 2), torch.zeros(vocabulary, 2))


@pytest.mark.parametrize("name", [None, "auto"])
def test_the_engine_of_large_vocabularies_is_not_compiled_on_a_gpu_alone(name):
    assert choose(name, head(COMPILE_FROM), CUDA) is Compiled
    assert choose(name, head(COMPILE_FROM - 1), CUDA) is Eager
    assert choose(name, head(COMPILE_FROM), CPU) is Eager
    assert choose(name, torch.zeros(1, COMPILE_FROM), CUDA) is Eager


def test_an_engine_that_is_asked_for_is_not_given():
    assert choose("compile", head(4), CPU) is Compiled and choose("eager", head(COMPILE_FROM), CUDA) is Eager
    with pytest.raises(ValueError, match="one of auto, eager, compile, got 'triton'"):
        choose("triton", head(4), CPU)


def test_blocks_leave_their_share_of_the_budget_or_the_cache():
    assert Eager.block_bytes(1280, CPU) == 10 and Eager.block_bytes(2**40, CPU) == CACHE_BYTES
    assert Eager.block_bytes(3200, CUDA) == 100 and Eager.block_bytes(2**40, CUDA) == 2**35
    assert Compiled.block_bytes(160, CPU) == 10 and Compiled.block_bytes(2**40, CPU) == 4 * CACHE_BYTES
    assert Compiled.block_bytes(800, CUDA) == 100 and Compiled.block_bytes(2**40, CUDA) == 2**37
    assert isinstance(Compiled.block_bytes(801, CUDA), int)


class Tempered:
    """A divergence that is no dataclass and tempers for itself."""

    temperature = 3.0


def test_a_plan_mixes_up_temperatures():
    own = Tempered()
    terms = [ForwardKL(2.0), ReverseKL(), ForwardKL(4.0), ReverseKL(2.0), LabelCrossEntropy(), own]
    plan = Plan.of(terms, [True, False, True, True, True, True], torch.float64, CPU)
    assert plan.slots == (1, 0, 2, 1, 0, 0) and plan.temperatures == (1.0, 2.0, 4.0)
    assert plan.inverse[0] is None and [float(x) for x in plan.inverse[1:]] == [0.5, 0.25]
    assert all(x.dtype == torch.float64 and x.ndim == 0 for x in plan.inverse[1:])
    assert plan.divergences[:4] == (ForwardKL(), ReverseKL(), ForwardKL(), ReverseKL()) and plan.divergences[5] is own
    assert plan.moving == (True, False, True, True, True, True)


def test_an_engine_is_said_twice_or_by_another_name(monkeypatch, caplog):
    monkeypatch.setattr(module, "_said", set())
    plan = Plan.of([ForwardKL()], [True], torch.float32, CPU)
    with caplog.at_level(logging.INFO, logger="hf_distill"):
        for _ in range(2):
            say(Eager(plan, torch.float32), 7)
            monkeypatch.setattr(Compiled, "works", None)
            say(Compiled(plan, torch.float32), 9)
        monkeypatch.setattr(Compiled, "works", False)
        say(Compiled(plan, torch.float32), 9)
    said = [record.getMessage() for record in caplog.records if "tiles of up to" in record.getMessage()]
    assert said == ["loss engine: eager, tiles of up to 7 rows", "loss engine: compile, tiles of up to 9 rows"]
