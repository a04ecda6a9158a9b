"""A run's own record, kept while it trains, and the report made of it."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import fields

from transformers import TrainerCallback

from hf_distill.hub.card import described_run
from hf_distill.hub.report import FACTS, LOG, write_report

logger = logging.getLogger(__name__)


class ReportCallback(TrainerCallback):
    """Writes what is logged to `log.jsonl`, facts about the run to `run.json`, and at the end `report.html` and `.png`.

    Both files stand in the output folder from the first step on, so `hf-distill report RUN` works while a run goes on
    and after one that was killed. A resumed run goes on in its own log. Only world process zero writes. Works in any
    transformers Trainer; our recipes have it.

    Args:
        trainer: the trainer it is added to, for facts about teacher and objective; None leaves them out.
    """

    def __init__(self, trainer=None):
        self.trainer = trainer
        self._before: list[dict] = []  # logged before training, when a folder may still hold another run's log
        self._began = self._ended = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        os.makedirs(args.output_dir, exist_ok=True)
        path = os.path.join(args.output_dir, LOG)
        old = [e for e in _entries(path) if e.get("step", 0) <= state.global_step] if state.global_step else []
        entries, self._before = old + self._before, []
        with open(path + ".part", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        os.replace(path + ".part", path)
        self._began, self._ended = True, False
        self._write_facts(args, state, model, finished=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or logs is None:
            return
        entry = {**_numbers(logs), "step": state.global_step}
        if not self._began:
            self._before.append(entry)
            return
        with open(os.path.join(args.output_dir, LOG), "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def on_evaluate(self, args, state, control, **kwargs):
        if self._ended and state.is_world_process_zero:  # the evaluation of what training left
            self._report(args)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        self._write_facts(args, state, model, finished=True)
        self._ended = True
        self._report(args)

    def _report(self, args) -> None:
        try:
            write_report(args.output_dir)
        except (ImportError, ValueError) as error:
            logger.info("no report: %s", error)

    def _write_facts(self, args, state, model, finished: bool) -> None:
        facts = {
            "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
            "max_steps": state.max_steps,
            "finished": finished,
            "settings": {f.name: _plain(getattr(args, f.name)) for f in fields(args) if _was_changed(args, f)},
            **described_run(self.trainer, model),
        }
        path = os.path.join(args.output_dir, FACTS)
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)
        os.replace(path + ".part", path)


def _entries(path: str) -> list[dict]:
    try:
        return [json.loads(line) for line in open(path, encoding="utf-8") if line.endswith("\n")]
    except FileNotFoundError:
        return []


def _numbers(logs: dict) -> dict:
    return {k: v for k, v in logs.items() if isinstance(v, int | float | str)}


def _was_changed(args, f) -> bool:
    """Whether a setting is not its default; folders and tokens of this machine are left out."""
    private = f.name.endswith(("_dir", "_token", "_path")) or f.name in ("run_name", "logging_dir")
    return f.init and not private and getattr(args, f.name) not in (f.default, None)


def _plain(value):
    return value if isinstance(value, int | float | str) else str(value)
