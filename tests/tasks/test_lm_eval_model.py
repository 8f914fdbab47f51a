"""Rows that lm-eval's requests become, and texts that come back, against a server whose answers are known by hand."""

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'megatron-emoe[eval]'"
)

END, MAX_LENGTH = 99, 8


class Server:
    """The next token is the last one plus 1, a sampled one is where the draw falls on 0 ... 49. Keeps the rows."""

    shares = 1

    def __init__(self) -> None:
        self.asked: list[list] = []

    def answer(self, rows: list) -> list:
        from megatron_emoe.tasks.forward_server import Next

        self.asked.append(rows)
        if not isinstance(rows[0], Next):
            return [[(-float(len(end)), end[-1] == row.tokens[-1] + 1) for end in row.ends] for row in rows]
        return [row.tokens[-1] + 1 if row.draw is None else int(row.draw * 50) for row in rows]


def numbers() -> SimpleNamespace:
    """A tokenizer, as Megatron's: `7 8` is [7, 8]."""
    return SimpleNamespace(
        eod=END,
        tokenize=lambda text: [int(word) for word in text.split()],
        detokenize=lambda ids: " ".join(map(str, ids)),
    )


def model(batch: int = 2):
    from megatron_emoe.tasks.lm_eval_model import MegatronLM, Text

    return MegatronLM(Server(), Text(numbers()), batch=batch, max_length=MAX_LENGTH)


def requests(kind: str, *arguments: tuple) -> list:
    from tests.task_files import instances

    return instances(kind, list(arguments))


def asked(lm) -> list[tuple[list, list]]:
    return [(list(row.tokens), [list(end) for end in row.ends]) for rows in lm.server.asked for row in rows]


def test_choices_that_follow_the_same_input_are_one_row():
    lm = model()
    found = lm.loglikelihood(
        requests("loglikelihood", ("1 2", " 3"), ("1 2", " 4"), ("1 2", " 3 4"), ("1 2 3", " 9")), True
    )
    assert found == [(-1.0, True), (-1.0, False), (-2.0, True), (-1.0, False)]
    assert asked(lm) == [([1, 2, 3], [[3, 4], [9]]), ([1, 2], [[3], [4]])]  # the longest first


def test_inputs_are_cut_from_the_left_and_an_empty_context_is_the_end_token():
    lm = model()
    lm.loglikelihood(requests("loglikelihood", ("1 2 3 4 5 6 7 8 9", " 10 11"), ("", " 5 6")), True)
    assert asked(lm) == [([3, 4, 5, 6, 7, 8, 9, 10], [[10, 11]]), ([END, 5], [[5, 6]])]
    with pytest.raises(ValueError, match="request 0: a continuation of 9 tokens: the model sees 8 at most, see"):
        lm.loglikelihood(requests("loglikelihood", ("1", " 1 2 3 4 5 6 7 8 9")), True)


def test_whole_texts_are_scored_in_windows_each_token_once():
    lm = model(batch=1)
    lm.max_length = 4
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("0 1 2 3 4 5 6 7 8 9",), ("5",)), True)
    # The windows of lm-eval's own description of loglikelihood_rolling.
    windows = [
        ([END, 0, 1, 2], [[0, 1, 2, 3]]),
        ([3, 4, 5, 6], [[4, 5, 6, 7]]),
        ([5, 6, 7, 8], [[8, 9]]),
        ([END], [[5]]),
    ]
    assert sorted(asked(lm)) == sorted(windows)
    assert found == [-10.0, -1.0]


def generate(lm, *arguments: tuple[str, dict]) -> list[str]:
    return lm.generate_until(requests("generate_until", *arguments), True)


def test_a_text_ends_at_its_stop_its_limit_or_the_end_token():
    found = generate(
        model(),
        ("9", {"until": ["13", "12"], "max_gen_toks": 5}),
        ("20", {"until": "never", "max_gen_toks": 3}),
        ("96", {"max_gen_toks": 6}),
    )
    assert found == ["10 11 ", "21 22 23", "97 98"]


def test_a_finished_text_leaves_its_place_to_the_next():
    lm = model()
    assert generate(lm, ("1", {"max_gen_toks": 1}), ("2", {"max_gen_toks": 3}), ("3", {"max_gen_toks": 2})) == [
        "2",
        "3 4 5",
        "4 5",
    ]
    seen = [[list(row.tokens) for row in rows] for rows in lm.server.asked]
    assert seen == [[[1], [2]], [[2, 3], [3]], [[2, 3, 4], [3, 4]]]


def test_a_prompt_leaves_room_for_what_is_generated():
    lm = model()
    assert generate(lm, ("1 2 3 4 5 6 7 8 9", {"max_gen_toks": 3})) == ["10 11 12"]
    assert list(lm.server.asked[0][0].tokens) == [5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"^8 tokens to generate: must lie in \[1, 7\], see --max-length$"):
        generate(lm, ("1", {"max_gen_toks": 8}))


def test_sampled_texts_do_not_depend_on_the_batch():
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 4}
    asked_for = [(str(i), dict(sampling)) for i in range(5)] + [("0", dict(sampling))]
    alone, together = model(batch=1), model(batch=8)
    found = generate(alone, *asked_for)
    assert found == generate(together, *asked_for)
    assert len(set(found)) == 6  # also where the prompt is the same: every request draws for itself
    row = together.server.asked[0][0]
    assert (row.temperature, row.top_p, row.top_k) == (0.7, 0.9, 0) and 0 <= row.draw < 1


def test_temperature_zero_and_do_sample_false_are_greedy():
    for kwargs in ({"do_sample": True, "temperature": 0.0}, {"do_sample": False, "temperature": 0.8}, {}):
        assert generate(model(), ("3", {"max_gen_toks": 2} | kwargs)) == ["4 5"]


def test_a_way_to_generate_that_is_not_there_is_refused():
    message = "generation_kwargs num_beams: 4 is not supported for Megatron"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        generate(model(), ("1", {"num_beams": 4, "max_gen_toks": 2}))


PROBS = torch.tensor([0.2, 0.5, 0.0, 0.3])  # in order: token 1 to 0.5, token 3 to 0.8, token 0 to 1


@pytest.mark.parametrize(
    ("draw", "options", "token"),
    [
        (None, {}, 1),
        (0.0, {}, 1),
        (0.49, {}, 1),
        (0.51, {}, 3),
        (0.79, {}, 3),
        (0.81, {}, 0),
        (0.999999, {}, 0),
        (0.999999, {"top_k": 2}, 3),  # of 0.5 and 0.3
        (0.62, {"top_k": 2}, 1),  # 0.5 / 0.8 = 0.625
        (0.63, {"top_k": 2}, 3),
        (0.999999, {"top_p": 0.5}, 1),
        (0.999999, {"top_p": 0.51}, 3),
        (0.999999, {"top_p": 0.81}, 0),
        (0.999999, {"top_k": 2, "top_p": 0.62}, 1),  # of the two that are left 0.625 is enough
        (0.65, {"temperature": 0.5}, 1),  # squares: 0.25, 0.09, 0.04 of 0.38: token 1 up to 0.658
        (0.67, {"temperature": 0.5}, 3),
    ],
)
def test_where_a_draw_falls(draw, options, token):
    from megatron_emoe.tasks.forward_server import Next, next_token

    assert next_token(PROBS.log(), Next((5,), draw, **options)) == token


def test_scores_are_sums_of_log_probabilities():
    from megatron_emoe.tasks.forward_server import score

    logits = torch.stack([PROBS.log() + 3, PROBS.log()])  # a constant changes no probability
    found, greedy = score(logits, [1, 3])
    assert found == pytest.approx(torch.tensor(0.5 * 0.3).log().item()) and not greedy
    assert score(logits, [1, 1])[1]
