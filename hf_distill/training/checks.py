"""Checks before training starts, each an error that says what was given and what to do."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch import Tensor
from trl import is_conversational, maybe_convert_to_chatml

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

IGNORED_LABEL = -100
ACCEPTED_COLUMNS = "text | messages | prompt + completion | input_ids"
# Merges, digits, spaces, scripts and code: tokenizers with one vocabulary that cut words differently differ here.
PROBES = (
    "The quick brown fox isn't lazy: it jumped over 1234567 fences in 2024.",
    "  def f(x):\n\treturn {'a': x ** 2}  # naïve café, Straße\r\n\n",
    "Привет мир, 你好世界, こんにちは, مرحبا, 🙂👍🏽 unbelievableness",
)
TEMPLATE_KEYS = ("messages", "conversations", "prompt", "completion", "chosen", "tools", "chat_template_kwargs")
REMEDY = (
    "A divergence of logits needs one vocabulary. Give both models the same tokenizer, or distil across tokenizers: "
    "objective=ULD(), in recipes --cross_tokenizer uld (its pure form is hf_distill.losses.uld_loss)"
)


def common_vocabulary(student_tokenizer, teacher_tokenizer, student_size: int, teacher_size: int) -> int:
    """How many entries of the two heads mean the same tokens; heads of one family are often padded differently.

    Args:
        student_tokenizer: a tokenizer or a processor; likewise `teacher_tokenizer`.
        student_size: rows of the student's head; likewise `teacher_size`.

    Raises:
        ValueError: the tokenizers differ in a token or in how they cut text, or have more tokens than a head has rows.
    """
    student_tokenizer, teacher_tokenizer = _tokenizer(student_tokenizer), _tokenizer(teacher_tokenizer)
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student != teacher:
        raise ValueError(f"student and teacher tokenizers differ: {_differing_tokens(student, teacher)}. {REMEDY}")
    special = " ".join(str(token) for token in student_tokenizer.added_tokens_decoder.values())
    for probe in (*PROBES, special):
        ids = student_tokenizer(probe, add_special_tokens=False)["input_ids"]
        other = teacher_tokenizer(probe, add_special_tokens=False)["input_ids"]
        if ids != other:
            raise ValueError(
                "student and teacher tokenizers have the same tokens but cut text differently: "
                f"{_first_difference(student_tokenizer, ids, other)}. {REMEDY}"
            )
    needed = max(student.values(), default=-1) + 1
    for who, size in (("student", student_size), ("teacher", teacher_size)):
        if needed > size:
            raise ValueError(
                f"the tokenizer has ids up to {needed - 1}, but the {who}'s head has only {size} entries; use the "
                f"tokenizer it came with, or call resize_token_embeddings({needed}) on the {who} before training"
            )
    return min(student_size, teacher_size)


def check_chat_templates(student_tokenizer, teacher_tokenizer, example: dict, allow_different: bool = False) -> None:
    """Both models must see a conversation as the text they know.

    Args:
        student_tokenizer: a tokenizer or a processor; likewise `teacher_tokenizer`.
        example: a row of the dataset. Nothing is checked if it is not conversational.
        allow_different: accept templates that differ; the student's renders for both.

    Raises:
        ValueError: the templates render the example differently, or one is missing.
    """
    example = maybe_convert_to_chatml(copy.deepcopy({key: example[key] for key in TEMPLATE_KEYS if key in example}))
    if not is_conversational(example) or allow_different:
        return
    missing = [
        who
        for who, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer))
        if not getattr(tokenizer, "chat_template", None)
    ]
    if missing:
        both = len(missing) == 2
        raise ValueError(
            f"the dataset is conversational, but the {' and the '.join(missing)} {'have' if both else 'has'} no chat "
            "template: it was probably not trained on conversations, and its answers to them mean little. "
            + ("Set one" if both else "Use an instruction-tuned model, copy the other's template")
            + " (tokenizer.chat_template), render the conversations to text yourself"
            + ("" if "student" in missing else ", or pass --allow_different_chat_templates to show it the student's")
        )
    student = _render(student_tokenizer, example, "student")
    teacher = _render(teacher_tokenizer, example, "teacher")
    if student != teacher:
        raise ValueError(
            "student and teacher render the first conversation differently:\n"
            f"  student: {_around_difference(student, teacher)}\n  teacher: {_around_difference(teacher, student)}\n"
            "The teacher would judge a text that it was not trained on. Give the student the teacher's template "
            "(tokenizer.chat_template), or pass --allow_different_chat_templates to show the teacher the student's"
        )


def check_token_ids(input_ids: Tensor | Iterable, limit: int, what: str = "input_ids") -> None:
    """Every id must be below `limit`; -100 is a masked label.

    Args:
        input_ids: tensor, list of ids, or list of such lists (one per example).
        what: names them in the error.
    """
    if isinstance(input_ids, Tensor):
        wrong = ((input_ids >= limit) | (input_ids < 0)) & (input_ids != IGNORED_LABEL)
        if not wrong.any():
            return
        place = wrong.nonzero()[0].tolist()
        example, value = place[0], int(input_ids[tuple(place)])
    else:
        found = next(_wrong_ids(input_ids, limit), None)
        if found is None:
            return
        example, value = found
    raise ValueError(
        f"{what}: id {value} in example {example} is outside 0 to {limit - 1}, the entries that student and teacher "
        "share; was the data tokenised with another tokenizer, or were tokens added after it was prepared?"
    )


def check_has_loss(dataset: Dataset) -> int:
    """How many examples have at least one label that is not masked.

    A dataset that is not tokenised yet counts all of its rows.

    Raises:
        ValueError: the dataset is empty, lacks the columns, or all of its labels are masked.
    """
    columns = set(dataset.column_names)
    if len(dataset) == 0:
        names = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"the dataset is empty (columns: {names}); check its split and filters")
    masks = [name for name in ("labels", "completion_mask", "assistant_masks") if name in columns]
    masks = masks[:1] if "labels" in masks else masks
    if not masks and "input_ids" not in columns:
        if columns & {"text", "messages", "conversations"} or {"prompt", "completion"} <= columns:
            return len(dataset)
        raise ValueError(
            f"the dataset has columns {', '.join(sorted(columns))}, none of the accepted {ACCEPTED_COLUMNS}; "
            "rename or map its columns"
        )
    masks = masks or ["input_ids"]
    tables = dataset.select_columns(masks).with_format("arrow").iter(batch_size=100_000)
    count = sum(_rows_with_loss(table, masks) for table in tables)
    if count == 0:
        raise ValueError(
            f"all labels of all {len(dataset)} examples are masked (by {' and '.join(masks)}), so there is nothing to "
            "learn; was max_length shorter than the prompts, or does the chat template mark no assistant tokens?"
        )
    return count


def check_launcher(accelerator: Accelerator, args: TrainingArguments | None = None) -> None:
    """The processes and the strategy that the launcher promised must be those that the trainer got."""
    check_processes(accelerator.num_processes)
    _check_strategy(accelerator, args)


def check_processes(got: int) -> None:
    """As many processes as the launcher promised; known before anything is loaded.

    Several ways of launching look healthy and run one process, or several trainings into one folder.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != got:
        raise RuntimeError(
            f"the launcher started {world_size} processes, but each trains alone (num_processes={got}): they would "
            f"write {world_size} trainings into one folder. No accelerator was found for them. To train on CPU "
            "processes set ACCELERATE_USE_CPU=true in the environment, or pass --use_cpu true"
        )
    if "WORLD_SIZE" not in os.environ:
        promised = _promised_by_accelerate_launch()
        if promised > got:
            script = " ".join(sys.argv)
            raise RuntimeError(
                f"accelerate launch was asked for {promised} processes and started {got}: without --multi_gpu (or with "
                "--cpu, or a MULTI_CPU config) it starts one, unless mpirun is there. Start them with\n"
                f"  accelerate launch --multi_gpu --num_processes {promised} {script}\n"
                "and on CPU with\n"
                f"  ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {promised} {script}"
            )


def _check_strategy(accelerator: Accelerator, args: TrainingArguments | None) -> None:
    got = accelerator.distributed_type
    fsdp = _flag("ACCELERATE_USE_FSDP") or getattr(args, "fsdp", None) or getattr(args, "fsdp_config", None)
    if fsdp and got != DistributedType.FSDP:
        raise RuntimeError(
            f"FSDP was asked for, but training would run as {got.value} and shard nothing: {_why_not(accelerator)} or "
            "drop --fsdp, --fsdp_config and the FSDP config file"
        )
    deepspeed = _flag("ACCELERATE_USE_DEEPSPEED") or getattr(args, "deepspeed", None)
    if deepspeed and got != DistributedType.DEEPSPEED:
        raise RuntimeError(
            f"DeepSpeed was asked for, but training would run as {got.value} and shard nothing: "
            f"{_why_not(accelerator)} or drop --deepspeed and the DeepSpeed config file"
        )


def _why_not(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cpu":
        return "on CPU processes accelerate replaces it by plain data parallelism. Run it on GPUs,"
    if accelerator.num_processes == 1 and "WORLD_SIZE" not in os.environ:
        return "the script was started without a launcher. Start it with accelerate launch or torchrun,"
    return "the launcher and the training arguments disagree. Ask for it in one place,"


def _promised_by_accelerate_launch() -> int:
    """Processes in the command line or config of the `accelerate launch` that started this one; 1 if none did."""
    for parent in psutil.Process().parents()[:2]:  # the script itself, or one shell between (--no_python)
        try:
            command, folder = parent.cmdline(), parent.cwd()
        except psutil.Error:
            continue
        arguments = _launch_arguments(command)
        if arguments is not None:
            return _promised(arguments, folder)
    return 1


def _launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch` in a command line, in any of its spellings."""
    for i, word in enumerate(command[:4]):
        name, rest = os.path.basename(word).removesuffix(".exe"), command[i + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and rest[:1] == ["launch"]:
            return rest[1:]
        if name in ("accelerate-launch", "accelerate.commands.launch") or word.endswith("commands/launch.py"):
            return rest
    return None


def _promised(arguments: list[str], folder: str) -> int:
    try:
        args = launch_command_parser().parse_args(arguments)
    except SystemExit:  # the parser's way of refusing; the launcher itself understood them
        return 1
    if args.num_processes is not None:
        return args.num_processes
    path = os.path.join(folder, args.config_file) if args.config_file is not None else None
    if path is None and (args.cpu or not os.path.isfile(default_config_file)):
        return 1
    return getattr(load_config_from_file(path), "num_processes", None) or 1


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on", "y", "t")


def _tokenizer(processing_class):
    return getattr(processing_class, "tokenizer", processing_class)


def _differing_tokens(student: dict[str, int], teacher: dict[str, int]) -> str:
    student_tokens, teacher_tokens = ({i: token for token, i in vocab.items()} for vocab in (student, teacher))
    ids = sorted(student_tokens.keys() | teacher_tokens.keys())
    differing = [i for i in ids if student_tokens.get(i) != teacher_tokens.get(i)]
    if not differing:  # several tokens share an id
        return f"{len(student)} and {len(teacher)} tokens on the same ids"
    shown = (
        f"id {i} is {_name(student_tokens, i)} for the student and {_name(teacher_tokens, i)} for the teacher"
        for i in differing[:3]
    )
    return f"{'; '.join(shown)} ({len(differing)} of {len(ids)} ids differ)"


def _name(tokens: dict[int, str], i: int) -> str:
    return repr(tokens[i]) if i in tokens else "nothing"


def _first_difference(tokenizer, ids: list[int], other: list[int]) -> str:
    start = len(os.path.commonprefix([ids, other]))
    student, teacher = (tokenizer.convert_ids_to_tokens(x[start : start + 3]) for x in (ids, other))
    return f"{student} for the student and {teacher} for the teacher, after {tokenizer.decode(ids[:start])!r}"


def _render(tokenizer, example: dict[str, Any], who: str) -> str:
    if "messages" in example:
        messages = example["messages"]
    else:
        messages = [*example.get("prompt", []), *example.get("completion", example.get("chosen", []))]
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, **(example.get("chat_template_kwargs") or {})
        )
    except Exception as error:
        raise ValueError(f"the {who}'s chat template does not render the first conversation: {error}") from error


def _around_difference(text: str, other: str, width: int = 300) -> str:
    start = len(os.path.commonprefix([text, other]))
    begin, end = max(0, start - width // 2), start + width
    return ("..." if begin else "") + repr(text[begin:end]) + ("..." if end < len(text) else "")


def _wrong_ids(values: Iterable, limit: int, example: int | None = None):
    """Pairs (example, id) of ids outside the limit; in a flat list each id is an example of its own."""
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            value = value.tolist()
        if isinstance(value, Iterable):
            yield from _wrong_ids(value, limit, i if example is None else example)
        elif not 0 <= value < limit and value != IGNORED_LABEL:
            yield (i if example is None else example), int(value)


def _rows_with_loss(table: pa.Table, masks: list[str]) -> int:
    parents, counts = None, None
    for name in masks:
        flat, parents = _flatten(table[name].combine_chunks())
        if name == "input_ids" or not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type)):
            kept = pc.is_valid(flat)
        else:
            kept = pc.not_equal(flat, IGNORED_LABEL if name == "labels" else 0)
        counts = kept if counts is None else pc.and_(counts, kept)
    return pc.count_distinct(pc.filter(parents, counts)).as_py()


def _flatten(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    """All values of a possibly nested column, and the row of each."""
    rows = pa.array(range(len(column)), pa.int64())
    while pa.types.is_nested(column.type):
        rows, column = pc.take(rows, pc.list_parent_indices(column)), pc.list_flatten(column)
    return column, rows


def check_adapter(model, peft_config) -> None:
    """An adapter trains a sparse student's experts and routers. Raises ValueError where it would leave them frozen."""
    if peft_config is None or not any(name.endswith(".experts") for name, _ in model.named_modules()):
        return
    from hf_distill.students.routers import check_lora_reaches_experts

    check_lora_reaches_experts(model, peft_config)
