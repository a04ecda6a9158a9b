"""SinKD: the whole loss, what is drawn and gathered, and runs of every kind of model and teacher."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from hf_distill import DistillSFTTrainer, DistillTrainer, FrozenTeacher, cache_teacher
from hf_distill.losses import HeadLogits, SampledLogits, sinkhorn_distance
from hf_distill.methods import sinkd
from hf_distill.methods.sinkd import CARD, SinKD, SinKDConfig, build_trainer, sinkd_loss
from hf_distill.signals import MixtureLogits, Rows, Signals
from hf_distill.testing.runs import Case
from tests.baselines.models import trainer
from tests.helpers import (
    SGD,
    plain_arguments,
    relative_difference,
    sft_arguments,
    text_dataset,
    tiny_llama,
    tiny_tokenizer,
)
from tests.training import scaling_cases

D64 = torch.float64


def logits(rows: int = 6, classes: int = 4):
    draw = torch.Generator().manual_seed(0)
    s, t = (2 * torch.randn(rows, classes, generator=draw, dtype=D64) for _ in range(2))
    return s.requires_grad_(), t, torch.arange(rows) % classes


def soft_ce(s, t, temperature):
    return -((t / temperature).softmax(-1) * (s / temperature).log_softmax(-1)).sum(-1).mean()


# ---- the loss --------------------------------------------------------------------------------------------------------
def test_the_names_that_stay_are_gone():
    for name in ("sinkhorn_cost", "sinkhorn_plan", "sinkhorn_distance", "sinkd_loss"):
        assert callable(getattr(sinkd, name))


@pytest.mark.parametrize("temperature", [1.0, 3.5])
def test_the_loss_has_t_squared_or_other_weights(temperature):
    s, t, y = logits()
    expected = 0.7 * soft_ce(s, t, temperature) + 0.3 * cross_entropy(s, y)
    expected = expected + 0.8 * 0.01 * sinkhorn_distance(s, t, 1.5)
    own = sinkd_loss(s, t, y, 0.7, 0.8, temperature, 0.01, 1.5)
    torch.testing.assert_close(own, expected)
    assert torch.autograd.gradcheck(lambda s: sinkd_loss(s, t, y, 0.7, 0.8, temperature, 0.01, 1.5), s)


def test_a_regression_is_transported():
    s, t, y = torch.randn(5, 1, dtype=D64), torch.randn(5, 1, dtype=D64), torch.randn(5, dtype=D64)
    expected = 0.9 * (s - t).square().mean() / 2.5 + 0.1 * (s[:, 0] - y).square().mean()
    torch.testing.assert_close(sinkd_loss(s, t, y, 0.9, 0.8, 2.5, 1.0, 2.0), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sinkhorn_epsilon": 0.0}, "sinkhorn_epsilon must be positive"),
        ({"sinkhorn_temperature": math.nan}, "sinkhorn_temperature must be positive"),
        ({"kd_temperature": math.inf}, "kd_temperature must be positive"),
        ({"sinkhorn_weight": -1.0}, "sinkhorn_weight must not be negative"),
        ({"label_weight": math.nan}, "label_weight must not be negative"),
        ({"sinkhorn_iters": 0}, "sinkhorn_iters must be at least 1"),
        ({"sinkhorn_max_rows": 0}, "sinkhorn_max_rows must be at least 1"),
        ({"sinkhorn_reduction": "none"}, "sum or mean"),
        ({"kd_weight": 1.5}, "give label_weight"),
        ({"kd_weight": 0.0, "label_weight": 0.0, "sinkhorn_scale": 0.0}, "all weights are zero"),
    ],
)
def test_a_bad_number_passes(settings, message):
    with pytest.raises(ValueError, match=message):
        SinKDConfig(**settings)


# ---- the objective on signals ----------------------------------------------------------------------------------------
def of_signals(objective: SinKD, s, t, y=None):
    return objective(Signals(logits=s, labels=y), Signals(logits=t), 0.0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_objective_is_not_the_loss(reduction):
    s, t, y = logits()
    scale = 0.02 * (6 if reduction == "mean" else 1)
    config = SinKDConfig(sinkhorn_scale=scale, kd_temperature=3.0, sinkhorn_reduction=reduction, kd_weight=0.7)
    terms = of_signals(SinKD(config), s, t, y)
    ours = sum(term.value * term.weight for term in terms.values())
    expected = sinkd_loss(s, t, y, 0.7, 0.8, 3.0, 0.02, 2.0)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (ours, expected)))
    assert {name for name, term in terms.items() if term.per == "batch"} == {"sinkhorn", *sinkd.MEASURES}
    plan = sinkd.sinkhorn_plan(sinkd.sinkhorn_cost(s, t))
    assert terms["sinkhorn_plan_diagonal"].value.item() == pytest.approx(plan.diagonal().mean().item())
    assert terms["sinkhorn_row_error"].value.item() == pytest.approx((plan.sum(1) - 1).abs().mean().item())


def test_several_teachers_or_masked_rows_are_compared_otherwise():
    s, t, y = logits()
    two = MixtureLogits((t, t.flip(0)), torch.tensor([0.3, 0.7], dtype=D64))
    log_p = torch.log(0.3 * (t / 2).softmax(-1) + 0.7 * (t.flip(0) / 2).softmax(-1))
    ours = of_signals(SinKD(), s, two, y)["sinkhorn"].value
    torch.testing.assert_close(ours, sinkhorn_distance(s, 2 * log_p))
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    masked = SinKD()(Signals(logits=s, labels=y, mask=mask), Signals(logits=t), 0.0)["sinkhorn"].value
    torch.testing.assert_close(masked, sinkhorn_distance(s[mask.bool()], t[mask.bool()]))


def test_a_teacher_known_by_draws_is_compared():
    s, _, y = logits()
    drawn = SampledLogits(torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2), torch.zeros(6, 2), 2.0)
    with pytest.raises(ValueError, match="known by draws"):
        of_signals(SinKD(), s, drawn, y)


def test_the_drawn_rows_are_always_the_same_or_are_not_those_of_the_step():
    s, t, y = logits(40)
    made = SinKD(SinKDConfig(sinkhorn_max_rows=7))
    places = made._drawn(Signals(logits=s))
    assert len(places) == 7 and places.unique().tolist() == places.tolist()
    torch.testing.assert_close(of_signals(made, s, t, y)["sinkhorn"].value, sinkhorn_distance(s[places], t[places]))
    made.after_step({}, 0.1)
    later = made._drawn(Signals(logits=s))
    assert later.tolist() != places.tolist()
    again = SinKD(SinKDConfig(sinkhorn_max_rows=7))
    again.load_state_tensors(made.state_tensors())
    assert again._drawn(Signals(logits=s)).tolist() == later.tolist()
    assert made.eval()._drawn(Signals(logits=s)).tolist() == places.tolist(), "evaluation moves with the steps"
    other = SinKD(SinKDConfig(sinkhorn_max_rows=7, sinkhorn_seed=1))
    assert other._drawn(Signals(logits=s)).tolist() != places.tolist()
    counts = torch.zeros(40)
    for _ in range(400):
        counts[again._drawn(Signals(logits=s))] += 1
        again.after_step({}, 0.0)
    assert 40 < counts.min() and counts.max() < 110, "70 each on average"


def test_more_rows_are_compared_the_more_ranks_there_are():
    class OfThreeRanks(SinKD):
        _ranks = 3

    made = OfThreeRanks(SinKDConfig(sinkhorn_max_rows=7, gather_across_ranks=True))
    assert len(made._drawn(Signals(logits=torch.zeros(40, 2)))) == 2


def test_language_rows_are_compared_on_other_entries_than_the_teacher_s():
    draw = torch.Generator().manual_seed(3)
    s, t = (HeadLogits(*(torch.randn(n, 6, generator=draw, dtype=D64) for n in (9, 20))) for _ in "st")
    index = torch.arange(9)
    rows = Rows(index, index, torch.zeros_like(index), index[:1])
    values = {}
    for k in (4, 20):
        made = SinKD(SinKDConfig(sinkhorn_top_k=k))
        values[k] = made(Signals(logits=s, labels=index, rows=rows), Signals(logits=t), 0.0)["sinkhorn"].value
    torch.testing.assert_close(values[20], sinkhorn_distance(s.dense(), t.dense()))
    assert 0 < values[4] < values[20]
    small = HeadLogits(t.hidden, t.weight[:15])  # of a vocabulary that is padded less
    value = made(Signals(logits=s, labels=index, rows=rows), Signals(logits=small), 0.0)["sinkhorn"].value
    torch.testing.assert_close(value, sinkhorn_distance(s.dense()[:, :15], small.dense()))


def test_the_temperature_does_not_come_down_by_epochs():
    made = SinKD(SinKDConfig(kd_temperature=4.0, kd_anneal=True), epochs=4)
    assert [made.temperature_at(step / 40) for step in (0, 9, 10, 20, 39, 40)] == [4.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    assert made.logit_terms(0.5)["kd"].temperature == 2.0
    assert SinKD(SinKDConfig(kd_temperature=4.0, kd_anneal=True), epochs=1).temperature_at(0.9) == 4.0
    assert SinKD(SinKDConfig(kd_temperature=4.0, kd_anneal=True)).temperature_at(0.5) == 2.5
    assert SinKD(SinKDConfig(kd_temperature=4.0), epochs=4).temperature_at(0.9) == 4.0


def test_sinkhorn_that_has_not_converged_is_hidden_or_said_at_every_step(caplog):
    # rows 0 and 1 want the same teacher row
    s = torch.tensor([[9.0, 0.0], [8.0, 0.0], [0.0, 9.0]])
    t = torch.tensor([[9.0, 0.0], [0.0, 9.0], [0.0, 8.0]])
    made = SinKD(SinKDConfig(sinkhorn_epsilon=1e-3, sinkhorn_iters=3))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            terms = of_signals(made, s, t, torch.tensor([0, 0, 1]))
            assert all(term.value.isfinite() for term in terms.values())
            made.after_step({name: term.value for name, term in terms.items()}, 0.0)
            made.logs()
    said = [record.message for record in caplog.records if "has not converged after 3 iterations" in record.message]
    assert len(said) == 1 and "Raise sinkhorn_iters" in said[0]
    caplog.clear()
    calm = SinKD()
    calm.after_step({name: term.value for name, term in of_signals(calm, s, t, torch.tensor([0, 0, 1])).items()}, 0.0)
    calm.logs()
    assert not caplog.records


# ---- runs ------------------------------------------------------------------------------------------------------------
def test_a_classifier_s_run_hides_a_measure_or_draws_from_the_global_generator(tmp_path):
    done = trainer(tmp_path, "bert", SinKD(SinKDConfig(kd_anneal=True)), n=7, max_steps=4, learning_rate=0.01)
    done.train()
    first, *_, last = [entry for entry in done.state.log_history if "loss" in entry]
    names = {f"loss/{name}" for name in ("label", "kd", "sinkhorn", *sinkd.MEASURES)} | {"kd_temperature"}
    assert names <= first.keys() and first["kd_temperature"] == 2.0 > last["kd_temperature"]
    state = torch.get_rng_state()
    metrics = done.evaluate()
    assert torch.equal(torch.get_rng_state(), state) and 0 < metrics["eval_sinkhorn"] < 2 * 4


def test_a_regression_needs_classes(tmp_path):
    def model(seed, width):
        torch.manual_seed(seed)
        sizes = dict(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        return BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=1, **sizes))

    rows = [{"input_ids": [1 + i, 2, 3], "labels": i / 4} for i in range(8)]
    done = build_trainer(
        model(0, 8), model(1, 16), Dataset.from_list(rows), SinKDConfig(), plain_arguments(tmp_path, max_steps=2),
        eval_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    done.train()
    entry = next(entry for entry in done.state.log_history if "loss" in entry)
    assert {n for n in entry if n.startswith("loss/")} == {"loss/label", "loss/kd"} and entry["loss/kd"] > 0
    assert entry["loss"] == pytest.approx(0.1 * entry["loss/label"] + 0.9 * entry["loss/kd"], rel=1e-4)
    assert done.evaluate()["eval_kd"] > 0


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_is_not_trained(kind, tmp_path):
    case = scaling_cases.Case(kind=kind)
    student, teacher = scaling_cases.models(case)
    rows = [{"input_ids": [3 + i, 4, 5 + i], "labels": [6 + i, 7, 8]} for i in range(4)]
    args = plain_arguments(tmp_path, max_steps=2, learning_rate=0.05)
    done = build_trainer(
        student, teacher, Dataset.from_list(rows), SinKDConfig(), args, processing_class=tiny_tokenizer()
    )
    assert type(done) is DistillTrainer
    done.train()
    losses = [entry["loss/sinkhorn"] for entry in done.state.log_history if "loss" in entry]
    assert 0 < losses[1] != losses[0]


DATA = text_dataset(24)


def language_trainer(folder, teacher, config, **settings) -> DistillSFTTrainer:
    more = {name: settings.pop(name) for name in ("peft_config", "eval_dataset") if name in settings}
    settings = SGD | dict(max_steps=3, per_device_train_batch_size=4, train_sampling_strategy="sequential") | settings
    args = sft_arguments(folder, **settings)
    return build_trainer(tiny_llama(), teacher, DATA, config, args, processing_class=tiny_tokenizer(), **more)


def trained(run) -> dict:
    run.train()
    losses = [entry["loss/sinkhorn"] for entry in run.state.log_history if "loss" in entry]
    return {k: v.clone() for k, v in run.student().state_dict().items()} | {"losses": torch.tensor(losses)}


LARGE = dict(sinkhorn_scale=0.05, sinkhorn_top_k=8, sinkhorn_max_rows=20)  # the transport is seen, rows are drawn


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A teacher and the run that it gives."""
    teacher = FrozenTeacher(tiny_llama(32, seed=1), tiny_tokenizer(), name="tiny")
    return teacher, trained(language_trainer(tmp_path_factory.mktemp("live"), teacher, SinKDConfig(**LARGE)))


def test_a_cache_teaches_otherwise_or_one_that_does_not_suffice_is_used(live, tmp_path):
    teacher, expected = live
    config = SinKDConfig(**LARGE, kd_weight=0.0)
    run = language_trainer(tmp_path / "run", teacher, config)
    expected = {"topk": trained(run), "hidden": expected}
    for name, options in {"topk": {"k": 8, "temperature": 2.0, "dtype": "float32"}, "hidden": {}}.items():
        cache_teacher(teacher, run, tmp_path / name, mode=name, batch_size=4, **options)
        own = config if name == "topk" else SinKDConfig(**LARGE)
        ours = trained(language_trainer(tmp_path / f"from-{name}", str(tmp_path / name), own))
        assert relative_difference(ours, expected[name]) < 1e-4, name
    with pytest.raises(ValueError, match="temperature 2.0, the transport cost 3.0"):
        other = replace(config, sinkhorn_temperature=3.0)
        language_trainer(tmp_path / "other", str(tmp_path / "topk"), other).train()


def test_packing_changes_which_rows_are_compared(live, tmp_path):
    """All tokens of one packed row are those of its documents padded, in the same order."""
    config = SinKDConfig(**LARGE | {"sinkhorn_max_rows": 500})
    settings = dict(max_steps=1, per_device_train_batch_size=24, max_length=512)
    packed, padded = (
        trained(language_trainer(tmp_path / str(packing), live[0], config, packing=packing, **settings))
        for packing in (True, False)
    )
    torch.testing.assert_close(packed["losses"], padded["losses"], rtol=1e-4, atol=0)
    assert relative_difference(packed, padded) < 1e-3


def test_an_adapter_does_not_learn_or_resuming_draws_other_rows(live, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = dict(save_strategy="steps", save_steps=2, max_steps=4, peft_config=lora)
    whole = language_trainer(tmp_path / "a", live[0], SinKDConfig(**LARGE), **settings)
    expected = trained(whole)
    resumed = language_trainer(tmp_path / "b", live[0], SinKDConfig(**LARGE), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    ours = resumed.student().state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    moved = [name for name in ours if "lora_B" in name and ours[name].abs().sum() > 0]
    assert len(moved) == 4


# ---- ranks -----------------------------------------------------------------------------------------------------------
def gathered(case: Case, ranks: int) -> dict:
    """Two steps on the same rows: on one process all in one batch, on two with the rows of both as one set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = SinKDConfig(
        sinkhorn_scale=0.05 * ranks, gather_across_ranks=ranks > 1, sinkhorn_max_rows=500, sinkhorn_top_k=8
    )
    args = case.arguments(
        f"run-{ranks}", **SGD | dict(max_steps=2, per_device_train_batch_size=8 // ranks), gradient_accumulation_steps=1
    )
    run = build_trainer(
        case.setup.student(), case.setup.teacher(), case.setup.dataset(16), config, args,
        processing_class=case.setup.processing_class(),
    )  # fmt: skip
    run.train()
    assert run.accelerator.num_processes == ranks
    values = {n: p.detach().clone() for n, p in run.accelerator.unwrap_model(run.model).named_parameters()}
    for i, entry in enumerate(entry for entry in run.state.log_history if "loss" in entry):
        values |= {f"{k} {i}": torch.tensor(v) for k, v in entry.items() if k.startswith("loss/")}
        values[f"loss/sinkhorn {i}"] *= ranks
    return values


@pytest.mark.parametrize("modality", ["text-classification", "text"])
def test_rows_of_two_ranks_are_not_one_set(modality, tmp_path):
    case = Case(replace(CARD, modality=modality), tmp_path)
    one, both = case.run(gathered, 1), case.run(gathered, 2, ranks=2)
    for two in both:
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=2e-4, atol=1e-6, msg=name)
