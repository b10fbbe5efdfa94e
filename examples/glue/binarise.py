"""Line files of columns.py -> the data folder that fairseq's sentence_prediction reads, for one pretrained model.

    python examples/glue/binarise.py LINES --pretrained FOLDER --out FOLDER

Sentences become the ids that `encode` of the hub interface gives them. What exceeds the model's positions is cut, of a
pair the longer sentence first, and counted.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterator

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
logging.disable(logging.INFO)  # fairseq announces optional packages on import
from fairseq.data import Dictionary, indexed_dataset  # noqa: E402

from fairseq_implicit.data.pairs import shorten_segments  # noqa: E402
from fairseq_implicit.models.bert import ImplicitBertModel  # noqa: E402


def lines(folder: str, split: str, parts: list[str]) -> Iterator[list[str]]:
    """The lines of a split's files, side by side. Raises ValueError when one has fewer than another."""
    files = [open(os.path.join(folder, f"{split}.{part}"), encoding="utf-8", newline="\n") for part in parts]
    try:
        for row in zip(*files, strict=True):
            yield [line.rstrip("\n") for line in row]
    except ValueError:
        raise ValueError(f"{', '.join(file.name for file in files)} differ in their numbers of lines") from None
    finally:
        for file in files:
            file.close()


class Output:
    """One column of a split in fairseq's memory-mapped format."""

    def __init__(self, prefix: str, vocabulary: int):
        os.makedirs(os.path.dirname(prefix), exist_ok=True)
        self.prefix = prefix
        self.builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=vocabulary)

    def add(self, ids: list[int]) -> None:
        self.builder.add_item(torch.tensor(ids))

    def close(self) -> None:
        self.builder.finalize(f"{self.prefix}.idx")


def write_sentences(bert, folder: str, split: str, inputs: list[str], out: str) -> str:
    """Writes the sentences of one split and returns what became of them, in words."""
    dictionary, room = bert.dictionary, bert.room(len(inputs))
    outputs = [Output(os.path.join(out, part, split), len(dictionary)) for part in inputs]
    examples = shortened = tokens = lost = unknown = 0
    for *texts, _ in lines(folder, split, [*inputs, "label"]):
        whole = [bert.ids(text) for text in texts]
        kept = shorten_segments(whole, room)
        for output, ids in zip(outputs, kept, strict=True):
            output.add([*ids, dictionary.eos()])
        examples += 1
        length = sum(map(len, whole))
        excess = length - sum(map(len, kept))
        tokens, lost, shortened = tokens + length, lost + excess, shortened + (excess > 0)
        unknown += sum(ids.count(dictionary.unk()) for ids in whole)
    for output in outputs:
        output.close()
    what, which = ("pairs", ", the longer sentence first") if len(inputs) > 1 else ("sentences", "")
    positions = bert.model.max_positions()
    said = f"{split}: {examples:,} {what}, {tokens:,} tokens of which {unknown:,} are unknown; "
    if not shortened:
        return said + f"all fit into the model's {positions} positions"
    return said + f"{shortened:,} {what} cut to the model's {positions} positions{which}: {lost:,} tokens left out"


def write_labels(folder: str, splits: list[str], out: str) -> None:
    """Writes the classes in the order of `classes`, or copies scores, which fairseq reads from text."""
    os.makedirs(out, exist_ok=True)
    path = os.path.join(folder, "classes")
    if not os.path.isfile(path):
        for split in splits:
            shutil.copy(os.path.join(folder, f"{split}.label"), out)
        return
    dictionary = Dictionary()
    with open(path, encoding="utf-8") as classes:
        for label in classes.read().split():
            dictionary.add_symbol(label)
    dictionary.save(os.path.join(out, "dict.txt"))
    for split in splits:
        output = Output(os.path.join(out, split), len(dictionary))
        for (label,) in lines(folder, split, ["label"]):
            output.add([dictionary.index(label), dictionary.eos()])
        output.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", metavar="LINES", help="folder that columns.py wrote")
    parser.add_argument("--pretrained", required=True, metavar="FOLDER", help="of the pretrained checkpoint")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="data folder to write; must not exist")
    arguments = parser.parse_args()
    if os.path.exists(arguments.out):
        parser.error(f"--out {arguments.out} exists: remove it or name another folder")
    folder = arguments.lines
    try:
        splits = sorted(name[: -len(".label")] for name in os.listdir(folder) if name.endswith(".label"))
        inputs = [part for part in ("input0", "input1") if os.path.isfile(os.path.join(folder, f"train.{part}"))]
        bert = ImplicitBertModel.from_pretrained(arguments.pretrained)
        for split in splits:
            print(f"  {write_sentences(bert, folder, split, inputs, arguments.out)}")
        for part in inputs:
            bert.dictionary.save(os.path.join(arguments.out, part, "dict.txt"))
        write_labels(folder, splits, os.path.join(arguments.out, "label"))
        for name, content in bert.vocabulary.contents.items():  # so that the hub finds the tokenizer beside its data
            with open(os.path.join(arguments.out, name), "wb") as file:
                file.write(content)
    except (OSError, ValueError) as error:
        sys.exit(f"binarise: {error}")


if __name__ == "__main__":
    main()
