"""Memory of a forward pass against tensors counted by hand."""

import pytest
import torch
from torch import nn

from hf_distill.evaluation.speed import forward_cost, peak_bytes

CPU = torch.device("cpu")


def test_freed_tensors_or_views_are_counted():
    given = torch.zeros(256)

    def run():
        a = given + 1  # 1 KiB
        b = a.view(16, 16).T  # a's own
        c = b.repeat(3, 1)  # 3 KiB more: the most at one time
        del a, b
        d = c.sum(0)
        del c
        return given.view(2, 128), d.mul_(2)

    assert peak_bytes(run, CPU) == 4096


def test_a_wider_model_costs_as_much():
    models = {"narrow": nn.Linear(8, 8).eval(), "wide": nn.Linear(8, 4096).eval()}
    inputs = {name: {"input": torch.zeros(64, 8)} for name in models}
    found = forward_cost(models, inputs, rounds=2)
    assert found["narrow"]["activation_bytes"] == 64 * 8 * 4 and found["wide"]["activation_bytes"] == 64 * 4096 * 4
    assert found["wide"]["seconds"] > found["narrow"]["seconds"] > 0
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        forward_cost(models, inputs, rounds=0)
