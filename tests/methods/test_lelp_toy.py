"""Is LELP's split worth anything? Ten clusters, two classes of five each; the teacher knows the classes only."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_distill.methods.lelp import LELPFit, lelp_class_probs, lelp_fit, lelp_loss, lelp_targets

SEEDS, SUBCLASSES, BETA = 4, 5, 0.3
CONTROLS = ("kd", "other_examples_split", "random_directions")


def network(width: int, outputs: int, seed: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()), nn.Linear(width, outputs)


def fitted(parts, loss, steps: int):
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return parts


def student(x: Tensor, targets: Tensor, seed: int):
    body, head = network(16, targets.shape[1], 100 + seed)
    return fitted((body, head), lambda: lelp_loss(head(body(x)), targets), 300)


@torch.no_grad()
def classes_said(parts, points: Tensor, subclasses: int = SUBCLASSES) -> Tensor:
    return lelp_class_probs(parts[1](parts[0](points)), subclasses).argmax(-1)


def same_directions(directions: Tensor, h: Tensor, y: Tensor) -> LELPFit:
    """The same directions for both classes, scores of mean 0 and size 1 within each."""
    mean = torch.stack([h[y == c].double().mean(0) for c in range(2)])
    size = torch.stack([((h[y == c] - mean[c]) @ directions).square().mean().sqrt() for c in range(2)])
    scaled = directions / size[:, None, None]
    return LELPFit(scaled, torch.einsum("cd,cds->cs", mean, scaled))


def one_seed(seed: int) -> dict[str, float]:
    """Accuracies of students that see 150 examples, and how a linear head of C outputs follows LELP's."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 20, generator=draw)
    cluster = torch.randint(10, (4000,), generator=draw)
    points, labels = centres[cluster] + torch.randn(4000, 20, generator=draw), cluster % 2
    (many, many_labels), (test, test_labels) = ((points[r], labels[r]) for r in (slice(2000), slice(2000, None)))
    body, head = network(64, 2, seed)
    fitted((body, head), lambda: cross_entropy(head(body(many)), many_labels), 200)
    x, y = many[:150], many_labels[:150]
    with torch.no_grad():
        h, t = body(x), head(body(x))
    targets = lelp_targets(lelp_fit(h, y, head.weight, SUBCLASSES), h, t, BETA)
    within = targets.view(-1, 2, SUBCLASSES) / t.softmax(-1)[..., None]
    others = within[torch.randperm(150, generator=draw)] * t.softmax(-1)[..., None]
    directions = torch.linalg.qr(torch.randn(64, SUBCLASSES, generator=draw, dtype=torch.float64))[0]
    at_random = lelp_targets(same_directions(directions, h, y), h, t, BETA)

    ours = student(x, targets, seed)
    said = {
        "lelp": classes_said(ours, test),
        "kd": classes_said(student(x, t.softmax(-1), seed), test, 1),
        "other_examples_split": classes_said(student(x, others.flatten(1), seed), test),
        "random_directions": classes_said(student(x, at_random, seed), test),
    }
    seen, follower = ours[0](x).detach(), nn.Linear(16, 2)
    goal = lelp_class_probs(ours[1](seen), SUBCLASSES).detach()
    fitted([follower], lambda: lelp_loss(follower(seen), goal), 300)
    said["stock"] = classes_said((ours[0], follower), test, 1)
    agreement = (said["stock"] == said["lelp"]).float().mean().item()
    return {name: (s == test_labels).float().mean().item() for name, s in said.items()} | {"agreement": agreement}


def test_the_split_is_worth_no_more_than_kd_or_a_split_at_random():
    runs = [one_seed(seed) for seed in range(SEEDS)]
    mean = {name: sum(run[name] for run in runs) / SEEDS for name in runs[0]}
    assert all(mean["lelp"] > mean[name] + 0.003 for name in CONTROLS), mean
    assert mean["agreement"] > 0.97 and mean["stock"] > mean["lelp"] - 0.01, mean
