"""`python -m hf_distill.testing PROMISE CARDS FOLDER`: the process that `check_methods` starts for a promise."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path

import transformers
from datasets import disable_progress_bars

from hf_distill.methods import MethodCard
from hf_distill.testing import courses, promises, selecting
from hf_distill.testing.runs import Case, RunFailed, import_before_forking

# by name: the check of one card, and what finishes it for all cards at once
CHECKS = {
    "interface": (promises.interface, None),
    "exact_scaling": (promises.exact_scaling, None),
    "no_wide_logits": (promises.no_wide_logits, None),
    "clean_student": (promises.clean_student, promises.load_clean_students),
    "exact_resume": (courses.exact_resume, None),
    "distributed": (courses.distributed, None),
    "frozen_teacher": (courses.frozen_teacher, None),
    "quiet_evaluation": (courses.quiet_evaluation, None),
}


def main(promise: str, cards: str, folder: str) -> None:
    """Check a promise card by card and write {slug: [what differs]} to `report.json`."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    listed = [MethodCard(**fields) for fields in json.loads(Path(cards).read_text(encoding="utf-8"))]
    import_before_forking(listed)
    check, finish = CHECKS[promise]
    report: dict[str, list[str]] = {}
    cases: list[Case] = []
    for card in listed:
        if card.entry == "select":
            own = selecting.CHECKS.get(promise)
            report[card.slug] = [] if own is None else _problems(own, card, Path(folder) / card.slug, [])
        else:
            report[card.slug] = _problems(check, card, Path(folder) / card.slug, cases)
    if finish is not None:
        for slug, problems in finish([case for case in cases if not report[case.card.slug]], Path(folder)).items():
            report[slug] += problems
    Path(folder, "report.json").write_text(json.dumps(report), encoding="utf-8")


def _problems(check, card: MethodCard, folder: Path, cases: list[Case]) -> list[str]:
    try:
        cases.append(Case(card, folder))
        return list(check(cases[-1]))
    except RunFailed as error:
        return [str(error)]
    except Exception:
        return [traceback.format_exc(limit=-4)]


if __name__ == "__main__":
    main(*sys.argv[1:])
