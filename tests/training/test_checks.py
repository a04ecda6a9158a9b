"""What a run must refuse before its first step, and what it must not refuse."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_distill.training import checks
from hf_distill.training.checks import (
    check_chat_templates,
    check_has_loss,
    check_launcher,
    check_token_ids,
    common_vocabulary,
)

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ tools or '' }}"
LETTERS = [*"abcdefgh", "ab", "cd", "abc", "bc"]


def tokenizer(tokens=LETTERS, merges=(("a", "b"), ("c", "d"), ("ab", "c")), template=None, added=()):
    model = models.BPE({token: i for i, token in enumerate([*tokens, "<unk>"])}, list(merges), unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    result = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    result.add_tokens(list(added))
    result.chat_template = template
    return result


def test_padded_heads_of_one_tokenizer_are_refused():
    assert common_vocabulary(tokenizer(), tokenizer(), 16, 32) == 16
    assert common_vocabulary(tokenizer(added=["<x>"]), tokenizer(added=["<x>"]), 40, 14) == 14
    processor = SimpleNamespace(tokenizer=tokenizer())
    assert common_vocabulary(processor, tokenizer(), 16, 32) == 16


def test_token_that_means_something_else_goes_unnoticed():
    other = ["x", *LETTERS[1:4], "y", "z", "w", *LETTERS[7:]]
    with pytest.raises(ValueError) as error:
        common_vocabulary(tokenizer(), tokenizer(other, merges=()), 16, 16)
    message = str(error.value)
    assert "id 0 is 'a' for the student and 'x' for the teacher" in message
    assert "id 5 is 'f'" in message and "id 6" not in message and "4 of 13 ids differ" in message
    assert "hf_distill.losses.uld_loss" in message


def test_token_added_on_one_side_goes_unnoticed():
    with pytest.raises(ValueError, match="id 13 is '<pad>' for the student and nothing for the teacher"):
        common_vocabulary(tokenizer(added=["<pad>"]), tokenizer(), 16, 16)


def test_same_tokens_with_other_merges_go_unnoticed(monkeypatch):
    monkeypatch.setattr(checks, "PROBES", ("a abc",))
    other = tokenizer(merges=(("b", "c"), ("a", "b"), ("c", "d"), ("ab", "c")))
    with pytest.raises(
        ValueError, match=r"cut text differently: \['abc'\] for the student and \['a', 'bc'\] for.*uld_loss"
    ):
        common_vocabulary(tokenizer(), other, 16, 16)


def test_tokenizer_longer_than_a_head_goes_unnoticed():
    with pytest.raises(ValueError, match="ids up to 12, but the teacher's head has only 12 entries"):
        common_vocabulary(tokenizer(), tokenizer(), 13, 12)
    with pytest.raises(ValueError, match="the student's head has only 5"):
        common_vocabulary(tokenizer(), tokenizer(), 5, 13)


MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(
    "example",
    [
        {"messages": MESSAGES},
        {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
        {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
    ],
)
def test_templates_that_render_differently_go_unnoticed(example):
    student, teacher = tokenizer(template=TEMPLATE), tokenizer(template=TEMPLATE + "!")
    check_chat_templates(student, tokenizer(template=TEMPLATE), example)
    with pytest.raises(ValueError) as error:
        check_chat_templates(student, teacher, example)
    message = str(error.value)
    human = "human" if "conversations" in example else "user"
    robot = "gpt" if "conversations" in example else "assistant"
    assert f"student: '<{human}>hello<{robot}>hi'" in message and f"teacher: '<{human}>hello<{robot}>hi!'" in message
    assert "--allow_different_chat_templates" in message
    check_chat_templates(student, teacher, example, allow_different=True)


def test_template_arguments_of_the_example_are_forgotten():
    student = tokenizer(template=TEMPLATE)
    with_think = tokenizer(template=TEMPLATE + "{% if think %}<think>{% endif %}")
    check_chat_templates(student, with_think, {"messages": MESSAGES})
    with pytest.raises(ValueError, match="<think>"):
        check_chat_templates(student, with_think, {"messages": MESSAGES, "chat_template_kwargs": {"think": True}})
    no_tools = tokenizer(template=TEMPLATE.replace("{{ tools or '' }}", ""))
    check_chat_templates(student, no_tools, {"messages": MESSAGES})
    with pytest.raises(ValueError, match="lookup"):
        check_chat_templates(student, no_tools, {"messages": MESSAGES, "tools": '[{"name": "lookup"}]'})


def test_missing_template_is_skipped_silently():
    with_one, without = tokenizer(template=TEMPLATE), tokenizer()
    check_chat_templates(with_one, without, {"text": "plain"})
    check_chat_templates(with_one, without, {"prompt": "plain", "completion": "text"})
    with pytest.raises(ValueError, match="the teacher has no chat template.*--allow_different_chat_templates"):
        check_chat_templates(with_one, without, {"messages": MESSAGES})
    with pytest.raises(ValueError, match="the student has no chat template"):
        check_chat_templates(without, with_one, {"messages": MESSAGES})
    with pytest.raises(ValueError, match="the student and the teacher have no chat template"):
        check_chat_templates(without, without, {"messages": MESSAGES})
    with pytest.raises(ValueError, match="the teacher's chat template does not render.*no system"):
        broken = tokenizer(template="{{ raise_exception('no system') }}")
        check_chat_templates(with_one, broken, {"messages": MESSAGES})


@pytest.mark.parametrize("kind", [torch.tensor, list, lambda rows: [torch.tensor(row) for row in rows], np.array])
def test_label_beyond_the_common_vocabulary_reaches_the_loss(kind):
    check_token_ids(kind([[1, -100, 9], [0, 2, 3]]), 10, "labels")
    with pytest.raises(ValueError, match="labels: id 10 in example 1 is outside 0 to 9"):
        check_token_ids(kind([[1, -100, 9], [0, 10, 3]]), 10, "labels")
    with pytest.raises(ValueError, match="input_ids: id -1 in example 0"):
        check_token_ids(kind([[1, -1, 9], [0, 1, 3]]), 10)


def test_flat_or_ragged_ids_are_misread():
    with pytest.raises(ValueError, match="id 10 in example 2"):
        check_token_ids([0, 1, 10], 10)
    with pytest.raises(ValueError, match="id 10 in example 1"):
        check_token_ids([[0, 1], [], [10]][1:], 10)


def test_examples_with_loss_are_miscounted():
    labels = [[-100, 1], [-100, -100], [2], [], [3, -100]]
    assert check_has_loss(Dataset.from_dict({"input_ids": [[0] * len(x) for x in labels], "labels": labels})) == 3
    assert check_has_loss(Dataset.from_dict({"labels": labels}).select([4, 1, 2])) == 2
    assert check_has_loss(Dataset.from_dict({"labels": labels}).shuffle(seed=0).with_format("torch")) == 3
    both = {"input_ids": [[1, 2], [1, 2]], "completion_mask": [[1, 0], [0, 1]], "assistant_masks": [[1, 1], [1, 0]]}
    assert check_has_loss(Dataset.from_dict(both)) == 1
    assert check_has_loss(Dataset.from_dict({"input_ids": [[1], [], [2]]})) == 2
    assert check_has_loss(Dataset.from_dict({"pixel_values": [0.0, 1.0, 2.0], "labels": [1, -100, 0]})) == 2
    assert check_has_loss(Dataset.from_dict({"labels": [[[-100], [1]], [[-100], [-100]]]})) == 1
    assert check_has_loss(Dataset.from_dict({"text": ["a", "b"]})) == 2


def test_dataset_that_teaches_nothing_is_accepted():
    with pytest.raises(ValueError, match="all labels of all 2 examples are masked .by labels."):
        check_has_loss(Dataset.from_dict({"labels": [[-100], [-100, -100]]}))
    with pytest.raises(ValueError, match="masked .by completion_mask and assistant_masks."):
        check_has_loss(Dataset.from_dict({"completion_mask": [[1, 0]], "assistant_masks": [[0, 1]]}))
    with pytest.raises(ValueError, match=r"the dataset is empty .columns: labels."):
        check_has_loss(Dataset.from_dict({"labels": []}))
    with pytest.raises(ValueError, match=r"columns answer, question, none of the accepted text \| messages \| prompt"):
        check_has_loss(Dataset.from_dict({"question": ["a"], "answer": ["b"]}))


def test_counting_a_million_rows_takes_minutes():
    labels = np.full((1_000_000, 8), -100)
    labels[::2, 3] = 1
    dataset = Dataset.from_dict({"labels": labels})
    start = time.perf_counter()
    assert check_has_loss(dataset) == 500_000
    assert time.perf_counter() - start < 20


def got(processes=1, kind=DistributedType.NO, device="cpu"):
    return SimpleNamespace(num_processes=processes, distributed_type=kind, device=torch.device(device))


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_single_process_is_refused(clean_environment):
    check_launcher(got(), SimpleNamespace(fsdp=None, fsdp_config=None, deepspeed=None))
    clean_environment.setenv("WORLD_SIZE", "1")
    check_launcher(got())


def test_separate_trainings_into_one_folder_go_unnoticed(clean_environment):
    clean_environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes.*ACCELERATE_USE_CPU=true"):
        check_launcher(got())
    check_launcher(got(2, DistributedType.MULTI_CPU))


@pytest.mark.parametrize("promise", ["environment", "fsdp", "fsdp_config"])
def test_fsdp_that_is_data_parallel_goes_unnoticed(clean_environment, promise):
    clean_environment.setenv("WORLD_SIZE", "2")
    args = SimpleNamespace(fsdp=True) if promise == "fsdp" else SimpleNamespace(fsdp_config={"version": 2})
    if promise == "environment":
        clean_environment.setenv("ACCELERATE_USE_FSDP", "true")
        args = None
    with pytest.raises(RuntimeError, match="FSDP was asked for.*MULTI_CPU.*on CPU"):
        check_launcher(got(2, DistributedType.MULTI_CPU), args)
    with pytest.raises(RuntimeError, match="FSDP was asked for.*MULTI_GPU.*in one place"):
        check_launcher(got(2, DistributedType.MULTI_GPU, "cuda"), args)
    check_launcher(got(2, DistributedType.FSDP, "cuda"), args)


def test_deepspeed_that_is_data_parallel_goes_unnoticed(clean_environment):
    with pytest.raises(RuntimeError, match="DeepSpeed was asked for.*without a launcher"):
        check_launcher(got(device="cuda"), SimpleNamespace(deepspeed="ds.json"))
    clean_environment.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RuntimeError, match="DeepSpeed was asked for.*on CPU"):
        check_launcher(got())
    check_launcher(got(1, DistributedType.DEEPSPEED))


@pytest.mark.parametrize(
    "command, promised",
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "x.py", "--lr", "1"], 2),
        (["python", "/bin/accelerate-launch", "--num_processes=3", "x.py"], 3),
        (["python", "-m", "accelerate.commands.launch", "--config_file", "two.yaml", "x.py"], 2),
        (["python", "/bin/accelerate", "launch", "--config_file", "two.yaml", "--num_processes", "1", "x.py"], 1),
        (["python", "/bin/accelerate", "launch", "--cpu", "x.py"], 1),
        (["python", "/bin/accelerate", "test"], None),
        (["python", "-m", "pytest"], None),
    ],
)
def test_promise_of_a_command_line_is_misread(tmp_path, command, promised):
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n")
    arguments = checks._launch_arguments(command)
    assert (promised is None) == (arguments is None)
    if promised is not None:
        assert checks._promised(arguments, str(tmp_path)) == promised


CPU2 = str(Path(__file__).parents[2] / "recipes/accelerate/cpu2.yaml")
SCRIPT = """
import os
from accelerate import Accelerator
from hf_distill.training.checks import check_launcher
accelerator = Accelerator()
try:
    check_launcher(accelerator)
    line = f"accepted {accelerator.num_processes}"
except RuntimeError as error:
    line = f"refused {error}"
os.write(1, (line + chr(10)).encode())  # in one piece: two processes share the pipe
"""


@pytest.mark.parametrize(
    "options, use_cpu, expected",
    [
        (
            ["--cpu", "--num_processes", "2"],
            False,
            ["refused accelerate launch was asked for 2 processes and started 1"],
        ),
        (["--config_file", CPU2, "--main_process_port", "0"], True, ["accepted 2", "accepted 2"]),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what CPU launches do, and two processes need two GPUs here")
def test_real_launch_is_misjudged(tmp_path, options, use_cpu, expected):
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    for name in ("WORLD_SIZE", "ACCELERATE_USE_CPU"):
        environment.pop(name, None)
    if use_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(tmp_path / "train.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    lines = [line for line in result.stdout.splitlines() if line.startswith(("accepted", "refused"))]
    assert len(lines) == len(expected), result.stdout + result.stderr
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines
