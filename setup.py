"""`pip install .`: the package without fairseq, which has to be installed first and without its declared dependencies
(README, "Installation"): those name torchaudio, whose build may not fit the installed torch, and on
Python 3.11 pip would compile fairseq against another torch than the one that will run it."""

from setuptools import find_packages, setup

setup(
    name="fairseq_implicit",
    version="0.1.0",
    description="BERT whose depth is an ODE solver or a fixed point: a plugin for fairseq",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["fairseq_implicit", "fairseq_implicit.*"]),
    package_data={"fairseq_implicit": ["py.typed"]},
    entry_points={"console_scripts": ["fairseq-implicit = fairseq_implicit.commands:command_line"]},
    python_requires=">=3.11,<3.13",
    # torch is a range, so that pip keeps the one that is there. The rest is what this package and the parts of
    # fairseq that it uses import.
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "tokenizers>=0.22",
        "zstandard>=0.22",
        "bitarray",
        "cffi",
        "hydra-core==1.3.2",
        "omegaconf==2.3.0",
        "orjson>=3.10",
        "packaging",
        "protobuf",
        "regex",
        "sacrebleu>=2.0",
        "scikit-learn",
        "tqdm",
    ],
    # What each is for stands in the README, "Installation".
    extras_require={
        "adaptive": ["torchdiffeq==0.2.5"],
        "hub": ["huggingface_hub>=1.0", "filelock"],
        "parquet": ["pyarrow"],
        "plots": ["matplotlib", "tensorboard"],
        "quality": ["datatrove[processing]", "spacy"],
        "study": ["matplotlib", "PyYAML", "scipy", "tensorboard"],
        "tensorboard": ["tensorboard", "tensorboardX"],
        "huggingface": ["transformers>=5", "accelerate", "safetensors"],
    },
)
