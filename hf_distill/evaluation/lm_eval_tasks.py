"""Tasks of EleutherAI's lm-evaluation-harness, through its own package (the extra `lm-eval`)."""

from __future__ import annotations

from collections.abc import Sequence


def check_tasks(tasks: Sequence[str], include_path: str | None = None) -> None:
    """lm-eval is installed and knows these tasks.

    Raises:
        ImportError: it is not; names the extra.
        ValueError: a task that it does not know.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("lm-eval tasks need the lm-eval package: pip install 'hf-distill[lm-eval]'") from error
    known = TaskManager(include_path=include_path).all_tasks
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(f"lm-eval knows no task {', '.join(unknown)}: see `lm-eval ls tasks`, or give its folder")


def lm_eval_scores(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """What the harness measures of a causal language model. Every rank runs all of it.

    Args:
        tasks: names of the harness, or of task files in the folder `include_path`.
        limit: examples per task; None takes all.

    Returns:
        "<task>/<metric>", or "<task>/<metric>,<filter>", -> value; "<task>/<metric>_stderr" where there is one.

    Raises:
        see `check_tasks`.
    """
    check_tasks(tasks, include_path)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    before = model.training
    wrapped = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size)
    manager = TaskManager(include_path=include_path)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager)
    model.train(before)
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, (int, float)) and metric != "sample_len"
    }
