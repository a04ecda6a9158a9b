"""Telemetry of routers: counts against the model's own choices, in our trainers and others, after a resume, drawn."""

import builtins
import json

import pytest
import torch
from transformers import Trainer

from hf_distill import DistillDPOTrainer, DistillSFTTrainer, LogitKD
from hf_distill.students import upcycle_to_moe
from hf_distill.training.routers import RouterTelemetryCallback, draw_expert_load
from tests.helpers import SGD, dpo_arguments, plain_arguments, sft_arguments, text_dataset, tiny_llama, tiny_tokenizer


def moe_student(**settings):
    return upcycle_to_moe(tiny_llama(layers=3), layers=[0, 2], router_std=0.5, **settings)


def trainer(folder, callback, student=None, objective=None, **settings):
    settings = dict(gradient_checkpointing=False, per_device_train_batch_size=4, max_steps=2) | SGD | settings
    return DistillSFTTrainer(
        student or moe_student(),
        teacher=tiny_llama(hidden=32, seed=7),
        objective=objective or LogitKD(),
        args=sft_arguments(folder, **settings),
        train_dataset=text_dataset(8),
        eval_dataset=text_dataset(4, seed=5),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
    )


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "expert_load.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_log_counts_other_tokens_than_the_model_routed(checkpointing, tmp_path):
    callback = RouterTelemetryCallback("expert")
    rate = dict(learning_rate=0.0, gradient_checkpointing=checkpointing)
    run = trainer(tmp_path, callback, max_steps=1, gradient_accumulation_steps=2, logging_steps=1, **rate)
    run.train()
    logged = run.state.log_history[0]
    batch = run.data_collator([run.train_dataset[i] for i in range(8)])
    keep = batch["attention_mask"].flatten().bool()
    assert not keep.all()
    model = moe_student()
    with torch.no_grad():
        out = model.model(batch["input_ids"], batch["attention_mask"], output_router_logits=True)
    entropies, loads = [], []
    for layer, logits in zip((0, 2), out.router_logits, strict=True):
        counts = logits[keep].topk(2).indices.flatten().bincount(minlength=4)
        loads += (counts / counts.sum()).tolist()
        for e in range(4):
            assert logged[f"expert_load/{layer}/{e}"] == pytest.approx(loads[-4 + e], abs=1e-6)
        entropies.append(
            torch.distributions.Categorical(logits=logits[keep]).entropy().mean() / torch.log(torch.tensor(4))
        )
    assert logged["expert_load/max"] == pytest.approx(max(loads)) and logged["expert_load/min"] == pytest.approx(
        min(loads)
    )
    assert logged["router_entropy"] == pytest.approx(sum(entropies).item() / 2, rel=1e-5)
    assert "dropped" not in logged
    assert not any(m._forward_hooks for m in run.student().modules() if "Router" in type(m).__name__ and m.training)


@pytest.mark.parametrize(("detail", "count"), [("summary", 3), ("layer", 7), ("expert", 11)])
def test_the_log_is_flooded(detail, count, tmp_path):
    run = trainer(tmp_path, RouterTelemetryCallback(detail))
    run.train()
    names = [name for name in run.state.log_history[0] if name.startswith(("expert_load", "router_entropy"))]
    assert len(names) == count
    assert [row["step"] for row in lines(tmp_path)] == [1, 2] and set(lines(tmp_path)[0]["load"]) == {"0", "2"}
    for row in lines(tmp_path):
        assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in row["load"].values())


def test_dropped_tokens_are_not_seen(tmp_path):
    shares = {}
    for capacity in (4.0, 0.5):
        run = trainer(tmp_path / str(capacity), RouterTelemetryCallback(), moe_student(capacity_factor=capacity))
        run.train()
        shares[capacity] = run.state.log_history[0]["dropped"]
    assert shares[4.0] == 0 and 0.3 < shares[0.5] < 0.7


def test_an_evaluation_is_counted(tmp_path):
    for name, settings in {"without": {}, "with": dict(eval_strategy="steps", eval_steps=1)}.items():
        run = trainer(tmp_path / name, RouterTelemetryCallback(), logging_steps=2, **settings)
        run.train()
    assert any("eval_loss" in log for log in run.state.log_history)
    assert lines(tmp_path / "with") == lines(tmp_path / "without")


def test_another_trainer_logs_nothing(tmp_path):
    callback = RouterTelemetryCallback()
    rows = [{"input_ids": [3 + i, 5, 6, 7], "labels": [3 + i, 5, 6, 7]} for i in range(8)]
    run = Trainer(
        moe_student(), plain_arguments(tmp_path, max_steps=2, **SGD), train_dataset=rows, callbacks=[callback]
    )
    run.train()
    assert [("expert_load/max" in log) for log in run.state.log_history[:2]] == [True, True]
    assert len(lines(tmp_path)) == 2


def test_preference_training_logs_nothing(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"w{i}", "chosen": f"w{i} w{i + 1}", "rejected": f"w{i + 2}"} for i in range(4)]
    run = DistillDPOTrainer(
        moe_student(),
        teacher=tiny_llama(hidden=32, seed=7),
        args=dpo_arguments(tmp_path, max_steps=1, **SGD),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[RouterTelemetryCallback()],
    )
    run.train()
    assert 0.25 <= run.state.log_history[0]["expert_load/max"] <= 1


def test_a_resumed_run_repeats_or_loses_lines(tmp_path):
    whole = trainer(tmp_path / "whole", RouterTelemetryCallback(), max_steps=4)
    whole.train()
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2)
    trainer(tmp_path / "killed", RouterTelemetryCallback(), **settings).train()
    resumed = trainer(tmp_path / "killed", RouterTelemetryCallback(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_the_picture_is_missing(tmp_path, monkeypatch, caplog):
    pytest.importorskip("matplotlib")
    trainer(tmp_path, RouterTelemetryCallback(), max_steps=3).train()
    picture = tmp_path / "expert_load.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    known = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return known(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level("INFO", logger="hf_distill"):
        assert not draw_expert_load(str(tmp_path / "expert_load.jsonl"), str(tmp_path / "other.png"))
    assert "matplotlib is not installed" in caplog.text and not (tmp_path / "other.png").exists()


def test_bad_input_is_accepted(tmp_path):
    with pytest.raises(ValueError, match="detail must be one of summary, layer, expert"):
        RouterTelemetryCallback("all")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routed layers"):
        trainer(tmp_path, RouterTelemetryCallback(), tiny_llama()).train()


def test_an_adapter_that_passes_over_the_experts_trains(tmp_path):
    from peft import LoraConfig

    from hf_distill import FrozenTeacher

    student = upcycle_to_moe(tiny_llama(), [0])
    given = dict(teacher=FrozenTeacher(tiny_llama()), args=sft_arguments(tmp_path), train_dataset=text_dataset(4))
    with pytest.raises(ValueError, match="would leave 3 of 3 expert and router parameters frozen"):
        DistillSFTTrainer(
            student, **given, processing_class=tiny_tokenizer(), peft_config=LoraConfig(target_modules="all-linear")
        )
