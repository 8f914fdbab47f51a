"""The place for a policy: a scheduler that gives the decoding of requests without a k' another level in every step."""

import served
import torch

from emoe_vllm.requests import FOLLOW
from emoe_vllm.scheduler import ElasticScheduler

BLOCK = {"k_train": 2, "tail_scale": ["3:0.6", "8:0.1"], "k_range": [1, 8]}
CYCLE = (8, 1, 3, 2)


class Cycling(ElasticScheduler):
    """Prefill at the server's k', decoding at each of CYCLE in turn."""

    steps = 0

    def default_levels(self):
        return self.default, FOLLOW

    def level_now(self):
        return CYCLE[self.steps % len(CYCLE)]

    def schedule(self, *args, **kwargs):
        output = super().schedule(*args, **kwargs)
        self.steps += 1
        return output


def test_decoding_follows_the_scheduler_and_prefill_does_not(tmp_path):
    folder = served.save("olmoe", tmp_path / "m", BLOCK)
    reference, prompt, longer = served.Reference(folder), served.tokens(1), served.tokens(2, 2 * served.BLOCK)
    with served.engine(folder, {"k": 4}, scheduler_cls=Cycling) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        first = scheduler.steps
        (answer, found), (named, at_six) = served.written(
            llm, [prompt, longer], [served.params(9), served.params(9, emoe_k=6)]
        )
        assert float((at_six - reference.logprobs(longer + named, 6)).abs().max()) < served.TOLERANCE
        again = llm.generate([{"prompt_token_ids": prompt + answer}], served.params(1, prompt=False), use_tqdm=False)
    reference.set(4)
    with torch.no_grad():
        out = reference.model(torch.tensor([prompt]), use_cache=True)
        logits = [out.logits[0]]
        for step, token in enumerate(answer[:-1], start=first + 1):
            reference.set(CYCLE[step % len(CYCLE)])
            out = reference.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
    follow = torch.tensor([*prompt[1:], *answer])[:, None]
    expected = torch.cat(logits).log_softmax(-1).gather(1, follow)[:, 0]
    assert float((found - expected).abs().max()) < served.TOLERANCE
    assert again[0].num_cached_tokens == served.BLOCK  # of the prompt; the second block has tokens of other levels
