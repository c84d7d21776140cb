"""Whatever a model is given as, predict gives the evaluator's answers, or one sentence that says why not.

Everything in fp32 with one thread: sums round otherwise with another number of threads.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hub_downloads import HubDownloads
from peft import LoraConfig, get_peft_model
from PIL import Image
from ranks import rank_environment
from trained import INSTRUCTION, Trained, evaluators_answers
from transformers import AutoModelForImageTextToText

from vlmdist.config import load_run
from vlmdist.errors import UserError
from vlmdist.predict.answer import Predictor, _settled
from vlmdist.predict.run import make_sample, open_source, predict
from vlmdist.predict.usual import usual_question
from vlmdist.sample import Sample

CPU = torch.device("cpu")


def answers(
    asked: Path, samples: Sequence[Sample], *overrides: str, checkpoint: str | None = None, with_text: bool = True
) -> list[str]:
    """As the command gives them, the text of each sample by --text and its images by --image."""
    source, usual = open_source(str(asked), overrides, checkpoint, None, CPU)
    predictor = Predictor(source, CPU)
    found = []
    for sample in samples:
        grown: list[str] = []
        text = sample.question[-1].text if with_text else None
        answer = predictor.answer(make_sample(source, usual, text, sample.images), grown.append)
        assert grown[-1] == answer.text
        assert all(answer.text.startswith(so_far) for so_far in grown)
        found.append(answer.text)
    return found


# -- text --------------------------------------------------------------------------------------------------------------


def test_a_run_of_lines(lines_run: Trained) -> None:
    assert len(set(lines_run.answers)) > 1
    checkpoint = lines_run.run / "checkpoints" / "step-000008"
    for asked in (lines_run.run, lines_run.file, checkpoint):
        assert answers(asked, lines_run.samples) == lines_run.answers, asked


def test_another_checkpoint_of_a_run(lines_run: Trained) -> None:
    expected = evaluators_answers(lines_run.file, checkpoint="best", name="asked-for")
    assert answers(lines_run.run, lines_run.samples, checkpoint="best") == expected
    older = lines_run.run / "checkpoints" / "step-000004"
    expected = evaluators_answers(lines_run.file, checkpoint=str(older))
    assert answers(lines_run.run, lines_run.samples, checkpoint=str(older)) == expected != lines_run.answers


def test_an_exported_adapter_knows_its_four_bits(lines_run: Trained) -> None:
    assert answers(lines_run.exported, lines_run.samples) == lines_run.answers


def test_a_merged_folder_and_a_plain_one(lines_run: Trained, tmp_path: Path) -> None:
    plain = ("model.quantization=none", f"output_dir={tmp_path}")
    merged = evaluators_answers(lines_run.file, f"model.name_or_path={lines_run.merged}", *plain, base=True)
    assert answers(lines_run.merged, lines_run.samples) == merged
    base = evaluators_answers(lines_run.file, *plain, base=True, name="plain")
    folder = lines_run.run.parent / "model"
    template = ("prompt.template=receipt-lines", "evaluate.max_new_tokens=24")
    assert answers(folder, lines_run.samples, *template) == base != merged


# -- images ------------------------------------------------------------------------------------------------------------


def test_a_run_of_pictures(pictures_run: Trained) -> None:
    """Its samples all ask the same, which needn't be given; image behind text, under a system message."""
    assert len(set(pictures_run.answers)) > 1
    assert answers(pictures_run.run, pictures_run.samples) == pictures_run.answers
    assert answers(pictures_run.run, pictures_run.samples, with_text=False) == pictures_run.answers
    early = "evaluate.stop_when_answered=true"
    expected = evaluators_answers(pictures_run.file, early, name="early")
    assert answers(pictures_run.run, pictures_run.samples, early) == expected
    usual, notes = usual_question(load_run(pictures_run.file))
    assert (usual.text, usual.system, usual.has_images, notes) == (INSTRUCTION, "Be short.", True, [])


def test_an_exported_model_and_a_foreign_adapter_of_pictures(pictures_run: Trained, tmp_path: Path) -> None:
    """What knows no run is asked without its system message, images first."""
    assert pictures_run.exported.joinpath("model.safetensors").is_file()
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*self_attn\.[qv]_proj", init_lora_weights=False)
    base = AutoModelForImageTextToText.from_pretrained(pictures_run.merged)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    rows = []
    for i, sample in enumerate(pictures_run.samples):
        (tmp_path / f"{i}.png").write_bytes(sample.images[0])
        rows.append({"image": f"{i}.png", "question": INSTRUCTION})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = (
        f"data.test={tmp_path / 'questions.jsonl'}",
        "evaluate.metric=exact",
        f"model.name_or_path={pictures_run.merged}",
    )
    merged = evaluators_answers(pictures_run.file, *asked, f"output_dir={tmp_path / 'a'}", base=True)
    assert answers(pictures_run.merged, pictures_run.samples) == merged
    adapted = evaluators_answers(
        pictures_run.file, *asked, f"output_dir={tmp_path / 'b'}", checkpoint=str(tmp_path / "adapter")
    )
    longest = "evaluate.max_new_tokens=16"
    assert answers(tmp_path / "adapter", pictures_run.samples, longest) == adapted != merged


# -- the command -------------------------------------------------------------------------------------------------------


def command(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "vlmdist", "predict", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=240,
        env=rank_environment(**environment),
    )
    out, errors = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in errors, errors
    return subprocess.CompletedProcess(done.args, done.returncode, out, errors)


def test_the_command_answers_on_standard_output(pictures_run: Trained, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(pictures_run.samples[1].images[0])
    done = command(pictures_run.run, "--image", image, "--text", "-", stdin=f"{INSTRUCTION}\n".encode())
    assert (done.returncode, done.stdout) == (0, pictures_run.answers[1] + "\n")
    assert "tokens in" in done.stderr
    done = command(pictures_run.run, "--image", image, "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert {name: found[name] for name in ("answer", "json", "complete", "model")} == {
        "answer": pictures_run.answers[1],
        "json": json.loads(pictures_run.answers[1]),
        "complete": True,
        "model": "step-000050 of run",
    }
    assert 0 < found["first_token_s"] <= found["seconds"]
    assert f"asking as all samples of the run do: {INSTRUCTION}" in done.stderr


def test_a_terminal_gets_the_json_in_lines(pictures_run: Trained, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(pictures_run.samples[1].images[0])
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmdist", "predict", str(pictures_run.run), "--image", str(image)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env=rank_environment(),
    )
    os.close(theirs)
    shown = _read_all(ours)
    assert process.wait(60) == 0
    first, _, rest = shown.replace("\r\n", "\n").partition("\n\n")
    assert first == pictures_run.answers[1]
    assert rest == json.dumps(json.loads(first), indent=2) + "\n"


def _read_all(descriptor: int) -> str:
    data = b""
    while True:
        try:
            piece = os.read(descriptor, 1 << 16)
        except OSError:  # the other end is closed
            piece = b""
        if not piece:
            os.close(descriptor)
            return data.decode()
        data += piece


def test_a_name_on_the_hub(lines_run: Trained, tmp_path: Path) -> None:
    """A model and an adapter from a stand-in for the hub; then the hub is gone, and they are still there."""
    adapter = tmp_path / "adapter"
    shutil.copytree(lines_run.exported, adapter)
    facts = json.loads((adapter / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = "me/base"
    (adapter / "adapter_config.json").write_text(json.dumps(facts))
    question = lines_run.samples[0].question[-1].text
    repos = {"me/base": lines_run.run.parent / "model", "me/lines": adapter}
    home = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    with HubDownloads(repos) as hub:
        there = {**home, "HF_ENDPOINT": hub.url}
        done = command("me/lines", "--text", question, "--json", **there)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["answer"] == lines_run.answers[0]
        done = command("me/nothing", "--text", question, **there)
        assert done.returncode == 2
        assert "me/nothing: no such folder here, and no such name on the hub that can be had" in done.stderr
        assert "a run folder, a run file" in done.stderr
    done = command("me/base", "--text", question, "prompt.template=receipt-lines", **there)
    assert done.returncode == 0, done.stderr
    assert "can't be reached" in done.stderr


# -- what can't be asked -----------------------------------------------------------------------------------------------


def refused(asked: Path | str, text: str | None = "x", images: Sequence[Path] = (), **options: object) -> list[str]:
    with pytest.raises(UserError) as e:
        predict(str(asked), text, images, **options)  # type: ignore[arg-type]
    return e.value.problems


def _bomb() -> bytes:
    """A small PNG that claims to have 20000 x 20000 pixels."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_that_cannot_be_used_are_all_named(pictures_run: Trained, tmp_path: Path) -> None:
    good = pictures_run.samples[0].images[0]
    contents = {"text.png": b"not an image", "empty.png": b"", "cut.png": good[: len(good) // 2], "bomb.png": _bomb()}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    files = [tmp_path / name for name in (*contents, "missing.png")]
    told = refused(pictures_run.run, images=[*files, tmp_path])
    assert [problem.partition(": ")[0] for problem in told] == [f"--image {file}" for file in [*files, tmp_path]]
    for problem, says in zip(
        told, ("not a known format", "0 bytes", "cut off", "too large", "no such file", "is no file"), strict=True
    ):
        assert says in problem


def test_questions_that_cannot_be_asked(lines_run: Trained, pictures_run: Trained, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(pictures_run.samples[0].images[0])
    assert "takes text only" in refused(lines_run.run, images=[image])[0]
    assert "--text: is needed" in refused(lines_run.run, None)[0]
    assert "don't all ask the same" in refused(lines_run.run, None)[0]
    assert "--text: is needed" in refused(lines_run.merged, None)[0]
    assert "is empty" in refused(lines_run.run, " ")[0]
    assert "special token '<|im_end|>'" in refused(lines_run.run, "x<|im_end|>")[0]
    assert "the model takes fewer than 2048" in refused(lines_run.merged, "milk " * 3000)[0]
    assert "--max-new-tokens 0: at least 1" in refused(lines_run.run, max_new_tokens=0)[0]


def test_what_does_not_answer(lines_run: Trained, tmp_path: Path) -> None:
    assert "no such file or folder; give a run folder, " in refused(tmp_path / "nowhere")[0]
    assert "holds nothing that answers; give a run folder" in refused(tmp_path)[0]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "without its adapter_model.safetensors" in refused(tmp_path)[0]
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    assert "is a pickle, which is not loaded" in refused(tmp_path)[0]
    assert "--checkpoint: is for a run" in refused(lines_run.merged, checkpoint="best")[0]
    assert "evaluate.max_new_toks: unknown key" in refused(lines_run.merged, overrides=["evaluate.max_new_toks=3"])[0]
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(lines_run.run / "run.yaml", fresh)
    assert "holds no whole checkpoint" in refused(fresh)[0]


def test_a_base_model_that_is_gone_is_named_with_the_way_to_say_where_it_is(lines_run: Trained, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(lines_run.exported, adapter)
    facts = json.loads((adapter / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = "/gone/model"
    (adapter / "adapter_config.json").write_text(json.dumps(facts))
    assert "model.name_or_path=FOLDER" in refused(adapter)[0]
    base = f"model.name_or_path={lines_run.run.parent / 'model'}"
    assert answers(adapter, lines_run.samples[:1], base) == lines_run.answers[:1]


def test_a_card_can_not_ask_for_more_than_how_the_base_was_held(lines_run: Trained, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(lines_run.exported, adapter)
    card = (adapter / "README.md").read_text()
    hostile = "model: {quantization: nf5, trust_remote_code: true, name_or_path: /etc}\noutput_dir: /etc\n"
    (adapter / "README.md").write_text(card.partition("## Run file")[0] + f"## Run file\n\n```yaml\n{hostile}```\n")
    source, _ = open_source(str(adapter), [], None, None, CPU)
    assert not source.config.model.trust_remote_code
    assert source.config.model.quantization == "none"
    assert source.config.model.name_or_path == str((lines_run.run.parent / "model").absolute())


# -- the answer as it grows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "settled"),
    [
        ("tea", "tea"),
        ("tea\ufffd", "tea"),  # the first bytes of a character
        ("he '", "he"),  # may yet become "he's"
        ("he didn't", "he didn't"),
        ("чай 33", "чай"),
        ('{"total": "14.10"', '{"total": "14.10"'),
        ("", ""),
    ],
)
def test_what_is_told_stays(text: str, settled: str) -> None:
    assert _settled(text) == settled


def test_control_characters_reach_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from vlmdist.predict.answer import Answer
    from vlmdist.predict.terminal import Printer

    printer = Printer()
    text = "a\x1b]0;title\x07\u202eb\tc\nчай"
    printer.print_growth(text[:3])
    printer.print_growth(text)
    printer.end(Answer(text, 3, True, 0.1, 0.2))
    assert capsys.readouterr().out == "a⟨U+001B⟩]0;title⟨U+0007⟩⟨U+202E⟩b\tc\nчай\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('{"a": NaN}', None),
        ('{"a": 1e999}', None),
        ("[1]", None),
        ('{"a": ' * 3000 + "1" + "}" * 3000, None),
        ('{"a": "\\ud800"}', {"a": "\ud800"}),
    ],
)
def test_json_that_can_be_said_again(text: str, value: object) -> None:
    from vlmdist.predict.answer import Answer

    found = Answer(text, 1, True, 0.1, 0.1).json
    assert found == value
    json.loads(json.dumps(found, allow_nan=False))
