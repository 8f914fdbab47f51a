"""The full-size models, from their published configurations alone: nothing is allocated.

configs/ holds the values of the published config.json files, in the keys of the time they were written. Not
compared with the files: Moonlight's eos_token_id, on which nothing here depends, and Granite's router_aux_loss_coef.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CONFIGS = Path(__file__).parent / "configs"
MODELS = [path.stem for path in sorted(CONFIGS.glob("*.json"))]

# Total, then active at k, 2k and 3k (a dense model has none): both embedding tables count, selection biases do not.
PUBLISHED = {
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280, 2_087_323_648, 2_892_630_016),
    "qwen1_5_moe_a2_7b": (14_315_784_192, 2_689_173_504, 3_519_645_696, 4_350_117_888),
    "deepseek_v2_lite": (15_706_484_224, 2_661_150_208, 4_010_667_520, 5_360_184_832),
    "ernie4_5_21b_a3b": (21_825_436_160, 3_352_148_480, 5_263_178_240, 7_174_208_000),
    "llama_3_2_1b": (1_235_814_400,),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704, 5_164_972_032, 6_976_911_360),
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248, 24_154_214_400, 35_428_503_552),
    "moonlight_16b_a3b": (15_960_108_544, 2_914_774_528, 4_264_291_840, 5_613_809_152),
    "granite_3_0_1b_a400m": (1_334_628_352, 428_658_688, 730_648_576, 1_032_638_464),
}
SELECTION_BIASES = {"ernie4_5_21b_a3b": 27 * 64, "moonlight_16b_a3b": 26 * 64}


def meta_model(name: str) -> PreTrainedModel:
    """The model of configs/`name`.json as transformers builds it, on the meta device."""
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json", trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def on_disk(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes as save_pretrained writes them: one tensor for each expert's gate, up and down."""
    shapes = {}
    biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, parameter in [*model.named_parameters(), *biases]:  # a tied head comes once, as the embedding
        shape = tuple(parameter.shape)
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            experts, rows, columns = shape
            for expert in range(experts):
                for half in ("gate_proj", "up_proj"):
                    shapes[f"{prefix}.{expert}.{half}.weight"] = (rows // 2, columns)
        elif last == "down_proj":
            shapes |= {f"{prefix}.{expert}.down_proj.weight": shape[1:] for expert in range(shape[0])}
        elif name.endswith(".router.weight"):  # Granite's
            shapes[f"{prefix}.layer.weight"] = shape
        else:
            shapes[name.replace(".gate.moe_statics.", ".moe_statics.")] = shape
    return {_of_mixtral(name) if model.config.model_type == "mixtral" else name: s for name, s in shapes.items()}


def _of_mixtral(name: str) -> str:
    """As that model has always been saved."""
    for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"), (".mlp.", ".block_sparse_moe.")):
        name = name.replace(ours, theirs)
    return name
