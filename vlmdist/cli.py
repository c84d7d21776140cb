"""The ``vlmdist`` command. Heavy imports happen inside the commands: ``--help`` answers at once.

Exit codes: 0 done; 1 failed; 2 wrong use or wrong input; 85 stopped on request with a checkpoint, run me again.
"""

import argparse
import atexit
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vlmdist import __version__
from vlmdist.errors import OtherRankFailed, RunFailed, StopRequested, UserError
from vlmdist.processes import kill_children

if TYPE_CHECKING:
    from vlmdist.train.signals import StopSignal

_SLURM_OPTIONS = ("partition", "account", "constraint", "qos", "time")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments, overrides = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        code: int = arguments.run(arguments, overrides) or 0
        sys.stdout.flush()  # here, where a reader that has gone away (`| head`) is no mistake
        return code
    except UserError as e:
        _say([f"error: {p}" for p in e.problems], every_rank=e.from_one_rank)
        return e.exit_code
    except RunFailed as e:
        _say([f"failed: {e}"], every_rank=e.from_one_rank)
        return e.exit_code
    except StopRequested as e:
        _say([str(e)])
        return e.exit_code
    except OtherRankFailed as e:
        return e.exit_code
    except OSError as e:
        if e.errno == errno.EPIPE and arguments.command not in ("train", "evaluate"):  # `vlmdist inspect ... | head`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
            return 0
        _say([f"failed: {e.filename or 'the system'}: {e.strerror or e}"], every_rank=True)
        return 1
    except KeyboardInterrupt:
        return 130


def run_and_exit() -> NoReturn:
    """What the ``vlmdist`` command and ``python -m vlmdist`` start: run one command and end the process."""
    code = main()
    if "torch" in sys.modules:
        # gloo's threads drop their last tensors when they please, for which they need the interpreter. One that asks
        # while it is taking itself apart aborts the process (3 of 50 ends, torch 2.13); so the process ends here.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        kill_children()  # loader workers: torch would wait for one that hangs
        atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)


def _say(lines: list[str], *, every_rank: bool = False) -> None:
    """Once, not once a rank: all ranks find the same mistakes in the input."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print("\n".join(lines), file=sys.stderr)
    elif every_rank:
        print("\n".join(f"[rank {rank}] {line}" for line in lines), file=sys.stderr)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # overrides may stand anywhere, also between options, which argparse's own positionals can't
    overrides = [r for r in rest if "=" in r and not r.startswith("-")]
    unknown = [r for r in rest if r not in overrides]
    if unknown:
        parser.error(f"unknown argument {' '.join(unknown)}; see vlmdist {arguments.command} --help")
    if overrides and not getattr(arguments, "takes_overrides", False):
        parser.error(f"{arguments.command} takes no overrides, found {' '.join(overrides)}")
    return arguments, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmdist",
        description="Fine-tune language and vision-language models on many GPUs, from WebDataset shards.",
    )
    parser.add_argument("--version", action="version", version=f"vlmdist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[..., int | None], text: str, *, overrides: bool = False
    ) -> argparse.ArgumentParser:
        epilog = "section.field=value arguments override the run file." if overrides else None
        sub = commands.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".", epilog=epilog)
        sub.set_defaults(run=run, takes_overrides=overrides)
        return sub

    def as_json(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")

    sub = command("index", _index, "make or refresh the index of a folder of WebDataset tars, whoever wrote them")
    sub.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="a folder of .tar files; or URLs of tars elsewhere (https, s3, gs, pipe:..., with {000..099} and *)",
    )
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="where the index of tars elsewhere goes")
    sub.add_argument(
        "--headers-only",
        action="store_true",
        help="places and lengths only, ten times as fast; samples are then checked when they are read",
    )
    sub.add_argument("--processes", type=int, metavar="N", help="that share the shards (default: as many as gain time)")
    as_json(sub)

    sub = command(
        "inspect",
        _inspect,
        "counts, sizes and bad samples of a corpus; one sample as the model sees it",
        overrides=True,
    )
    sub.add_argument("shards", metavar="SHARDS", help="folder or URL of .tar files with their index")
    sub.add_argument("--run", dest="run_file", metavar="RUN.yaml", help="show tokens as this run's model sees them")
    sub.add_argument("--key", help="show this sample")
    as_json(sub)

    sub = command(
        "check", _check, "would this run file train, and does it fit? Needs no GPU and loads no weights", overrides=True
    )
    sub.add_argument("run_file", metavar="RUN.yaml")
    sub.add_argument("--gpu", metavar="NAME", help="v100-32gb, a100-40gb, h100, ..., cpu (default: this machine's)")
    sub.add_argument("--gpus", type=int, metavar="N", help="GPUs a node (default: the Slurm request's, else 1)")
    sub.add_argument("--nodes", type=int, metavar="N", help="machines (default: the Slurm request's, else 1)")
    sub.add_argument(
        "--on",
        action="append",
        default=[],
        metavar="[NODESx]GPUSxGPU[/LINK][/NETWORK]",
        help="estimate the time there too: 2xV100, 8xA100-40GB/nvlink, 4x8xA100/nvlink/8hdr; may be given again",
    )
    sub.add_argument("--script", type=Path, metavar="JOB.sh", help="Slurm job script, whose #SBATCH lines are checked")
    for name in _SLURM_OPTIONS:
        sub.add_argument(f"--{name}", metavar=name.upper(), help="as for sbatch; the cluster is asked about it")
    as_json(sub)

    sub = command("train", _train, "train; resumes by itself from the newest whole checkpoint", overrides=True)
    sub.add_argument("run_file", metavar="RUN.yaml")

    sub = command("watch", _watch, "how far a run is, and whether it lives: from its folder alone, on any machine")
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="run folders, or a folder of run folders")
    sub.add_argument("--once", action="store_true", help="print it once")
    as_json(sub)

    sub = command("bench", _bench, "measure a run file's training steps; or put results side by side", overrides=True)
    sub.add_argument("measured", nargs="+", metavar="RUN.yaml | RESULT.json ...", help="what to measure, or results")
    sub.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps measured (default: 20)")
    sub.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before them (default: 5)")
    sub.add_argument("--synthetic", action="store_true", help="the same micro-batches again and again: no data is read")
    sub.add_argument("--random-weights", action="store_true", help="the model from its configuration, none downloaded")
    sub.add_argument("--profile", action="store_true", help="a trace of the last steps by torch's profiler, each rank")
    sub.add_argument("--name", help="folder under bench/ (default: ranks-NNNN)")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the result, or the table's rows, there too")
    sub.add_argument("--png", type=Path, metavar="FILE", help="of results side by side: a picture of their scaling")

    sub = command("evaluate", _evaluate, "generate answers and score them, on any number of ranks", overrides=True)
    sub.add_argument("run_file", metavar="RUN.yaml")
    which = sub.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", metavar="best|latest|DIR", help="a checkpoint folder (default: the run's newest whole one)"
    )
    which.add_argument("--base", action="store_true", help="the model before training")
    sub.add_argument("--few-shot", type=int, default=0, metavar="N", help="worked examples in the prompt")
    sub.add_argument("--split", choices=("test", "validation"), default="test", help="corpus of the run file to score")
    sub.add_argument("--name", help="folder under eval/ (default: base, or the checkpoint's name)")
    as_json(sub)

    sub = command("score", _score, "score a file of {id, truth, prediction} rows; no model, no torch")
    sub.add_argument("predictions", type=Path, metavar="PREDICTIONS.jsonl")
    sub.add_argument("--metric", default="fuzzy", help="name of a metric (default: fuzzy)")
    as_json(sub)

    sub = command("compare", _compare, "two evaluations of the same samples: difference, interval, p-value; no model")
    sub.add_argument("a", type=Path, metavar="EVAL_A", help="folder RUN/eval/NAME, or a file of predictions")
    sub.add_argument("b", type=Path, metavar="EVAL_B", help="the same, of the other model")
    sub.add_argument("--metric", help="name of a metric (default: what both were scored with)")
    as_json(sub)

    sub = command("predictions", _predictions, "the answers of an evaluation as lmms-eval's or VLMEvalKit's files")
    sub.add_argument("folder", type=Path, metavar="EVAL", help="folder RUN/eval/NAME")
    sub.add_argument("--to", required=True, choices=("lmms-eval", "vlmevalkit"), help="whose form")
    sub.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="lmms-eval: a folder; vlmevalkit: FILE.xlsx or FILE.tsv"
    )
    sub.add_argument("--shards", help="the corpus that was evaluated (default: the one in the run's run.yaml)")
    as_json(sub)

    sub = command("predict", _predict, "one answer at the prompt, or with --serve a page to ask on", overrides=True)
    sub.add_argument(
        "model",
        metavar="MODEL_OR_RUN",
        help="a run folder or file, a checkpoint, an adapter folder, a model folder, or a name on the hub",
    )
    sub.add_argument("--text", metavar="T", help="the question; -: standard input (default: the one all samples ask)")
    sub.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be given again")
    sub.add_argument("--checkpoint", metavar="best|latest|DIR", help="of a run (default: its newest whole one)")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the run's)")
    sub.add_argument("--serve", action="store_true", help="a page in the browser (pip install 'vlmdist[serve]')")
    sub.add_argument("--host", default="127.0.0.1", help="of the page: who may reach it (default: this machine alone)")
    sub.add_argument("--port", type=int, default=7860, metavar="N", help="of the page; 0: any (default: 7860)")
    as_json(sub)
    sub.epilog = (
        "section.field=value arguments override the run file; for a model they set the same (model.quantization=nf4). "
        "A page on a compute node NODE is reached by ssh -L 7860:127.0.0.1:7860 -J LOGIN_NODE NODE, then "
        "http://127.0.0.1:7860 at home; where nodes take no ssh, by --host 0.0.0.0 and ssh -L 7860:NODE:7860 LOGIN_NODE"
    )

    sub = command("audit", _audit, "prove from the run's own log that every sample was taken exactly once")
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    as_json(sub)

    sub = command("report", _report, "one self-contained HTML page of one or several runs")
    sub.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    sub.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first run folder")

    sub = command("export", _export, "write an ordinary transformers or peft folder that loads without vlmdist")
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    sub.add_argument("--merge", action="store_true", help="the whole model, adapters merged into 16 or 32 bit")
    sub.add_argument(
        "--checkpoint", metavar="best|latest|DIR", help="a checkpoint folder (default: the run's newest whole one)"
    )
    sub.add_argument("--push-to-hub", metavar="REPO", help="then upload it; the login is HF_TOKEN or `hf auth login`")
    sub.add_argument("--private", action="store_true", help="only where the repository is private")
    as_json(sub)

    command("config-schema", _config_schema, "the JSON schema of run files, for editors")
    return parser


def _index(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.data.inspect import format_inspection, inspect_corpus
    from vlmdist.data.remote.store import is_url
    from vlmdist.data.shards.build import build_index
    from vlmdist.data.shards.build_remote import index_remote

    if arguments.processes is not None and arguments.processes < 1:
        raise UserError(f"--processes {arguments.processes}: at least 1")
    elsewhere = [is_url(source) for source in arguments.shards]
    if not any(elsewhere) and (len(arguments.shards) > 1 or arguments.out is not None):
        raise UserError("tars in a local folder get their index there: vlmdist index FOLDER, one folder at a time")
    if any(elsewhere):
        if arguments.out is None:
            raise UserError("tars elsewhere need a local folder for their index: --out FOLDER")
        if arguments.headers_only or arguments.processes is not None:
            raise UserError("--headers-only and --processes are for tars in a local folder")
        corpus = index_remote(arguments.shards, arguments.out, progress=not arguments.json)
    else:
        corpus = build_index(
            Path(arguments.shards[0]),
            processes=arguments.processes,
            headers_only=arguments.headers_only,
            progress=not arguments.json,
        )
    facts = inspect_corpus(corpus)
    print(json.dumps(facts) if arguments.json else format_inspection(facts))


def _inspect(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.data.inspect import format_inspection, inspect_corpus
    from vlmdist.data.shards.corpus import Corpus

    if arguments.run_file is None:
        if overrides:
            raise UserError("overrides belong to a run file: --run RUN.yaml")
        facts = inspect_corpus(Corpus.open(arguments.shards), key=arguments.key)
        print(json.dumps(facts) if arguments.json else format_inspection(facts))
        return
    from vlmdist.config import load_run
    from vlmdist.data.prompt import Prompter
    from vlmdist.data.remote.cache import RemoteAccess
    from vlmdist.data.show import as_seen, format_as_seen
    from vlmdist.model.load import load_processor

    config = load_run(arguments.run_file, overrides)
    corpus = Corpus.open(arguments.shards, RemoteAccess.for_run(config.data))
    facts = inspect_corpus(corpus, key=arguments.key)
    prompter = Prompter.for_run(load_processor(config.model), config)
    facts["as_seen"] = as_seen(corpus, prompter, arguments.key)
    print(json.dumps(facts) if arguments.json else format_inspection(facts) + "\n\n" + format_as_seen(facts["as_seen"]))


def _check(arguments: argparse.Namespace, overrides: list[str]) -> int:
    _set_up_libraries()
    from vlmdist.check.run import check_run
    from vlmdist.check.slurm import read_request
    from vlmdist.check.text import format_report

    asked: dict[str, str | None] = {name: getattr(arguments, name) for name in _SLURM_OPTIONS}
    request = None
    if arguments.script is not None or any(asked.values()):
        asked["nodes"] = None if arguments.nodes is None else str(arguments.nodes)
        asked["gpus-per-node"] = None if arguments.gpus is None else str(arguments.gpus)
        request = read_request(arguments.script, asked)
    report = check_run(
        arguments.run_file,
        overrides,
        gpu=arguments.gpu,
        gpus_per_node=arguments.gpus,
        num_nodes=arguments.nodes,
        on=arguments.on,
        request=request,
    )
    print(json.dumps(report.as_json()) if arguments.json else format_report(report), flush=True)
    if report.problems and not arguments.json:
        raise UserError(report.problems)
    return UserError.exit_code if report.problems else 0


def _train(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.config import load_run

    with _stoppable("asked to stop before the first step: nothing to save; run again to begin") as stop:
        config = load_run(arguments.run_file, overrides)
        _set_up_libraries()
        from vlmdist.train.loop import train

        train(config, stop)


@contextmanager
def _stoppable(said_at_once: str) -> "Iterator[StopSignal]":
    """From its first moment a signal to stop is heard: the imports alone take seconds. The ranks are then joined.

    said_at_once: where a stop comes before there is anything to save.
    """
    from vlmdist.distributed import adopt_slurm_environment
    from vlmdist.train.signals import StoppedAtOnce, StopSignal

    try:
        with StopSignal() as stop:
            adopt_slurm_environment()
            yield stop
    except StoppedAtOnce:
        raise StopRequested(said_at_once) from None


def _watch(arguments: argparse.Namespace, overrides: list[str]) -> int:
    try:
        from vlmdist.live.watch import watch_runs

        watch_runs(arguments.runs, once=arguments.once, json_output=arguments.json)
    except KeyboardInterrupt:  # how one leaves it
        print()
    return 0


def _bench(arguments: argparse.Namespace, overrides: list[str]) -> None:
    if all(name.endswith(".json") for name in arguments.measured):
        _compare_benches(arguments)
        return
    if len(arguments.measured) > 1 or arguments.png is not None:
        raise UserError(
            "bench: give one run file to measure, or results (.json) to put side by side, with --png or not"
        )
    from vlmdist.config import load_run
    from vlmdist.run_folder import replace_file_text

    with _stoppable("asked to stop before the first step: nothing was measured") as stop:
        config = load_run(arguments.measured[0], overrides)
        _set_up_libraries()
        from vlmdist.bench.run import bench_run
        from vlmdist.bench.table import format_result

        result = bench_run(
            config,
            stop,
            num_steps=arguments.steps,
            num_warmup_steps=arguments.warmup,
            synthetic=arguments.synthetic,
            random_weights=arguments.random_weights,
            profile=arguments.profile,
            name=arguments.name,
        )
    if result is not None:
        print(format_result(result), f"\nin {result['folder']}", sep="\n")
        if arguments.json is not None:
            replace_file_text(arguments.json, json.dumps(result, indent=1) + "\n")


def _compare_benches(arguments: argparse.Namespace) -> None:
    from vlmdist.bench.table import draw_scaling, format_scaling, read_results, scaling
    from vlmdist.run_folder import replace_file_text

    results = read_results(arguments.measured)
    print(format_scaling(results))
    if arguments.json is not None:
        replace_file_text(arguments.json, json.dumps(scaling(results), indent=1) + "\n")
    if arguments.png is not None:
        draw_scaling(results, arguments.png)


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.config import load_run

    # batches are written whole, so a stop may come at any moment
    with _stoppable("asked to stop: the finished batches are kept; run again to go on"):
        config = load_run(arguments.run_file, overrides)
        _set_up_libraries()
        from vlmdist.evaluate.run import evaluate_run
        from vlmdist.evaluate.scores import format_scores

        scores = evaluate_run(
            config,
            checkpoint=arguments.checkpoint,
            base=arguments.base,
            name=arguments.name,
            few_shot=arguments.few_shot,
            split=arguments.split,
        )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(scores) if arguments.json else format_scores(scores))


def _score(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.evaluate.scores import format_scores, score_file

    scores = score_file(arguments.predictions, arguments.metric)
    print(json.dumps(scores) if arguments.json else format_scores(scores))


def _compare(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.evaluate.compare import compare_evaluations, format_comparison

    facts = compare_evaluations(arguments.a, arguments.b, arguments.metric)
    print(json.dumps(facts) if arguments.json else format_comparison(facts))


def _predictions(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.bridges.predictions import convert_predictions, format_conversion

    facts = convert_predictions(arguments.folder, arguments.to, arguments.out, arguments.shards)
    print(json.dumps(facts) if arguments.json else format_conversion(facts))


def _predict(arguments: argparse.Namespace, overrides: list[str]) -> None:
    _set_up_libraries()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a model may say anything
    from vlmdist.predict.run import predict

    if arguments.serve:
        _serve(arguments, overrides)
        return
    facts = predict(
        arguments.model,
        arguments.text,
        arguments.image,
        checkpoint=arguments.checkpoint,
        overrides=overrides,
        max_new_tokens=arguments.max_new_tokens,
        as_json=arguments.json,
    )
    if arguments.json:
        print(json.dumps(facts))


def _serve(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.predict.serve import serve

    if arguments.image or arguments.text is not None or arguments.json:
        raise UserError("--serve: text and images are given on the page, without --text, --image and --json")
    serve(
        arguments.model,
        checkpoint=arguments.checkpoint,
        overrides=overrides,
        max_new_tokens=arguments.max_new_tokens,
        host=arguments.host,
        port=arguments.port,
    )


def _audit(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlmdist.audit import audit_run, format_audit

    facts = audit_run(arguments.run_dir)
    print(json.dumps(facts) if arguments.json else format_audit(facts))
    return 0 if facts["clean"] else 1


def _report(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.report.page import write_report

    print(write_report(arguments.run_dirs, arguments.out))


def _export(arguments: argparse.Namespace, overrides: list[str]) -> None:
    _set_up_libraries()
    from vlmdist.export.run import export_run, format_export

    facts = export_run(
        arguments.run_dir,
        arguments.out,
        merge=arguments.merge,
        checkpoint=arguments.checkpoint,
        push_to_hub=arguments.push_to_hub,
        private=arguments.private,
    )
    print(json.dumps(facts) if arguments.json else format_export(facts))


def _config_schema(arguments: argparse.Namespace, overrides: list[str]) -> None:
    from vlmdist.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))


def _set_up_libraries() -> None:
    """Before they are imported. They are made quiet: the chatter of every rank would bury the run's lines."""
    # large tensors on huge pages, for torch's first tensor to find: on a CPU the loss over 128k logits takes 60 % of
    # the time, since half of it went into page faults
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # deprecations inside the libraries (transformers' checkpointing calls in peft, torch's gathers in deepspeed)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if "DS_ACCELERATOR" not in os.environ:
        import torch

        os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
