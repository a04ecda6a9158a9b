"""Learning from written texts: counts are taken after it, and what cannot be done is said before anything is."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_distill import DistillSFTConfig, DistillSFTTrainer, FrozenTeacher, LogitKD
from hf_distill.methods import taid
from tests.helpers import SGD, relative_difference, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer
from tests.training.onpolicy_runs import Seen, loop_loss, questions, trainer_of


def run(folder, **settings):
    seen = Seen()
    trainer = trainer_of(folder, callbacks=[seen], **settings)
    trainer.train()
    return trainer, seen


def doubles(seed_student=1, seed_teacher=2):
    return tiny_llama(16, 2, seed=seed_student).double().eval(), tiny_llama(32, 3, seed=seed_teacher).double().eval()


def rows_of(batch: dict) -> set[tuple[int, ...]]:
    """The rows' tokens without padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return {tuple(token for token, m in zip(ids, mask, strict=True) if m) for ids, mask in rows}


# ---- what is counted -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size, steps", [(4, 2), (2, 4)])
def test_sampled_texts_are_divided_by_another_count_than_their_own(tmp_path, size, steps):
    """Mixed: some micro-batches of the window are the data's. Against a loop in float64 over what was learnt from."""
    _, seen = run(
        tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, lmbda=0.5, max_steps=1, seed=11
    )
    student, teacher = doubles()
    loss, count = loop_loss(seen.batches, student, teacher)
    loss.backward()
    assert len(seen.batches) == steps and 0 < len(seen.texts) < steps, "the window is mixed"
    assert seen.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    expected = {n: p.grad.float() for n, p in student.named_parameters()}
    assert relative_difference(seen.gradients[0], expected) < 1e-5
    of_data = sum(len(ids) for ids in trainer_of(tmp_path / "data").train_dataset["labels"])
    assert count != of_data


def test_the_gradient_depends_on_how_greedy_texts_were_split(tmp_path):
    """The likeliest token needs no draws, so that every split writes the same texts."""
    found = []
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        _, seen = run(tmp_path / str(size), lmbda=1.0, sampling_temperature=0.0, max_steps=1, **settings)
        found.append((seen.gradients[0], seen.losses[0]))
        assert seen.logs[0]["on_policy/share"] == 1.0
    for gradient, loss in found[1:]:
        assert relative_difference(gradient, found[0][0]) < 1e-5 and loss == pytest.approx(found[0][1], rel=1e-6)


def test_without_chance_a_run_differs_from_one_off_policy(tmp_path):
    _, plain = run(tmp_path / "plain", dropout=0.2)
    _, zero = run(tmp_path / "zero", dropout=0.2, lmbda=0.0, sampling_temperature=0.7, max_completion_length=3)
    assert zero.logs == plain.logs
    assert zero.batches == plain.batches and not zero.texts
    assert all("on_policy/share" not in log for log in zero.logs)


def test_the_same_prompts_get_the_same_texts_in_every_micro_batch_or_step(tmp_path):
    settings = dict(same=True, lmbda=1.0, sampling_temperature=3.0, per_device_train_batch_size=2)
    _, seen = run(tmp_path / "a", gradient_accumulation_steps=2, max_steps=2, **settings)
    _, again = run(tmp_path / "b", gradient_accumulation_steps=2, max_steps=2, **settings)
    _, other = run(tmp_path / "c", gradient_accumulation_steps=2, max_steps=2, seed=7, **settings)
    drawn = [str(completions) for _, completions in seen.texts]
    assert len(drawn) == 4 == len(set(drawn)) and seen.texts == again.texts
    assert not set(drawn) & {str(completions) for _, completions in other.texts}


def test_what_is_logged_or_announced_is_not_what_was_learnt_from(tmp_path):
    tokenizer = tiny_tokenizer()
    _, seen = run(tmp_path, lmbda=1.0, max_steps=1)
    batch, log = seen.batches[0], seen.logs[0]
    lengths = [0] * 4
    for index in batch["loss_rows"]:
        lengths[index // len(batch["input_ids"][0])] += 1
    assert log["on_policy/length"] == sum(lengths) / 4
    ended = [row for row in range(4) if 1 in batch["input_ids"][row]]
    assert log["on_policy/truncated"] == 1 - len(ended) / 4
    assert log["num_tokens"] == sum(map(sum, batch["attention_mask"]))
    (prompts, completions), given = seen.texts[0], set(questions(8)["prompt"])
    assert set(prompts) <= given
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = [i for i, m in zip(batch["input_ids"][row], batch["attention_mask"][row], strict=True) if m]
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"{prompt} {completion}".strip()


def test_an_adapter_is_left_out_of_the_samples(tmp_path):
    """LoRA whose update is large: the texts are the adapted student's, and only the adapter learns."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    settings = dict(lmbda=1.0, sampling_temperature=0.0, max_steps=1)
    trainer, seen = run(tmp_path / "lora", peft_config=lora, **settings)
    _, plain = run(tmp_path / "plain", **settings)
    assert seen.texts[0][0] == plain.texts[0][0] and seen.texts[0][1] != plain.texts[0][1]
    assert all("lora" in name for name in seen.gradients[0])
    assert trainer.model.training


def test_chats_are_answered_elsewhere_than_in_their_last_turn(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}w60 {% generation %}{{ m['content'] }} <eos>"
        "{% endgeneration %} {% else %}w59 {{ m['content'] }} {% endif %}{% endfor %}"
    )
    turns = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    data = Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in turns]}] * 4)
    seen = Seen()
    trainer = DistillSFTTrainer(
        tiny_llama(16, 2, seed=1),
        teacher=FrozenTeacher(tiny_llama(32, 3, seed=2)),
        objective=taid.TAID(taid.TAIDConfig()),
        args=sft_arguments(
            tmp_path, **SGD, max_length=32, max_steps=1, assistant_only_loss=True, lmbda=1.0, max_completion_length=4
        ),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[seen],
    )
    trainer.train()
    assert set(seen.texts[0][0]) == {"w59 w1 w2 w60 w3 w59 w4 w60"}
    assert len(seen.batches[0]["loss_rows"]) <= 8 * 4, "earlier answers are context now"
    assert "loss/taid" in seen.logs[0]


# ---- the teacher's texts, and a share that moves ---------------------------------------------------------------------
def test_the_teacher_writes_a_text_twice_or_another_one_in_the_next_epoch(tmp_path):
    trainer, seen = run(tmp_path, rows=4, seq_kd=True, max_steps=3, dropout=0.1)
    answers = [rows_of(batch) for batch in seen.batches]
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 4
    assert trainer._writer.usage.requests == 4 and trainer._writer.usage.cache_hits == 8
    assert (tmp_path / "teacher_texts" / "teacher.json").is_file()
    assert not seen.texts and seen.logs[0]["on_policy/share"] == 0
    given = {tuple(ids) for ids in trainer_of(tmp_path / "data", rows=4).train_dataset["input_ids"]}
    assert not given & answers[0], "the data's own completions were learnt"
    # a likelier text to the teacher than the data's
    teacher = tiny_llama(32, 3, seed=2).eval()

    def nll(texts):
        with torch.no_grad():
            return sum(float(teacher(torch.tensor([t]), labels=torch.tensor([t])).loss) for t in texts) / len(texts)

    assert nll(answers[0]) < nll(given)


def test_a_share_that_is_set_while_training_comes_late_or_never(tmp_path):
    class Sets(Seen):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.trainer.set_lmbda(1.0)

    seen = Sets()
    seen.trainer = trainer = trainer_of(tmp_path, callbacks=[seen], max_steps=3)
    trainer.train()
    assert len(seen.texts) == 2 and [log.get("on_policy/share") for log in seen.logs][1:] == [1.0, 1.0]
    assert trainer.lmbda == 1.0


def test_an_adaptive_share_stays_where_the_validation_loss_rises(tmp_path):
    """A learning rate that is far too high."""
    trainer, seen = run(
        tmp_path, rows=16, lmbda=0.2, lmbda_schedule="adaptive", eval_strategy="steps", eval_steps=1, max_steps=5,
        learning_rate=30.0, lmbda_step=0.4, replay_capacity=4, objective=LogitKD(label_weight=1.0, kd_weight=0.0),
    )  # fmt: skip
    values = [log["eval_cross_entropy"] for log in trainer.state.log_history if "eval_cross_entropy" in log]
    assert max(values) > values[0] + 0.1, "the case is one where it rises"
    assert trainer.lmbda >= 0.6 and len(trainer._policy.buffer) == 4
    assert sum(log["on_policy/replayed"] for log in seen.logs) > 0


# ---- what is refused -------------------------------------------------------------------------------------------------
SETTINGS = {
    "a share above 1": (dict(lmbda=1.5), "lmbda must lie between 0 and 1, got 1.5"),
    "a share that is nan": (dict(lmbda=float("nan")), "lmbda must lie between 0 and 1"),
    "a schedule of another name": (dict(lmbda_schedule="cosine"), "constant, linear, adaptive.*cosine"),
    "adaptive without validation": (dict(lmbda_schedule="adaptive"), "set eval_strategy"),
    "a negative temperature": (dict(sampling_temperature=-1.0), "sampling_temperature.*-1.0"),
    "no room": (dict(max_completion_length=0), "max_completion_length must be at least 1"),
    "top_p of 0": (dict(sampling_top_p=0.0), "sampling_top_p"),
    "a text of the teacher never used": (dict(lmbda=1.0, seq_kd=True), "no text of the teacher"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_cannot_be_meant_is_taken(tmp_path, case):
    settings, message = SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        DistillSFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_a_run_that_cannot_write_starts(tmp_path):
    def refused(message, error=ValueError, data=None, **settings):
        with pytest.raises(error, match=message):
            if data is None:
                trainer_of(tmp_path, **settings)
            else:
                args = sft_arguments(tmp_path, max_steps=1, **settings)
                DistillSFTTrainer(
                    tiny_llama(), teacher=FrozenTeacher(tiny_llama(32)), args=args, train_dataset=data,
                    processing_class=tiny_tokenizer(),
                )  # fmt: skip

    refused("packing or padding_free.*every row is one prompt", lmbda=0.5, packing=True)
    refused("first example has none.*prompt and\n? ?completion", data=text_dataset(4), lmbda=0.5)
    refused("pip install 'trl\\[vllm\\]'", error=ImportError, lmbda=0.5, use_vllm=True)
    refused("was not tried with a compiled student", lmbda=0.5, torch_compile=True)
    trainer = trainer_of(tmp_path)
    trainer.teacher.readers = ("a cache's",)
    with pytest.raises(ValueError, match="read from a cache.*own texts only.*live teacher"):
        trainer.set_lmbda(0.5)
    assert trainer.lmbda == 0.0


def test_the_engine_of_trl_takes_other_arguments_than_ours():
    """vLLM is not here; what would be asked of TRL's helper is."""
    import inspect

    from trl.generation.vllm_generation import VLLMGeneration

    from hf_distill.training import compat

    call = inspect.getsource(compat.vllm_generation).split("VLLMGeneration(")[1]
    asked = {line.split("=")[0].strip() for line in call.splitlines() if "=" in line}
    assert asked <= set(inspect.signature(VLLMGeneration.__init__).parameters) and "temperature" in asked
    assert list(inspect.signature(VLLMGeneration.generate).parameters)[1:4] == ["prompts", "images", "num_generations"]
    assert not list(inspect.signature(VLLMGeneration.sync_weights).parameters)[1:]
