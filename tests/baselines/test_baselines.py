"""Baselines as objectives: terms, weights, units, and what they refuse."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import hf_distill
from hf_distill import FrozenTeacher, LogitKD
from hf_distill.baselines import OBJECTIVES
from hf_distill.baselines.contrastive import gather_rows
from hf_distill.baselines.features import TapsFeatures
from hf_distill.losses import (
    at_loss,
    cc_loss,
    crd_loss,
    dist_loss,
    dkd_loss,
    fitnet_loss,
    hcl_loss,
    kd_loss,
    nkd_loss,
    rkd_loss,
    sp_loss,
    standardize_logits,
)
from hf_distill.objectives import Objective
from hf_distill.signals import HeadLogits, Rows, Signals
from tests.baselines.models import CLASSES, bert, resnet, vit

N, B = 12, 4
LABELS = torch.tensor([0, 1, 2, 0])


def signals(seed: int, shape=(B, 6), name: str = "embedding", batch: int = B) -> Signals:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, CLASSES, generator=draw)
    feature = torch.randn(batch, *shape[1:], generator=draw)
    rows = {"cached_index": torch.arange(batch)}
    return Signals(logits, LABELS[:batch], features={name: feature}, batch=rows)


def built(objective: Objective, shapes) -> Objective:
    """Set up without models."""
    if isinstance(objective, TapsFeatures):
        objective.build([shapes])
    return objective


def total(objective: Objective, student: Signals, teacher: Signals, progress: float = 1.0) -> torch.Tensor:
    return sum(term.value * term.weight for term in objective(student, teacher, progress).values())


# ---- terms and weights ----------------------------------------------------------------------------------------------
def test_a_name_or_a_default_is_missing():
    assert hf_distill.OBJECTIVES is OBJECTIVES
    for name in ("kd", "dkd", "dist", "nkd", "fitnet", "at", "rkd", "sp", "cc", "crd", "review", "logit_kd"):
        objective = OBJECTIVES[name](**({"classes": [0, 1, 2]} if name == "crd" else {}))
        assert isinstance(objective, Objective) and getattr(hf_distill, type(objective).__name__) is OBJECTIVES[name]


@pytest.mark.parametrize(
    ("name", "options", "loss", "label_weight"),
    [
        ("kd", {}, lambda s, t: 0.9 * kd_loss(s, t, 4.0), 0.1),
        ("dkd", {}, lambda s, t: dkd_loss(s, t, LABELS, 1.0, 8.0, 4.0), 1.0),
        ("nkd", {}, lambda s, t: nkd_loss(s, t, LABELS, 1.5, 1.0), 1.0),
        ("dist", {"weight": 0.5}, lambda s, t: 0.5 * dist_loss(s, t, 2.0, 2.0, 4.0), 1.0),
        (
            "kd",
            {"standardize": True},
            lambda s, t: 9 * kd_loss(standardize_logits(s), standardize_logits(t), 2.0),
            0.1,
        ),
        (
            "dkd",
            {"standardize": True, "weight": 1.0, "beta": 3.0},
            lambda s, t: dkd_loss(standardize_logits(s), standardize_logits(t), LABELS, 1.0, 3.0, 2.0),
            0.1,
        ),
    ],
)
def test_a_logit_baseline_is_not_its_function_beside_cross_entropy_on_raw_logits(name, options, loss, label_weight):
    student, teacher = signals(0), signals(1)
    expected = label_weight * cross_entropy(student.logits, LABELS) + loss(student.logits, teacher.logits)
    torch.testing.assert_close(total(OBJECTIVES[name](**options), student, teacher), expected)


@pytest.mark.parametrize(
    ("name", "shapes", "loss"),
    [
        ("rkd", ((B, 6), (B, 6)), rkd_loss),
        ("sp", ((B, 6, 2, 2), (B, 6, 2, 2)), lambda s, t: 3000 * sp_loss(s, t)),
        ("fitnet", ((B, 6), (B, 6)), lambda s, t: 100 * fitnet_loss(s, t)),
        ("at", ((B, 6, 4, 4), (B, 3, 4, 4)), lambda s, t: 1000 * at_loss(s, t)),
    ],
)
def test_a_feature_baseline_is_not_its_function(name, shapes, loss):
    objective = built(OBJECTIVES[name]([["x", "x"]]), shapes)
    student, teacher = signals(0, shapes[0], "x"), signals(1, shapes[1], "x")
    expected = cross_entropy(student.logits, LABELS) + loss(student.features["x"], teacher.features["x"])
    torch.testing.assert_close(total(objective, student, teacher), expected)


def test_learned_embeddings_of_cc_and_crd_get_no_gradient():
    student, teacher = signals(0, (B, 6)), signals(1, (B, 9))
    cc = built(OBJECTIVES["cc"](width=5), ((B, 6), (B, 9)))
    expected = cc_loss(cc.embed[0](student.features["embedding"]), cc.embed[1](teacher.features["embedding"]))
    torch.testing.assert_close(cc(student, teacher, 0.0)["correlation"].value, expected)
    crd = built(OBJECTIVES["crd"](torch.arange(N) % CLASSES, negatives=5, width=7), ((B, 6), (B, 9)))
    for objective in (cc, crd):
        total(objective, student, teacher).backward()
        assert all(p.grad.abs().sum() > 0 for p in objective.parameters())


def test_the_review_is_not_fused_from_the_deepest_stage():
    objective = OBJECTIVES["review"]([["a", "a"], ["b", "b"]], width=5, warmup=0.0)
    shapes = [((B, 4, 8, 8), (B, 6, 8, 8)), ((B, 8, 4, 4), (B, 7, 2, 2))]
    objective.build(shapes)
    draw = torch.Generator().manual_seed(0)
    features = [
        {name: torch.randn(pair[side], generator=draw) for name, pair in zip("ab", shapes, strict=True)}
        for side in (0, 1)
    ]
    shallow, deep = objective.blocks
    assert deep.gate is None and shallow.gate is not None
    own = deep.enter(features[0]["b"])
    pooled = torch.nn.functional.interpolate(own, (2, 2), mode="nearest")
    expected = hcl_loss(deep.leave(pooled), features[1]["b"])
    below = torch.nn.functional.interpolate(pooled, (8, 8), mode="nearest")
    own = shallow.enter(features[0]["a"])
    gate = shallow.gate(torch.cat([own, below], 1))
    fused = own * gate[:, 0, None] + below * gate[:, 1, None]
    expected = expected + hcl_loss(shallow.leave(fused), features[1]["a"])
    logits = signals(0).logits
    student, teacher = (Signals(logits, LABELS, features=f) for f in features)
    torch.testing.assert_close(objective(student, teacher, 0.0)["review"].value, expected)


def test_the_warm_up_reaches_the_labels_or_drops_a_term():
    objective = OBJECTIVES["dkd"](alpha=2.0, beta=6.0, warmup=0.5)
    assert objective.weights(0.0) == {"label": 1.0, "target": 0.0, "non_target": 0.0}
    assert objective.weights(0.25) == {"label": 1.0, "target": 1.0, "non_target": 3.0}
    assert objective.weights(0.9) == {"label": 1.0, "target": 2.0, "non_target": 6.0}


def test_soft_labels_are_refused():
    student, teacher = signals(0), signals(1)
    soft = 0.7 * torch.nn.functional.one_hot(LABELS, CLASSES) + 0.1
    terms = OBJECTIVES["nkd"]()(Signals(student.logits, soft), teacher, 0.0)
    torch.testing.assert_close(terms["label"].value, cross_entropy(student.logits, soft))
    torch.testing.assert_close(terms["target"].value, OBJECTIVES["nkd"]()(student, teacher, 0.0)["target"].value)


# ---- units ----------------------------------------------------------------------------------------------------------
def test_units_are_not_what_the_terms_are_means_over():
    dist = OBJECTIVES["dist"]()
    assert [dist.per_of(t) for t in ("label", "inter", "intra")] == ["sample", "sample", "relation"]
    rkd = OBJECTIVES["rkd"]()
    assert [rkd.per_of(t) for t in ("label", "distance", "angle")] == ["sample", "relation", "relation"]
    coupled = {n for n, c in OBJECTIVES.items() if n != "crd" and c().couples_batch} | {"crd"}
    assert coupled == {"dist", "rkd", "sp", "cc", "crd", "review"}
    fitnet = built(OBJECTIVES["fitnet"](), ((B, 4, 8, 8), (B, 6, 4, 4)))
    assert "BatchNorm" in fitnet.couples_batch and "BatchNorm" in (LogitKD() + fitnet).couples_batch
    assert built(OBJECTIVES["fitnet"](projector="linear"), ((B, 4, 8, 8), (B, 6, 4, 4))).couples_batch is None


@pytest.mark.parametrize("name", ["dist", "rkd", "sp", "cc"])
def test_a_last_batch_of_one_counts_or_batches_of_one_train_on_nothing(name):
    layers = {} if name == "dist" else {"layers": [["embedding", "embedding"]]}
    objective = built(OBJECTIVES[name](**layers), ((B, 6), (B, 6))).train()
    one = [signals(i, batch=1) for i in (0, 1)]
    several = [signals(i) for i in (0, 1)]
    assert objective.count({"labels": LABELS}) == {"relation": 1}
    assert objective.count({"labels": LABELS[:1]}) == objective.count({"labels": LABELS, "only_repeats": True})
    assert objective.count({"labels": LABELS[:1]}) == {"relation": 0}
    for _ in range(2):  # a ragged end after each epoch
        objective(*several, 0.0)
        assert all(term.value.isfinite() for term in objective(*one, 0.0).values())
    with pytest.raises(ValueError, match="batches hold one example: set per_device_train_batch_size to at least 2"):
        objective(*one, 0.0)
    objective.eval()
    objective(*one, 0.0), objective(*one, 0.0)


# ---- setup on models ------------------------------------------------------------------------------------------------
def setup(objective, student, teacher):
    objective.setup(student, FrozenTeacher(teacher))
    return objective


def test_a_preset_chooses_other_layers_than_its_pairs():
    at = OBJECTIVES["at"]("uniform")
    assert at.needs_of("teacher") == {"hidden_states"}
    both = LogitKD() + setup(at, vit(layers=2), vit(12, 4))
    assert at.pairs == [("hidden_states.1", "hidden_states.2"), ("hidden_states.2", "hidden_states.4")]
    assert both.needs_of("teacher") == {"logits", "features:hidden_states.2", "features:hidden_states.4"}
    assert both.needs_of("student") == {"logits", "features:hidden_states.1", "features:hidden_states.2"}
    assert at.prefixes == (1, 1)


@pytest.mark.parametrize(
    ("student", "teacher", "form"),
    [
        (resnet(), vit(12, 3), "map"),
        (vit(), resnet(8, 2), "map"),
        (vit(), vit(12), "tokens"),
        (bert(), bert(12), "tokens"),
    ],
)
def test_a_projector_is_not_built_from_what_the_models_give(student, teacher, form):
    objective = setup(OBJECTIVES["fitnet"]([[-1, -1]], projector="linear"), student, teacher)
    assert objective.projectors[0].form == form
    weights = [p.clone() for p in objective.parameters()]
    objective.setup(student, FrozenTeacher(teacher))
    assert all(torch.equal(a, b) for a, b in zip(weights, objective.parameters(), strict=True)), "built a second time"


def test_the_dry_run_moves_something():
    model, teacher = resnet().train(), resnet(seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    setup(OBJECTIVES["at"](), model, teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(m.training for m in model.modules())


def test_declared_shapes_still_run_the_models():
    student = resnet().to("meta")
    shapes = [((1, 8, 2, 2), (1, 12, 2, 2))]
    objective = OBJECTIVES["fitnet"]([[2, 2]], shapes=shapes)
    objective.setup(student, FrozenTeacher(resnet().to("meta")))
    assert objective.projectors[0].map[0].weight.shape == (12, 8, 1, 1)
    with pytest.raises(ValueError, match="not in memory yet: declare shapes="):
        OBJECTIVES["fitnet"]([[2, 2]]).setup(student, FrozenTeacher(resnet()))


# ---- memory banks ---------------------------------------------------------------------------------------------------
def crd(**options):
    classes = torch.tensor([0] * 5 + [2] * 3 + [1] * 4)[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    return built(OBJECTIVES["crd"](classes, **{"negatives": 500, "width": 7} | options), ((B, 6), (B, 6))), classes


def test_a_negative_has_the_examples_class_or_others_are_never_drawn():
    objective, classes = crd()
    index = torch.arange(N)
    drawn = objective.draw(index)
    assert (classes[drawn] != classes[index][:, None]).all()
    for row, negatives in enumerate(drawn):
        others = (classes != classes[row]).nonzero().flatten()
        counts = torch.bincount(negatives, minlength=N)[others]
        expected = 500 / len(others)
        assert ((counts - expected) ** 2 / expected).sum() < 30, "chi² of up to 8 degrees of freedom"


def test_draws_depend_on_the_split_or_repeat_at_the_next_step():
    objective, _ = crd()
    index = torch.arange(N)
    whole = objective.draw(index)
    assert torch.equal(whole[3:7], objective.draw(index[3:7]))
    assert torch.equal(whole, crd()[0].draw(index)) and not torch.equal(whole, crd(seed=1)[0].draw(index))
    objective.state["step"] += 1
    assert (objective.draw(index) == whole).float().mean() < 0.3
    assert (whole[0] == whole[1]).float().mean() < 0.3


def test_constants_or_banks_move_before_the_step_is_done():
    objective, classes = crd()
    objective.train()
    at = lambda rows, seed: Signals(  # noqa: E731
        torch.randn(len(rows), CLASSES), classes[rows], features=signals(seed).features, batch={"cached_index": rows}
    )
    first, second = torch.tensor([3, 1, 4, 0]), torch.tensor([5, 9, 2, 6])
    before = {k: v.clone() for k, v in objective.state.items()}
    for rows, seed in ((first, 0), (second, 1)):
        objective(at(rows, seed), at(rows, seed + 5), 0.0)
    assert all(torch.equal(v, before[k]) for k, v in objective.state.items())
    constants = torch.stack([z for *_, z in objective._seen]).mean(0)[0]
    objective.after_step({}, 0.0)
    torch.testing.assert_close(objective.state["z"], constants)
    moved = (objective.state["student_bank"] != before["student_bank"]).any(1)
    assert moved.nonzero().flatten().tolist() == sorted([*first.tolist(), *second.tolist()])
    objective(at(first, 2), at(first, 3), 0.0)
    objective.after_step({}, 0.0)
    torch.testing.assert_close(objective.state["z"], constants, msg="the constants were set a second time")
    assert objective.state["step"] == 2

    student, teacher = at(first, 0), at(first, 1)
    found = objective(student, teacher, 0.0)["contrast"].value
    ours, theirs = (
        torch.nn.functional.normalize(embed(s.features["embedding"]), dim=1)
        for embed, s in zip(objective.embed, (student, teacher), strict=True)
    )
    index = torch.cat([first[:, None], objective.draw(first)], 1)
    banks = objective.state["student_bank"], objective.state["teacher_bank"]
    torch.testing.assert_close(found, crd_loss(ours, theirs, *banks, index, 0.07, *constants)[0])
    objective.eval()
    student = Signals(student.logits, student.labels, features=student.features)  # an evaluation set has no rows
    assert objective(student, teacher, 0.0)["contrast"].value == 0 and len(objective._seen) == 1


def test_one_process_gathers_its_own_rows():
    x = torch.randn(3, 2)
    assert gather_rows(x) is x


# ---- refused --------------------------------------------------------------------------------------------------------
def test_what_cannot_train_is_taken():
    with pytest.raises(ValueError, match="must not be negative.*weight=-1"):
        OBJECTIVES["rkd"](weight=-1.0)
    with pytest.raises(ValueError, match="warmup is a share of training"):
        OBJECTIVES["kd"](warmup=20)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        OBJECTIVES["nkd"](temperature=0)
    with pytest.raises(ValueError, match="unknown layers 'all'"):
        OBJECTIVES["at"]("all")
    with pytest.raises(ValueError, match="compares one pair of layers"):
        OBJECTIVES["sp"]([[1, 1], [2, 2]])
    with pytest.raises(ValueError, match="compares one pair of layers"):
        OBJECTIVES["rkd"]("uniform")
    with pytest.raises(ValueError, match="name the pairs, not a preset"):
        OBJECTIVES["at"]("last", shapes=[])
    with pytest.raises(ValueError, match="1 pairs of layers need as many pairs of shapes, got 2"):
        OBJECTIVES["fitnet"]([[1, 1]], shapes=[((1, 2), (1, 2))] * 2)
    with pytest.raises(ValueError, match='projector must be "regressor"'):
        OBJECTIVES["fitnet"](projector="mlp")
    for classes in ([0, 0, 0], [[0, 1]], [0.0, 1.0]):
        with pytest.raises(ValueError, match="negatives from other classes"):
            OBJECTIVES["crd"](classes)


def test_features_of_two_shapes_meet_without_a_projector():
    with pytest.raises(
        ValueError, match=r'\(1, 17, 8\), hidden_states.2 of the teacher \(1, 17, 12\).*projector="linear"'
    ):
        setup(OBJECTIVES["fitnet"](projector="none"), vit(), vit(12))
    setup(OBJECTIVES["fitnet"](projector="none"), vit(), vit(8, 3))
    with pytest.raises(ValueError, match="no module 'vit.layer.1'; near matches: vit.layers.1"):
        setup(OBJECTIVES["fitnet"]([["vit.layers.1", "vit.layer.1"]]), vit(), vit())


def test_language_models_or_other_classes_pass():
    rows = Rows(torch.arange(B), LABELS, torch.arange(B), torch.arange(B))
    language = Signals(HeadLogits(torch.randn(B, 5), torch.randn(9, 5)), LABELS, rows=rows)
    with pytest.raises(ValueError, match="one row of class logits per example; .* use LogitKD"):
        OBJECTIVES["dkd"]()(language, language, 0.0)
    student = signals(0)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\).*num_labels"):
        OBJECTIVES["kd"]()(student, Signals(student.logits[:, :2]), 0.0)
    with pytest.raises(ValueError, match="needs labels in the batch"):
        OBJECTIVES["kd"]()(Signals(student.logits), student, 0.0)


def test_rows_of_the_train_set_are_missing_or_wrong():
    objective, classes = crd()
    objective.train()
    student = signals(0)
    with pytest.raises(ValueError, match=r"no 'index'.*add_column.*example_columns=\('index',\)"):
        objective(Signals(student.logits, LABELS, features=student.features), student, 0.0)
    for rows in (torch.arange(B) + 20, (classes != 0).nonzero().flatten()[:B]):
        batch = {"cached_index": rows}
        with pytest.raises(ValueError, match="does not fit `classes`"):
            objective(Signals(student.logits, LABELS * 0, features=student.features, batch=batch), student, 0.0)
