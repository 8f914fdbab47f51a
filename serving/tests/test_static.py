"""What vLLM gives at every k' against transformers with megatron_emoe's hooks, in every architecture."""

import served
import torch

TAIL = {"k_train": 2, "tail_scale": ["3:0.6", "8:0.1"], "k_range": [1, 8]}


def compare(model_type, folder, block, ks, **changes):
    """The largest difference of a log-probability at each of `ks`, each asked for by a request of its own."""
    served.save(model_type, folder, block, **changes)
    reference, prompt, differences = served.Reference(folder), served.tokens(), {}
    with served.engine(folder, {} if block is None else None) as llm:
        for k in ks:
            answer, found = served.written(llm, [prompt], served.params(4, emoe_k=k))[0]
            expected = reference.logprobs(prompt + answer, k)
            differences[k] = float((found - expected).abs().max())
    return differences


def check(differences):
    assert max(differences.values()) < served.TOLERANCE, differences


def test_olmoe(tmp_path):
    check(compare("olmoe", tmp_path / "m", TAIL, [1, 2, 3, 5, 8]))


def test_olmoe_that_renormalises(tmp_path):
    check(compare("olmoe", tmp_path / "m", TAIL, [1, 2, 3, 5, 8], norm_topk_prob=True))


def test_qwen2_moe(tmp_path):
    check(compare("qwen2_moe", tmp_path / "m", TAIL, [1, 2, 4, 8]))


def test_deepseek_v2(tmp_path):
    check(compare("deepseek_v2", tmp_path / "m", TAIL, [1, 2, 4, 8]))


def test_ernie_with_its_selection_bias(tmp_path):
    check(compare("ernie4_5_moe", tmp_path / "m", TAIL, [1, 2, 4, 8]))


def test_qwen3_moe_without_a_block(tmp_path):
    check(compare("qwen3_moe", tmp_path / "m", None, [1, 2, 4]))


def test_glm4_moe_with_sigmoid_scores_bias_and_groups(tmp_path):
    check(compare("glm4_moe", tmp_path / "m", None, [1, 2, 4]))


def test_mixtral_without_a_block(tmp_path):
    check(compare("mixtral", tmp_path / "m", None, [1, 2, 4]))


def test_a_block_that_leaves_k_to_config_json(tmp_path):
    check(compare("olmoe", tmp_path / "m", {"tail_scale": ["0.3"], "k_range": [1, 8]}, [2, 6]))


def test_learned_scales(tmp_path):
    generator = torch.Generator().manual_seed(3)
    log = [[torch.randn(k, generator=generator).tolist() for k in (2, 4, 6)] for _ in range(2)]
    block = {"k_train": 2, "k_range": [1, 8], "budget_scales": {"k": [2, 4, 6], "log": log}, "tail_scale": ["0.5"]}
    check(compare("olmoe", tmp_path / "m", block, [1, 2, 3, 4, 5, 6, 8]))
