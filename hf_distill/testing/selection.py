"""What methods that select data run on."""

from __future__ import annotations

from hf_distill.testing.setups import TinyText


class TinySelection(TinyText):
    """Two tiny models of one tokenizer, and texts; few of them make a shard."""

    layout = {"miniplm_length": 8, "miniplm_shard_units": 2, "miniplm_batch_size": 2}
    other_layout = {"miniplm_length": 8, "miniplm_shard_units": 5, "miniplm_batch_size": 3}
    wide_layout = {"miniplm_length": 8, "miniplm_shard_units": 64, "miniplm_batch_size": 64}

    def config(self, config_class: type, **changes):
        return config_class(**self.layout | changes)
