"""`python -m hf_distill.testing PROMISE CARDS FOLDER`: the process that `check_methods` starts for a promise."""

import sys

from hf_distill.testing.promises import main

main(*sys.argv[1:])
