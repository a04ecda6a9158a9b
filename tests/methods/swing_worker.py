"""Exposure and Swing's logs on two ranks. swing_worker.py FOLDER"""

import json
import os
import sys

from accelerate import PartialState

from tests.methods.test_swing import logged_with_canaries


def main(folder: str) -> None:
    logs = logged_with_canaries(folder)
    state = PartialState()
    assert state.num_processes == 2, state
    with open(os.path.join(folder, f"rank-{state.process_index}.json"), "w", encoding="utf-8") as file:
        json.dump(logs, file)


if __name__ == "__main__":
    main(sys.argv[1])
