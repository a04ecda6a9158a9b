"""LELP: its fit, targets and loss, both ways out, and what the split is worth."""

import math

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from hf_distill import FrozenTeacher
from hf_distill.methods import lelp
from hf_distill.methods.lelp import (
    LELP,
    LELPConfig,
    fit_moments,
    lelp_class_probs,
    lelp_fit,
    lelp_loss,
    lelp_moments,
    lelp_targets,
    random_rotations,
)
from hf_distill.students.heads import subclass_head
from tests.baselines.models import FAMILIES, bert, dataset
from tests.helpers import SGD, plain_arguments

D64 = torch.float64


def embeddings(n=60, width=9, classes=2):
    """Classes with means far from 0 and directions of unlike size."""
    size = torch.linspace(3, 0.3, width, dtype=D64)
    labels = torch.arange(n) % classes
    mean = 5 * torch.randn(classes, width, dtype=D64)
    return mean[labels] + size * torch.randn(n, width, dtype=D64), labels


def setting(**options):
    h, y = embeddings()
    head = torch.randn(2, 9, dtype=D64)
    return h, y, head, lelp_fit(h, y, head, 3, **options)


# ---- the fit ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("null_space", [True, False])
def test_scores_are_not_those_of_the_steps_written_out(null_space):
    h, y, head, _ = setting()
    rotations = random_rotations(2, 3, 7)
    fit = lelp_fit(h, y, head, 3, null_space, rotations)
    p = torch.eye(9, dtype=D64)
    if null_space:
        v = torch.linalg.qr(head.T)[0]
        p = p - v @ v.T
    for c in range(2):
        own = (h @ p)[y == c]
        mean = own.mean(0)
        directions = torch.linalg.svd(own - mean, full_matrices=False)[2][:3].T
        for s in range(3):
            if directions[directions[:, s].abs().argmax(), s] < 0:
                directions[:, s] *= -1
        undivided = (h @ p - mean) @ directions @ rotations[c]
        scale = undivided[y == c].square().mean().sqrt()
        torch.testing.assert_close(fit.scores(h)[:, c], undivided / scale)


def test_sums_over_parts_give_another_fit():
    h, y, head, fit = setting()
    parts = [lelp_moments(h[rows], y[rows], 2) for rows in (slice(0, 11), slice(11, 60))]
    again = fit_moments({k: parts[0][k] + parts[1][k] for k in parts[0]}, head, 3)
    torch.testing.assert_close(again.directions, fit.directions)
    torch.testing.assert_close(again.offset, fit.offset)


def test_what_the_head_reads_moves_a_score():
    h, _, head, fit = setting()
    torch.testing.assert_close(fit.scores(h + torch.randn(60, 2, dtype=D64) @ head), fit.scores(h))
    full = lelp_fit(h, torch.arange(60) % 2, head, 3, null_space=False)
    assert (full.scores(h + head.sum(0)) - full.scores(h)).abs().max() > 1e-2


def test_a_class_of_scores_is_not_of_size_one_or_not_evened_out():
    ratios = {"own": [], "rotated": []}
    for seed in range(20):
        torch.manual_seed(seed)
        h, y = embeddings()
        head = torch.randn(2, 9, dtype=D64)
        for kind, rotations in (("own", torch.eye(3, dtype=D64).expand(2, 3, 3)), ("rotated", None)):
            scores = lelp_fit(h, y, head, 3, rotations=rotations, seed=seed).scores(h)[:, 0][y == 0]
            assert scores.square().mean().item() == pytest.approx(1.0)
            variance = scores.var(0)
            ratios[kind].append((variance.max() / variance.min()).log().item())
    assert sum(ratios["rotated"]) < 0.8 * sum(ratios["own"])


def test_rotations_are_no_rotations():
    r = random_rotations(4, 5, 3)
    torch.testing.assert_close(r @ r.mT, torch.eye(5, dtype=D64).expand(4, 5, 5))
    assert torch.equal(r, random_rotations(4, 5, 3)) and not torch.equal(r, random_rotations(4, 5, 4))


def test_a_fit_of_too_little_is_made():
    h, y, head, _ = setting()
    with pytest.raises(ValueError, match="more than 3 examples of every class, class 1 has 3"):
        lelp_fit(torch.cat([h[y == 0], h[y == 1][:3]]), torch.tensor([0] * 30 + [1] * 3), head, 3)
    with pytest.raises(ValueError, match="7 directions"):
        lelp_fit(h, y, head, 8)
    with pytest.raises(ValueError, match=r"class \[1\] are all alike"):
        lelp_fit(torch.where(y[:, None] == 1, h[1], h), y, head, 3)
    with pytest.raises(ValueError, match="labels must be 0 to 1"):
        lelp_fit(h, y + 1, head, 3)


def test_a_teacher_with_one_output_is_not_one_of_two_classes():
    h, y, head, _ = setting()
    both = torch.stack([torch.zeros(9, dtype=D64), head[0]])
    one, two = lelp_fit(h, y, head[:1], 3), lelp_fit(h, y, both, 3)
    torch.testing.assert_close(one.directions, two.directions)
    z = torch.randn(60, 1, dtype=D64)
    torch.testing.assert_close(lelp_targets(one, h, z), lelp_targets(two, h, torch.cat([torch.zeros_like(z), z], -1)))


# ---- targets and loss ------------------------------------------------------------------------------------------------
def test_targets_are_not_those_of_a_loop():
    h, _, _, fit = setting()
    t, z, q = torch.randn(60, 2, dtype=D64), fit.scores(h), None
    q = lelp_targets(fit, h, t, beta=0.7, temperature=2.0)
    for i in range(3):
        for c in range(2):
            for s in range(3):
                expected = (t[i] / 2).softmax(0)[c] * (z[i, c] / 0.7).softmax(0)[s]
                torch.testing.assert_close(q[i, c * 3 + s], expected)
    torch.testing.assert_close(q.sum(-1), torch.ones(60, dtype=D64))
    torch.testing.assert_close(q.view(60, 2, 3).sum(-1), (t / 2).softmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_not_that_of_a_loop(temperature):
    o, q = torch.randn(4, 6, dtype=D64, requires_grad=True), torch.rand(4, 6, dtype=D64)
    expected = 0.0
    for i in range(4):
        p = (o[i] / temperature).exp() / (o[i] / temperature).exp().sum()
        expected -= temperature**2 * (q[i] * p.log()).sum() / 4
    torch.testing.assert_close(lelp_loss(o, q, temperature), expected)
    assert torch.autograd.gradcheck(lambda o: lelp_loss(o, q, temperature), o)


def test_a_huge_beta_or_one_subclass_is_no_vanilla_kd():
    h, y, head, fit = setting()
    t, s = torch.randn(60, 2, dtype=D64), torch.randn(60, 2, dtype=D64, requires_grad=True)
    kd = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1).mean()
    (kd_gradient,) = torch.autograd.grad(kd, s)
    tied = s.repeat_interleave(3, -1)
    loss = lelp_loss(tied, lelp_targets(fit, h, t, beta=1e9))
    torch.testing.assert_close(loss, kd + math.log(3), rtol=1e-7, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(gradient, kd_gradient, rtol=1e-6, atol=1e-9)
    one = lelp_fit(h, y, head, 1)
    torch.testing.assert_close(lelp_loss(s, lelp_targets(one, h, t)), kd)


def test_class_probabilities_are_not_sums():
    o = torch.randn(4, 6, dtype=D64)
    torch.testing.assert_close(lelp_class_probs(o, 3), o.softmax(-1).view(4, 2, 3).sum(-1))


def test_a_target_gets_a_gradient():
    h, _, _, fit = setting()
    h = h.requires_grad_()
    assert not lelp_targets(fit, h, torch.randn(60, 2, dtype=D64, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    "wrong",
    [
        {"lelp_num_subclasses": 0},
        {"lelp_beta": 0.0},
        {"lelp_temperature": float("nan")},
        {"lelp_alpha": -1.0},
        {"lelp_alpha": float("nan")},
        {"lelp_export": "linear"},
    ],
)
def test_a_bad_setting_is_taken(wrong):
    with pytest.raises(ValueError, match="lelp_"):
        LELPConfig(**wrong)


# ---- runs ------------------------------------------------------------------------------------------------------------
SMALL = dict(lelp_num_subclasses=2)


def build(folder, family="bert", *, student=None, teacher=None, data=None, peft_config=None, n=12, config=None, **args):
    args = SGD | dict(max_steps=3, per_device_train_batch_size=4, per_device_eval_batch_size=4) | args
    return lelp.build_trainer(
        student if student is not None else FAMILIES[family](seed=1),
        teacher if teacher is not None else FrozenTeacher(FAMILIES[family](12, 3, seed=2)),
        data if data is not None else dataset(family, n),
        LELPConfig(**SMALL | (config or {})),
        plain_arguments(folder, **args),
        eval_dataset=dataset(family, 5) if data is None else data,
        peft_config=peft_config,
    )


def deterministic(seed=1):
    return bert(seed=seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.mark.parametrize("export", ["stock", "subclasses"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_does_not_train_or_leaves_unclean(family, export, tmp_path):
    run = build(tmp_path / "out", family, config={"lelp_export": export, "lelp_alpha": 0.1})
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    still = [n for n, p in run.model.named_parameters() if torch.equal(p, before[n])]
    assert not [n for n in still if "classifier" in n or "outputs" in n], still
    metrics = run.evaluate()
    assert 0 < metrics["eval_subclass_entropy"] <= math.log(2) + 1e-6
    assert ("eval_follow" in metrics) == (export == "stock")
    run.save_model(tmp_path / "out")
    student = run.student()
    assert (subclass_head(student) is not None) == (export == "subclasses")
    loaded, info = type(student).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    rows = {k: torch.as_tensor(v) for k, v in dataset(family, 4)[:4].items() if k not in ("labels", "index")}
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**rows).logits, student(**rows).logits)
    assert student(**rows).logits.shape == (4, 3)


def test_the_following_head_moves_the_rest_of_the_student(tmp_path):
    """Both ways out train the same student, but for its last layer."""
    students = {}
    for export in ("stock", "subclasses"):
        run = build(tmp_path / export, student=deterministic(), config={"lelp_export": export})
        run.train()
        students[export] = run.student().state_dict()
        head = run.objective.head if export == "stock" else run.student().classifier.outputs
        students[export]["head"] = head.weight.detach()
    stock, exact = students.values()
    for name in exact.keys() & stock.keys():
        torch.testing.assert_close(stock[name], exact[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(stock["classifier.weight"], deterministic().classifier.weight)


def test_the_directions_are_not_those_of_the_data(tmp_path):
    teacher = bert(12, 3, seed=2)
    run = build(tmp_path, teacher=FrozenTeacher(teacher), n=15)
    rows = dataset("bert", 15)[:]
    seen = []
    handle = teacher.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        teacher(input_ids=torch.tensor(rows["input_ids"]), attention_mask=torch.tensor(rows["attention_mask"]))
    handle.remove()
    fit = lelp_fit(seen[0], torch.tensor(rows["labels"]), teacher.classifier.weight, 2)
    torch.testing.assert_close(run.objective.state["directions"], fit.directions.float(), rtol=1e-3, atol=1e-4)
    assert list((tmp_path / "_passes").glob("lelp-*.safetensors"))


def test_data_without_labels_do_not_take_the_teachers_classes(tmp_path):
    data = dataset("bert", 30).remove_columns(["labels", "index"])
    teacher = bert(12, 3, seed=2)
    with torch.no_grad():  # so that it names every class
        said = teacher(**{k: torch.tensor(v) for k, v in data[:].items()}).logits
        teacher.classifier.weight.div_(said.std(0)[:, None])
        teacher.classifier.bias.copy_(-(said / said.std(0)).mean(0))
    run = build(tmp_path, teacher=FrozenTeacher(teacher), data=data, config={"lelp_num_subclasses": 1})
    run.train()
    assert "eval_lelp" in run.evaluate()


def test_a_head_beside_adapters_stays_frozen_or_unsaved(tmp_path):
    frozen = LoraConfig(r=2, target_modules=["query"])
    with pytest.raises(ValueError, match="modules_to_save"):
        build(tmp_path / "a", peft_config=frozen)
    for export in ("stock", "subclasses"):
        peft_config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        run = build(tmp_path / export, peft_config=peft_config, config={"lelp_export": export})
        before = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
        assert any("modules_to_save" in n for n in before)
        run.train()
        assert not [n for n, p in run.model.named_parameters() if n in before and torch.equal(p, before[n])]
        run.save_model(tmp_path / export)
        kept = load_file(tmp_path / export / "adapter_model.safetensors")
        assert any("classifier" in name for name in kept) and not any("distill" in name for name in kept)


@pytest.mark.parametrize("export", ["stock", "subclasses"])
def test_a_resumed_run_ends_elsewhere(export, tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2)
    ends = []
    for folder, resume in (("a", None), ("b", str(tmp_path / "a" / "checkpoint-2"))):
        run = build(tmp_path / folder, config={"lelp_export": export}, **settings)
        run.train(resume_from_checkpoint=resume)
        ends.append(load_file(tmp_path / folder / "checkpoint-4" / "model.safetensors"))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_saved_subclass_student_does_not_train_on_by_path(tmp_path):
    run = build(tmp_path / "a", config={"lelp_export": "subclasses"})
    run.train()
    run.save_model(tmp_path / "a")
    again = build(tmp_path / "b", student=str(tmp_path / "a"), config={"lelp_export": "subclasses"})
    assert again.objective.head is None
    again.train()
    with pytest.raises(ValueError, match="has 2 subclasses, lelp_num_subclasses=3"):
        build(tmp_path / "c", student=str(tmp_path / "a"), config={"lelp_num_subclasses": 3})


def two_label(data):
    return data.map(lambda row: {"labels": row["labels"] % 2})


def test_a_regression_teacher_does_not_teach_two_classes(tmp_path):
    torch.manual_seed(0)
    from transformers import BertForSequenceClassification

    config = bert(12, 3).config
    config.num_labels = 1
    teacher = BertForSequenceClassification(config).eval()
    rows = {"input_ids": torch.arange(8)[None] + 1}
    with torch.no_grad():
        one = teacher(**rows).logits
    student_config = bert().config
    student_config.num_labels = 2
    student = BertForSequenceClassification(student_config)
    run = build(tmp_path, student=student, teacher=FrozenTeacher(teacher), data=two_label(dataset("bert", 12)))
    with torch.no_grad():
        two = teacher(**rows).logits
    torch.testing.assert_close(two, torch.cat([torch.zeros_like(one), one], -1))
    run.train()
    with pytest.raises(ValueError, match="the student has 3 classes and the teacher 2"):
        build(tmp_path / "b", teacher=FrozenTeacher(teacher), data=two_label(dataset("bert", 12)))


def test_a_teacher_without_embeddings_or_an_unfitted_objective_is_taken(tmp_path):
    from hf_distill import DistillTrainer

    run = DistillTrainer(
        bert(seed=1),
        teacher=FrozenTeacher(bert(12, 3, seed=2)),
        objective=LELP(LELPConfig(**SMALL)),
        args=plain_arguments(tmp_path, max_steps=1),
        train_dataset=dataset("bert"),
    )
    with pytest.raises(ValueError, match="no directions yet"):
        run.train()
