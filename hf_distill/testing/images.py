"""Set-ups of image methods whose default config says little on a few tiny examples."""

from __future__ import annotations

from hf_distill.testing.setups import TinyImage


class TinyNDLoss(TinyImage):
    """A projector without dropout, whose draws are not the same on one rank and on two."""

    def config(self, config_class: type):
        return config_class(projector="linear")


class TinyMixKD(TinyImage):
    """Half of a batch is mixed: a tenth of four examples is none."""

    def config(self, config_class: type):
        return config_class(mixup_fraction=0.5)
