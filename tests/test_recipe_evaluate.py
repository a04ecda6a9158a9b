import json
import math

import pytest

from hf_distill.cli import main


@pytest.mark.parametrize("task", ["language", "image", "text"])
def test_a_student_is_not_measured_beside_its_teacher(task, tmp_path, capsys):
    flags = ["--task", task, "--tiny", "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    main(["evaluate", *flags])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    own = {"cross_entropy", "teacher_kl", "agreement", "ece", "parameters", "teacher_parameters", "times_smaller"}
    assert own <= found.keys() and all(math.isfinite(value) for value in found.values())
    more = {"student_tokens_per_second_read", "times_faster"} if task == "language" else {"accuracy", "macro_f1"}
    assert more <= found.keys()
    assert (tmp_path / "reliability.png").stat().st_size > 3000
    assert "KL(teacher || student)" in capsys.readouterr().out or task != "language"


def test_a_task_that_there_is_not_is_evaluated(tmp_path):
    with pytest.raises(ValueError, match="--task must be one of language, image, text, got 'audio'"):
        main(["evaluate", "--task", "audio"])
