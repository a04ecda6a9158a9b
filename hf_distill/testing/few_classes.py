"""Set-ups of methods for tasks of few classes."""

from __future__ import annotations

from hf_distill.testing.setups import TinySequence


class TinyLELP(TinySequence):
    """Two classes in two subclasses each: five need more examples of every class than a tiny run has.

    The label term makes gradients larger than rounding noise: the teacher's two classes alone say little.
    """

    labels = ("bad", "good")

    def config(self, config_class: type):
        return config_class(lelp_num_subclasses=2, lelp_alpha=1.0)
