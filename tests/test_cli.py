import subprocess
import sys

import pytest

from hf_distill.cli import main
from hf_distill.methods import METHODS


def test_methods_are_listed_with_their_papers(capsys):
    main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][: len(METHODS)] == list(METHODS)
    assert any("2501.16937" in line for line in lines)


def test_without_a_command_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "methods" in capsys.readouterr().err


def test_help_does_not_load_transformers():
    code = "import sys; sys.argv = ['hf-distill', '--version']\nfrom hf_distill.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
