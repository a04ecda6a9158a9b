"""What a checkpoint holds, beside what a run that was not interrupted has; in one process, small."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_distill import DistillSFTTrainer, FeatureKD, FrozenTeacher
from hf_distill.methods.taid import TAID, TAIDConfig
from hf_distill.training import saving
from hf_distill.training.saving import FILE, DiskFullError, complete_checkpoints
from tests.helpers import sft_arguments, text_dataset, tiny_llama, tiny_tokenizer

STEPS, AT = 5, 2


def trainer_of(folder, **more) -> DistillSFTTrainer:
    tokenizer = tiny_tokenizer()
    settings = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, logging_steps=3, learning_rate=1e-2)
    return DistillSFTTrainer(
        tiny_llama(16, 1),
        teacher=FrozenTeacher(tiny_llama(32, 2, seed=1), tokenizer),
        objective=TAID(TAIDConfig()) + 0.5 * FeatureKD(),
        args=sft_arguments(folder, **settings | more),
        train_dataset=text_dataset(24, seed=0),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> DistillSFTTrainer:
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def logs(trainer) -> list[dict]:
    measured = ("runtime", "per_second", "train_loss")
    return [{k: v for k, v in e.items() if not k.endswith(measured)} for e in trainer.state.log_history]


def test_a_run_goes_on_with_other_sums_state_or_projectors(whole, tmp_path):
    other = trainer_of(tmp_path)
    other.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{AT}")
    assert logs(other) == logs(whole) and len(logs(whole)) > 1
    ours, theirs = other.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any("distill_objective" in k for k in ours)
    state, wanted = other.objective.state_tensors(), whole.objective.state_tensors()
    assert state.keys() == wanted.keys() and all(torch.equal(state[k], wanted[k]) for k in state)


def test_a_checkpoint_lacks_a_tensor_or_holds_one_too_many(whole):
    tensors = load_file(f"{whole.args.output_dir}/checkpoint-{AT}/{FILE}")
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds - {"running"} == {"parameter", "state", "log_sum", "log_steps", "tokens", "tr_loss"}
    assert tensors["log_steps"].tolist() == [AT, 0] and tensors["tr_loss"].shape == (1,)
    assert int(tensors["tokens"]) > 0
    student = load_file(f"{whole.args.output_dir}/checkpoint-{AT}/model.safetensors")
    assert not [name for name in student if "distill_objective" in name]


def test_another_objective_s_checkpoint_is_taken(whole, tmp_path):
    trainer = trainer_of(tmp_path)
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    with pytest.raises(ValueError, match="was not written by a distillation trainer"):
        trainer._load_objective(str(folder))
    tensors = load_file(f"{whole.args.output_dir}/checkpoint-{AT}/{FILE}")
    name = next(n for n in tensors if n.startswith("parameter."))
    save_file(tensors | {name: torch.zeros(3, 3)}, folder / FILE)
    with pytest.raises(ValueError, match=r"has parameters .*\(3, 3\).*this one"):
        trainer._load_objective(str(folder))
    save_file({k: v for k, v in tensors.items() if k != name}, folder / FILE)
    with pytest.raises(ValueError, match="the checkpoint's objective has parameters none"):
        trainer._load_objective(str(folder))


def test_checkpoints_are_sorted_as_words_or_other_folders_count(tmp_path):
    for name in (
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-11",
        "checkpoint-x",
        "checkpoint-1-x",
        "other-12",
        "notes",
    ):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({}))
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"log')
    complete, partial = complete_checkpoints(str(tmp_path))
    assert [p.rsplit("-")[-1] for p in complete] == ["10", "9"] and [p.rsplit("-")[-1] for p in partial] == ["11"]
    assert complete_checkpoints(str(tmp_path / "absent")) == ([], [])
    with pytest.raises(ValueError, match="holds another run \\(checkpoint-10\\)"):
        saving.check_no_other_run(str(tmp_path))
    saving.check_no_other_run(str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["optimizer.pt", "optimizer.bin", "optimizer_0", "global_step4"])
def test_an_optimizer_s_file_is_not_seen(tmp_path, name):
    (tmp_path / "model.safetensors").touch()
    assert not saving._holds_optimizer(str(tmp_path))
    (tmp_path / name).touch()
    assert saving._holds_optimizer(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "no"), True),
        (OSError(errno.EDQUOT, "no"), True),
        (OSError(errno.EFBIG, "no"), True),
        (OSError(errno.EACCES, "no"), False),
        (RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_an_error_of_the_disk_has_another_name(whole, error, named):
    folder = f"{whole.args.output_dir}/checkpoint-9"
    with pytest.raises(DiskFullError if named else type(error)) as raised, saving._named_disk_errors(folder):
        raise error
    if named:
        assert raised.value.errno == errno.ENOSPC and raised.value.__cause__ is error
        assert f"writing {folder} failed" in str(raised.value)
        assert f"the last complete checkpoint is {whole.args.output_dir}/checkpoint-{STEPS}" in str(raised.value)
    else:
        assert raised.value is error


def test_an_error_without_any_checkpoint_names_one(tmp_path):
    with pytest.raises(DiskFullError, match="no complete checkpoint exists yet"):
        with saving._named_disk_errors(str(tmp_path / "a" / "checkpoint-1")):
            raise OSError(errno.ENOSPC, "no")


@pytest.mark.parametrize(("in_checkpoint", "times"), [(False, 1), (True, 3)])
def test_the_space_that_a_save_needs_is_another(whole, monkeypatch, in_checkpoint, times):
    weights = sum(p.numel() * p.element_size() for p in whole.model.parameters())
    monkeypatch.setattr(whole, "_in_checkpoint", in_checkpoint)
    usage = type("Usage", (), {"free": times * weights})
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda place: usage)
    whole._check_space(f"{whole.args.output_dir}/not/there/yet")
    usage.free -= 1
    with pytest.raises(DiskFullError, match="nothing was written") as raised:
        whole._check_space(f"{whole.args.output_dir}/not/there/yet")
    assert raised.value.errno == errno.ENOSPC


def test_many_shapes_are_all_told():
    tensors = {f"p{i}": torch.zeros(i, 2) for i in range(9)}
    assert saving._shapes(tensors).endswith("p7 (7, 2), ...") and saving._shapes({}) == "none"
    assert saving._shapes({"a": torch.zeros(1)}) == "a (1,)"


def test_a_gathered_state_leaves_the_objective_in_the_student(whole, tmp_path):
    """As FSDP and DeepSpeed hand it over."""
    inner = f"{saving.KEY}.weight"
    gathered = {k: v for k, v in whole.model.state_dict().items() if saving.KEY not in k}
    whole._in_checkpoint = True
    try:
        whole._save(str(tmp_path), state_dict=gathered | {inner: torch.full((2,), 7.0)})
    finally:
        whole._in_checkpoint = False
    assert not [name for name in load_file(tmp_path / "model.safetensors") if saving.KEY in name]
    tensors = load_file(tmp_path / FILE)
    assert tensors["parameter.weight"].tolist() == [7.0, 7.0]
    assert [name for name in tensors if name.startswith("parameter.")] == ["parameter.weight"]


def test_the_state_of_a_teacher_takes_no_space(whole, monkeypatch):
    weights = sum(p.numel() * p.element_size() for p in whole.model.parameters())
    monkeypatch.setattr(whole, "_in_checkpoint", True)
    monkeypatch.setattr(whole.teacher, "state_tensors", lambda: {"average": torch.zeros(2**20, dtype=torch.float16)})
    usage = type("Usage", (), {"free": 3 * weights + 2**21})
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda place: usage)
    whole._check_space(whole.args.output_dir)
    usage.free = 2**20
    with pytest.raises(DiskFullError, match=r"needs about 2 MiB and .* has 1 MiB left"):
        whole._check_space(whole.args.output_dir)


@pytest.mark.parametrize(("kept", "wanted"), [([1.0], 1.0), ([1.0, 3.0], 2.0), ([1.0, 3.0, 5.0], 3.0)])
def test_the_loss_of_other_ranks_is_taken_for_one_s_own(whole, monkeypatch, kept, wanted):
    """Resumed on another number of ranks, each goes on with their mean."""
    tensors = {"log_steps": torch.tensor([2, 1]), "tokens": torch.tensor(5), "tr_loss": torch.tensor(kept)}
    monkeypatch.setattr(whole, "_resumed", tensors)
    whole._restore_running_values()
    assert float(whole._tr_loss) == wanted and whole._resumed is None and int(whole._tokens) == 5


def test_the_hint_names_an_older_checkpoint(whole, tmp_path):
    for step in (3, 4, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (3, 4):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the last complete one is .*checkpoint-4$"):
        whole._checkpoint_to_resume(str(tmp_path / "checkpoint-5"))


def test_merging_is_asked_for_by_position_or_eight_shapes_are_cut(whole):
    with pytest.raises(TypeError, match="positional"):
        whole.student(True)
    assert not saving._shapes({f"p{i}": torch.zeros(1) for i in range(8)}).endswith("...")
