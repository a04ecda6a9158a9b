"""Does it teach? Ten arcs of two rings, a teacher that saw many points, students that see ten per class."""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_distill.losses import kd_loss

CLASSES, SEEDS = 10, 5


def rings(n: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of two noisy rings, (n, 2), and which of five arcs of which ring each belongs to."""
    angle = 2 * math.pi * torch.rand(n, generator=draw)
    ring = torch.randint(2, (n,), generator=draw)
    radius = 1 + ring + 0.25 * torch.randn(n, generator=draw)
    label = 5 * ring + ((angle + 0.3 * torch.randn(n, generator=draw)) / (2 * math.pi) * 5).floor().long() % 5
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label


def mlp(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))


def fit(model: nn.Module, loss, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module, points: torch.Tensor, labels: torch.Tensor) -> float:
    return (model(points).argmax(-1) == labels).float().mean().item()


def test_distillation_teaches_no_more_than_ten_labels_per_class():
    plain, distilled, taught = [], [], []
    for seed in range(SEEDS):
        draw = torch.Generator().manual_seed(seed)
        many, few, test = (rings(n, draw) for n in (4000, 4000, 2000))
        teacher = fit(mlp(64, seed), lambda m, many=many: cross_entropy(m(many[0]), many[1]), 200)
        rows = torch.cat([(few[1] == c).nonzero().flatten()[:10] for c in range(CLASSES)])
        x, y = few[0][rows], few[1][rows]
        with torch.no_grad():
            said = teacher(x)
        alone = fit(mlp(32, 100 + seed), lambda m, x=x, y=y: cross_entropy(m(x), y), 300)
        student = fit(
            mlp(32, 100 + seed),
            lambda m, x=x, y=y, said=said: 0.1 * cross_entropy(m(x), y) + 0.9 * kd_loss(m(x), said, 4.0),
            300,
        )
        plain.append(accuracy(alone, *test))
        distilled.append(accuracy(student, *test))
        taught.append(accuracy(teacher, *test))
    gains = [d - p for d, p in zip(distilled, plain, strict=True)]
    assert min(gains) > 0 and sum(gains) / SEEDS > 0.05, (plain, distilled, taught)
