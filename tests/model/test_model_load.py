"""Loading, quantising, freezing: on real NF4, with tiny random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_families import make_qwen2_5_vl, make_smollm2
from tiny_models import make_tiny_llava
from torch import nn
from transformers import AutoConfig

from vlmdist.config import AdaptConfig, LoraConfig, ModelConfig, RunConfig
from vlmdist.errors import UserError
from vlmdist.model.adapters import load_trainable, trainable_names, trains_vision
from vlmdist.model.families import FAMILIES, PARTS, TEXT, Family
from vlmdist.model.load import load_for_evaluation, load_for_training, load_processor
from vlmdist.model.precision import resolve_attention, resolve_dtype

CPU = torch.device("cpu")


def run_config(model: Path, adapt: AdaptConfig | None = None, **options: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {"name_or_path": str(model), **options},
            "adapt": (adapt or AdaptConfig()).model_dump(),
            "data": {"train": "unused"},
            "train": {"global_batch_size": 1},
        }
    )


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("llava"), ["what is it", "a receipt"])


def kinds(model: nn.Module) -> dict[str, str]:
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_nf4_packs_the_language_model_alone(tiny_llava: Path) -> None:
    model, _ = load_for_training(run_config(tiny_llava, quantization="nf4"), CPU)
    packed = {n for n, kind in kinds(model).items() if kind == "Linear4bit"}
    plain = {n for n, kind in kinds(model).items() if kind == "Linear"}
    assert any("language_model.layers.0.self_attn.q_proj" in n for n in packed)
    assert not any("vision_tower" in n or "projector" in n or "lm_head" in n for n in packed)
    assert any("vision_tower" in n for n in plain)
    assert any("lm_head" in n for n in plain)


def test_what_is_asked_for_is_packed_too(tiny_llava: Path) -> None:
    config = run_config(tiny_llava, quantization="nf4", quantized_parts=["vision_tower", "language_model"])
    packed = {n for n, kind in kinds(load_for_training(config, CPU)[0]).items() if kind == "Linear4bit"}
    assert any("vision_tower" in n for n in packed)
    assert not any("projector" in n for n in packed)


def test_new_parts_are_drawn_anew_and_the_others_kept(tiny_llava: Path) -> None:
    adapt = AdaptConfig(projector="full", language_model="frozen")
    kept, _ = load_for_training(run_config(tiny_llava, adapt), CPU)
    drawn, family = load_for_training(run_config(tiny_llava, adapt, new_parts=["projector"]), CPU)
    again, _ = load_for_training(run_config(tiny_llava, adapt, new_parts=["projector"]), CPU)
    before, after = dict(kept.named_parameters()), dict(drawn.named_parameters())
    for name, value in dict(again.named_parameters()).items():
        assert torch.equal(value, after[name])  # the same on every rank
        assert torch.equal(value, before[name]) == (family.part_of(name) != "projector"), name
    with pytest.raises(UserError, match=r"model\.new_parts: projector must be full in the adapt section"):
        load_for_training(run_config(tiny_llava, new_parts=["projector"]), CPU)


def test_a_vision_tower_under_another_name_is_not_packed_unseen(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "llava", Family(("model.eyes",), ("model.lens",), ("model.language_model",)))
    with pytest.raises(UserError, match=r"14 layers .*first: model\.vision_tower.*a row of vlmdist/model/families\.py"):
        load_for_training(run_config(tiny_llava, quantization="nf4"), CPU)


def test_lora_on_the_language_model_only_by_default(tiny_llava: Path) -> None:
    model, family = load_for_training(run_config(tiny_llava), CPU)
    names = trainable_names(model)
    assert len(names) == 2 * 7 * 2  # two layers, seven linears, A and B
    assert all("language_model.layers" in n and "lora_" in n for n in names)
    assert not trains_vision(AdaptConfig(), family)


def test_each_part_can_be_frozen_lora_or_full(tiny_llava: Path) -> None:
    adapt = AdaptConfig(vision_tower="lora", projector="full", language_model="frozen", head="full")
    model, family = load_for_training(run_config(tiny_llava, adapt), CPU)
    names = trainable_names(model)
    assert {n.split(".")[-1] for n in names if "multi_modal_projector" in n} == {"weight", "bias"}
    assert all("lora_" in n for n in names if "vision_tower" in n)
    assert any("lm_head.weight" in n for n in names)
    assert not any("language_model" in n for n in names)
    assert trains_vision(adapt, family)


def test_targets_by_name(tiny_world: Path) -> None:
    adapt = AdaptConfig(lora=LoraConfig(target_modules=["q_proj", "v_proj"]))
    names = trainable_names(load_for_training(run_config(tiny_world / "model", adapt), CPU)[0])
    assert {n.split(".lora_")[0].split(".")[-1] for n in names} == {"q_proj", "v_proj"}
    unknown = AdaptConfig(lora=LoraConfig(target_modules=["wqkv"]))
    with pytest.raises(UserError, match="none of .* is a linear layer"):
        load_for_training(run_config(tiny_world / "model", unknown), CPU)


def test_parts_that_a_text_model_lacks_are_refused(tiny_world: Path) -> None:
    adapt = AdaptConfig(vision_tower="lora", projector="full")
    with pytest.raises(UserError) as caught:
        load_for_training(run_config(tiny_world / "model", adapt), CPU)
    assert len(caught.value.problems) == 2


def test_a_tied_head_is_no_part_of_its_own(tmp_path: Path) -> None:
    folder = make_smollm2(tmp_path)
    for adapt in (AdaptConfig(head="full"), AdaptConfig(head="lora"), AdaptConfig(language_model="full", head="lora")):
        with pytest.raises(UserError, match="its token embedding"):
            load_for_training(run_config(folder, adapt), CPU)
    model, _ = load_for_training(run_config(folder, AdaptConfig(language_model="full", head="full")), CPU)
    assert model.get_output_embeddings().weight.requires_grad


def test_all_frozen_is_refused(tiny_world: Path) -> None:
    with pytest.raises(UserError, match="everything is frozen"):
        load_for_training(run_config(tiny_world / "model", AdaptConfig(language_model="frozen")), CPU)


def test_gradient_after_evaluation_in_4_bit(tiny_world: Path) -> None:
    """bitsandbytes on AVX512-BF16 loses the gradient after the first forward in eval mode, unless told not to."""
    model, _ = load_for_training(run_config(tiny_world / "model", quantization="nf4"), CPU)
    ids = torch.arange(5, 25).reshape(1, 20)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_trained_weights_come_back(tiny_world: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = run_config(tiny_world / "model")
    trained, _ = load_for_training(config, CPU)
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if p.requires_grad:
                p.add_(torch.full_like(p, 0.1) if "lora_B" in name else 0)
    weights = {n: p.detach().clone() for n, p in trained.named_parameters() if p.requires_grad}
    save_file(weights, tmp_path / "trainable.safetensors")
    loaded, _ = load_for_evaluation(config, CPU, checkpoint=tmp_path)
    base, _ = load_for_evaluation(config, CPU)
    ids = torch.arange(5, 25).reshape(1, 20)
    trained.eval()
    with torch.no_grad():
        assert torch.equal(trained(input_ids=ids).logits, loaded(input_ids=ids).logits)
        assert not torch.allclose(base(input_ids=ids).logits, loaded(input_ids=ids).logits, atol=1e-2)
    save_file({"other": torch.zeros(1)}, tmp_path / "trainable.safetensors")
    with pytest.raises(UserError, match="28 weights are missing .* 1 are unknown"):
        load_trainable(loaded, tmp_path / "trainable.safetensors")


def test_model_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be loaded"):
        load_processor(ModelConfig(name_or_path=str(tmp_path / "missing")))


def test_code_of_a_model_runs_only_where_the_run_file_says_so(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(tiny_world / "model", tmp_path / "model")
    (folder / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="trust_remote_code"):
        load_for_training(run_config(folder), CPU)
    assert not (tmp_path / "ran").exists()
    model, _ = load_for_training(run_config(folder, trust_remote_code=True), CPU)
    assert (tmp_path / "ran").exists()
    assert trainable_names(model)


def test_a_processor_as_published_before_it_had_a_file_of_its_own(tmp_path: Path) -> None:
    """Without processor_config.json the class follows from the kind of model."""
    folder = make_qwen2_5_vl(tmp_path)
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    processor = load_processor(ModelConfig(name_or_path=str(folder)))
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert processor.image_processor.size["longest_edge"] == 56 * 84


def test_family_parts() -> None:
    llava = FAMILIES["llava"]
    assert llava.part_of("model.vision_tower.encoder.layers.0") == "vision_tower"
    assert llava.part_of("model.language_model.layers.0") == "language_model"
    assert llava.part_of("lm_head") == "head"
    assert llava.part_of("model.image_newline") is None
    assert TEXT.part_of("model.layers.0.mlp") == "language_model"


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_row_names_the_parts_of_the_family(kind: str) -> None:
    """The whole model of the family's default configuration, but for most of its layers, on no device."""
    import vlmdist.model.moondream  # noqa: F401  # makes itself known to AutoConfig
    from vlmdist.model.memory import model_on_meta

    config = AutoConfig.for_model(kind)
    text = config.get_text_config()
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    family = FAMILIES[kind]
    model = model_on_meta(config, family)
    names = [*dict(model.named_modules()), *dict(model.named_parameters())]
    prefixes = [prefix for part in PARTS for prefix in getattr(family, part)]
    assert [p for p in prefixes if p not in names] == []
    assert [n for n, _ in model.named_parameters() if family.part_of(n) is None] == []


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), torch.float16), ((8, 0), torch.bfloat16)])
def test_precision_goes_by_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    # a V100 answers True to torch.cuda.is_bf16_supported(); only its capability tells
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve_dtype("auto", torch.device("cuda", 0)) == dtype


def test_attention_goes_by_capability_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for capability, installed, expected in (
        ((7, 0), True, "sdpa"),
        ((8, 0), True, "flash_attention_2"),
        ((9, 0), False, "sdpa"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        monkeypatch.setattr("importlib.util.find_spec", lambda name, i=installed: object() if i else None)
        assert resolve_attention("auto", device) == expected
        assert resolve_attention("eager", device) == "eager"
    assert resolve_attention("auto", CPU) == "sdpa"


def test_what_a_v100_cannot_do_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmdist.model.precision import precision_problems

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100-SXM2-32GB")
    asked = ModelConfig(
        name_or_path="m", precision="bf16", attn_implementation="flash_attention_2", quantization="int8"
    )
    problems = precision_problems(asked, torch.device("cuda", 0))
    # where the package flash-attn is missing, that is told as well
    assert len([p for p in problems if "V100" in p]) == 3


def test_size_from_the_configuration_alone_equals_the_loaded_model(tiny_llava: Path) -> None:
    from vlmdist.model.memory import model_on_meta, weight_bytes

    for quantization in ("none", "nf4"):
        config = run_config(tiny_llava, quantization=quantization)
        model, family = load_for_training(config, CPU)
        frozen = [p for n, p in model.named_parameters() if "lora_" not in n]
        held = sum(p.numel() * p.element_size() for p in frozen)
        empty = model_on_meta(AutoConfig.from_pretrained(tiny_llava), family)
        assert all(p.device.type == "meta" for p in empty.parameters())
        told = weight_bytes(empty, config.model, family, torch.bfloat16)
        # the block scales of NF4 lie beside the weights; on layers this small they round up
        assert told == pytest.approx(held, rel=0.03), quantization


def test_a_model_too_large_for_the_device_is_refused_before_it_is_loaded(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vlmdist.model.memory as memory

    monkeypatch.setattr(memory, "_device_bytes", lambda device: 1000)
    with pytest.raises(UserError, match=r"take 0\.0 GB on each rank.*use quantization: nf4"):
        load_for_training(run_config(tiny_llava), CPU)
