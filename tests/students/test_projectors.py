"""Projectors: forms, sizes and widths brought together; what cannot be is said."""

import pytest
import torch
from torch import nn

from hf_distill.losses import fitnet_loss
from hf_distill.students.projectors import (
    Projector,
    as_map,
    as_pooled,
    conv_regressor,
    form_of,
    layer_pairs,
    prefix_tokens,
    resized,
    width_of,
)
from tests.baselines.models import bert, resnet, vit

SHAPES = {
    "pooled": (2, 6),
    "tokens": (2, 17, 6),  # [CLS] and 4 x 4
    "tokens_small": (2, 5, 8),  # [CLS] and 2 x 2
    "map": (2, 6, 8, 8),
    "map_small": (2, 10, 2, 3),
}
PREFIX = {"tokens": 1, "tokens_small": 1}


@pytest.mark.parametrize("theirs", SHAPES)
@pytest.mark.parametrize("ours", SHAPES)
def test_a_pair_of_forms_does_not_meet(ours, theirs):
    prefixes = PREFIX.get(ours, 0), PREFIX.get(theirs, 0)
    projector = Projector(SHAPES[ours], SHAPES[theirs], *prefixes)
    student, teacher = torch.randn(SHAPES[ours], requires_grad=True), torch.randn(SHAPES[theirs])
    a, b = projector(student, teacher)
    assert a.shape == b.shape and width_of(b.shape) == width_of(teacher.shape)
    fitnet_loss(a, b).backward()
    assert all(p.grad.abs().sum() > 0 for p in projector.parameters()) and student.grad.abs().sum() > 0
    same_width = width_of(SHAPES[ours]) == width_of(SHAPES[theirs])
    assert isinstance(projector.map, nn.Identity) == same_width
    assert "pooled" not in (ours, theirs) or a.dim() == 2


def test_a_token_lands_on_another_place_of_the_map():
    grid = torch.arange(2 * 6 * 4 * 4.0).reshape(2, 6, 4, 4)
    tokens = torch.cat([torch.full((2, 2, 6), -1.0), grid.flatten(2).mT], 1)
    assert torch.equal(as_map(tokens, 2), grid)
    assert as_map(grid) is grid
    assert as_map(tokens, None).shape == (2, 6, 18, 1)
    a, b = Projector(tokens.shape, tokens.shape, 2, 2)(tokens, tokens)
    assert torch.equal(a, b) and torch.equal(a, tokens[:, 2:])


def test_pooling_counts_a_prefix_or_padding():
    tokens = torch.randn(2, 5, 3)
    torch.testing.assert_close(as_pooled(tokens, 1), tokens[:, 1:].mean(1))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    found = as_pooled(tokens, None, mask)
    torch.testing.assert_close(found[0], tokens[0, :2].mean(0))
    torch.testing.assert_close(found[1], tokens[1].mean(0))
    a, _ = Projector((2, 5, 3), (2, 3), None, None)(tokens, torch.randn(2, 3), mask)
    torch.testing.assert_close(a, found)
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(as_pooled(maps), maps.flatten(2).mean(2))


def test_texts_of_one_length_are_not_compared_token_by_token():
    a, b = Projector((1, 7, 4), (1, 7, 9), None, None)(torch.randn(2, 12, 4), torch.randn(2, 12, 9))
    assert a.shape == b.shape == (2, 12, 9)


def test_a_map_shrinks_otherwise_than_by_averages():
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(resized(x, (2, 2))[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    assert resized(x, (4, 4)) is x and resized(x, (8, 6)).shape == (1, 2, 8, 6)


def test_low_precision_features_stop_a_projector():
    projector = Projector((2, 6), (2, 9))
    a, _ = projector(torch.randn(2, 6).bfloat16(), torch.randn(2, 9).bfloat16())
    assert a.dtype == torch.float32


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [(8, 4, (3, 3)), (4, 8, (4, 4)), (7, 5, (3, 3)), (5, 5, (1, 1))],
)
def test_fitnets_regressor_is_another_than_the_authors(ours, theirs, kind):
    student, teacher = (2, 3, ours, ours), (2, 6, theirs, theirs)
    regressor = conv_regressor(student, teacher)
    assert regressor(torch.randn(student)).shape == teacher and regressor[0].kernel_size == kind
    assert [type(m).__name__ for m in regressor[1:]] == ["BatchNorm2d", "ReLU"]
    assert isinstance(regressor[0], nn.ConvTranspose2d) == (theirs > ours)


def test_prefix_tokens_are_miscounted():
    assert prefix_tokens(vit()) == 1 and prefix_tokens(resnet()) == 0 and prefix_tokens(bert()) is None
    from transformers import DeiTConfig, DeiTForImageClassification, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    tiny = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8)
    assert prefix_tokens(DeiTForImageClassification(DeiTConfig(patch_size=4, **tiny))) == 2
    assert prefix_tokens(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=4, **tiny))) == 5


def test_presets_choose_other_layers():
    assert layer_pairs("uniform", 3, 6) == [(1, 2), (2, 4), (3, 6)]
    assert layer_pairs("uniform", 4, 6) == [(1, 2), (2, 3), (3, 4), (4, 6)]
    assert layer_pairs("last", 3, 6) == [(1, 4), (2, 5), (3, 6)]
    assert layer_pairs("skip", 3, 7) == [(1, 2), (2, 4), (3, 6)]
    assert layer_pairs([["a", 1]], 0, 0) == [("a", 1)]


def test_what_does_not_fit_passes():
    with pytest.raises(ValueError, match="unknown layers 'first'; choose one of uniform, last, skip"):
        layer_pairs("first", 2, 2)
    with pytest.raises(ValueError, match="at least as deep as its student, got 2 layers for 3"):
        layer_pairs("last", 3, 2)
    with pytest.raises(ValueError, match="pairs"):
        layer_pairs([], 1, 1)
    with pytest.raises(ValueError, match=r"got \(2, 3, 4, 5, 6\)"):
        form_of((2, 3, 4, 5, 6))
    with pytest.raises(ValueError, match="pooled features .* have no places"):
        as_map(torch.randn(2, 3))
    with pytest.raises(ValueError, match="6 tokens, 1 of them a prefix, are no square grid"):
        as_map(torch.randn(2, 6, 3), 1)
    with pytest.raises(ValueError, match="larger map to a smaller one or doubles it"):
        conv_regressor((1, 2, 4, 4), (1, 2, 6, 6))
    with pytest.raises(ValueError, match="project the student's first"):
        fitnet_loss(torch.randn(2, 3, 4), torch.randn(2, 4))
