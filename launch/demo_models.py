"""How the demo's models are put together from weight files: GGUF and ONNX to transformers folders.

Called by fetch_models.py. Each builder saves into ``staging``; weights are bfloat16.
"""

from pathlib import Path
from typing import Any

from vlmdist.errors import RunFailed

SMOLLM2_FOLDER = "smollm2"
PROJECTOR_SEED = 0
IMAGE_PIXELS = 224
PATCH_PIXELS = 14

# --- SmolLM2 ----------------------------------------------------------------------------------------------------------


def build_smollm2(weights: Path, models: Path, staging: Path) -> None:
    """GGUF to a plain transformers folder; the 4-bit weights of the file are unpacked to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    forget_quantization(model)
    save_model(model, staging)
    save_tokenizer(tokenizer, staging)


def save_model(model: Any, staging: Path) -> None:
    """In bfloat16, and with no path of this machine in config.json."""
    import torch

    for config in (
        model.config,
        getattr(model.config, "text_config", None),
        getattr(model.config, "vision_config", None),
    ):
        if config is not None:
            config.name_or_path = ""
            config.dtype = torch.bfloat16
            config.__dict__.pop("_model_name_or_path", None)  # a left-over of the GGUF file
    model.to(torch.bfloat16).save_pretrained(staging)


def save_tokenizer(tokenizer_or_processor: Any, staging: Path) -> None:
    tokenizer = getattr(tokenizer_or_processor, "tokenizer", tokenizer_or_processor)
    for name in ("is_local", "local_files_only"):  # how it was loaded here is nothing to hand on
        tokenizer.init_kwargs.pop(name, None)
    tokenizer_or_processor.save_pretrained(staging)


def forget_quantization(model: Any) -> None:
    """A model read from GGUF believes it is still quantised and refuses to be saved; its weights are plain by now."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


# --- DINOv2 + SmolLM2 -------------------------------------------------------------------------------------------------

# SmolLM2's own template, for content that is a list of parts: an image becomes its token, where it stands
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<image>' }}{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def build_smolvlm(weights: Path, models: Path, staging: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(models / SMOLLM2_FOLDER)
    language_model = AutoModelForCausalLM.from_pretrained(models / SMOLLM2_FOLDER, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    embeddings = language_model.get_input_embeddings().weight.data
    embeddings[-1] = embeddings[:-1].mean(dim=0)  # tied to the output: an ordinary logit for a token never said
    vision_tower = read_dinov2(weights)
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # all patches, no class token
        image_seq_length=(IMAGE_PIXELS // PATCH_PIXELS) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(PROJECTOR_SEED)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision_tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config = language_model.generation_config
    save_model(model, staging)
    save_tokenizer(make_processor(tokenizer), staging)


def make_processor(tokenizer: Any) -> Any:
    """Images are squeezed to a square, not cropped: a receipt's total stands near its edge."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    square = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    image_processor = CLIPImageProcessor(
        size=square,
        crop_size=square,
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],  # ImageNet's, as DINOv2 was trained
        image_std=[0.229, 0.224, 0.225],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
        chat_template=CHAT_TEMPLATE,
    )


def read_dinov2(weights: Path) -> Any:
    """DINOv2-small (384 wide, 12 layers) out of the ONNX graph, in float32.

    The export kept the names of biases and norms; a linear's matrix is named by number, stands transposed, and is
    known by the bias that is added to its product. The position embeddings are two constants: class token, patches.
    """
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(weights)).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {n.removeprefix("backbone."): a for n, a in arrays.items() if n.startswith("backbone.")}
    producer = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        bias = next((i for i in node.input if i.startswith("backbone.") and i.endswith(".bias")), None)
        other = next((producer[i] for i in node.input if i in producer), None)
        if node.op_type == "Add" and bias and other is not None and other.op_type == "MatMul":
            matrix = arrays[next(i for i in other.input if i in arrays)]
            state[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = matrix.T.contiguous()
    positions = [a for n, a in arrays.items() if a.dim() == 3 and n.startswith("onnx::")]  # [1, 1, D], [1, 37 * 37, D]
    state["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda a: a.shape[1]), dim=1)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=PATCH_PIXELS
    )
    # from_pretrained, since it knows these names from older checkpoints whatever transformers calls its modules today
    model, info = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    missing = {*info["missing_keys"]} - {"embeddings.mask_token"}  # used in DINOv2's own training only
    if missing or info["unexpected_keys"]:
        raise RunFailed(
            f"{weights.name} does not fit this transformers' Dinov2Model: {len(missing)} weights missing, "
            f"{len(info['unexpected_keys'])} unknown. Install the versions of launch/constraints.txt"
        )
    torch.nn.init.zeros_(model.embeddings.mask_token)
    return model.eval()
