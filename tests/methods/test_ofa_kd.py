"""OFA-KD: its loss, its branches on every form of features, and short runs."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeiTConfig, DeiTForImageClassification

from hf_distill import FrozenTeacher
from hf_distill.losses import forward_kl
from hf_distill.methods import ofa_kd
from hf_distill.methods.ofa_kd import OFA, OFAConfig, ofa_loss
from hf_distill.signals import Signals
from hf_distill.students.branches import Merge, exit_branch
from tests.baselines.models import FAMILIES, bert, dataset, resnet, trainer, vit
from tests.helpers import SGD, plain_arguments


def logits(rows: int = 5, classes: int = 4, dtype=torch.float64):
    return 2 * torch.randn(rows, classes, dtype=dtype), 2 * torch.randn(rows, classes, dtype=dtype)


# ---- the loss --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("eps, temperature", [(1.0, 1.0), (1.5, 1.0), (1.2, 2.0)])
def test_the_loss_is_not_the_official_sum(eps, temperature):
    s, t = logits()
    labels, expected = torch.tensor([0, 3, 1, 1, 2]), 0.0
    for i in range(5):
        p, q = (t[i] / temperature).softmax(0), (s[i] / temperature).softmax(0)
        for c in range(4):
            m = float(c == labels[i])
            expected += -((p[c] + m) ** eps - m) * q[c].log() / 5
    torch.testing.assert_close(ofa_loss(s, t, labels, eps, temperature), expected)
    soft = torch.nn.functional.one_hot(labels, 4) * 0.5 + 0.125
    torch.testing.assert_close(ofa_loss(s, t, soft.double(), eps, temperature), expected)


def test_at_eps_one_it_is_no_cross_entropy_with_the_teacher():
    s, t = logits()
    p = t.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(ofa_loss(s, t, torch.arange(5) % 4) - entropy, forward_kl(s, t))


def test_a_larger_eps_does_not_lift_the_target():
    t = torch.tensor([[1.0, 0.5, -1.0]])
    ratios = []
    for eps in (1.0, 1.5, 2.0):
        s = torch.zeros(1, 3, requires_grad=True)
        ofa_loss(s, t, torch.tensor([0]), eps).backward()
        p = t.softmax(-1)[0]
        target, other = (1 + p[0]) ** eps - 1, p[1] ** eps
        coefficients = torch.stack([target, other, p[2] ** eps])
        torch.testing.assert_close(s.grad[0], coefficients.sum() / 3 - coefficients)
        ratios.append((target / other).item())
    assert ratios == sorted(ratios) and ratios[0] < ratios[-1]


def test_the_teacher_gets_a_gradient_or_a_sure_student_an_infinite_loss():
    s, t = logits()
    s, t = s.requires_grad_(), t.requires_grad_()
    labels = torch.tensor([0, 3, 1, 1, 2])
    assert torch.autograd.gradcheck(lambda z: ofa_loss(z, t, labels, 1.5), s)
    ofa_loss(s, t, labels, 1.5).backward()
    assert t.grad is None and s.grad.abs().sum() > 0
    far = torch.tensor([[300.0, 0.0]])  # softmax underflows
    assert ofa_loss(far, -far, torch.tensor([1])).item() == pytest.approx(300.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ofa_eps": [0.0]},
        {"ofa_eps": [1.0, float("nan")]},
        {"ofa_eps": [1.0, 1.0, 1.0]},
        {"ofa_temperature": float("nan")},
        {"gt_loss_weight": -1.0},
        {"gt_loss_weight": 0.0, "kd_loss_weight": 0.0, "ofa_loss_weight": 0.0},
        {"ofa_stages": []},
        {"ofa_stages": ["1", "1"]},
        {"ofa_stages": ["1", "5"]},
        {"ofa_stages": ["1", "vit.layers.0"]},
        {"ofa_stages": ["uniform", "1"]},
    ],
)
def test_a_bad_setting_is_taken(wrong):
    with pytest.raises(ValueError, match="ofa_|_loss_weight"):
        OFAConfig(**wrong)


# ---- branches --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage, blocks, stride", [(1, 3, 8), (2, 2, 4), (3, 1, 2), (4, 1, 1)])
def test_a_branch_of_maps_has_other_blocks(stage, blocks, stride):
    branch = exit_branch((1, 4, 16, 16), stage, 20, 3, 0)
    assert len(branch.blocks) == blocks
    assert branch.blocks(torch.randn(2, 4, 16, 16)).shape == (2, 20, 16 // stride, 16 // stride)
    assert branch(torch.randn(2, 4, 16, 16)).shape == (2, 3)


def test_a_branch_of_tokens_merges_to_another_grid():
    for side, merges in ((4, 0), (7, 0), (14, 1), (15, 1), (28, 2)):
        branch = exit_branch((1, 1 + side**2, 8), 2, 12, 3, 1)
        assert len(branch.merges) == merges and len(branch.blocks) == 2
        seen = []
        branch.blocks[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape))
        assert branch(torch.randn(2, 1 + side**2, 8)).shape == (2, 3)
        end = side
        for _ in range(merges):
            end = (end + 1) // 2
        assert seen == [(2, 1 + end**2, 12)]


def test_merged_patches_are_not_neighbours():
    merge = Merge(1, 4, last=True)
    torch.nn.init.eye_(merge.linear.weight), torch.nn.init.zeros_(merge.linear.bias)
    merge.norm = torch.nn.Identity()
    grid = torch.arange(16.0).view(1, 1, 4, 4)
    out = merge(grid)
    assert out.shape == (1, 4, 2, 2)
    assert out[0, :, 0, 1].tolist() == [2.0, 3.0, 6.0, 7.0]


def test_padding_of_a_text_reaches_its_branch():
    branch = exit_branch((1, 8, 12), 3, 12, 3, None).eval()
    x, mask = torch.randn(2, 8, 12), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    changed = x.clone()
    changed[1, 5:] = 100.0
    torch.testing.assert_close(branch(changed, mask), branch(x, mask))
    torch.testing.assert_close(branch(x[1:, :5], mask[1:, :5]), branch(x, mask)[1:])


def test_a_branch_does_not_end_in_its_first_prefix_token_or_in_the_mean():
    x = torch.randn(2, 2 + 16, 8)
    for prefix, seen in ((2, x[:, 0]), (0, x[:, 2:].mean(1))):
        branch = exit_branch((1, prefix + 16, 8), 3, 8, 3, prefix)
        branch.blocks = torch.nn.ModuleList()
        torch.testing.assert_close(branch(x[:, 2 - prefix :]), branch.head(seen))


def test_distilled_models_lose_their_second_prefix_token():
    config = DeiTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4
    )
    objective = OFA(OFAConfig())
    objective.setup(DeiTForImageClassification(config), None)
    assert objective.prefix == 2 and [b.prefix for b in objective.branches] == [2, 2]


@pytest.mark.parametrize(
    "student, stages, places",
    [
        (vit(layers=12), ["1", "2", "3", "4"], {2: 1, 4: 2, 10: 3, 12: 4}),
        (vit(layers=12), ["uniform"], {3: 1, 6: 2, 9: 3, 12: 4}),
        (vit(layers=12), ["4", "2"], {4: 2, 12: 4}),
        (vit(layers=2), ["1", "2", "3", "4"], {1: 2, 2: 4}),
        (resnet(layers=4), ["1", "2", "3", "4"], {1: 1, 2: 2, 3: 3, 4: 4}),
        (bert(layers=4), ["uniform"], {1: 1, 2: 2, 3: 3, 4: 4}),
    ],
)
def test_stages_are_counted_otherwise(student, stages, places):
    objective = OFA(OFAConfig(ofa_stages=stages, ofa_eps=[1.0]))
    objective.setup(student, None)
    assert objective.places == {f"hidden_states.{layer}": stage for layer, stage in places.items()}


def test_each_stage_does_not_have_its_own_eps():
    objective = OFA(OFAConfig(ofa_stages=["2", "4"], ofa_eps=[1.1, 1.2, 1.3]))
    objective.setup(vit(layers=2), None)
    assert objective._eps() == [1.1, 1.2, 1.3]
    shallow = OFA(OFAConfig(ofa_eps=[1.1, 1.2, 1.3, 1.4, 1.5]))
    shallow.setup(vit(layers=2), None)
    assert shallow._eps() == [1.2, 1.4, 1.5]


def test_pooled_features_get_a_branch():
    with pytest.raises(ValueError, match="before the pooling"):
        OFA(OFAConfig(ofa_stages=["embedding"])).setup(vit(), None)


# ---- runs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_alone_does_not_move_the_stage_it_leaves(family, tmp_path):
    student = FAMILIES[family](layers=2, seed=1)
    objective = OFA(OFAConfig(ofa_stages=["hidden_states.1"], kd_loss_weight=0.0, gt_loss_weight=0.0))
    done = trainer(tmp_path, family, objective, student=student, learning_rate=1.0)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    done.train()
    moved = {n for n, p in student.named_parameters() if n in before and not torch.equal(p, before[n])}
    layer = {"vit": "vit.layers.", "bert": "encoder.layer.", "resnet": "encoder.stages."}[family]
    assert any(layer + "0." in name for name in moved)
    assert not any(layer + "1." in name or "classifier" in name for name in moved)
    assert set(done.state.log_history[0]) >= {"loss/label", "loss/head", "loss/branch1"}


def test_the_exported_student_holds_a_branch(tmp_path):
    student = vit(seed=1)
    names = set(student.state_dict())
    run = ofa_kd.build_trainer(
        student,
        FrozenTeacher(resnet(seed=2)),
        dataset("vit"),
        OFAConfig(),
        plain_arguments(tmp_path / "out", **SGD | {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}),
        eval_dataset=dataset("vit", 5),
    )
    run.train()
    assert {"eval_branch1", "eval_branch2", "eval_head"} <= run.evaluate().keys()
    kept = load_file(tmp_path / "out" / "checkpoint-2" / "distill_objective.safetensors")
    assert any("branches.0.blocks" in name for name in kept)
    run.save_model(tmp_path / "out")
    clean = run.student()
    assert set(clean.state_dict()) == names
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    loaded = type(clean).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(loaded(**pixels).logits, clean(**pixels).logits)


def test_a_map_branch_does_not_say_that_it_couples_a_batch():
    for student, coupled in ((resnet(), True), (vit(), False)):
        objective = OFA()
        objective.setup(student, None)
        assert bool(objective.couples_batch) == coupled


def test_an_early_exit_learns_nothing():
    """Images whose quarter is bright; a sure teacher; the first stage's branch must tell the quarters apart."""
    torch.manual_seed(0)
    student = resnet(hidden=8, layers=4, seed=0).train()
    objective = OFA(OFAConfig())
    objective.setup(student, None)
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (96,), generator=draw)
    pixels = 0.5 * torch.randn(96, 3, 16, 16, generator=draw)
    for i, label in enumerate(labels):
        pixels[i, :, 8 * (label // 2) :, 8 * (label % 2) :][:, :8, :8] += 1.0
    teacher = Signals(logits=4.0 * torch.nn.functional.one_hot(labels, 3).float())
    optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], lr=1e-2)

    def signals(rows):
        out = student(pixel_values=pixels[rows], output_hidden_states=True)
        features = {path: out.hidden_states[int(path.split(".")[1])] for path in objective.places}
        return Signals(logits=out.logits, labels=labels[rows], features=features)

    for _ in range(40):
        optimizer.zero_grad()
        terms = objective(signals(slice(0, 64)), Signals(logits=teacher.logits[:64]), 0.5)
        sum(term.value * term.weight for term in terms.values()).backward()
        optimizer.step()
    student.eval(), objective.eval()
    with torch.no_grad():
        held_out = signals(slice(64, 96))
        for path, branch in zip(objective.places, objective.branches, strict=True):
            accuracy = (branch(held_out.features[path]).argmax(-1) == labels[64:]).float().mean().item()
            assert accuracy > 0.6, (path, accuracy)
