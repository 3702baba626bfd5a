import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
plots, evaluation, robust = ["matplotlib"], ["torch-fidelity>=0.4.0"], ["pyautoattack==0.2.0"]
ood = ["pytorch-ood>=0.4.0"]

setup(
    name="timm_jem",
    version=re.search(r'__version__ = "(.+)"', (here / "timm_jem/version.py").read_text(encoding="utf-8"))[1],
    description="Joint energy models on timm backbones: one network that classifies, scores, and draws images",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The timm_jem authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "energy-based models",
        "joint energy models",
        "image classification",
        "image generation",
        "out-of-distribution detection",
        "timm",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # A checkout's recipes/train.py and an installed timm_jem.recipes.train are the same file.
    packages=[*find_packages(include=["timm_jem", "timm_jem.*"]), "timm_jem.recipes"],
    package_dir={"timm_jem.recipes": "recipes"},
    package_data={
        "timm_jem": ["py.typed", "pretrained/*/*"],
        "timm_jem.demo": ["*.css", "*.js"],
        "timm_jem.hub": ["card_template.md"],
        "timm_jem.recipes": ["configs/*.yaml", "variants/*.yaml"],
    },
    install_requires=[
        "torch>=2.5",
        "torchvision",
        "timm>=1.0.31",
        "accelerate>=1.0",
        "datasets>=3.0",
        "huggingface-hub>=1.2.1",
        "jinja2",  # model cards
        "pyyaml",
        "safetensors>=0.4.3",
        "jsonargparse[signatures]>=4.49,<5",
        "tqdm",
        "scikit-learn",  # its digits are the data set that needs no network
    ],
    extras_require={
        "plots": plots,  # recipes/stability.py
        "eval": [*plots, *evaluation],  # recipes/evaluate.py
        "robust": robust,  # AutoAttack
        "ood": ood,  # detectors: react, ash, dice, vim, knn
        "demo": ["gradio>=6.31,<7"],  # recipes/demo.py
        "trackers": ["tensorboard", "trackio", "wandb"],
        "test": [
            *plots,
            *evaluation,
            *robust,
            *ood,
            "pytest",
            "pytest-xdist>=3.8",  # --no-loadscope-reorder
            "peft",
            "ruff",
            "setuptools>=77",  # builds the wheel that is tested
            "tensorboard",
            # other implementations of what is measured
            "foolbox>=3.3.4",
            "markdown-it-py",
            "scipy",
            "torchmetrics>=1.9",
            "transformers>=5.0",  # reads timm's folders, too
        ],
    },
)
