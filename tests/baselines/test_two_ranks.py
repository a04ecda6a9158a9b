"""Two processes with half the micro-batches each end where one process does, memory banks included."""

import json

import torch
from safetensors.torch import load_file

from tests.baselines.two_rank_worker import main
from tests.launching import run_worker


def test_two_processes_hold_other_banks_or_weights_than_one(tmp_path):
    run_worker("tests/baselines/two_rank_worker.py", tmp_path / "two", ranks=2)
    assert json.loads((tmp_path / "two.json").read_text()) == {"ranks": 2, "banks_equal": True}
    main(str(tmp_path / "one"))
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and {"bank", "z"} <= one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)
