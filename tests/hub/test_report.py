import json
import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from hf_distill import DistillSFTTrainer, SampleCompletionsCallback, TeacherAgreementCallback
from hf_distill.hub.report import LOG, PAGE, PICTURE, panels_of, read_log, write_report
from hf_distill.methods.taid import TAID
from hf_distill.training.report import ReportCallback
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

HOSTILE = "<script>alert('w1')</script> & w2"


def build(folder, callbacks=(), **settings):
    tokenizer, teacher = tiny_tokenizer(), tiny_llama(32, 3, seed=1)
    settings = dict(max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2) | settings
    trainer = DistillSFTTrainer(
        tiny_llama(),
        teacher=teacher,
        objective=TAID(),
        args=sft_arguments(folder, **settings),
        train_dataset=text_dataset(16),
        eval_dataset=text_dataset(4, seed=1),
        processing_class=tokenizer,
        callbacks=[
            TeacherAgreementCallback(),
            SampleCompletionsCallback([HOSTILE], max_new_tokens=3, reference=teacher),
            *callbacks,
        ],
    )
    trainer.add_callback(ReportCallback(trainer))
    return trainer


def run(folder, callbacks=(), resume=None, **settings):
    trainer = build(folder, callbacks, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run(folder)
    return folder


def test_the_page_lacks_what_the_run_was_or_did(done):
    page = (done / PAGE).read_text(encoding="utf-8")
    for wanted in ("Interpolated", "TAID: Temporally Adaptive", "LlamaForCausalLM", "teacher_kl", "6 of 6 steps"):
        assert wanted in page, wanted
    assert "http" not in page.split("<body>")[0] and str(done) not in page, "it must stand alone, and name no folder"
    assert page.count("data:image/png;base64,") == 1 and (done / PICTURE).stat().st_size > 20_000
    value = [e for e in read_log(done) if "eval_teacher_kl" in e][-1]["eval_teacher_kl"]
    assert f"{value:.4g}" in page


def test_text_of_a_model_becomes_part_of_the_page(done):
    page = (done / PAGE).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page


def test_values_go_to_the_wrong_panel_or_none(done):
    panels = {title: set(curves) for title, _, curves in panels_of(read_log(done))}
    assert {"loss", "eval_loss", "loss/taid", "loss/label"} <= panels["loss and its terms"]
    assert panels["distance from the teacher (nats)"] == {"teacher_kl", "eval_teacher_kl"}
    assert panels["schedules and other values"] >= {"taid_t", "taid_momentum"}
    assert panels["learning rate"] == {"learning_rate"}
    logged = {k for e in read_log(done) for k, v in e.items() if isinstance(v, float)}
    shown = set().union(*panels.values())
    left = {k for k in logged - shown if not k.endswith(("runtime", "second"))}
    assert left <= {"epoch", "total_flos", "train_loss"}, left


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_has_no_report_or_its_log_is_not_gone_on_with(tmp_path):
    torch.set_num_threads(1)
    pid = os.fork()
    if pid == 0:
        run(tmp_path, [Kill()])
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    page, _ = write_report(tmp_path)
    assert "5 of 6 steps so far: the run has not ended" in page.read_text(
        encoding="utf-8"
    ) or "4 of 6" in page.read_text(encoding="utf-8")
    with open(tmp_path / LOG, "a") as file:
        file.write('{"loss": 1.0, "st')  # as a kill leaves a line
    assert all("step" in entry for entry in read_log(tmp_path))
    run(tmp_path, resume=True)
    steps = [entry["step"] for entry in read_log(tmp_path) if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert "so far" not in (tmp_path / PAGE).read_text(encoding="utf-8")


def test_checkpoints_alone_give_no_report(done, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    for step in (4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        state = (done / f"checkpoint-{step}" / "trainer_state.json").read_text()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert read_log(tmp_path)[-1]["step"] == 6
    assert write_report(tmp_path)[0].is_file()


def test_a_folder_without_a_log_is_reported(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no log \(log.jsonl or trainer_state.json; found: config.json\)"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_facts_hold_a_folder_or_token_of_this_machine(done):
    facts = json.loads((done / "run.json").read_text())
    assert str(done) not in json.dumps(facts["settings"]) and facts["finished"]
    assert facts["settings"]["max_steps"] == 6


def test_evaluations_before_and_after_training_are_left_out(tmp_path):
    trainer = run(tmp_path / "first", eval_strategy="no")  # also leaves a log of another run behind
    assert trainer.state.global_step == 6
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / LOG).write_text((tmp_path / "first" / LOG).read_text())
    trainer = build(tmp_path / "second", eval_strategy="no", save_strategy="no")
    before = trainer.evaluate()["eval_teacher_kl"]
    trainer.train()
    after = trainer.evaluate()["eval_teacher_kl"]
    found = [entry["eval_teacher_kl"] for entry in read_log(tmp_path / "second") if "eval_teacher_kl" in entry]
    assert found == [before, after]
    page = (tmp_path / "second" / PAGE).read_text(encoding="utf-8")
    assert f"{before:.4g}" in page and f"{after:.4g}" in page
