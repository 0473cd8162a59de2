"""Makes the small pretrained model in the package: three layers of MiniLM, distilled on Wikipedia, in 8 and 4 bits.

    python -m benchmarks.studies.tiny --teacher MINILM --corpus wiki_en.txt.xz --out runs/tiny

1. Removes the rarest word pieces from the teacher's vocabulary, and their rows from its embeddings.
2. Keeps layers 0, 2 and 4 as layout 1,1,1 and distills the teacher into them (pretrain.py; an interrupted run is resumed).
3. Writes OUT/package: config.json, tokenizer.json and model.safetensors, with matrices in 8 bits and word embeddings in 4.

The pieces that are kept: special tokens, the characters of the corpus, and those that are most frequent in its words that begin
with a lower-case letter, so that words take precedence over names. Words that lose their piece are split into smaller ones.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.studies.results import ROOT, environment
from funnel.data.tokenizer import FunnelTokenizer
from funnel.errors import FunnelError
from funnel.io import atomic_folder, write_json
from funnel.model.checkpoint import CONFIG, WEIGHTS, Checkpoint, load_checkpoint, save_checkpoint, save_weights
from funnel.model.quantization import quantize
from funnel.pretraining.corpus import read_documents
from funnel.weights.load import read_source, resolve

BATCH = 1000  # texts per call of the tokenizer
CAPITALIZED = re.compile(r"\b[A-Z]\w*")
EMBEDDINGS = "embeddings.word_embeddings.weight"
RECIPE = "--objective distill --blocks 1,1,1 --decoder-layers 0 --states blocks --pairs --batch-size 64 --lr 3e-4 --dtype bf16"


def count_tokens(tokenizer: FunnelTokenizer, corpus: Path) -> np.ndarray:
    """How often each token occurs in the words of a corpus that begin with a lower-case letter, [V]."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    documents = read_documents(corpus)
    while batch := list(itertools.islice(documents, BATCH)):
        for ids in tokenizer.encode_plain([CAPITALIZED.sub(" ", text) for text in batch]):
            np.add.at(counts, ids, 1)
    return counts


def choose_tokens(tokenizer: FunnelTokenizer, counts: np.ndarray, size: int) -> list[int]:
    """The ids of the tokens to keep, in their order."""
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    characters = {token.removeprefix("##")[:1] for token, token_id in vocabulary.items() if counts[token_id]}
    kept = set(tokenizer.ids.values()) | {i for token, i in vocabulary.items() if token.removeprefix("##") in characters}
    unused = {token_id for token, token_id in vocabulary.items() if token.startswith("[unused")}
    for token_id in np.argsort(-counts, kind="stable"):  # of equally frequent ones, those that BERT lists first
        if len(kept) >= size:
            break
        if token_id not in unused:
            kept.add(int(token_id))
    return sorted(kept)


def prune_tokenizer(tokenizer: FunnelTokenizer, kept: list[int]) -> FunnelTokenizer:
    """The tokenizer with some tokens only; their new ids are their positions in `kept`."""
    values = json.loads(tokenizer.tokenizer.to_str())
    if values["model"]["type"] != "WordPiece":
        raise FunnelError(f"{tokenizer.source}: expected a WordPiece tokenizer, found {values['model']['type']}")
    new_ids = {old: new for new, old in enumerate(kept)}
    values["model"]["vocab"] = {token: new_ids[i] for token, i in values["model"]["vocab"].items() if i in new_ids}
    values["added_tokens"] = [{**token, "id": new_ids[token["id"]]} for token in values["added_tokens"]]
    for token in values["post_processor"]["special_tokens"].values():
        token["ids"] = [new_ids[i] for i in token["ids"]]
    return FunnelTokenizer(Tokenizer.from_str(json.dumps(values)), tokenizer.source)


def prune(teacher: str, corpus: Path, size: int, out: Path) -> None:
    """Writes the teacher with a smaller vocabulary as a checkpoint folder."""
    source = read_source(resolve(teacher))
    tokenizer = source.require_tokenizer()
    counts = count_tokens(tokenizer, corpus)
    kept = choose_tokens(tokenizer, counts, size)
    weights = {**source.weights, EMBEDDINGS: source.weights[EMBEDDINGS][kept].clone()}
    checkpoint = Checkpoint(source.config.replace(vocab_size=len(kept)), weights, source.architecture)
    save_checkpoint(out, checkpoint, prune_tokenizer(tokenizer, kept).save)
    share = counts[kept].sum() / counts.sum()
    print(f"kept {len(kept):,} of {tokenizer.vocab_size:,} tokens, which make up {share:.2%} of the lower-case words")


def distill(args: argparse.Namespace) -> Path:
    """Runs pretrain.py, or resumes it; returns the run's folder."""
    run = args.out / "run"
    arguments = ["--resume"]
    if not (run / "run.json").exists():
        arguments = [*RECIPE.split(), "--steps", str(args.steps), "--corpus", str(args.corpus)]
        arguments += ["--teacher", args.teacher, "--weights", str(args.out / "pruned")]
    command = [sys.executable, str(ROOT / "pretrain.py"), *arguments, "--out", str(run)]
    subprocess.run(command, check=True, env=environment(1))
    return run


def write_package(run: Path, out: Path) -> None:
    """Writes the run's model without its head, quantized."""
    checkpoint = load_checkpoint(run / "last")
    body = {name: tensor for name, tensor in checkpoint.weights.items() if name.startswith(("embeddings.", "encoder."))}
    with atomic_folder(out) as folder:
        values = json.loads((run / "last" / CONFIG).read_text(encoding="utf-8"))
        write_json(folder / CONFIG, {**values, "architectures": ["FunnelBaseModel"]})
        save_weights(folder / WEIGHTS, quantize(body, [EMBEDDINGS]))
        FunnelTokenizer.load(run / "last").save(folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {out}: {sum(tensor.numel() for tensor in body.values()):,} parameters, {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of MiniLM, or a BERT-like model with a WordPiece vocabulary")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--vocab", type=int, default=27_000, help="number of word pieces to keep (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2_000, help="of distillation (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not (args.out / "pruned").exists():
        prune(args.teacher, args.corpus, args.vocab, args.out / "pruned")
    write_package(distill(args), args.out / "package")


if __name__ == "__main__":
    main()
