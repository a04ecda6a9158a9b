"""What lies in the folders: a clean student, checkpoints whole or known to be half-written, nothing after a NaN."""

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback

from hf_distill import AdapterOffTeacher, DistillSFTTrainer, FeatureKD, FrozenTeacher, LogitKD
from hf_distill.training.saving import FILE
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
LORA = dict(r=4, target_modules="all-linear")


class Counting(LogitKD):
    """Remembers its optimizer steps; `poison` makes its term infinite from that step on."""

    def __init__(self, poison: int | None = None):
        super().__init__(label_weight=0.5)
        self.poison = poison
        self.state = {"steps": torch.zeros((), dtype=torch.int64)}

    def after_step(self, terms, progress):
        self.state["steps"] = self.state["steps"] + 1

    def other_terms(self, student, teacher, progress):
        bad = self.poison is not None and self.state["steps"] + 1 >= self.poison
        return {"extra": student.logits.hidden.sum() * (float("inf") if bad else 0.0)}


def make_trainer(
    folder, *, student=None, teacher=None, objective=None, lora=False, callbacks=None, eval_rows=0, **settings
):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    arguments = dict(
        max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, learning_rate=1e-2
    )
    return DistillSFTTrainer(
        tiny_llama() if student is None else student,
        teacher=teacher or FrozenTeacher(tiny_llama(32, 3, seed=1), tokenizer),
        objective=objective or Counting() + 0.3 * FeatureKD(),
        args=sft_arguments(folder, **arguments | settings),
        train_dataset=text_dataset(13),
        eval_dataset=text_dataset(eval_rows, seed=1) if eval_rows else None,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def files(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir() if path.is_file()}


def kept_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---- the student that leaves -----------------------------------------------------------------------------------------
LOADS_ALONE = """
import json, sys
sys.modules["hf_distill"] = None  # importing it fails
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
said = {}
for folder in sys.argv[1:]:
    name = folder.split("/")[-1]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    keys = {k: sorted(v) for k, v in info.items() if k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate = pipeline("text-generation", model=folder)
    new = generate("w1 w2 w3", min_new_tokens=4, max_new_tokens=4, return_tensors=True)[0]["generated_token_ids"]
    ids = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    said[name] = {
        "class": type(model).__name__, "keys": keys, "generated": len(new), "template": tokenizer.chat_template,
        "parameters": [n for n, _ in model.named_parameters()], "logits": model.eval()(ids).logits.flatten().tolist(),
        "end": model.generation_config.eos_token_id,
    }
print("RESULT" + json.dumps(said))
"""


def test_a_saved_student_does_not_load_without_this_package(tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    expected = {}
    for name, lora, merge in (("full", False, False), ("adapter", True, False), ("merged", True, True)):
        student = str(base) if lora else None
        trainer = make_trainer(tmp_path / name, student=student, lora=lora, merge_adapter=merge, save_steps=3)
        trainer.train()
        if merge:  # the adapter that a push during training would have left there
            shutil.copy(tmp_path / name / "checkpoint-3" / "adapter_config.json", tmp_path / name)
        trainer.save_model()
        ids = trainer.processing_class("w1 w2 w3", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected[name] = trainer.model.eval()(ids).logits.flatten()
        weights = {"adapter_model.safetensors", "adapter_config.json"} if name == "adapter" else {"model.safetensors"}
        assert weights <= files(tmp_path / name)
        assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= files(
            tmp_path / name
        )
        # what save_model and push_to_hub upload is this folder without its checkpoints
        for file in Path(tmp_path / name).glob("*.*"):
            if file.name != "training_args.bin" and file.is_file():
                assert b"distill_objective" not in file.read_bytes(), file
        assert FILE in files(tmp_path / name / "checkpoint-3")
        assert not {"model.safetensors"} & files(tmp_path / "merged" / "checkpoint-3") if merge else True
    assert not {"adapter_config.json", "adapter_model.safetensors"} & files(tmp_path / "merged")

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    folders = [str(tmp_path / name) for name in expected]
    done = subprocess.run(
        [sys.executable, "-c", LOADS_ALONE, *folders], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.split("RESULT")[1])
    for name, loaded in said.items():
        assert not any(loaded["keys"].values()), (name, loaded["keys"])
        assert not [n for n in loaded["parameters"] if "distill" in n or (name != "adapter" and "lora" in n)]
        assert loaded["class"] == "LlamaForCausalLM" and loaded["generated"] == 3 + 4
        assert (loaded["template"], loaded["end"]) == (TEMPLATE, 1)
        torch.testing.assert_close(torch.tensor(loaded["logits"]), expected[name], rtol=1e-4, atol=1e-4)


def test_the_student_handed_back_still_carries_something(tmp_path):
    objective = FeatureKD()  # never projects: its trainer freezes the head
    trainer = make_trainer(tmp_path, objective=objective, bf16=True, gradient_checkpointing=True, max_steps=1)
    trainer.train()
    assert not trainer.model.lm_head.weight.requires_grad
    student = trainer.student()
    plain = tiny_llama()
    assert student is trainer.model and not student.training
    assert dict(student.named_modules()).keys() == dict(plain.named_modules()).keys()
    assert all(p.requires_grad for p in student.parameters())
    assert not {"forward", "_original_forward"} & student.__dict__.keys()
    assert student.forward.__func__ is LlamaForCausalLM.forward and not student.is_activation_checkpointing
    hooks = [h for m in student.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [
        h for h in hooks if h.__name__ != "output_capturing_hook"
    ]  # a model's own way to give its hidden states
    student.save_pretrained(tmp_path / "by_hand")
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "by_hand", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0  # and the trainer can still measure


def test_merging_is_not_what_the_adapter_computes(tmp_path):
    trainer = make_trainer(tmp_path, lora=True, teacher=AdapterOffTeacher(), objective=LogitKD(label_weight=1.0))
    trainer.train()
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = trainer.model.eval()(ids).logits
        merged = trainer.student(merge=True)
        torch.testing.assert_close(merged(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert isinstance(merged, LlamaForCausalLM)
    trainer.save_model(str(tmp_path / "out"))
    assert "model.safetensors" in files(tmp_path / "out") and "adapter_config.json" not in files(tmp_path / "out")
    with pytest.raises(ValueError, match="adapter was merged"):
        trainer.evaluate(trainer.train_dataset)


# ---- checkpoints that are not whole ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Checkpoints 2 and 4 of a run of four steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    make_trainer(folder).train()
    return folder


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_a_half_written_checkpoint_is_used_or_dropped_in_silence(finished, tmp_path, caplog, damage):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    marker = folder / "checkpoint-4" / "trainer_state.json"
    if damage == "deleted":
        marker.unlink()
    else:
        marker.write_text(marker.read_text()[:200])
    with pytest.raises(
        ValueError, match="checkpoint-4 is not a complete checkpoint .*last complete one is .*checkpoint-2"
    ):
        make_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(ValueError, match="holds another run .*checkpoint-2.*resume_from_checkpoint"):
        make_trainer(folder).train()
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(folder)
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is half-written; going on from" in caplog.text
    for name in ("model.safetensors", FILE):
        ours, theirs = (load_file(f / "checkpoint-4" / name) for f in (folder, finished))
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_rewritten_checkpoint_looks_whole_too_early(finished, tmp_path):
    """Going on from an older checkpoint: the newer one is not whole while it is being written again."""
    folder, seen = tmp_path / "run", []
    shutil.copytree(finished, folder)
    trainer = make_trainer(folder)
    original = trainer._save_optimizer_and_scheduler

    def look(output_dir):
        seen.append((folder / "checkpoint-4" / "trainer_state.json").exists())
        original(output_dir)

    trainer._save_optimizer_and_scheduler = look
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert seen == [False] and (folder / "checkpoint-4" / "trainer_state.json").exists()


def test_resuming_what_cannot_be_resumed_says_nothing(finished, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint in .*empty"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    weights_only = tmp_path / "weights"
    make_trainer(weights_only, save_only_model=True).train()
    with pytest.raises(ValueError, match="checkpoint-4 holds no optimizer state .*save_only_model"):
        make_trainer(weights_only).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="objective has parameters parts.1.projectors.0.weight .*this one none"):
        make_trainer(finished, objective=Counting() + LogitKD()).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint holds objective state .*counting/steps"):
        make_trainer(finished, objective=LogitKD() + FeatureKD()).train(resume_from_checkpoint=True)
    plain = tmp_path / "plain" / "checkpoint-2"
    shutil.copytree(finished / "checkpoint-2", plain)
    (plain / FILE).unlink()
    with pytest.raises(ValueError, match=f"no {FILE}.*not written by a distillation trainer"):
        make_trainer(tmp_path / "plain").train(resume_from_checkpoint=True)


def test_the_same_trainer_cannot_train_twice(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_model_comes_back_without_its_objective(tmp_path, lora):
    trainer = make_trainer(
        tmp_path,
        lora=lora,
        eval_rows=5,
        max_steps=6,
        greater_is_better=True,  # so that the last step is not the best
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=1,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.state.best_global_step < 6
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {best.name}
    saved = load_file(best / FILE)
    assert torch.equal(trainer.objective.parts[1].projectors[0].weight, saved["parameter.parts.1.projectors.0.weight"])
    assert trainer.objective.state_tensors()["counting/steps"] == trainer.state.best_global_step
    assert abs(trainer.evaluate()["eval_loss"] - trainer.state.best_metric) < 1e-6


def test_a_half_written_checkpoint_is_kept_in_place_of_a_whole_one(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "checkpoint-4").rename(folder / "checkpoint-3")  # a step at which this run does not save
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    (folder / "checkpoint-3" / "now").touch()
    make_trainer(folder, max_steps=4, save_total_limit=2).train(resume_from_checkpoint=True)
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


# ---- what must stop a save -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("logging_steps", [1, 100])
def test_something_is_saved_after_an_infinite_term(tmp_path, logging_steps):
    trainer = make_trainer(tmp_path, objective=Counting(poison=3), logging_steps=logging_steps, max_steps=8)
    with pytest.raises(FloatingPointError, match="term 'extra' became NaN or infinite at step 3"):
        trainer.train()
    assert trainer.state.global_step == (3 if logging_steps == 1 else 4)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(FloatingPointError, match="at step 3"):
        trainer.save_model()
    assert not files(tmp_path) & {"model.safetensors"}


def test_the_device_is_asked_for_finite_terms_at_every_step(tmp_path, monkeypatch):
    asked = []
    trainer = make_trainer(tmp_path, logging_steps=2, max_steps=4, save_steps=3)
    original = trainer._check_finite
    monkeypatch.setattr(trainer, "_check_finite", lambda: (asked.append(trainer.state.global_step), original()))
    trainer.train()
    assert set(asked) == {2, 3, 4}  # at logging and before each save only


def test_writing_starts_where_it_cannot_fit(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=4)
    usage = shutil.disk_usage(tmp_path)

    class Shrink(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))

    trainer.add_callback(Shrink())
    with pytest.raises(OSError, match="nothing was written.*resume_from_checkpoint") as caught:
        trainer.train()
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "checkpoint-4").exists() and "trainer_state.json" in files(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_a_disk_that_fills_up_is_not_named(finished, tmp_path, where):
    """A real limit on the size of written files, met by safetensors and by torch.save."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = kept_files(folder / "checkpoint-4")
    largest = {n: len(b) for n, b in before.items()}
    limit = largest["model.safetensors"] // 2 if where == "weights" else largest["optimizer.pt"] - 1000
    assert where == "weights" or largest["model.safetensors"] < limit
    trainer = make_trainer(folder, max_steps=6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    trainer.add_callback(Fill())
    try:
        with pytest.raises(OSError, match="checkpoint-6|run failed") as caught:
            trainer.train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.ENOSPC
    assert "want of space" in str(caught.value) and f"last complete checkpoint is {folder / 'checkpoint-4'}" in str(
        caught.value
    )
    assert "trainer_state.json" not in files(folder / "checkpoint-6")
    assert kept_files(folder / "checkpoint-4") == before
    trainer = make_trainer(folder, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
