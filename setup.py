"""Package metadata and dependency ranges. Tool settings (ruff, mypy, pytest) are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"
INIT = Path(__file__).parent / "megatron_emoe" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+?)"', INIT.read_text(encoding="utf-8"), re.MULTILINE)
assert VERSION, f"{INIT} names no version"
PARQUET = "pyarrow>=21,<27"  # tools/preprocess_data.py reads Parquet and .zst with it; datasets brings it too
CONVERSATIONS = "datasets>=2.19,<6"  # Megatron's SFTDataset reads its files with it
# tools/eval_tasks.py; lm-eval's model class for transformers imports accelerate. About 0.3 GB beside datasets.
TASKS = ["lm-eval>=0.4.13,<0.5", "accelerate>=1,<2"]

setup(
    name="megatron-emoe",
    version=VERSION[1],
    description="Elastic Mixture-of-Experts training for Megatron-Core: one checkpoint, every number of active experts",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megatron_emoe", "megatron_emoe.*"]),
    package_data={"megatron_emoe": ["py.typed"]},  # type checkers then read the package's own annotations
    # megatron-core 0.19 needs 3.12; its dataset helpers are compiled for each Python, 3.14 is not among them.
    python_requires=">=3.12,<3.14",
    install_requires=[
        # 0.19 is the first release whose wheel holds megatron.training. NVIDIA's apex is used by it when present, but
        # is no dependency here: the package that the index calls "apex" is another project.
        "megatron-core[training]>=0.19,<0.20",
        "torch>=2.8,<3",
        "numpy>=2.0.2,<3",
        "transformers>=5.15.1,<6",
        "safetensors>=0.4.5,<1",
        "sentencepiece>=0.2,<0.3",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.10,<4",
        "tqdm>=4.66,<5",
        "pydantic>=2.7,<3",
        "scipy>=1.13,<2",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]>=2.4,<3"],
        "eval": TASKS,
        "sft": [CONVERSATIONS],
        "parquet": [PARQUET],
        "dev": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff==0.17.6",
            "mypy>=1.13,<3",
            "import-linter>=2.6,<3",
            CONVERSATIONS,
            PARQUET,
            *TASKS,
        ],
    },
)
