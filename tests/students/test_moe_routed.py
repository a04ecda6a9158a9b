"""Routing and experts against slow loops; kernels against each other; dropping."""

import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from hf_distill.students.moe import upcycle_to_moe
from hf_distill.students.routed import route_top_k, routed_ffn
from hf_distill.students.routers import routed_blocks
from tests.students.moe_models import dense_model, inputs_of


def slow_route(logits, top_k, capacity_factor):
    """Token by token, all first choices before any second."""
    tokens, experts = logits.shape
    capacity = math.inf if capacity_factor is None else math.ceil(tokens * top_k / experts * capacity_factor)
    order = [sorted(range(experts), key=lambda e: -row[e].item()) for row in logits]
    taken, kept = [0] * experts, [[] for _ in range(tokens)]
    for choice in range(top_k):
        for s in range(tokens):
            expert = order[s][choice]
            if taken[expert] < capacity:
                kept[s].append(choice)
                taken[expert] += 1
    weights = torch.zeros(tokens, top_k, dtype=logits.dtype)
    for s in range(tokens):
        g = logits[s].softmax(0)
        total = sum(g[order[s][j]] for j in kept[s])
        for j in kept[s]:
            weights[s, j] = g[order[s][j]] / total
    return torch.tensor([o[:top_k] for o in order]), weights


@pytest.mark.parametrize("capacity_factor", [None, 2.0, 1.0, 0.3])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 1), (3, 3)])
def test_routing_differs_from_a_loop_over_tokens(experts, top_k, capacity_factor):
    logits = torch.randn(13, experts, dtype=torch.float64) + torch.linspace(2, 0, experts)
    indices, weights = route_top_k(logits, top_k, capacity_factor)
    slow_indices, slow_weights = slow_route(logits, top_k, capacity_factor)
    assert torch.equal(indices, slow_indices)
    torch.testing.assert_close(weights, slow_weights)


def test_a_token_without_a_place_comes_out_as_nan():
    logits = torch.tensor([[3.0, 2.0, 0.0]] * 6, requires_grad=True)
    _, weights = route_top_k(logits, 2, capacity_factor=0.5)  # two places each
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1.0, 1, 0, 0, 0, 0]))
    weights.square().sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[2:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_block_differs_from_a_loop_over_tokens(dtype):
    width, inner, experts, tokens = 6, 5, 4, 9
    hidden, router = torch.randn(tokens, width), torch.randn(experts, width)
    up, down = torch.randn(experts, 2 * inner, width) / 3, torch.randn(experts, width, inner) / 3
    hidden, router, up, down = (x.to(dtype) for x in (hidden, router, up, down))
    out = routed_ffn(hidden, router, up, down, top_k=2)
    assert out.dtype == dtype
    for s in range(tokens):
        g = (router.double() @ hidden[s].double()).softmax(0)
        best = g.argsort(descending=True)[:2]
        expected = sum(
            g[e] / g[best].sum() * (down[e].double() @ (F.silu(a) * b))
            for e in best
            for a, b in [(up[e].double() @ hidden[s].double()).chunk(2)]
        )
        tolerance = dict(atol=0.1, rtol=0.1) if dtype == torch.bfloat16 else dict(atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out[s].double(), expected, **tolerance)


@pytest.mark.parametrize("name", ["llama", "gemma", "vit"])
def test_kernels_disagree(name):
    model = upcycle_to_moe(dense_model(name), router_std=1.0)
    for block in routed_blocks(model).values():
        for parameter in block.experts.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    results = {}
    for kernel in ("grouped_mm", "eager", "batched_mm"):
        model.set_experts_implementation(kernel)
        assert model.get_experts_implementation()[""] == kernel
        model.zero_grad()
        logits = model(**inputs_of(name)).logits
        logits.square().mean().backward()
        results[kernel] = [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    for kernel in ("eager", "batched_mm"):
        assert len(results[kernel]) == len(results["grouped_mm"])
        for ours, other in zip(results["grouped_mm"], results[kernel], strict=True):
            torch.testing.assert_close(ours, other, atol=2e-5, rtol=2e-4)


def test_the_block_is_not_the_function():
    """The module's grouped kernel, and the pure function."""
    model = upcycle_to_moe(dense_model("llama"), router_std=1.0)
    block = model.model.layers[0].mlp
    hidden = torch.randn(2, 7, 16)
    ours = routed_ffn(hidden.flatten(0, 1), block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    torch.testing.assert_close(block(hidden).flatten(0, 1), ours)


def test_choices_are_dropped_outside_training_or_never():
    model = upcycle_to_moe(dense_model("llama"), router_std=1.0, capacity_factor=0.5)
    inputs, expected = inputs_of("llama"), dense_model("llama")
    with torch.no_grad():
        expected = expected(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        assert (model.train()(**inputs).logits - expected).abs().max() > 0.1
        roomy = upcycle_to_moe(dense_model("llama"), router_std=1.0, capacity_factor=4.0).train()
        torch.testing.assert_close(roomy(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_router_computes_in_half_precision():
    model = upcycle_to_moe(dense_model("llama").bfloat16(), router_std=1.0)
    router = model.model.layers[0].mlp.gate
    hidden = torch.randn(8, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, _ = router(hidden)
    torch.testing.assert_close(logits, hidden.float() @ router.weight.float().T)
    assert weights.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_routed_student_is_not_loaded_by_its_path(name, tmp_path):
    """In a process that has not imported its class."""
    student = upcycle_to_moe(dense_model(name), [0])
    student.save_pretrained(tmp_path)
    code = f"from hf_distill.training import compat; print(type(compat.load_model({str(tmp_path)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == type(student).__name__
