"""Brings other people's checkpoints into this project's format, and takes ours to transformers'.

python convert_weights.py funnel-transformer/small weights/small      # from the hub
python convert_weights.py DIR weights/mine                            # transformers, original, or BERT, as it finds
python convert_weights.py runs/mine out --to huggingface              # for transformers' from_pretrained
python convert_weights.py runs/mine out --to onnx                     # one file for onnxruntime (extra: onnx)
"""

import sys
from pathlib import Path

from funnel.cli.common import ArgumentParser, run_command
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError, format_list
from funnel.io import atomic_folder, write_json
from funnel.model import checkpoint
from funnel.model.checkpoint import Checkpoint
from funnel.model.heads import MODELS
from funnel.weights import huggingface
from funnel.weights.export import export_onnx, export_torch
from funnel.weights.load import read_weights_from, resolve


def main(arguments: list[str] | None = None) -> int:
    """Converts as the command does, with its arguments (default: the command line's). Gives the exit status."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", help="a folder with a checkpoint in any known format, a run's folder, or a hub id")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist")
    parser.add_argument(
        "--to", choices=("funnel", "huggingface", "onnx"), default="funnel", help="format to write (%(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    args = parser.parse_args(arguments)
    return run_command(
        "convert_weights.py",
        lambda: convert(args.source, args.out, args.to),
        on_interrupt="nothing was written",
        debug=args.debug,
    )


def convert(name: str, out: Path, to: str = "funnel") -> None:
    """Converts one checkpoint and prints what was read, left out, made and written.

    Raises:
        FunnelError: the source cannot be read, or `out` exists or cannot be written; then nothing is written.
    """
    if out.exists():
        raise FunnelError(f"{out}: exists already; name a folder that does not, or remove it")
    source = read_weights_from(resolve(name))
    tokenizer = FunnelTokenizer.load(source.folder).fitting(source.config.vocab_size, source.folder)
    saved = Checkpoint(source.config, source.weights, source.architecture)
    count = sum(tensor.numel() for tensor in source.weights.values())
    print(f"read      {source.folder}: {source.format} format, {source.architecture}, blocks {source.config.layout}")
    for title, table in (("left out", source.left_out), ("made", source.made)):
        for reason, names in _by_reason(table).items():
            print(f"{title:<9} {format_list(names, 3)} ({reason})")
    if to == "huggingface":
        with atomic_folder(out) as folder:
            _write_huggingface(folder, saved, tokenizer)
    elif to == "onnx":
        with atomic_folder(out) as folder:
            _write_onnx(folder, saved, tokenizer)
    else:
        checkpoint.save(out, saved.config, saved.weights, saved.architecture, extra=tokenizer.save)
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f"wrote     {out}: {len(source.weights)} weights, {count:,} parameters ({files})")


def _write_huggingface(folder: Path, saved: Checkpoint, tokenizer: FunnelTokenizer) -> None:
    huggingface.write(folder, saved)
    tokenizer.save_for_transformers(folder)


def _write_onnx(folder: Path, saved: Checkpoint, tokenizer: FunnelTokenizer) -> None:
    model = MODELS[saved.architecture](saved.config)
    model.load_state_dict(dict(saved.weights))
    export_onnx(export_torch(model), folder / "model.onnx")
    write_json(folder / checkpoint.CONFIG, saved.config.to_dict())
    tokenizer.save(folder)


def _by_reason(table: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in table.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


if __name__ == "__main__":
    sys.exit(main())
