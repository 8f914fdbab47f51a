"""A program: one model in vLLM, three prompts; prints every log-probability, exactly, as JSON.

python one_run.py FOLDER '{"additional_config": ...}'
"""

import json
import sys

import served

if __name__ == "__main__":
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    prompts = [served.tokens(seed, length) for seed, length in ((1, 40), (2, 7), (3, 70))]
    with served.engine(folder, **options) as llm:
        found = served.written(llm, prompts, served.params(8))
        kind = type(llm.llm_engine.engine_core.engine_core.scheduler).__name__
    values = [[answer, [value.hex() for value in logprobs.double().tolist()]] for answer, logprobs in found]
    print(json.dumps({"scheduler": kind, "values": values}))
