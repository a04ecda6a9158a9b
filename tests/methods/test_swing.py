"""Swing: the loss per token, what noise depends on, every kind of data and teacher, and a canary that does not leak."""

import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

from hf_distill import CachedTeacher, FrozenTeacher, HeadLogits, Signals, cache_teacher
from hf_distill.curricula.collators import loss_rows
from hf_distill.curricula.privacy import likelihood_ratio_scores, rarity_scores
from hf_distill.evaluation.exposure import Canary, CanaryExposureCallback, measure_exposure
from hf_distill.losses import forward_kl
from hf_distill.methods.swing import (
    Swing,
    SwingConfig,
    build_trainer,
    distill,
    exposure,
    noise_keys,
    swing_kd_loss,
    token_temperature,
)
from hf_distill.signals import Rows
from hf_distill.teachers.referenced import ReferencedTeacher
from tests.helpers import plain_arguments, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.launching import run_worker

B, S, V = 2, 5, 7
WORDS = [f"w{i}" for i in range(20, 52)]


def inputs(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    student, teacher, noise = (2 * torch.randn(B, S, V, generator=draw, dtype=dtype) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], dtype=torch.bool)
    return student.requires_grad_(), teacher, mask, torch.rand(B, S, generator=draw), 0.1 * noise


# ---- the loss --------------------------------------------------------------------------------------------------------
def test_swing_kd_differs_from_a_loop_over_positions():
    student, teacher, mask, score, noise = inputs()
    expected = 0.0
    for b, s in mask.nonzero().tolist():
        temperature = 1 + 9 * score[b, s].double()
        target = ((teacher[b, s] / temperature).softmax(0) + score[b, s] * noise[b, s]).clamp(min=0)
        target = target / target.sum()
        log_q = (student[b, s] / temperature).log_softmax(0)
        expected += sum(t * (t.log() - q) for t, q in zip(target, log_q, strict=True) if t > 0) / mask.sum()
    ours = swing_kd_loss(student, teacher, mask, score, noise=noise)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda z: swing_kd_loss(z, teacher, mask, score, noise=noise), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_score_is_not_forward_kl_at_the_lowest_temperature(dtype):
    student, teacher, mask, score, noise = inputs(dtype)
    zero = torch.zeros_like(score)
    expected = forward_kl(student, teacher, mask=mask, temperature=2.0)
    torch.testing.assert_close(swing_kd_loss(student, teacher, mask, zero, t_min=2.0), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(swing_kd_loss(student, teacher, mask, zero, t_min=2.0, noise=noise), expected)
    zeros = torch.zeros_like(noise)
    torch.testing.assert_close(
        swing_kd_loss(student, teacher, mask, score, noise=zeros), swing_kd_loss(student, teacher, mask, score)
    )


def test_a_private_token_is_not_taught_the_uniform_distribution_or_its_neighbours_change():
    student, teacher, mask, score, _ = inputs()
    score = torch.zeros_like(score)
    (before,) = torch.autograd.grad(swing_kd_loss(student, teacher, mask, score), student)
    score[0, 1] = 1.0
    (after,) = torch.autograd.grad(swing_kd_loss(student, teacher, mask, score, t_max=1e6), student)
    assert torch.equal(before[0, [0, 2, 3, 4]], after[0, [0, 2, 3, 4]]) and torch.equal(before[1], after[1])
    assert after[0, 1].abs().max() < 1e-9
    target = (teacher[0, 1] / token_temperature(torch.ones(()), 1.0, 1e6)).softmax(0)
    assert -(target * target.log()).sum().item() == pytest.approx(math.log(V), rel=1e-9)


def test_the_gradient_of_a_private_token_does_not_shrink_with_the_square_of_its_temperature():
    student, teacher, mask, score, _ = inputs()
    score = torch.zeros_like(score)
    score[0, 1] = 1.0
    sizes = []
    for t_max in (100.0, 1000.0):
        (grad,) = torch.autograd.grad(swing_kd_loss(student, teacher, mask, score, t_max=t_max), student)
        sizes.append(grad[0, 1].norm().item())
    assert sizes[0] / sizes[1] == pytest.approx(100, rel=0.05)


def test_the_teacher_gets_a_gradient_or_an_empty_mask_gives_nan():
    student, teacher, mask, score, noise = inputs()
    teacher.requires_grad_()
    swing_kd_loss(student, teacher, mask, score, noise=noise).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert swing_kd_loss(student, teacher, torch.zeros_like(mask), score) == 0


def test_temperatures_are_averaged_or_wrong_ones_are_taken():
    assert token_temperature(torch.tensor([[0.0, 1.0], [0.25, 0.5]]), 2.0, 6.0).tolist() == [[2.0, 6.0], [3.0, 4.0]]
    for t_min, t_max in ((0.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="0 < t_min <= t_max"):
            token_temperature(torch.zeros(2), t_min, t_max)
    assert exposure([3.0, 1.0, 2.0, 4.0], 1) == 2.0


# ---- the config ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        {"swing_t_min": 0.0}, {"swing_t_max": 0.5}, {"swing_sigma": float("nan")}, {"swing_sigma": -1.0},
        {"swing_noise": "uniform"}, {"swing_noise": "laplace"}, {"swing_epsilon": 1.0},
        {"swing_noise": "laplace", "swing_epsilon": 0.0}, {"swing_weight": 1.5}, {"swing_scorer": "guess"},
        {"swing_scorer": "pattern+likelihood_ratio"}, {"swing_reference_model": "x"}, {"swing_scorer": "rarity"},
        {"swing_patterns": ["("]}, {"swing_k": 0.0}, {"swing_common": 1.0}, {"swing_canary_every": -1},
    ],
)  # fmt: skip
def test_wrong_settings_are_taken(settings):
    with pytest.raises(ValueError):
        SwingConfig(**settings)


def test_epsilon_is_not_a_budget():
    scales = [SwingConfig(swing_noise="laplace", swing_epsilon=e).scale for e in (10.0, 20.0)]
    assert scales == [0.1, 0.05] and SwingConfig(swing_noise="none").scale == 0.0


# ---- the objective ---------------------------------------------------------------------------------------------------
def batch_of(ids: torch.Tensor, mask: torch.Tensor | None, positions=None, **more) -> Signals:
    labels = ids.clone() if mask is None else ids.masked_fill(mask == 0, -100)
    if positions is not None:
        labels[positions == 0] = -100
    lengths = None if positions is None else [ids.shape[1]]
    rows = loss_rows(labels, positions, example_lengths=lengths)
    batch = {"input_ids": ids, "labels": labels} | more
    batch |= {k: v for k, v in (("attention_mask", mask), ("position_ids", positions)) if v is not None}
    return Signals(rows=Rows(*rows.values()), labels=rows["row_labels"], batch=batch)


def test_noise_depends_on_padding_packing_or_the_split_and_not_on_step_seed_and_text():
    first, second = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 6, 7])
    step = torch.tensor(3)
    alone = [noise_keys(batch_of(ids[None], torch.ones(1, len(ids))), 1, step) for ids in (first, second)]
    padded = torch.stack([first, torch.cat([second, torch.zeros(1, dtype=torch.int64)])])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    packed = torch.cat([first, second])[None], None, torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    for made in ((padded, mask), packed):
        assert torch.equal(noise_keys(batch_of(*made), 1, step), torch.cat(alone))
    every = torch.cat([*alone, noise_keys(batch_of(first[None], torch.ones(1, 4)), 1, step + 1),
                       noise_keys(batch_of(first[None], torch.ones(1, 4)), 2, step)])  # fmt: skip
    assert len(every.unique()) == len(every)


def signals() -> tuple[Signals, Signals, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8], [9, 6, 7, 0]])
    student = batch_of(ids, (ids > 0).long())
    score = torch.tensor([0.0, 1.0, 0.4, 0.6, 0.2])
    draw = torch.Generator().manual_seed(0)
    hidden, head, teacher = (torch.randn(n, 6, generator=draw) for n in (5, 12, 5))
    student = replace(student, logits=HeadLogits(hidden.requires_grad_(), head))
    student.batch["cached_target_privacy"] = score
    return student, Signals(logits=teacher @ head.T), score


def test_the_terms_are_not_the_formula():
    student, teacher, score = signals()
    objective = Swing(SwingConfig(swing_weight=0.3)).eval()
    terms = objective(student, teacher, 0.0)
    dense = student.logits.dense().detach()
    ce = torch.nn.functional.cross_entropy(dense, student.labels, reduction="none")
    torch.testing.assert_close(terms["label"].value, ((1 - score) * ce).mean())
    torch.testing.assert_close(terms["swing"].value, swing_kd_loss(dense, teacher.logits, None, score))
    assert (terms["label"].weight, terms["swing"].weight) == (0.7, 0.3)
    measured = [terms[name].value.item() for name in ("privacy_score", "private_share", "temperature")]
    assert measured == pytest.approx([score.mean().item(), 0.4, 1 + 9 * score.mean().item()])
    whole = Swing(SwingConfig(swing_mask_hard=False)).eval()(student, teacher, 0.0)
    torch.testing.assert_close(whole["label"].value, ce.mean())


@pytest.mark.parametrize("settings", [{}, {"swing_noise": "laplace", "swing_epsilon": 20.0}])
def test_noise_is_drawn_in_evaluation_or_is_the_same_at_every_step(settings):
    student, teacher, _ = signals()
    objective = Swing(SwingConfig(**settings), seed=1)
    value = lambda: objective(student, teacher, 0.0)["swing"].value.item()  # noqa: E731
    quiet = Swing(SwingConfig(swing_noise="none"))(student, teacher, 0.0)["swing"].value.item()
    first = value()
    assert first == value() != quiet
    objective.after_step({}, 0.0)
    assert value() != first
    assert Swing(SwingConfig(**settings), seed=2)(student, teacher, 0.0)["swing"].value.item() != first
    assert objective.eval() and value() == quiet
    assert Swing(SwingConfig(swing_sigma=0.0))(student, teacher, 0.0)["swing"].value.item() == quiet


def test_noise_everywhere_leaves_tokens_without_a_score_alone():
    student, teacher, score = signals()
    student.batch["cached_target_privacy"] = torch.zeros_like(score)
    quiet, scored, everywhere = (
        Swing(SwingConfig(**settings))(student, teacher, 0.0)["swing"].value.item()
        for settings in ({"swing_noise": "none"}, {}, {"swing_noise_everywhere": True})
    )
    assert quiet == pytest.approx(scored, rel=1e-6) and abs(everywhere - quiet) > 1e-4


def test_scores_of_several_scorers_are_not_the_largest(tmp_path):
    student, _, given = signals()
    counts = torch.arange(12)
    path = str(tmp_path / "counts.safetensors")
    save_file({"counts": counts}, path)
    config = SwingConfig(
        swing_scorer="given+rarity+likelihood_ratio", swing_public_counts=path, swing_common=8.0,
        swing_reference_model="x", swing_m=0.0,
    )  # fmt: skip
    ours, public = -torch.arange(5.0), torch.tensor([-1.0, -torch.inf, -2.0, -2.0, -9.0])
    teacher = Signals(features={"label_log_probs": ours, "reference_log_probs": public})
    each = given, rarity_scores(counts, 8.0)[student.labels], likelihood_ratio_scores(ours, public, 0)
    torch.testing.assert_close(Swing(config).scores(student, teacher), torch.stack(each).amax(0))
    del student.batch["cached_target_privacy"]
    with pytest.raises(ValueError, match="carries no privacy scores"):
        Swing().scores(student, teacher)


# ---- training --------------------------------------------------------------------------------------------------------
def canary_text(n: int = 24) -> Dataset:
    """Rows with numbers, which the tokenizer does not know: they are private all the same."""
    rows = text_dataset(n)["text"]
    return Dataset.from_dict({"text": [f"{row} 12345 w{i}" for i, row in enumerate(rows)]})


def trainer(folder, config=None, teacher=None, data=None, **settings):
    return build_trainer(
        settings.pop("student", None) or tiny_llama(seed=1),
        teacher or FrozenTeacher(tiny_llama(32, 3), tiny_tokenizer()),
        data or canary_text(),
        config or SwingConfig(),
        sft_arguments(folder, max_steps=2, per_device_train_batch_size=4, **settings),
        eval_dataset=canary_text(6),
        processing_class=tiny_tokenizer(),
    )


def logged(run) -> dict:
    run.train()
    return next(entry for entry in run.state.log_history if "loss/swing" in entry)


@pytest.mark.parametrize("packing", [False, True])
def test_scores_do_not_reach_their_targets(packing, tmp_path):
    run = trainer(tmp_path, packing=packing, max_length=32)
    batch = next(iter(run.get_train_dataloader()))
    unknown = tiny_tokenizer().unk_token_id
    assert torch.equal(batch["cached_target_privacy"] == 1, batch["row_labels"] == unknown)
    assert 0 < (batch["row_labels"] == unknown).sum() < len(batch["row_labels"])
    logs = logged(run)
    assert logs["loss/temperature"] == pytest.approx(1 + 9 * logs["loss/privacy_score"]) and logs["loss/private_share"]
    assert 0 < run.evaluate()["eval_privacy_score"] < 0.5


def test_a_teacher_with_all_its_logits_from_a_cache_gives_another_training(tmp_path):
    live = trainer(tmp_path / "live")
    cached = {}
    for mode, options in (("hidden", {"dtype": "float32"}), ("topk", {"k": 8})):
        cache_teacher(live.teacher, live, tmp_path / mode, mode=mode, **options)
        cached[mode] = CachedTeacher(str(tmp_path / mode))
    reference, from_cache = logged(live), logged(trainer(tmp_path / "cached", teacher=cached["hidden"]))
    for name in ("loss/swing", "loss/label", "loss/privacy_score"):
        assert from_cache[name] == pytest.approx(reference[name], rel=1e-5)
    with pytest.raises(ValueError, match="A temperature per token"):
        trainer(tmp_path / "topk-run", teacher=cached["topk"])


def test_the_reference_model_scores_wrongly_or_is_any_model(tmp_path):
    tiny_llama(seed=5).save_pretrained(tmp_path / "reference")
    tiny_tokenizer().save_pretrained(tmp_path / "reference")
    config = SwingConfig(
        swing_scorer="likelihood_ratio", swing_reference_model=str(tmp_path / "reference"), swing_m=0.5
    )
    run = trainer(tmp_path / "run", config)
    batch = next(iter(run.get_train_dataloader()))
    said = run.teacher(batch)
    log_probs = []
    for model in (run.teacher.teacher.model, tiny_llama(seed=5)):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        log_probs.append(logits.log_softmax(-1)[batch["loss_rows"], batch["row_labels"]])
    scores = run.objective.scores(Signals(labels=batch["row_labels"], batch=batch), said)
    torch.testing.assert_close(scores, likelihood_ratio_scores(*log_probs, 0.5), rtol=1e-4, atol=1e-5)
    assert 0 < logged(run)["loss/privacy_score"] < 1
    other = FrozenTeacher(tiny_llama(vocabulary=8), tiny_tokenizer())
    other._tokenizer = None
    assert ReferencedTeacher(run.teacher.teacher, other).vocabulary_size() == 8
    with pytest.raises(ValueError, match="the scorer likelihood_ratio needs what a public model says"):
        Swing(config).setup(tiny_llama(), FrozenTeacher(tiny_llama()))


def test_an_encoder_decoder_is_not_trained(tmp_path):
    def t5(seed: int) -> T5ForConditionalGeneration:
        torch.manual_seed(seed)
        sizes = dict(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
        return T5ForConditionalGeneration(T5Config(**sizes))

    rows = [{"input_ids": [5, 6, i], "labels": [7, i, 1], "privacy_score": [0.0, 1.0, 0.0]} for i in range(8, 16)]
    run = build_trainer(
        t5(0), t5(1), Dataset.from_list(rows), SwingConfig(swing_scorer="given"),
        plain_arguments(tmp_path, max_steps=1, per_device_train_batch_size=8), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    batch = next(iter(run.get_train_dataloader()))
    assert torch.equal(batch["cached_target_privacy"] == 1, batch["row_labels"] >= 8)
    assert logged(run)["loss/privacy_score"] == pytest.approx(1 / 3)


# ---- canaries --------------------------------------------------------------------------------------------------------
def canaries() -> list[Canary]:
    return [Canary("w1 w2 w3 {}", "w33", WORDS), Canary("w4 w5 {} w6", "w22", WORDS)]


def logged_with_canaries(folder) -> list[dict]:
    listed = [{"template": c.template, "secret": c.secret, "space": list(c.space)} for c in canaries()]
    with open(f"{folder}/canaries.json", "w", encoding="utf-8") as file:
        json.dump(listed, file)
    config = SwingConfig(swing_canaries=f"{folder}/canaries.json", swing_canary_every=2)
    run = build_trainer(
        tiny_llama(seed=1), FrozenTeacher(tiny_llama(32, 3), tiny_tokenizer()), canary_text(), config,
        sft_arguments(f"{folder}/run", max_steps=3, per_device_train_batch_size=2, logging_steps=5),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    run.train()
    history = next(c for c in run.callback_handler.callbacks if isinstance(c, CanaryExposureCallback)).history
    kept = [{k: v for k, v in e.items() if k.startswith(("privacy", "step"))} for e in run.state.log_history]
    return [*kept, {"history": history}]


def test_exposure_is_not_logged_before_and_after_or_differs_between_ranks(tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    alone = logged_with_canaries(tmp_path / "one")
    before, after = alone[0], [entry for entry in alone if "privacy/exposure_1" in entry]
    assert [entry["step"] for entry in after] == [2, 3]
    assert set(before) >= {"privacy/exposure_mean_before", "privacy/exposure_mean", "privacy/exposure_max"}
    untrained = measure_exposure(tiny_llama(seed=1), tiny_tokenizer(), canaries())
    assert before["privacy/exposure_mean_before"] == pytest.approx(sum(untrained.values()) / 2)
    assert [step for step, _ in alone[-1]["history"]] == [0, 2, 3]
    run_worker("tests/methods/swing_worker.py", tmp_path / "two", ranks=2)
    first, second = (json.loads((tmp_path / "two" / f"rank-{r}.json").read_text()) for r in (0, 1))
    assert first == second and first[0]["privacy/exposure_mean_before"] == before["privacy/exposure_mean_before"]


def test_a_canary_longer_than_the_context_is_planted(tmp_path):
    callback = CanaryExposureCallback(canaries())
    run = trainer(tmp_path, max_length=3)
    run.add_callback(callback)
    with pytest.raises(ValueError, match="has 4 tokens and the context 3"):
        run.train()


def test_a_secret_leaks_as_much_as_by_plain_kd(tmp_path):
    """A teacher that knows a secret; students see its place among other rows."""
    canary, tokenizer = Canary("w1 w2 w3 {}", "w33", WORDS), tiny_tokenizer()
    data = Dataset.from_dict({"text": [*text_dataset(16)["text"], *[canary.text()] * 8]})
    scores = [[float(t == canary.text() and i == 3) for i in range(len(t.split()) + 1)] for t in data["text"]]
    data = data.add_column("privacy_score", scores)
    plain = dict(swing_scorer="given", swing_t_max=1.0, swing_noise="none", swing_mask_hard=False)
    settings = dict(max_steps=60, per_device_train_batch_size=12, learning_rate=1e-2, logging_steps=60)
    run = lambda name, teacher, config, student: distill(  # noqa: E731
        student, teacher, data, config, sft_arguments(tmp_path / name, **settings), processing_class=tokenizer
    )
    alone = SwingConfig(**plain | {"swing_weight": 0.0})
    teacher = run("teacher", FrozenTeacher(tiny_llama(), tokenizer), alone, tiny_llama(32, seed=3))
    known = math.log2(len(WORDS))
    assert measure_exposure(teacher, tokenizer, [canary])[canary.text()] == known
    found = {}
    for name, config in (("kd", SwingConfig(**plain)), ("swing", SwingConfig(swing_scorer="given"))):
        student = run(name, FrozenTeacher(teacher, tokenizer), config, tiny_llama(seed=2))
        found[name] = measure_exposure(student, tokenizer, [canary])[canary.text()]
    assert found["kd"] == known and found["swing"] < 0.6 * known, found
