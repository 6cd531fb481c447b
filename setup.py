"""Metadata, requirements and extras; build backend, ruff and pytest are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "swifti2v_kernels" / "__init__.py").read_text())[1]

DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1", "ruff>=0.9"]
GENERATE = ["av>=14", "pillow>=10.3", "safetensors>=0.4", "tqdm>=4.60"]
GGUF = ["gguf>=0.13"]
HEIF = ["pillow-heif>=1"]
TEXT = ["ftfy>=6", "protobuf", "sentencepiece>=0.2", "transformers>=4.56"]
BENCH = [*GENERATE, "jinja2>=3.1", "jsonschema>=4.18", "nvidia-ml-py>=12"]
TEST = [
    *BENCH,
    *GGUF,
    *HEIF,
    *TEXT,
    "accelerate>=1",
    "diffusers>=0.35",
    "hypothesis>=6",
    "kernels>=0.14",
    "peft>=0.17",
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "selenium>=4.20",
]

setup(
    name="swifti2v",
    version=VERSION,
    description="Triton-kernel library for high-resolution video diffusion, with SwiftI2V (2K image to video)",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The wheel is the operator library alone; model and bench run from a checkout.
    packages=find_packages(include=["swifti2v_kernels", "swifti2v_kernels.*"]),
    package_data={"swifti2v_kernels": ["py.typed", "configs/*.json"]},
    install_requires=["einops>=0.7", "numpy>=1.26", "torch>=2.6", 'triton>=3.6; platform_system == "Linux"'],
    extras_require={
        "generate": GENERATE,
        "gguf": GGUF,
        "heif": HEIF,
        "text": TEXT,
        "bench": BENCH,
        "docs": DOCS,
        "test": TEST,
        # Its metadata asks for Python 3.12; on 3.11 tests/sanitizer passes, installed as docs/contributing.md says.
        "sanitize": ['ttsem==0.1.0; python_version >= "3.12"'],
        "all": sorted({*DOCS, *GENERATE, *TEXT, *BENCH, *TEST}),
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
