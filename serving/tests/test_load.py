"""Decoding that follows the load in a real engine, its worker another process: a scripted pattern of arrivals."""

import pytest
import served
import torch

import emoe_vllm

BLOCK = {"k_train": 2, "tail_scale": ["3:0.6", "8:0.1"], "k_range": [1, 8]}
BUDGETS = {
    "version": 1,
    "k_train": 2,
    "num_experts": 8,
    "budgets": [
        {"name": "low", "k": 1, "quality": 0.8},
        {"name": "fast", "k": 1, "quality": 0.9},
        {"name": "good", "k": 3, "quality": 0.95},
        {"name": "best", "k": [8, 6], "quality": 1.01},
    ],
}
EMOE = {
    "k": 4,
    "budgets": BUDGETS,
    "follow": {"0": "best", "2": "good", "4": 1},
    "hold": 2,
    "margin": 0,
    "min_quality": 0.8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.save("olmoe", tmp_path_factory.mktemp("load") / "m", BLOCK)


@pytest.fixture(scope="module")
def llm(folder):
    with served.engine(folder, EMOE, distributed_executor_backend="mp") as made:
        yield made


@pytest.fixture(scope="module")
def reference(folder):
    return served.Reference(folder)


class Script:
    """An engine step by step. levels: the budget of every step in which tokens ran."""

    def __init__(self, llm):
        self.llm, self.engine, self.levels, self.outputs = llm, llm.llm_engine, [], {}
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.schedule = self.scheduler.schedule

    def __enter__(self):
        def recorded(*args, **kwargs):
            output = self.schedule(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                self.levels.append(self.scheduler.levels.budget(output.emoe_level))
            return output

        self.scheduler.schedule = recorded
        return self

    def __exit__(self, *_):
        del self.scheduler.schedule

    def run(self, arrivals):
        """arrivals: (step, name, prompt, parameters); steps count from 0 in this call."""
        start, waiting = len(self.levels), sorted(arrivals, key=lambda each: each[0])
        while waiting or self.engine.has_unfinished_requests():
            while waiting and waiting[0][0] <= len(self.levels) - start:
                _, name, prompt, asked = waiting.pop(0)
                self.engine.add_request(name, {"prompt_token_ids": prompt}, asked)
            for output in self.engine.step():
                if output.finished:
                    self.outputs[output.request_id] = output.outputs[0]
        return self.levels[start:]


def expected(reference, prompt, answer, prefill, decode):
    """transformers with the prompt at `prefill` and each written token fed at its own of `decode`."""
    reference.set(prefill)
    with torch.no_grad():
        out = reference.model(torch.tensor([prompt]), use_cache=True)
        logits = [out.logits[0, -1:]]
        for token, k in zip(answer, decode, strict=False):
            reference.set(k)
            out = reference.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
    logprobs = torch.cat(logits)[: len(answer)].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]


def right(reference, prompt, output, prefill, decode):
    found = torch.tensor([step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)])
    want = expected(reference, prompt, list(output.token_ids), prefill, decode)
    return len(found) == len(want) and float((found - want).abs().max()) < served.TOLERANCE


def asked(length, **extra):
    return served.params(length, prompt=False, **extra)


BEST = (8, 6)
# Request: first step, tokens written, each in a step of its own: in the engine from the first step on, so many steps.
ARRIVALS = {"a": (0, 16), "b": (2, 6), "c": (3, 3), "d": (4, 3)}
LOADS = [1, 1, 2, 3, 4, 4, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1]
# From 4 on k' = 1; 6 and 7 are calm, so 8 is one level up; 8 and 9 are calm for that one too, so 10 is the first again.
LEVELS = [BEST, BEST, 3, 3, 1, 1, 1, 1, 3, 3, BEST, BEST, BEST, BEST, BEST, BEST]


def test_the_script_has_these_loads():
    spans = [range(start, start + length) for start, length in ARRIVALS.values()]
    assert [sum(step in span for span in spans) for step in range(16)] == LOADS


def test_levels_of_every_step_and_what_is_written_at_them(llm, reference):
    before = emoe_vllm.status(llm)
    assert (before["k"], before["k_now"], before["k_now_mean"], before["changes"]) == (4, [8, 6], 7.0, 0)
    prompts = {name: served.tokens(20 + number) for number, name in enumerate(ARRIVALS)}
    named = {"d": {"emoe_k": 6}}
    with Script(llm) as script:
        found = script.run(
            [
                (start, name, prompts[name], asked(length, **named.get(name, {})))
                for name, (start, length) in ARRIVALS.items()
            ]
        )
        assert found == LEVELS
        for name, (start, length) in ARRIVALS.items():
            prefill, decode = (6, [6] * length) if name == "d" else (4, LEVELS[start + 1 : start + length])
            assert right(reference, prompts[name], script.outputs[name], prefill, decode), name
        # A crowd that leaves all at once: whoever comes to an empty engine has the first level.
        crowd = [(0, f"e{number}", served.tokens(30 + number), asked(2)) for number in range(4)]
        assert script.run(crowd) == [1, 1]
        assert script.run([(0, "f", served.tokens(40), asked(3))]) == [BEST] * 3
        assert right(reference, served.tokens(40), script.outputs["f"], 4, [BEST] * 2)
    after = emoe_vllm.status(llm)
    assert after["changes"] == 6  # 3, 1, 3, best; 1, best
    # The last token that is written is never an input.
    decode = {1: 0, 3: 0, 6: 2, BEST: 2}
    for name, (start, length) in ARRIVALS.items():
        for level in LEVELS[start + 1 : start + length] if name != "d" else ():
            decode[level] += 1
    decode[1] += 4
    assert {as_key(k): count for k, count in after["decode"]} == decode
    assert {as_key(k): count for k, count in after["prefill"]} == {4: 8 * served.PROMPT, 6: served.PROMPT}


def as_key(k):
    return tuple(k) if isinstance(k, list | tuple) else k


def test_what_follows_is_said(llm):
    follow = emoe_vllm.status(llm)["follow"]
    assert follow == {
        "now": True,
        "levels": [
            {"from": 0, "k": [8, 6], "name": "best"},
            {"from": 2, "k": 3, "name": "good"},
            {"from": 4, "k": 1, "name": "low"},
        ],
        "hold": 2,
        "margin": 0,
        "min_quality": 0.8,
        "left_out": [],
    }


def test_a_k_of_the_server_ends_following_for_requests_to_come(llm, reference):
    prompts, length = [served.tokens(50 + number) for number in range(4)], 6
    try:
        with Script(llm) as script:
            script.engine.add_request("before", {"prompt_token_ids": prompts[0]}, asked(length))
            script.engine.step()
            status = emoe_vllm.set_k(llm, "good")
            assert (status["k"], status["k_now"], status["follow"]["now"]) == (3, 3, False)
            script.run([(0, "pinned", prompts[1], asked(length))])
            emoe_vllm.set_k(llm, 5, follow=True)
            script.run([(0, "prompt", prompts[2], asked(length))])
            status = emoe_vllm.set_k(llm, None)
            assert (status["k"], status["k_now"], status["follow"]["now"]) == (4, [8, 6], True)
            script.run([(0, "after", prompts[3], asked(length))])
        # "pinned" came one step after "before": their loads of 2 hold k' = 3 for the one that follows, up to its end.
        assert right(reference, prompts[0], script.outputs["before"], 4, [3] * 5)
        assert right(reference, prompts[1], script.outputs["pinned"], 3, [3] * 5)
        assert right(reference, prompts[2], script.outputs["prompt"], 5, [BEST] * 5)
        assert right(reference, prompts[3], script.outputs["after"], 4, [BEST] * 5)
    finally:
        emoe_vllm.set_k(llm, None)


def test_names_of_requests_in_both_phases(llm, reference):
    prompt = served.tokens(60)
    wanted = served.params(4, emoe_k_prefill="best", emoe_k_decode="fast")
    answer, found = served.written(llm, [prompt], wanted)[0]
    want = reference.in_phases(prompt, answer, BEST, 1)
    assert float((found - want).abs().max()) < served.TOLERANCE


def test_a_worker_of_another_process_says_what_to_call(llm):
    with pytest.raises(RuntimeError, match=r"another process; emoe_vllm.set_k\(llm, k\) or POST /emoe/k"):
        llm.collective_rpc("emoe_set_k", args=(5,))
