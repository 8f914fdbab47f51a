"""Flags on a GPU machine where Transformer Engine is not installed."""

import re

import pytest

from megatron_emoe.host import engine
from megatron_emoe.host.flags import LOCAL_LAYERS


@pytest.fixture(autouse=True)
def without(monkeypatch):
    monkeypatch.setattr(engine, "is_there", lambda: False)


def test_what_local_layers_need_is_added_where_it_is_not_given(capsys):
    words = engine.settle(["--attention-backend=local", "--moe-grouped-gemm", "--no-rope-fusion", "--lr", "-1"])
    assert words[:4] == ["--attention-backend=local", "--no-rope-fusion", "--lr", "-1"]
    added = [name for name in LOCAL_LAYERS if name not in ("--attention-backend", "--no-rope-fusion")]
    assert [word for word in words[4:] if word.startswith("--")] == added and "local" in words[4:]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "Transformer Engine is not installed: Megatron-Core's local layers are used; --moe-grouped-gemm is left out "
        "(docs/gpu.md)"
    )


def test_with_it_nothing_changes(monkeypatch, capsys):
    monkeypatch.setattr(engine, "is_there", lambda: True)
    assert engine.settle(["--fp8-format", "hybrid"]) == ["--fp8-format", "hybrid"] and not capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "--fp8-format hybrid",
        "--use-precision-aware-optimizer",
        "--transformer-impl transformer_engine",
        "--context-parallel-size 2",
    ],
)
def test_what_it_alone_can_serve_is_refused(words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}: needs Transformer Engine, which is not installed"):
        engine.settle(["--bf16", *words.split(), "--lr", "1"])
