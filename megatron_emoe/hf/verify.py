"""The proof of a conversion: a whole Hugging Face model and a whole Megatron checkpoint on the same tokens.

transformers loads the one by its own rules, without this package's name tables; the other is built and loaded as for
training and for tools/sweep_k.py. Both answer at each number k' of active experts. One of the two models is in memory
at a time, in the type asked for.

How close can two implementations of one model come? transformers also runs against itself, with the output of every
decoder layer jittered by one unit in the last place of its type: the noise. Our distance may be FACTOR times the noise
(its square for a KL), or the floor, whichever is larger.

fp32: the floors are |dlogit| 1e-5 and KL 1e-10 nats. A routed set may differ by a tie, two experts with the same score
up to rounding: the tokens that such a choice reaches are counted, and left out of all bounds. Any other difference of
sets fails.

bf16: two right implementations differ in single logits by 5, where a token meets another expert, so the bounds are on
means over all tokens. They prove that bf16 computes the same function, not that no weight is wrong: that is fp32's
business.

Measured by benchmarks/measure_rounding.py on 12 tiny random models of 512 tokens at k' = 1 to 8. fp32: noise 1.3e-6 to
5.5e-6, ours at most 2.2 times that (KL 1.9 times). bf16: KL up to 1.6e-2, another most likely token for 6.2 %, other
sets for 3.4 %; the floors are two to three times that.
"""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from megatron_emoe.hf.architecture import experts_in, own_k
from megatron_emoe.hf.comparison import (
    Answer,
    Distance,
    distance,
    first_layer,
    reached_by_no_tie,
    set_hf_k,
    tracing_hf,
    tracing_megatron,
)
from megatron_emoe.hf.export_model import check_same_model
from megatron_emoe.hf.one_process import evaluating, silent_transformers
from megatron_emoe.hf.registry import architecture_of, read_config
from megatron_emoe.hf.safetensors_files import SafetensorsFolder
from megatron_emoe.hf.verify_report import KRow, VerifyReport
from megatron_emoe.model.checkpoint import locate, stored_args
from megatron_emoe.model.layer_spec import elastic_model_config
from megatron_emoe.model.stored_model import SHAPE_FLAGS
from megatron_emoe.routing.active_k import get_active_k
from megatron_emoe.training.evaluation import current_device
from megatron_emoe.training.held_out import load_model

FACTOR = 4.0
"""Our distance over the noise, at most."""
TIE = 1e-4
"""As comparison.TIE, for hidden states that went through many layers with other roundings."""
SEQUENCES, LENGTH = 8, 64


FLOORS = {
    torch.float32: Distance(max_difference=1e-5, kl=1e-10, other_top1=1.0, other_sets=1.0),
    torch.bfloat16: Distance(max_difference=torch.inf, kl=3e-2, other_top1=0.2, other_sets=0.1),
}
"""The least bounds. fp32: the logits' bound implies the others. bf16: see above."""
LAYER_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-5}
"""From which relative difference on a decoder layer's output is named as the first that differs."""


def verify(
    hf: Path,
    checkpoint: Path,
    *,
    ks: Sequence[int | None] | None = None,
    tokens: Tensor | None = None,
    bf16: bool = False,
    flags: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> VerifyReport:
    """Compare the model in `hf` with the newest checkpoint in the folder `checkpoint` (as --load takes it).

    ks: numbers of active experts for both; by default each uses its own. tokens: int64 [B, S], by default 8 x 64 random
    ones; see also `text_tokens`. bf16: both in bf16, else both in fp32, whatever type they are stored in. flags:
    Megatron's, on how to run (--transformer-impl local). One process; a GPU is used where there is one.

    Raises:
        ValueError: a k' or a token out of range, or a model that cannot be read or loaded. A difference is no error,
            but a report that has not passed.
        SystemExit: status 2, after one message on stderr, where Megatron's arguments or the checkpoint are refused.
    """
    config = read_config(hf)
    SafetensorsFolder(hf)
    _check_shapes(config, stored_args(locate(str(checkpoint), source="checkpoint"), "checkpoint"), hf)
    each_its_own, ks = not ks, list(dict.fromkeys(ks or [own_k(config)]))
    tokens = random_tokens(config.vocab_size) if tokens is None else tokens
    _check(ks, config, tokens)
    dtype = torch.bfloat16 if bf16 else torch.float32
    report(f"{hf} and {checkpoint}, {tokens.numel()} tokens, {'bf16' if bf16 else 'fp32'}; in brackets the noise")
    with torch.no_grad():
        theirs = _run_hf(hf, tokens, ks, dtype)
        asked = [None] if each_its_own else ks
        ours = _run_megatron(checkpoint, tokens, asked, bf16, flags, config)
        rows = tuple(_row(k, theirs[k], answer, dtype) for k, answer in zip(ks, ours, strict=True))
    result = VerifyReport(str(hf), str(checkpoint), "bf16" if bf16 else "fp32", rows)
    report(result.table())
    return result


def _check_shapes(config: PretrainedConfig, stored: Namespace, hf: Path) -> None:
    """ValueError for two models of other shapes. What else they may differ in is measured."""
    check_same_model(architecture_of(config), config, stored, hf, SHAPE_FLAGS)
    rows = stored.padded_vocab_size
    if rows is not None and rows < config.vocab_size:
        raise ValueError(
            f"--padded-vocab-size {rows}: the checkpoint has it, {hf / 'config.json'} means {config.vocab_size}"
        )


def _check(ks: Sequence[int | None], config: PretrainedConfig, tokens: Tensor) -> None:
    experts, vocab_size = experts_in(config), config.vocab_size
    for k in ks:
        if k is not None and not experts:
            raise ValueError(f"--k {k}: a {config.model_type} has no experts, and so no k'")
        if k is not None and not 1 <= k <= experts:
            raise ValueError(f"--k {k}: must lie in [1, {experts}], the number of experts")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(f"tokens {int(tokens.min())} to {int(tokens.max())}: the model has 0 to {vocab_size - 1}")


def random_tokens(vocab_size: int, *, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Token ids, int64 [sequences, length], uniform."""
    return torch.randint(0, vocab_size, (sequences, length), generator=torch.Generator().manual_seed(seed))


def text_tokens(hf: Path, text: Path, *, sequences: int = SEQUENCES, length: int = LENGTH) -> Tensor:
    """The first tokens of a text file, int64 [sequences, length], by the tokenizer in `hf`.

    Raises:
        ValueError: no tokenizer, no such file, or too short a text.
    """
    read_config(hf)
    try:
        ids = AutoTokenizer.from_pretrained(str(hf), trust_remote_code=False)(text.read_text())["input_ids"]
    except Exception as error:  # the library of fast tokenizers raises no other class
        raise ValueError(f"--text {text}: cannot be read, or {hf} has no tokenizer ({error})") from error
    if len(ids) < sequences * length:
        raise ValueError(f"--text {text}: {len(ids)} tokens, {sequences} x {length} are needed")
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


def _run_hf(
    folder: Path, tokens_BS: Tensor, ks: Sequence[int | None], dtype: torch.dtype
) -> dict[int | None, tuple[Answer, Answer]]:
    """By k': transformers' answer, and its answer with noise."""
    model = load_hf(folder, dtype)
    tokens_BS = tokens_BS.to(current_device())
    answers = {}
    for k in ks:
        if k is not None:
            set_hf_k(model.model.layers, k)
        answer = _answer_hf(model, tokens_BS)
        with _noise(model.model.layers):
            answers[k] = answer, _answer_hf(model, tokens_BS)
    del model
    gc.collect()  # before the other model comes
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answers


def load_hf(folder: Path, dtype: torch.dtype, *, eager: bool = True) -> PreTrainedModel:
    """The model in `folder` on this device, in evaluation mode. eager: by transformers' plain code; else by the faster
    attention and experts that it picks itself.

    Raises:
        ValueError: tensors are missing or have another shape.
    """
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"} if eager else {}
    with silent_transformers():
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=read_config(folder),
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **plain,
        )
    lost = [*loading["missing_keys"], *loading["mismatched_keys"]]
    if lost:  # transformers would go on with random numbers in their place
        raise ValueError(f"{folder}: not in its files, or of another shape: {', '.join(map(str, lost))}")
    return model.to(current_device()).eval()


def _answer_hf(model: PreTrainedModel, tokens_BS: Tensor) -> Answer:
    with tracing_hf(model.model.layers, tokens_BS.shape[0]) as trace:
        logits_BSV = model(tokens_BS, use_cache=False).logits
    return Answer(logits_BSV.float().cpu(), trace)


@contextmanager
def _noise(layers: nn.ModuleList) -> Iterator[None]:
    """Inside, every decoder layer's output is off by up to one unit in the last place, at random."""
    generator = torch.Generator().manual_seed(1)

    def jitter(_layer: nn.Module, _inputs: Any, hidden: Tensor) -> Tensor:
        unit = torch.finfo(hidden.dtype).eps * (2 * torch.rand(hidden.shape, generator=generator) - 1)
        return (hidden.float() * (1 + unit.to(hidden.device))).to(hidden.dtype)

    hooks = [layer.register_forward_hook(jitter) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run_megatron(
    folder: Path,
    tokens_BS: Tensor,
    ks: Sequence[int | None],
    bf16: bool,
    flags: Sequence[str],
    config: PretrainedConfig,
) -> list[Answer]:
    """Our answer at each k'; None: at the checkpoint's own."""
    scale = architecture_of(config).stream_scale(config)
    with evaluating(folder, length=tokens_BS.shape[1], bf16=bf16, flags=flags) as args:
        model = _load(args)
        layers = unwrap_model(model).decoder.layers
        tokens_BS = tokens_BS.to(current_device())
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        answers = []
        for k in ks:
            with (
                tracing_megatron(layers, tokens_BS.shape[0], scale) as trace,
                get_active_k().evaluating(k),
                get_active_k().plain_weights(),  # transformers by its own rules has no scales
            ):
                logits_BSV = model(tokens_BS, positions_BS, None)
            answers.append(Answer(logits_BSV[..., : config.vocab_size].float().cpu(), trace))
    return answers


def _load(args: Namespace) -> nn.Module:
    try:
        return load_model(args, elastic_model_config(args))[0]
    except (Exception, CheckpointException) as error:  # torch's is no Exception, and ends with the cause
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]
        raise ValueError(f"{args.load}: cannot be loaded as the model of its own flags ({reason})") from error


def _row(k: int | None, theirs: tuple[Answer, Answer], ours: Answer, dtype: torch.dtype) -> KRow:
    """The numbers of one k', and which of them are out of bounds for this type."""
    expected, noisy = theirs
    tie = TIE if dtype == torch.float32 else None  # in bf16 they are everywhere
    clean_BS, ties, first_sets = reached_by_no_tie(expected.trace, ours.trace, tie)
    row = KRow(
        k=k,
        tokens=clean_BS.numel(),
        compared=int(clean_BS.sum()),
        ties=ties,
        ours=distance(expected, ours, clean_BS),
        noise=distance(expected, noisy, reached_by_no_tie(expected.trace, noisy.trace, tie)[0]),
        first_layer=first_layer(expected.trace, ours.trace, clean_BS, LAYER_BOUND[dtype]),
        first_layer_sets=first_sets,
        failures=(),
    )
    return KRow(**{**vars(row), "failures": tuple(_failures(row, dtype))})


def _failures(row: KRow, dtype: torch.dtype) -> list[str]:
    """What is out of bounds. A value that is not a number is."""
    layers = f"first layer that differs: {row.first_layer}; in its experts: {row.first_layer_sets}"
    failures = []
    if row.compared * 2 < row.tokens:
        failures.append(f"ties reach {row.tokens - row.compared} of {row.tokens} tokens: take other tokens")
    if dtype == torch.float32 and row.first_layer_sets is not None:
        failures.append(f"other experts are chosen, and not by a tie; {layers}")
    noise, floor = vars(row.noise), vars(FLOORS[dtype])
    for name, value in vars(row.ours).items():
        bound = max(noise[name] * (FACTOR**2 if name == "kl" else FACTOR), floor[name])
        if not value <= bound:
            failures.append(f"{name} {value:.2e} above {bound:.1e}; {layers}")
    return failures
