"""What methods that mix domains run on."""

from __future__ import annotations

from hf_distill.testing.setups import TinyText


class TinyDomains(TinyText):
    """Texts of two domains in turns, mixed anew after every step."""

    def dataset(self, rows: int):
        return super().dataset(rows).add_column("domain", ["even" if i % 2 == 0 else "odd" for i in range(rows)])

    def config(self, config_class: type):
        return config_class(ddk_interval=1, ddk_eval_samples=1)
