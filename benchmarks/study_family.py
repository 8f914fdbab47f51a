"""What a study is made of: a model with its base runs, ways to continue them, and how each is judged."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_emoe.settings.elastic_config import ElasticConfig


@dataclass(frozen=True)
class Method:
    """One way to continue a base run.

    flags: what differs from plain top-k; {base} stands for the checkpoint that is continued. about: a line for the
    table. lr: schedule. k: --moe-router-topk. ks: the k' it is swept at. fit: whether a tail scale is fitted and swept
    besides plain top-k'. base: of the family's bases. share: of the family's steps, for a run that is to cost what
    another does.
    """

    name: str
    flags: str
    about: str
    lr: str
    k: int
    ks: tuple[int, ...]
    fit: bool = False
    base: str = "base"
    share: float = 1.0


@dataclass(frozen=True)
class Family:
    """A study: everything in it continues one of its bases on the same data for the same number of steps, with the
    batch order and the draws of its seed.

    k: --moe-router-topk of the base. fitted_ks: the k' that a tail scale is fitted at; it is linear in between.
    base_train, train: batches and schedule of the base run, and of the others. bases: their checkpoints' names, and
    their flags. micro_batches: of a step of the others. evaluation: how held-out tokens are read. fit_tokens: their
    second half is fitted on; the first is what the sweeps judge on, as many as held_out_tokens. data: the data set's
    name in the study's folder.
    """

    layers: int
    k: int
    fitted_ks: tuple[int, ...]
    model: str
    base_train: str
    train: str
    base_lr: str
    bases: Mapping[str, str]
    base_iters: int
    continued_iters: int
    micro_batches: int
    evaluation: str
    held_out_tokens: int
    data: str

    @property
    def fit_tokens(self) -> int:
        return 2 * self.held_out_tokens

    def iterations(self, method: Method) -> int:
        """Steps of a run that continues a base."""
        return round(self.continued_iters * method.share)

    def base_method(self, name: str) -> Method:
        """The run that makes a base."""
        return Method(name, "", "a run to continue", self.base_lr, self.k, (self.k,), base=name)


def elastic_config(method: Method, seed: int) -> ElasticConfig:
    """The elastic settings of a cell, parsed from its flags."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ArgumentGroupFactory(ElasticConfig).build_group(parser, "elastic MoE")
    return ElasticConfig(**vars(parser.parse_args([*method.flags.split(), "--emoe-seed", str(seed)])))
