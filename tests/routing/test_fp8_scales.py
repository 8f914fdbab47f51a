"""FP8 scales that a run would save and could not load again are refused before it starts."""

import re
from argparse import Namespace

import pytest

from megatron_emoe.routing import combinations
from megatron_emoe.routing.combinations import refuse_state_that_would_not_load

SCALED = {"fp8": "hybrid", "fp8_recipe": "delayed", "save": "folder"}


@pytest.mark.parametrize(
    "changes", [{"fp8": None}, {"fp8_recipe": "tensorwise"}, {"save": None}, {"loads pickles": True}], ids=str
)
def test_scales_that_could_not_be_loaded_again_are_refused_before_work_starts(changes, monkeypatch):
    monkeypatch.setattr(combinations, "_pickles_are_loaded", lambda: changes.get("loads pickles", False))
    refuse_state_that_would_not_load(Namespace(**SCALED | changes))
    monkeypatch.setattr(combinations, "_pickles_are_loaded", lambda: False)
    message = (
        "--save folder with --fp8-recipe delayed: its scales are saved as pickles, which this Transformer Engine does "
        "not load: give another --fp8-recipe (tensorwise, blockwise, mxfp8), or set "
        "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 where the checkpoints can be trusted"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        refuse_state_that_would_not_load(Namespace(**SCALED))
