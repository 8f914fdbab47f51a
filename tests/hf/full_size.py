"""The full-size models, from their published configurations alone: nothing is allocated.

configs/ holds the values of the published config.json files, in the keys of the time they were written.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CONFIGS = Path(__file__).parent / "configs"
MODELS = [path.stem for path in sorted(CONFIGS.glob("*.json"))]

# Total, then active at k, 2k and 3k: both embedding tables count, ERNIE's selection bias (27 x 64) does not.
PUBLISHED = {
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280, 2_087_323_648, 2_892_630_016),
    "qwen1_5_moe_a2_7b": (14_315_784_192, 2_689_173_504, 3_519_645_696, 4_350_117_888),
    "deepseek_v2_lite": (15_706_484_224, 2_661_150_208, 4_010_667_520, 5_360_184_832),
    "ernie4_5_21b_a3b": (21_825_436_160, 3_352_148_480, 5_263_178_240, 7_174_208_000),
}


def meta_model(name: str) -> PreTrainedModel:
    """The model of configs/`name`.json as transformers builds it, on the meta device."""
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json", trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def on_disk(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes as save_pretrained writes them: one tensor for each expert's gate, up and down."""
    shapes = {}
    for name, parameter in model.named_parameters():  # a tied head comes once, as the embedding
        shape = tuple(parameter.shape)
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            experts, rows, columns = shape
            for expert in range(experts):
                for half in ("gate_proj", "up_proj"):
                    shapes[f"{prefix}.{expert}.{half}.weight"] = (rows // 2, columns)
        elif last == "down_proj":
            shapes |= {f"{prefix}.{expert}.down_proj.weight": shape[1:] for expert in range(shape[0])}
        else:
            shapes[name.replace(".gate.moe_statics.", ".moe_statics.")] = shape
    return shapes
