"""Objectives declare; the frame projects once, scales, and moves their state without casting it."""

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_distill import FeatureKD, LogitKD, NextToken, Objective
from hf_distill import objectives as module
from hf_distill.losses import LabelCrossEntropy, ReverseKL, reverse_kl
from hf_distill.objectives import SCHEDULES, Sum, hidden_size, sample_row_weights, scheduled
from hf_distill.signals import HeadLogits, Rows, Signals
from tests.helpers import tiny_llama

N, H, V = 6, 4, 11


def signals(seed: int, width: int = H, grad: bool = False) -> Signals:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, width, generator=draw).requires_grad_(grad)
    head = torch.randn(V, width, generator=draw)
    rows = Rows(torch.tensor([0, 1, 2, 4, 5, 7]), torch.arange(N), torch.tensor([0, 0, 0, 1, 1, 2]), torch.arange(3))
    states = (torch.randn(2, 4, width, generator=draw),)
    return Signals(HeadLogits(hidden, head), rows.labels, hidden_states=states, rows=rows)


# ---- declaring ------------------------------------------------------------------------------------------------------
def test_a_sum_is_flat_and_names_its_parts_apart():
    a, b, c = LogitKD(), LogitKD("tvd"), NextToken()
    total = 0.5 * (a + 2.0 * b) + c
    assert isinstance(total, Sum) and total.factors == [0.5, 1.0, 1.0]
    assert [prefix for prefix, _, _ in total.leaves()] == ["logitkd0/", "logitkd1/", "nexttoken/"]
    assert list(total.parts) == [a, b, c]
    assert total.uses_teacher and not (c + NextToken()).uses_teacher
    with pytest.raises(ValueError, match="must not be negative"):
        -1.0 * a + c


def test_added_logit_terms_meet_in_one_projection(monkeypatch):
    calls = []
    run = module.run_terms
    monkeypatch.setattr(module, "run_terms", lambda *a, **k: calls.append(list(a[2])) or run(*a, **k))
    objective = LogitKD(label_weight=1.0) + 0.5 * LogitKD("tvd") + NextToken()
    objective(signals(0), signals(1), 0.0)
    assert calls == [["logitkd0/label", "logitkd0/kd", "logitkd1/label", "logitkd1/kd", "nexttoken/label"]]
    calls.clear()
    (LogitKD() + LogitKD(per="sample"))(signals(0), signals(1), 0.0)
    assert len(calls) == 2, "one per distinct unit"


def test_terms_are_unweighted_means_with_their_weight_beside():
    student, teacher = signals(0), signals(1)
    terms = (LogitKD("reverse_kl", kd_weight=3.0) + 0.5 * LogitKD(label_weight=4.0))(student, teacher, 0.0)
    assert {n: t.weight for n, t in terms.items()} == {
        "logitkd0/label": 0.0,
        "logitkd0/kd": 3.0,
        "logitkd1/label": 2.0,
        "logitkd1/kd": 0.5,
    }
    expected = reverse_kl(student.logits.dense(), teacher.logits.dense())
    torch.testing.assert_close(terms["logitkd0/kd"].value, expected)


def test_a_term_per_sample_is_the_mean_of_its_documents_means():
    student, teacher = signals(0), signals(1)
    term = LogitKD("reverse_kl", per="sample")(student, teacher, 0.0)["kd"]
    rows = reverse_kl(student.logits.dense(), teacher.logits.dense(), reduction="none")
    expected = torch.stack([rows[:3].mean(), rows[3:5].mean(), rows[5:].mean()]).mean()
    torch.testing.assert_close(term.value, expected)
    assert term.per == "sample"
    torch.testing.assert_close(sample_row_weights(student).sum(), torch.tensor(float(N)))


class Selects(Objective):
    """The rows of document 1, counted against all rows."""

    def logit_terms(self, progress):
        return {"kd": ReverseKL(), "label": LabelCrossEntropy()}

    def row_weights(self, student, teacher, progress):
        return {"kd": (student.rows.document == 1).float()}


def test_row_weights_select_rows_and_leave_the_denominator():
    student, teacher = signals(0, grad=True), signals(1)
    terms = Selects()(student, teacher, 0.0)
    rows = reverse_kl(student.logits.dense(), teacher.logits.dense(), reduction="none")
    torch.testing.assert_close(terms["kd"].value, rows[3:5].sum() / N)
    sum(term.value for term in terms.values()).backward()
    assert student.logits.hidden.grad.abs().sum() > 0
    both = (0.5 * Selects() + LogitKD())(student, teacher, 0.0)
    torch.testing.assert_close(both["selects/kd"].value, rows[3:5].sum() / N)


class PerTerm(Objective):
    needs = frozenset({"teacher.hidden_states", "student.logits"})
    per = {"a": "sample", "b": "batch"}


def test_units_and_needs_may_differ_by_term_and_side():
    objective = PerTerm()
    assert [objective.per_of(t) for t in "abc"] == ["sample", "batch", "token"]
    assert objective.needs_of("student") == {"logits"} and objective.needs_of("teacher") == {"hidden_states"}
    assert (objective + LogitKD()).needs_of("student") == {"logits"}
    assert (objective + FeatureKD()).needs_of("student") == {"logits", "hidden_states"}


# ---- what lasts -----------------------------------------------------------------------------------------------------
class Keeps(Objective):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(2, 2)
        self.state = {"t": torch.tensor(0.4004, dtype=torch.float32), "steps": torch.tensor(3)}


def test_state_is_moved_but_never_cast():
    objective = Keeps()
    objective.bfloat16()
    assert objective.project.weight.dtype == torch.bfloat16
    assert objective.state["t"].dtype == torch.float32 and objective.state["t"] == 0.4004 * torch.ones(())
    objective.to("meta")
    assert objective.state["t"].device.type == "meta" and objective.state["steps"].dtype == torch.int64
    total = Keeps() + LogitKD()
    total.half()
    assert total.parts[0].state["t"].dtype == torch.float32
    parent = nn.Module()
    parent.add_module("distill_objective", Keeps())
    parent.to(torch.float64)
    assert parent.distill_objective.state["t"].dtype == torch.float32


def test_state_has_unique_names_and_goes_back_where_it_was():
    saved = {k: v.clone() for k, v in (Keeps() + Keeps()).state_tensors().items()}
    assert sorted(saved) == ["keeps0/steps", "keeps0/t", "keeps1/steps", "keeps1/t"]
    saved["keeps1/t"] += 1
    fresh = Keeps() + Keeps()
    fresh.load_state_tensors(saved)
    assert fresh.parts[1].state["t"] == saved["keeps1/t"] and fresh.parts[0].state["t"] != saved["keeps1/t"]
    assert not [k for k in fresh.state_dict() if "state" in k or k.endswith(".t")], "state is not broadcast by DDP"
    with pytest.raises(ValueError, match="started with"):
        (Keeps() + LogitKD()).load_state_tensors(saved)


class Records(Objective):
    def logit_terms(self, progress):
        return {"kd": ReverseKL()}

    def after_step(self, terms, progress):
        self.got = (terms, progress)


def test_after_a_step_each_part_gets_its_own_means():
    total = Records() + NextToken() + Records()
    values = {n: torch.tensor(float(i)) for i, n in enumerate(["records0/kd", "nexttoken/label", "records2/kd"])}
    total.after_step(values, 0.25)
    assert total.parts[0].got == ({"kd": values["records0/kd"]}, 0.25)
    assert total.parts[2].got[0]["kd"] == 2.0


# ---- for every day --------------------------------------------------------------------------------------------------
def test_schedules_start_end_and_stay():
    for name in SCHEDULES:
        assert scheduled(name, 2.0, None, 0.7) == 2.0 and scheduled(name, 2.0, 1.0, 0.0) == 2.0
    assert scheduled("linear", 2.0, 1.0, 0.25) == 1.75 and scheduled("cosine", 2.0, 1.0, 1.5) == pytest.approx(1.0)


def test_logit_kd_moves_weight_and_temperature_with_progress():
    objective = LogitKD(kd_weight=1.0, kd_weight_end=0.0, temperature=4.0, temperature_end=2.0, t_squared=True)
    assert objective.weights(0.0)["kd"] == 16.0 and objective.weights(0.5)["kd"] == 0.5 * 9.0
    assert objective.logit_terms(1.0)["kd"].temperature == 2.0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(divergence="kl"), "unknown divergence 'kl'; choose one of forward_kl"),
        (dict(kd_weight=-1.0), "kd_weight must not be negative"),
        (dict(kd_weight=float("nan")), "kd_weight must not be negative"),
        (dict(kd_weight=0.0), "all weights are zero"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(weight_schedule="steps"), "unknown weight_schedule 'steps'"),
        (dict(per="row"), 'per must be "token" or "sample"'),
        (dict(options={"beta": 1}), "beta"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LogitKD(**wrong)


@pytest.mark.parametrize("per", ["token", "sample"])
def test_feature_kd_is_the_mean_over_rows_or_documents(per):
    objective = FeatureKD(layers=((0, 0),), per=per)
    objective.setup(tiny_llama(16), tiny_llama(32))
    assert objective.projectors[0].weight.shape == (32, 16)
    student, teacher = signals(0, 16), signals(1, 32)
    value = objective.other_terms(student, teacher, 0.0)["feature"]
    ours, theirs = (s.hidden_states[0].flatten(0, 1)[student.rows.index] for s in (student, teacher))
    rows = (objective.projectors[0](ours) - theirs).pow(2).mean(-1)
    documents = torch.stack([rows[:3].mean(), rows[3:5].mean(), rows[5:].mean()])
    torch.testing.assert_close(value, rows.mean() if per == "token" else documents.mean())
    value.backward()
    assert objective.projectors[0].weight.grad.abs().sum() > 0


def test_feature_kd_ignores_padding_of_whole_samples():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    objective = FeatureKD(layers=((0, 0),))
    objective.projectors.append(nn.Identity())
    given = (Signals(hidden_states=(x,), batch={"attention_mask": mask}) for x in (student, teacher))
    error = (student - teacher).pow(2).mean(-1)
    expected = (error[0, :2].mean() + error[1].mean()) / 2
    torch.testing.assert_close(objective.other_terms(*given, 0.0)["feature"], expected)


def test_feature_kd_needs_no_projector_between_equal_widths():
    objective = FeatureKD()
    objective.setup(tiny_llama(16), tiny_llama(16))
    assert isinstance(objective.projectors[0], nn.Identity) and hidden_size(tiny_llama(16)) == 16


# ---- outside the package --------------------------------------------------------------------------------------------
@pytest.fixture
def example(monkeypatch):
    return lambda name: load_example(name, monkeypatch)


def load_example(name: str, monkeypatch):
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


QUIET = dict(use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=2)


def lines_of(cls) -> int:
    return len([line for line in inspect.getsource(cls).splitlines() if line.strip() and '"""' not in line])


def test_an_own_objective_is_fifteen_lines_and_trains(example, tmp_path):
    own = example("own_objective")
    assert lines_of(own.CosineFeatures) <= 15
    trainer = own.main(str(tmp_path), steps=12, logging_steps=1, **QUIET)
    terms = [line["loss/cosinefeatures/cosine"] for line in trainer.state.log_history if "loss" in line]
    assert len(terms) == 12 and sum(terms[-3:]) < sum(terms[:3])
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.002, 0.01}
    assert "project" not in " ".join(trainer.student().state_dict())


def test_an_own_callback_is_ten_lines_and_logs(example, tmp_path):
    own = example("own_callback")
    assert lines_of(own.TeacherConfidence) <= 10
    trainer = own.main(str(tmp_path), steps=5, **QUIET)
    logged = [line["teacher_entropy"] for line in trainer.state.log_history if "teacher_entropy" in line]
    assert len(logged) == 1 and 0 < logged[0] < 10


# ---- numbers that a schedule, a default or a mask must not shift ----------------------------------------------------
@pytest.mark.parametrize(
    ("schedule", "progress", "share"),
    [("linear", 0.25, 0.25), ("cosine", 0.25, 0.5 - 2**0.5 / 4), ("cosine", 0.5, 0.5), ("cosine", 1.0, 1.0)],
)
def test_a_schedule_passes_another_point(schedule, progress, share):
    assert scheduled(schedule, 1.0, 3.0, progress) == pytest.approx(1 + 2 * share)
    assert scheduled(schedule, 1.0, 3.0, -0.5) == 1.0 and scheduled(schedule, 1.0, 3.0, 1.5) == 3.0


@pytest.mark.parametrize("field", ["temperature", "temperature_end"])
@pytest.mark.parametrize("value", [0.0, -0.5, -2.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_taken(field, value):
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        LogitKD(**{field: value})
    LogitKD(**{field: 0.5})


def test_features_of_the_last_layers_are_not_the_default():
    assert FeatureKD().layers == ((-1, -1),) and FeatureKD().weights(0.5) == {"feature": 1.0}


def test_features_of_an_empty_sample_or_of_no_row_are_not_a_number():
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 4, H, generator=draw), torch.randn(2, 4, H, generator=draw)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    student, teacher = (Signals(hidden_states=(x,), batch={"attention_mask": mask}) for x in states)
    objective = FeatureKD()
    objective.projectors.append(nn.Identity())
    found = objective.other_terms(student, teacher, 0.0)["feature"]
    torch.testing.assert_close(found, (states[0] - states[1]).pow(2).mean(-1)[0, :2].mean() / 2)
    none = Rows(*(torch.zeros(0, dtype=torch.int64) for _ in range(4)))
    student, teacher = (Signals(hidden_states=(x,), rows=none) for x in states)
    assert objective.other_terms(student, teacher, 0.0)["feature"] == 0


class Halved(LogitKD):
    """A term whose rows are weighted."""

    def row_weights(self, student, teacher, progress):
        return {"kd": torch.linspace(0.25, 2.0, N)}


@pytest.mark.parametrize("per", ["token", "sample"])
def test_weights_of_rows_and_of_documents_are_not_multiplied(per):
    student, teacher = signals(0), signals(1)
    found = Halved(per=per)(student, teacher, 0.0)["kd"].value
    rows = module.run_terms(
        student.logits.hidden @ student.logits.weight.T,
        teacher.logits.hidden @ teacher.logits.weight.T,
        {"kd": (LogitKD().logit_terms(0.0)["kd"], 1.0)},
        reduction="none",
    )["kd"]
    weights = torch.linspace(0.25, 2.0, N)
    shared = sample_row_weights(student) if per == "sample" else 1.0
    torch.testing.assert_close(found, (rows * weights * shared).mean())


def test_what_is_only_observed_takes_part_in_another_projection(monkeypatch):
    calls = []
    run = module.run_terms
    monkeypatch.setattr(module, "run_terms", lambda *a, **k: calls.append(list(a[2])) or run(*a, **k))
    both = LogitKD(per="sample") + LogitKD("tvd")
    both(signals(0), signals(1), 0.0, observed={"seen": ReverseKL()})
    assert len(calls) == 2 and "seen" in next(names for names in calls if "logitkd1/kd" in names)
    calls.clear()
    terms = LogitKD(per="sample")(signals(0), signals(1), 0.0, observed={"seen": ReverseKL()})
    assert len(calls) == 1 and terms["seen"].per == "token"
