"""Converts checkpoints of Funnel and of BERT-like models to this project's format, transformers' or ONNX.

funnel convert funnel-transformer/small weights/small      # from the hub
funnel convert DIR weights/mine                            # the format is detected; also BERT, RoBERTa, ELECTRA, …
funnel convert runs/mine out --to huggingface              # for transformers' from_pretrained
funnel convert runs/mine out --to onnx                     # one file for onnxruntime (extra: onnx)
funnel convert runs/mine out --to onnx --quantize int8     # with int8 weights; compares accuracy and latency
funnel convert runs/mine out --to huggingface --push-to-hub OWNER/NAME   # also upload the folder
"""

import argparse
import shutil
import signal
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from funnel.cli.common import ArgumentParser, run_command
from funnel.errors import FunnelError, StoppedBySignal, format_list

if TYPE_CHECKING:
    from funnel.weights.load import Source

TARGETS = ("funnel", "huggingface", "onnx")
QUANTIZATIONS = ("int8",)
CARD = "README.md"  # of a run; copied into the folder
ON_INTERRUPT = "nothing was written"


def add_convert(commands: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Adds the subcommand to `funnel`."""
    parser = commands.add_parser("convert", help="convert a checkpoint to another format", description=__doc__)
    _add_arguments(parser)
    parser.set_defaults(work=convert_and_push, on_interrupt=ON_INTERRUPT)


def main(program: str, arguments: list[str] | None = None) -> int:
    """Runs the command as a standalone program and returns the exit status.

    Args:
        program: name for messages.
        arguments: default: those of the process.
    """
    assert __doc__ is not None
    parser = ArgumentParser(prog=program, description=__doc__.replace("funnel convert", f"python {program}"))
    _add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the full traceback of errors")
    try:
        args = parser.parse_args(arguments)
    except SystemExit as end:  # after --help or a usage error
        return int(end.code or 0)
    return run_command(program, partial(convert_and_push, args), on_interrupt=ON_INTERRUPT, debug=args.debug)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder in any format, run folder, or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--to", choices=TARGETS, default="funnel", help="format to write (default: %(default)s)")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="onnx: store weights in int8 (dynamic quantization)")
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the folder to the Hugging Face repository OWNER/NAME; the "
                        "token is that of `hf auth login` or HF_TOKEN")  # fmt: skip
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make a new repository private")


def convert_and_push(args: argparse.Namespace) -> None:
    """Converts a checkpoint, then uploads the result if a repository is given.

    Raises:
        FunnelError: as `convert`, or the folder cannot be uploaded. Then it is complete nevertheless.
    """
    if args.push_to_hub is None:
        if args.private:
            raise FunnelError("private has no effect without push_to_hub; omit it", "private")
        convert(args.source, args.out, args.to, args.quantize)
        return
    from funnel.analysis.card import REPO_ID
    from funnel.io import atomic_write
    from funnel.weights.hub import check_repo_id, find_token, push_folder

    check_repo_id(args.push_to_hub)  # before the conversion
    find_token()
    convert(args.source, args.out, args.to, args.quantize)
    card = args.out / CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8").replace(REPO_ID, args.push_to_hub)
        with atomic_write(card) as temporary:
            temporary.write_text(text, encoding="utf-8")
    else:
        warnings.warn("the repository gets no model card; write one with funnel card RUN before converting", stacklevel=2)
    try:
        print(f"uploaded  {push_folder(args.out, args.push_to_hub, args.private)}")
    except KeyboardInterrupt:
        raise StoppedBySignal(signal.SIGINT, f"{args.out} is complete, but not uploaded") from None


def convert(source: str, out: Path, to: str = "funnel", quantize: str | None = None) -> None:
    """Converts a checkpoint and prints a summary.

    With `quantize`, the summary compares latency with float32 weights and, if the source is a run, the scores on its dev set.

    Args:
        source: a checkpoint folder, a run folder, or a hub id.
        out: the folder to write.
        to: one of `TARGETS`.
        quantize: None or one of `QUANTIZATIONS`, for ONNX.

    Raises:
        FunnelError: the source cannot be read, `out` exists or cannot be written, or the format `to` has no such model
            or cannot be quantized; then nothing is written.
    """
    from funnel.io import atomic_folder
    from funnel.model.checkpoint import Checkpoint, save_checkpoint
    from funnel.weights.export import check_can_quantize, max_length, write_onnx, write_transformers
    from funnel.weights.load import read_source, resolve

    if quantize is not None:
        if to != "onnx":
            raise FunnelError(f"quantize {quantize}: only ONNX files can be quantized; add --to onnx", "quantize")
        check_can_quantize()
    if out.exists():
        raise FunnelError(f"{out} already exists; choose a new folder or remove it")
    try:
        folder = resolve(source)
    except FunnelError as error:  # SOURCE is not a flag
        message = str(error)
        raise FunnelError(message.replace("weights", "SOURCE", 1) if error.parameter == "weights" else message) from None
    loaded = read_source(folder)
    tokenizer = loaded.tokenizer
    _print_source(loaded)
    if tokenizer is None:
        warnings.warn(f"{folder}: no tokenizer found; copy the model's tokenizer.json or vocab.txt into {out}", stacklevel=2)
    checkpoint = Checkpoint(loaded.config, loaded.weights, loaded.architecture)
    card = _model_card(folder)

    def write_more(target: Path) -> None:
        if tokenizer is not None and to == "huggingface":
            config = loaded.config
            token_types = 3 if config.relative_attention else config.token_type_embeddings  # Funnel's [CLS] has a type
            tokenizer.save_for_transformers(target, max_length(config), token_types)
        elif tokenizer is not None:
            tokenizer.save(target)
        if card is not None:
            shutil.copyfile(card, target / CARD)

    if to == "funnel":
        save_checkpoint(out, checkpoint, extra=write_more)
    else:
        with atomic_folder(out) as target:
            (write_transformers if to == "huggingface" else write_onnx)(target, checkpoint)
            if quantize is not None:
                _quantize(target / "model.onnx", loaded)
            write_more(target)
    num_parameters = sum(tensor.numel() for tensor in loaded.weights.values())
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f"wrote     {out}: {len(loaded.weights)} weights, {num_parameters:,} parameters ({files})")


def _model_card(folder: Path) -> Path | None:
    """The model card of a run, given its best checkpoint; None if there is none."""
    from funnel.inference.predictor import run_folder
    from funnel.model.checkpoint import best_checkpoint

    run = run_folder(folder)
    if run is None or best_checkpoint(run) != folder or not (run / CARD).is_file():
        return None
    return run / CARD


def _quantize(path: Path, source: "Source") -> None:
    """Replaces an ONNX file with a quantized one and prints how the two compare."""
    from funnel.analysis.onnx_report import compare_graphs, load_dev_set
    from funnel.weights.export import quantize_onnx

    try:
        dev = load_dev_set(source)
    except FunnelError as error:
        dev = None
        print(f"no dev set to measure the accuracy on: {error}")
    with tempfile.TemporaryDirectory() as folder:
        original = Path(shutil.move(path, folder))
        quantize_onnx(original, path)
        print(compare_graphs({"fp32": original, "int8": path}, dev))


def _print_source(source: "Source") -> None:
    print(f"read      {source.folder}: {source.format} format, {source.architecture}, blocks {source.config.layout}")
    for reason, names in _group_by_reason(source.unused).items():
        print(f"unused    {format_list(names, 3)} ({reason})")


def _group_by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return groups
