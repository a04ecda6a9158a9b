"""Balance losses against slow loops and transformers' own, at their limits, and where the gradient goes."""

import pytest
import torch
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from hf_distill.losses import balance_loss, router_z_loss

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


def router_logits(layers: int = 3, tokens: int = 12, experts: int = 5) -> list[torch.Tensor]:
    return [2 * torch.randn(tokens, experts, dtype=torch.float64) for _ in range(layers)]


def slow_gshard(layers, keep) -> float:
    total = 0.0
    for logits in layers:
        rows = [logits[s].softmax(0).tolist() for s in keep]
        for e in range(logits.shape[1]):
            mean = sum(row[e] for row in rows) / len(rows)
            first = sum(max(range(len(row)), key=row.__getitem__) == e for row in rows) / len(rows)
            total += logits.shape[1] * mean * first
    return total


def slow_hf(layers, keep, top_k) -> float:
    rows = [logits[s].softmax(0).tolist() for logits in layers for s in keep]
    total = 0.0
    for e in range(layers[0].shape[1]):
        mean = sum(row[e] for row in rows) / len(rows)
        chosen = sum(e in sorted(range(len(row)), key=row.__getitem__)[-top_k:] for row in rows) / len(rows)
        total += layers[0].shape[1] * mean * chosen
    return total


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_differs_from_a_loop_over_tokens(mask, top_k):
    layers = router_logits()
    keep = range(12) if mask is None else mask.flatten().nonzero().flatten().tolist()
    hf = balance_loss(layers, top_k, "hf", mask)
    assert hf.item() == pytest.approx(slow_hf(layers, keep, top_k))
    assert balance_loss(layers, top_k, attention_mask=mask).item() == pytest.approx(slow_gshard(layers, keep))
    own = load_balancing_loss_func(tuple(x.float() for x in layers), 5, top_k, mask)
    torch.testing.assert_close(hf.float(), own)


def test_padding_moves_the_loss():
    layers = router_logits()
    noise = [x + 9 * torch.randn_like(x) * (MASK.flatten() == 0)[:, None] for x in layers]
    for form in ("gshard", "hf"):
        a, b = (balance_loss(x, 2, form, MASK) for x in (layers, noise))
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(router_z_loss(layers, MASK), router_z_loss(noise, MASK))


def test_balanced_and_collapsed_values_are_not_those_of_the_definition():
    balanced = [9 * torch.eye(4).repeat(3, 1)] * 2
    assert balance_loss(balanced, 1).item() == pytest.approx(2)  # 1 per layer
    assert balance_loss(balanced, 1, "hf").item() == pytest.approx(1)  # top_k, whatever the layers
    both = [9.0 * (torch.eye(4) + torch.eye(4).roll(1, 0)).repeat(3, 1)] * 3
    assert balance_loss(both, 2, "hf").item() == pytest.approx(2, rel=1e-3)
    collapsed = [torch.tensor([50.0, 0.0, 0.0, 0.0]).repeat(6, 1)]
    assert balance_loss(collapsed, 2).item() == pytest.approx(4)


def test_z_loss_differs_from_its_definition():
    layers = router_logits(2)
    keep = MASK.flatten().bool()
    expected = sum((x[keep].exp().sum(-1).log() ** 2).mean() for x in layers)
    torch.testing.assert_close(router_z_loss(layers, MASK), expected)
    assert router_z_loss([x + 3 for x in layers]) > router_z_loss(layers)
    assert router_z_loss([torch.full((2, 3), 1e4)]).isfinite()


@pytest.mark.parametrize("loss", [balance_loss, router_z_loss])
def test_the_gradient_is_wrong(loss):
    layers = [(x + torch.tensor([2, 0, 0])).requires_grad_() for x in router_logits(2, 4, 3)]
    assert torch.autograd.gradcheck(lambda *x: loss(x), layers)
    loss(layers, attention_mask=torch.tensor([1, 1, 0, 1])).backward()
    assert all(x.grad[2].abs().sum() == 0 and (x.grad[[0, 1, 3]].abs().sum(1) > 0).all() for x in layers)


def test_a_gradient_step_makes_the_load_less_even():
    logits = (torch.randn(200, 4) + torch.tensor([2.0, 0.0, 0.0, 0.0])).requires_grad_()
    bias = torch.zeros(4, requires_grad=True)
    start = (logits.argmax(-1) == 0).float().mean()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(balance_loss([logits + bias]), bias)
        bias = (bias - gradient).detach().requires_grad_()
    assert ((logits + bias).argmax(-1) == 0).float().mean() < start - 0.2


@pytest.mark.parametrize("form", ["gshard", "hf"])
def test_a_batch_of_padding_gives_nan(form):
    layers = [x.requires_grad_() for x in router_logits()]
    value = balance_loss(layers, 2, form, torch.zeros(3, 4)) + router_z_loss(layers, torch.zeros(3, 4))
    value.backward()
    assert value == 0 and all((x.grad == 0).all() for x in layers)


def test_half_precision_is_summed_in_half_precision():
    layers = [x.bfloat16() for x in router_logits()]
    assert balance_loss(layers).dtype == router_z_loss(layers).dtype == torch.float32
    torch.testing.assert_close(balance_loss(layers), balance_loss([x.float() for x in layers]))
    assert balance_loss(router_logits()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(router_logits=[]), "holds no layers"),
        (dict(form="switch"), "form must be one of gshard, hf, got 'switch'"),
        (dict(top_k=6), "top_k=6 choices of 5 experts"),
        (dict(top_k=0), "choose 1 to 5"),
        (dict(attention_mask=torch.ones(2, 3)), "has 6 entries, the routers saw 12 tokens"),
    ],
)
def test_bad_input_is_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        balance_loss(**dict(router_logits=router_logits()) | arguments)
