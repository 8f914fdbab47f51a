"""Many budgets in one engine: mixed batches, phases, the prefix cache, and what changes while it runs."""

import pytest
import served
import torch
from vllm.exceptions import VLLMValidationError

import emoe_vllm

BLOCK = {"k_train": 2, "tail_scale": ["3:0.6", "8:0.1"], "k_range": [1, 8]}
SEEDS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.save("olmoe", tmp_path_factory.mktemp("requests") / "m", BLOCK)


@pytest.fixture(scope="module")
def llm(folder):
    with served.engine(folder, {"k": 4}) as made:
        yield made


@pytest.fixture(scope="module")
def reference(folder):
    return served.Reference(folder)


def close(found, expected):
    return float((found - expected).abs().max()) < served.TOLERANCE


def cached(length, **extra):
    """Parameters of a request that may read the prefix cache."""
    return served.params(length, prompt=False, **extra)


def test_a_batch_of_four_budgets_is_four_runs_alone(llm, reference):
    prompts, ks = [served.tokens(seed) for seed in SEEDS], (1, 8, 3, 2)
    together = served.written(llm, prompts, [served.params(6, emoe_k=k) for k in ks])
    for prompt, k, (answer, found) in zip(prompts, ks, together, strict=True):
        alone, apart = served.written(llm, [prompt], served.params(6, emoe_k=k))[0]
        assert alone == answer and close(found, apart)
        assert close(found, reference.logprobs(prompt + answer, k)), k


@pytest.mark.parametrize(("prefill", "decode"), [(8, 1), (1, 8)])
def test_reading_at_one_budget_and_writing_at_another(llm, reference, prefill, decode):
    prompt = served.tokens(7)
    asked = served.params(8, emoe_k_prefill=prefill, emoe_k_decode=decode)
    answer, found = served.written(llm, [prompt], asked)[0]
    assert close(found, reference.in_phases(prompt, answer, prefill, decode))
    assert not close(found, reference.logprobs(prompt + answer, prefill))


def test_a_request_that_names_one_phase_has_the_servers_budget_in_the_other(llm, reference):
    prompt = served.tokens(8)
    answer, found = served.written(llm, [prompt], served.params(4, emoe_k_decode=1))[0]
    assert close(found, reference.in_phases(prompt, answer, 4, 1))


def test_cached_blocks_are_read_at_their_own_budget_alone(llm, reference):
    prompt = served.tokens(9, 3 * served.BLOCK + 5)
    for k in (8, 1, 8, 2):  # the third reads what the first left
        answer, found = served.written(llm, [prompt], cached(4, emoe_k=k))[0]
        assert close(found, reference.logprobs(prompt + answer, k)[len(prompt) - 1 :]), k


def cached_tokens(llm, prompt, **extra):
    """Tokens of a prompt that a request reads from the prefix cache."""
    return llm.generate([{"prompt_token_ids": prompt}], cached(1, **extra), use_tqdm=False)[0].num_cached_tokens


def test_equal_budgets_share_blocks(llm):
    prompt = served.tokens(10, 3 * served.BLOCK + 5)
    hits = [cached_tokens(llm, prompt, emoe_k=k) for k in (8, 8, 1, 1)]
    assert hits == [0, 3 * served.BLOCK, 0, 3 * served.BLOCK]
    assert cached_tokens(llm, prompt, emoe_k_prefill=8, emoe_k_decode=2) == 3 * served.BLOCK


def test_what_was_written_at_another_budget_is_not_read_as_a_prompt(llm, reference):
    prompt = served.tokens(11, served.BLOCK + 5)
    asked = cached(2 * served.BLOCK, emoe_k_prefill=8, emoe_k_decode=1)
    answer, _ = served.written(llm, [prompt], asked)[0]
    longer = prompt + answer
    assert cached_tokens(llm, longer, emoe_k=8) == served.BLOCK  # the block that is the prompt's alone
    again, found = served.written(llm, [longer], cached(3, emoe_k=8))[0]
    assert close(found, reference.logprobs(longer + again, 8)[len(longer) - 1 :])


def test_what_was_written_at_the_same_budget_is_read_again(llm):
    prompt = served.tokens(12, served.BLOCK + 5)
    answer, _ = served.written(llm, [prompt], cached(2 * served.BLOCK, emoe_k=3))[0]
    assert cached_tokens(llm, prompt + answer, emoe_k=3) == 3 * served.BLOCK


def test_the_servers_budget_changes_while_it_runs(llm, reference):
    prompt, was = served.tokens(13), emoe_vllm.status(llm)
    assert (was["k"], was["k_train"], was["k_min"], was["k_max"]) == (4, 2, 1, 8)
    try:
        for k in (8, [1, 7], 1):
            assert emoe_vllm.set_k(llm, k)["k"] == k
            answer, found = served.written(llm, [prompt], served.params(3))[0]
            assert close(found, reference.logprobs(prompt + answer, k)), k
        assert llm.collective_rpc("emoe_set_k", args=(5,))[0]["k"] == 5
    finally:
        emoe_vllm.set_k(llm, 4)


def test_rows_are_tokens_times_budget(llm):
    before = emoe_vllm.status(llm)
    served.written(llm, [served.tokens(14)], served.params(5, emoe_k_prefill=6, emoe_k_decode=3))
    after = emoe_vllm.status(llm)
    # The prompt at 6; of five written tokens the last is never an input.
    rows = served.PROMPT * 6 + 4 * 3
    assert [after["rows"][layer] - before["rows"][layer] for layer in ("0", "1")] == [rows, rows]
    now, was = dict(after["tokens"]), dict(before["tokens"])
    assert now[6] - was.get(6, 0) == served.PROMPT and now[3] - was.get(3, 0) == 4


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"emoe_k": 9}, r"emoe_k 9: must be a whole number in \[1, 8\], the k' that are served"),
        ({"emoe_k": 0}, r"emoe_k 0: must be a whole number in \[1, 8\]"),
        ({"emoe_k": 2.5}, r"emoe_k 2.5: must be a whole number"),
        ({"emoe_k": True}, r"emoe_k True: must be a whole number"),
        ({"emoe_k_decode": "many"}, r"emoe_k_decode 'many': must be a whole number"),
        ({"emoe_kk": 2}, r"emoe_kk: is not known; a request may name emoe_k, emoe_k_prefill and emoe_k_decode"),
        ({"emoe_levels": [1, 1]}, r"emoe_levels: is set by the server"),
    ],
)
def test_a_bad_budget_is_refused_before_the_engine_sees_it(llm, extra, message):
    with pytest.raises(VLLMValidationError, match=message):
        served.written(llm, [served.tokens()], served.params(1, **extra))


def test_a_bad_budget_of_the_server_is_refused(llm):
    with pytest.raises(ValueError, match=r"k 9: must be a whole number in \[1, 8\], the k' that are served"):
        emoe_vllm.set_k(llm, 9)
    with pytest.raises(ValueError, match=r"k \[1, 2, 3\]: must have one k' for each of the 2 layers with experts"):
        emoe_vllm.set_k(llm, [1, 2, 3])
    assert emoe_vllm.status(llm)["k"] == 4


def test_one_sampling_parameter_for_many_requests_stays_the_callers(llm, reference):
    asked = served.params(3, emoe_k=8)
    for answer, found in served.written(llm, [served.tokens(seed) for seed in SEEDS], asked):
        assert torch.isfinite(found).all() and len(answer) == 3
    assert asked.extra_args == {"emoe_k": 8}
