"""The run file: typed, nested, every mistake told at once.

``load_run(path, overrides)`` reads the YAML, applies ``section.field=value`` overrides from the command line and
checks everything against the models below. Field names are transformers' TrainingArguments' where the meaning is the
same. The docstring under each field is its documentation (``vlmdist config-schema`` prints it for editors).
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlmdist.errors import UserError

Part = Literal["frozen", "lora", "full"]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]  # ~ means the same to every command


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class ModelConfig(_Section):
    name_or_path: PathText
    """A transformers folder on disk, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """How the frozen linear layers of the language model are held: nf4 is QLoRA's 4 bits with double quantisation."""
    quantized_parts: list[Literal["vision_tower", "projector", "language_model", "head"]] = ["language_model"]
    """Parts whose linear layers quantization holds so. A quantised vision tower or projector often gives nonsense."""
    new_parts: list[Literal["vision_tower", "projector", "language_model", "head"]] = []
    """Parts whose weights are drawn anew when a run starts: a projector that has yet to learn to see."""
    random_weights: bool = False
    """Draw all weights at random, from the configuration alone: to measure speed and memory with nothing downloaded."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the step. auto: bf16 from compute capability 8.0 and on CPU, fp16 below (V100)."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """auto: flash_attention_2 from compute capability 8.0 where flash-attn is installed, else sdpa. The last two need
    8.0; sdpa runs everywhere, packed rows included."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass (non-reentrant): about 30 % more time for much less memory."""


class LoraConfig(_Section):
    r: int = Field(16, ge=1)
    """Rank of the adapter."""
    alpha: float = Field(16, gt=0)
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is dropped in training."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train beside the adapter, as in peft."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an adapter; all-linear: every one of each part set to lora."""


class AdaptConfig(_Section):
    """What trains: each part of the model is frozen, gets LoRA adapters, or trains in full."""

    vision_tower: Part = "frozen"
    """What turns pixels into features."""
    projector: Part = "frozen"
    """What maps vision features into the language model's width."""
    language_model: Part = "lora"
    """The decoder, without its output head."""
    head: Part = "frozen"
    """The output projection onto the vocabulary."""
    init_from: PathText | None = None
    """Trained weights that a new run begins with: a checkpoint, a run folder (its newest whole checkpoint; or its
    checkpoints/best), or the adapter folder of ``vlmdist export`` or peft. All else begins anew. Weights of a part that
    is frozen here stay as they are, and go into every checkpoint. A run with a checkpoint goes on from that instead."""
    lora: LoraConfig = Field(default_factory=LoraConfig)


class CorpusConfig(_Section):
    shards: PathText
    """Folder of WebDataset tars with their index, or the URL of one (https://, s3://, whatever fsspec knows)."""
    weight: float = Field(1.0, gt=0)
    """Passes over this corpus in one epoch of the run; each sample exactly once per pass."""


class DataConfig(_Section):
    train: list[CorpusConfig] = Field(min_length=1)
    """The training corpora. A path alone means one corpus of weight 1."""
    validation: PathText | None = None
    """Folder of shards for the validation loss."""
    test: PathText | None = None
    """What ``vlmdist evaluate`` scores: a folder of shards, or a JSONL of questions beside its images."""
    cache_dir: PathText | None = None
    """Folder on this node for shards that lie elsewhere, shared by its ranks and by other runs; null: $VLMDIST_CACHE,
    else a folder in $SLURM_TMPDIR, else ~/.cache/vlmdist/shards."""
    cache_bytes: int | None = Field(None, ge=1)
    """Most bytes of shards in cache_dir; null: 100 GB, at most 80 % of the free space. The shards longest unused go."""
    run_pipe_commands: bool = False
    """Run the shell commands (pipe:COMMAND) that an index names as its shards. Only for indexes that you made."""
    shuffle_block_size: int = Field(1, ge=1)
    """Samples that stay together in the shuffle; 1 shuffles single samples, thousands suit network disks."""
    num_workers: int = Field(1, ge=0)
    """Loader processes per rank that read, decode and tokenize ahead of the step."""
    max_length: int = Field(1024, ge=8)
    """Longest sample in tokens, image tokens included."""
    too_long: Literal["drop", "refuse"] = "drop"
    """A sample over max_length is left out and counted as a bad sample (drop), or ends the run (refuse). Never cut."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Bad samples, as a share of the corpus, over which the run stops with their list."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone_is_one_corpus(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("train"), str):
            return {**data, "train": [{"shards": data["train"]}]}
        if isinstance(data, dict) and isinstance(data.get("train"), list):
            return {**data, "train": [{"shards": c} if isinstance(c, str) else c for c in data["train"]]}
        return data


class PromptConfig(_Section):
    template: str | None = None
    """Chat template: a name of vlmdist/data/templates.py, a Jinja file, or null for the model's own."""
    train_on: Literal["assistant", "everything"] = "assistant"
    """Tokens in the loss: what the assistant says (proven for the template), or all, as some articles do."""
    max_image_tiles: int | None = Field(None, ge=1)
    """Most tiles an image is cut into (InternVL; a thumbnail comes on top where there are several); null: the model's
    own limit. Each tile costs tokens and memory."""


class TrainConfig(_Section):
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the training mixture; may be a fraction."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, however many epochs that is; null: num_train_epochs decides."""
    global_batch_size: int | None = Field(None, ge=1)
    """Samples in one optimizer step over all ranks. Give this or gradient_accumulation_steps."""
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    """Micro-steps in one optimizer step; the global batch is then this x per_device_train_batch_size x ranks."""
    per_device_train_batch_size: int = Field(1, ge=1)
    """Most samples in a micro-batch on one rank."""
    max_tokens_per_micro_batch: int | None = Field(None, ge=8)
    """Most tokens in a micro-batch on one rank, padding included; short samples then share one, up to
    per_device_train_batch_size. Planned from text bytes and image sizes: 1 sample of 100 may be longer than planned."""
    packing: bool = False
    """Put the samples of a micro-batch into one row without padding; none attends to another. For families where
    packed equals separate (README); per_device_train_batch_size is then the most samples in a row."""
    cache_vision_features: bool = False
    """Keep the features of a frozen vision tower in the run folder; from the second epoch on pictures are neither
    decoded nor looked at again. ``vlmdist check`` says how much disk that takes. Not under ZeRO-3."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "moondream"] = "cosine"
    """After warm-up; moondream: linear from a tenth of the peak to the peak, cosine back to a tenth."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate rises."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps in which the learning rate rises; overrides warmup_ratio."""
    optim: Literal["adamw", "paged_adamw_32bit", "adamw_8bit"] = "adamw"
    """The last two are bitsandbytes' and need a GPU. With offload, adamw is DeepSpeed's CPU Adam."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this L2 norm; 0 turns clipping off."""
    deepspeed: str = "zero2"
    """DeepSpeed JSON: a path, or the name of one in dsconfigs/. "auto" in it is filled from this run file."""
    logging_steps: int = Field(1, ge=1)
    """Steps between rows of metrics.jsonl and TensorBoard."""
    report_to: list[Literal["wandb", "mlflow"]] = []
    """Services that get the rows of metrics.jsonl and the run file too: wandb (Weights & Biases), mlflow. Where and as
    whom is said by their own environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...)."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between validation losses (also at the end); null: only at the end, where there is a validation corpus."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Validation samples used for the loss; null: all."""
    generate_samples: int | None = Field(None, ge=1)
    """So many samples, spread evenly over data.validation, are answered while training and scored as the evaluate
    section says (validation_score and the metric's other figures); null: none. Not under ZeRO-3."""
    generate_steps: int | None = Field(None, ge=1)
    """Steps between these answers (also at the end); null: whenever the validation loss is measured."""
    save_steps: int = Field(500, ge=1)
    """Steps between checkpoints (also at the end)."""
    save_total_limit: int = Field(2, ge=1)
    """Newest checkpoints kept; the best one is kept beside them."""
    metric_for_best_model: str | None = None
    """Name of a figure measured in validation: validation_loss; with generate_samples also validation_score,
    validation_exact and what else evaluate.metric measures. A checkpoint is saved whenever it is better than ever, and
    that one is kept; checkpoints/best names it."""
    greater_is_better: bool | None = None
    """Of metric_for_best_model; null: true unless its name has "loss" or "error" in it."""
    max_nonfinite_steps: int = Field(5, ge=1)
    """Steps in a row with a NaN or infinite loss or gradient (each is skipped and counted) that end the run."""
    stop_margin_s: float = Field(60, ge=0)
    """Seconds that must be left of a Slurm allocation (SLURM_JOB_END_TIME), beside the longest step and save so far;
    then the run saves and ends with exit code 85."""
    hang_floor_s: float = Field(300, gt=0)
    """A rank that makes no progress for ten times the longest wait of the run so far, and for no less than these
    seconds, is named and ends the run."""
    start_limit_s: float = Field(1800, gt=0)
    """The same before the first step is done: longest time for loading a model, building kernels, the first step."""

    @property
    def best_is_greater(self) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not any(word in (self.metric_for_best_model or "") for word in ("loss", "error"))


class EvaluateConfig(_Section):
    metric: str = "fuzzy"
    """Name of a metric (see vlmdist/evaluate/metrics/)."""
    per_device_eval_batch_size: int = Field(8, ge=1)
    """Samples generated together; fixes the padding, so scores compare only at the same value."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer in tokens."""
    max_samples: int | None = Field(None, ge=1)
    """Only the first so many samples of the corpus; null: all."""
    max_image_tiles: int | None = Field(None, ge=1)
    """In place of prompt.max_image_tiles when answers are scored; null: the same."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What generates: transformers, or vLLM where it is installed, one rank a GPU: the same prompts and the same
    reading of answers, other kernels. An answer of vLLM depends on its batch alone; the bytes are the same at 1 and 2
    ranks on CPUs, not yet shown on GPUs. Take a large per_device_eval_batch_size with it."""
    merged: bool = False
    """Answer with the base unquantized, in the arithmetic of the step, and the adapters merged into it, as
    ``vlmdist export --merge`` writes it; false: as trained, beside the base as model.quantization holds it."""
    stop_when_answered: bool = False
    """End an answer as soon as what the metric reads is complete (the JSON object closes, the line of ## fields ends):
    spares the tokens of a model that talks on. The published scores are taken without."""
    cache: Literal["dynamic", "static"] = "dynamic"
    """Keys and values of the tokens so far: grown as needed, or of full length from the start, which lets transformers
    compile the decoding step on a GPU."""
    instruction: str | None = None
    """System message for a model that is asked untrained (--base) or with worked examples (--few-shot)."""
    few_shot_template: str | None = None
    """In place of prompt.template with --few-shot; null: the same."""


class RunConfig(_Section):
    output_dir: PathText
    """The run folder; everything a run writes is inside."""
    seed: int = Field(0, ge=0)
    """Decides the order of samples, the adapter's first weights and dropout."""
    threads_per_rank: int = Field(1, ge=1)
    """CPU threads of a rank. Part of the run because CPU kernels round differently with another count."""
    model: ModelConfig
    adapt: AdaptConfig = Field(default_factory=AdaptConfig)
    data: DataConfig
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)

    @model_validator(mode="after")
    def _one_batch_size(self) -> "RunConfig":
        t = self.train
        if (t.global_batch_size is None) == (t.gradient_accumulation_steps is None):
            raise ValueError(
                "train: give exactly one of global_batch_size and gradient_accumulation_steps "
                f"(found {t.global_batch_size} and {t.gradient_accumulation_steps})"
            )
        return self


def load_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file (or a run folder's run.yaml), apply overrides, check. Raises UserError with all mistakes."""
    file = Path(path)
    if file.is_dir():
        file = file / "run.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: can't be read: {getattr(e, 'strerror', None) or e}") from None
    try:
        tree = yaml.load(text, Loader=_RunFileLoader)  # noqa: S506 - a SafeLoader that also refuses double keys
    except yaml.YAMLError as e:
        raise UserError(f"{file}: not valid YAML: {_one_line(e)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a run file is a mapping of sections, this is a {type(tree).__name__}")
    problems = []
    for override in overrides:
        problem = _apply_override(tree, override)
        if problem:
            problems.append(problem)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as e:
        raise UserError([f"{file}: {p}" for p in explain(e, RunConfig)] + problems) from None
    if problems:
        raise UserError(problems)
    return config


def dump_run(config: RunConfig) -> str:
    """The effective run file as YAML, every field written out."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence per mistake pydantic found, with the nearest valid name for unknown keys."""
    sentences = []
    for e in error.errors():
        where = ".".join(str(p) for p in e["loc"])
        if e["type"] == "extra_forbidden":
            allowed = sorted(_fields_at(model, e["loc"][:-1]))
            near = difflib.get_close_matches(str(e["loc"][-1]), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed here: {', '.join(allowed)}"
            sentences.append(f"{where}: unknown key; {hint}")
        elif e["type"] == "missing":
            sentences.append(f"{where}: missing, and it has no default")
        elif e["type"] == "value_error":
            sentences.append(str(e["ctx"]["error"]))
        else:
            # pydantic names the branch of a union in loc; the user has no such key
            where = ".".join(str(p) for p in e["loc"] if not str(p).startswith(("list[", "literal[")))
            sentences.append(f"{where}: {_lower_first(e['msg'])}; found {_short(e['input'])}")
    return sentences


def _fields_at(model: type[BaseModel], loc: Sequence[Any]) -> set[str]:
    current: type[BaseModel] = model
    for name in loc:
        if isinstance(name, int):
            continue
        field = current.model_fields.get(str(name))
        if field is None:
            return set()
        found = _model_in(field.annotation)
        if found is None:
            return set()
        current = found
    return set(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in getattr(annotation, "__args__", ()):
        found = _model_in(arg)
        if found is not None:
            return found
    return None


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Set one ``section.field=value`` in the tree; returns what is wrong with it, or None."""
    path, sep, raw = override.partition("=")
    names = path.split(".")
    if not sep or not all(names):
        return f"{override!r}: an override is section.field=value"
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as e:
        return f"{override!r}: the value is not valid YAML: {_one_line(e)}"
    node: Any = tree
    for name in names[:-1]:
        child: Any
        if isinstance(node, list):
            if not name.isdigit() or int(name) >= len(node):
                return f"{override!r}: {name!r} is no place in a list of {len(node)}"
            child = node[int(name)]
        else:
            child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict | list):
            return f"{override!r}: {name!r} is a single value, nothing can be set inside it"
        node = child
    if isinstance(node, list):
        return f"{override!r}: a list is set as a whole or by section.0.field"
    node[names[-1]] = value
    return None


class _RunFileLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would silently keep the second."""


def _mapping_without_doubles(loader: _RunFileLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)  # type: ignore[no-untyped-call]
        if isinstance(key, list | dict):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_RunFileLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_doubles)


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
