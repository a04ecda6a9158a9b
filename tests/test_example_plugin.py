"""The example package, installed as its readers install it, keeps the promises of our own methods."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin"
CHECK = """
from hf_distill.methods import cards
from hf_distill.testing import check_methods
found = [card for card in cards() if card.slug == "handover_kd"]
assert len(found) == 1, [card.slug for card in cards()]
check_methods(found)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """An environment in which the package is installed."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("installing a package offline needs pip and setuptools in this environment")
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")
    for path in EXAMPLE.rglob("*"):
        if path.suffix in (".toml", ".py", ".md"):
            (source / path.relative_to(EXAMPLE)).parent.mkdir(exist_ok=True, parents=True)
            (source / path.relative_to(EXAMPLE)).write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(folder), str(source)], check=True, capture_output=True, timeout=120)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(EXAMPLE.parents[1])])}


def run(installed, *command: str) -> str:
    done = subprocess.run([sys.executable, *command], env=installed, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_example_breaks_a_promise(installed):
    run(installed, "-c", CHECK)


def test_the_example_is_not_listed_or_its_recipe_does_not_run(installed, tmp_path):
    assert "handover_kd" in run(installed, "-m", "hf_distill.cli", "methods")
    said = run(installed, str(EXAMPLE / "recipe.py"), "--tiny", "--output_dir", str(tmp_path), "--disable_tqdm", "true")
    assert "KL(teacher || student)" in said and "teacher_share" in (tmp_path / "log.jsonl").read_text()
