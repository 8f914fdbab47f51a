"""`vllm serve` as a user starts it: its HTTP interface, and a change of k' under load."""

import json
import threading
import time

import pytest
import served
from http_server import Server, right

BLOCK = {"k_train": 2, "tail_scale": ["3:0.6", "8:0.1"], "k_range": [1, 8]}
BUDGETS = {
    "version": 1,
    "checkpoint": "random",
    "k_train": 2,
    "num_experts": 8,
    "budgets": [
        {"name": "fast", "k": 1, "loss": 2.4, "quality": 0.9, "expert_flops": 0.5, "latency_ms_batch1": 3.5},
        {"name": "middle", "k": 4, "loss": 2.3, "quality": 1.01, "expert_flops": 2.0},
        {"name": "best", "k": [8, 6], "loss": 2.2, "quality": 1.02, "expert_flops": 3.5},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a table of budgets beside its config.json."""
    folder = served.save("olmoe", tmp_path_factory.mktemp("server") / "m", BLOCK, tokenizer=True)
    (folder / "emoe_budgets.json").write_text(json.dumps(BUDGETS))
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    started = Server(folder, log, {"k": "middle"})
    try:
        yield started.wait()
    finally:
        started.stop()


@pytest.fixture(scope="module")
def reference(folder):
    return served.Reference(folder)


def test_a_request_names_its_budget(server, reference):
    for k in (1, 8, 3):
        status, answer = server.complete(served.tokens(1), emoe_k=k)
        assert status == 200 and right(reference, served.tokens(1), answer, k)


def test_a_budget_out_of_range_is_http_400_with_the_range(server):
    status, answer = server.complete(served.tokens(1), emoe_k=9)
    assert status == 400
    assert "emoe_k 9: must be a whole number in [1, 8], the k' that are served" in json.dumps(answer)
    assert server.complete(served.tokens(1))[0] == 200  # it goes on


def test_names_of_budgets(server, reference):
    prompt = served.tokens(3)
    assert right(reference, prompt, server.complete(prompt, emoe_k="best")[1], (8, 6))
    assert right(reference, prompt, server.complete(prompt, emoe_k="best", emoe_k_decode="fast")[1], (8, 6), 1)
    assert right(reference, prompt, server.complete(prompt, emoe_k_prefill="fast")[1], 1, 4)
    status, answer = server.complete(prompt, emoe_k="bset")
    assert status == 400 and "emoe_k 'bset': must be one of fast, middle, best, or a whole" in json.dumps(answer)
    assert server.call("/emoe")[1]["budgets"] == [
        {key: each[key] for key in ("name", "k", "quality", "expert_flops")} for each in BUDGETS["budgets"]
    ]
    assert server.call("/emoe/k", {"k": "fast"})[1]["k"] == 1
    assert right(reference, prompt, server.complete(prompt)[1], 1)
    server.call("/emoe/k", {"k": None})


def counts(metrics):
    """The tokens of /metrics by phase and k'."""
    return {(labels[1][1], labels[0][1]): value for labels, value in metrics["emoe:tokens_total"].items()}


def test_metrics_are_those_of_the_status_and_vllms_in_one_answer(server):
    before, was = server.metrics(), server.call("/emoe")[1]
    server.call("/emoe/k", {"k": [7, 1]})
    server.complete(served.tokens(4), 5)
    server.complete(served.tokens(4), 3, emoe_k_decode=8)
    metrics, status = server.metrics(), server.call("/emoe")[1]
    assert metrics["emoe:k"] == {(): 4.0} and metrics["emoe:k_prefill"] == {(): 4.0} and status["k_now_mean"] == 4.0
    assert metrics["emoe:level_changes_total"] == {(): 0.0}
    now, then = counts(metrics), counts(before)
    label = {True: "-".join, False: "".join}
    for phase in ("prefill", "decode"):
        said = {
            (phase, label[isinstance(k, list)](map(str, k if isinstance(k, list) else [k]))): n
            for k, n in status[phase]
        }
        assert said == {key: value for key, value in now.items() if key[0] == phase}
    assert now["prefill", "7-1"] - then.get(("prefill", "7-1"), 0) == 2 * served.PROMPT
    assert now["decode", "7-1"] - then.get(("decode", "7-1"), 0) == 4  # the last that is written is never an input
    assert now["decode", "8"] - then.get(("decode", "8"), 0) == 2
    prompts = "vllm:prompt_tokens_total"
    assert metrics[prompts][()] - before[prompts][()] == 2 * served.PROMPT
    assert sum(n for _, n in status["tokens"]) - sum(n for _, n in was["tokens"]) == 2 * served.PROMPT + 6
    server.call("/emoe/k", {"k": None})


def test_the_servers_budget_is_read_and_set(server, reference):
    status, was = server.call("/emoe")
    assert status == 200 and (was["k"], was["k_train"], was["k_min"], was["k_max"]) == (4, 2, 1, 8)
    for k in (8, [1, 7]):
        status, now = server.call("/emoe/k", {"k": k})
        assert status == 200 and now["k"] == k
        assert right(reference, served.tokens(2), server.complete(served.tokens(2))[1], k)
    tokens = {json.dumps(k): count for k, count in server.call("/emoe")[1]["tokens"]}
    assert tokens["[1, 7]"] == served.PROMPT + 3
    assert server.call("/emoe/k", {"k": None})[1]["k"] == 4  # what it was started with


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"k": 9}, "k 9: must be a whole number in [1, 8], the k' that are served"),
        ({"k": [1]}, "k [1]: must have one k' for each of the 2 layers with experts"),
        ({"k": "all"}, "k 'all': must be one of fast, middle, best, or a whole number in [1, 8], the k' that are"),
        ({"kk": 2}, "the body must be an object with the key k, such as"),
        ({}, "the body must be an object with the key k, such as"),
        ({"follow": 1}, "follow 1: must be true or false"),
        ({"follow": True}, "follow True: this server has no levels to follow; --additional-config emoe.follow sets"),
    ],
)
def test_a_bad_budget_of_the_server_is_http_400(server, body, message):
    status, answer = server.call("/emoe/k", body)
    assert status == 400 and message in answer["error"]["message"]
    assert server.call("/emoe")[1]["k"] == 4


def test_a_change_under_load_loses_and_mixes_no_request(server, reference):
    answers, prompts = {}, {number: served.tokens(100 + number) for number in range(24)}

    def ask(numbers):
        for number in numbers:
            extra = {"emoe_k": 3} if number % 3 == 0 else {}
            answers[number] = server.complete(prompts[number], 12, **extra)

    threads = [threading.Thread(target=ask, args=(range(first, 24, 6),)) for first in range(6)]
    used, ran = {4}, [sum(counts(server.metrics()).values())]
    for thread in threads:
        thread.start()
    for k in (8, 1, 2, 4):
        time.sleep(0.2)
        assert server.call("/emoe/k", {"k": k})[0] == 200
        used.add(k)
        ran.append(sum(counts(server.metrics()).values()))
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted(prompts)
    # Also while it works: no count is lost.
    assert sorted(ran) == ran and sum(counts(server.metrics()).values()) - ran[0] == 24 * (served.PROMPT + 11)
    for number, (status, answer) in answers.items():
        assert status == 200 and len(answer["choices"][0]["token_ids"]) == 12
        possible = {3} if number % 3 == 0 else used
        assert any(right(reference, prompts[number], answer, k) for k in possible), number
