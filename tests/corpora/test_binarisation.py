"""The fast route gives fairseq-preprocess' bytes; every token is accounted for; tokenizers fit fairseq."""

import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import time

import numpy as np
import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary, indexed_dataset

from fairseq_implicit.corpora import binarisation, tokenizer_training
from fairseq_implicit.corpora.durable import sha256_of
from fairseq_implicit.corpora.ownership import own_folder
from fairseq_implicit.corpora.problems import CorpusError
from fairseq_implicit.corpora.token_parts import PartWriter, join_parts
from fairseq_implicit.corpora.tokenizer_training import PRESETS, sampled_lines, train_tokenizer
from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary
from fairseq_implicit.text.token_files import index_header
from tests.corpora.formats import (
    NAUGHTY,
    kill_group,
    pile_lines,
    prepare,
    run_command,
    start_function_in_own_group,
    write_zst,
)


def made_up_documents(number, seed):
    rng = random.Random(seed)
    syllables = ["ka", "to", "mi", "re", "su", "né", "la", "pe", "vi", "du", "語", "9"]
    return [
        "\n".join(
            " ".join("".join(rng.choices(syllables, k=3)) for _ in range(rng.randrange(3, 12)))
            for _ in range(rng.randrange(1, 5))
        )
        for _ in range(number)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("binarisation")
    write_zst(folder / "00.jsonl.zst", pile_lines(made_up_documents(600, 0) + NAUGHTY))
    flags = ["--shard-size", "15KB", "--valid-fraction", "0.1", "--test-fraction", "0.05"]
    prepare(folder / "00.jsonl.zst", "--output", folder / "prepared", *flags)
    return folder / "prepared"


KINDS = {
    "unigram": {"model_type": "unigram"},
    "bpe": {"model_type": "bpe"},
    "bytes": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "identity": {"model_type": "unigram", "character_coverage": 0.98, "normalization_rule_name": "identity"},
}


@pytest.fixture(scope="module")
def models(prepared):
    paths = {}
    for kind, options in KINDS.items():
        paths[kind] = prepared.parent / f"tokenizer-{kind}" / "spm.model"
        size = 448 if kind == "bytes" else 192
        train_tokenizer([prepared], paths[kind], size, options, threads=1)
    return paths


@pytest.fixture(scope="module")
def naughty_text(prepared):
    """Lines on which the routes could differ: unknown characters beside unusual white space, every kind of line end."""
    rng = random.Random(5)
    alphabet = "ka to\t\u00a0\u3000\u2028\u0085\u200bqxz<s></s>語é9\u2581"
    lines = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(30))) for _ in range(800)]
    lines += [*NAUGHTY, "", " ", "▁", "<s>", "</s> <unk>", "x" * 70_000]
    path = prepared.parent / "naughty.txt"
    path.write_bytes("\n".join(lines).encode() + b"\nline\r\nends\rof all kinds\n\nlast without end")
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_fast_route_gives_the_bytes_of_fairseq_preprocess(
    prepared, models, naughty_text, fairseq_preprocess, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(binarisation, "_BLOCK", 5000)
    monkeypatch.setattr(binarisation, "_SMALLEST_RANGE", 20_000)
    valid = prepared / "valid.txt"
    fast(["--train", naughty_text, "--valid", valid, "--tokenizer", models[kind], "--output", tmp_path / "fast"])
    fairseq_preprocess(
        *("--task", "implicit_masked_lm", "--only-source", "--srcdict", models[kind], "--destdir", tmp_path / "slow"),
        *("--trainpref", naughty_text, "--validpref", valid),
    )
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "dict.txt", "sentencepiece.bpe.model"):
        assert (tmp_path / "fast/shard0" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes(), name


def fast(arguments):
    return run_command("binarise", *arguments, "--fast")


def test_fairseq_route_of_the_script(prepared, models, tmp_path):
    train, valid = sorted(prepared.glob("train.*.txt"))[0], prepared / "valid.txt"
    arguments = ["--train", train, "--valid", valid, "--tokenizer", models["unigram"], "--output"]
    run_command("binarise", *arguments, tmp_path / "slow")
    fast([*arguments, tmp_path / "fast"])
    for name in ("train.bin", "train.idx", "valid.bin", "dict.txt"):
        assert (tmp_path / "fast/shard0" / name).read_bytes() == (tmp_path / "slow/shard0" / name).read_bytes()
    slow, quick = (json.loads((tmp_path / way / "shard0/binarised.json").read_text()) for way in ("slow", "fast"))
    assert slow == quick


def test_large_vocabulary_is_stored_in_32_bits(models, tmp_path):
    model = models["unigram"].read_bytes()
    vocabulary = SentencePieceVocabulary(model)
    assert vocabulary.dtype == np.uint16 and vocabulary.encode_lines([b"kato"])[0].dtype == np.uint16
    assert SentencePieceVocabulary(model, vocabulary.symbols * 400).dtype == np.uint32

    lines = [[70_000, 2], [2], [5, 65_536, 2]]
    builder = indexed_dataset.make_builder(str(tmp_path / "fairseq.bin"), "mmap", vocab_size=100_000)
    for part in range(2):
        writer = PartWriter(tmp_path / str(part), ".part")
        for line in lines:
            writer.write(np.array(line, dtype=np.uint32), np.array([len(line)], dtype=np.int32))
            builder.add_item(torch.tensor(line))
        writer.close()
    builder.finalize(str(tmp_path / "fairseq.idx"))
    assert join_parts([tmp_path / "0", tmp_path / "1"], tmp_path / "own", np.dtype(np.uint32)) == (6, 12)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"own{suffix}").read_bytes() == (tmp_path / f"fairseq{suffix}").read_bytes()


def test_tokens_are_those_of_sentencepiece_and_one_end_mark_per_line(prepared, models, tmp_path, capsys):
    fast([prepared, "--tokenizer", models["unigram"], "--output", tmp_path / "bin", "--workers", "2"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(models["unigram"]))
    shards = sorted(prepared.glob("train.*.txt"))
    assert len(shards) >= 3
    total = 0
    for number, shard in enumerate(shards):
        lines = shard.read_text().removesuffix("\n").split("\n")
        expected = sum(map(len, processor.encode(lines))) + len(lines)
        assert os.path.getsize(tmp_path / f"bin/shard{number}/train.bin") == 2 * expected
        assert (tmp_path / f"bin/shard{number}/valid.bin").exists() == (number == 0)
        total += expected
    output = capsys.readouterr().out
    assert f"{total:,} tokens" in output
    argument = ":".join(str(tmp_path / f"bin/shard{number}") for number in range(len(shards)))
    assert output.endswith(argument + "\n") and (tmp_path / "bin/data-bin.txt").read_text() == argument + "\n"
    assert not (tmp_path / "bin/work").exists()


def test_every_token_is_seen_in_an_epoch_of_the_task(prepared, models, tmp_path):
    from fairseq_implicit.tasks.implicit_masked_lm import ImplicitMaskedLMConfig, ImplicitMaskedLMTask

    fast([prepared, "--tokenizer", models["unigram"], "--output", tmp_path / "bin"])
    data = (tmp_path / "bin/data-bin.txt").read_text().strip()
    records = [json.loads((tmp_path / f"bin/shard{k}/binarised.json").read_text()) for k in range(3)]
    for mode in ("none", "complete", "complete_doc", "eos"):
        for length in (17, 64, 512):
            cfg = ImplicitMaskedLMConfig(data=data, tokens_per_sample=length, sample_break_mode=mode, seed=1)
            task = ImplicitMaskedLMTask.setup_task(cfg)
            for epoch in (1, 2, 3):
                dataset = task.load_dataset("train", epoch=epoch)
                # every block begins with an <s> of its own
                seen = sum(len(dataset[index]["source"]) - 1 for index in range(len(dataset)))
                separators = 0
                if mode in ("complete_doc", "eos"):  # lone end marks between documents are borders there
                    text = sorted(prepared.glob("train.*.txt"))[epoch - 1].read_text()
                    separators = text.removesuffix("\n").split("\n").count("")
                assert seen + separators == records[epoch - 1]["counts"]["train"]["tokens"], (mode, length, epoch)


def all_checksums(folder):
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("[!.]*")) if path.is_file()}


def test_one_result_for_workers_parts_and_kills(prepared, models, tmp_path, monkeypatch):
    monkeypatch.setattr(binarisation, "_SMALLEST_RANGE", 4000)
    arguments = [prepared, "--tokenizer", models["unigram"], "--output"]
    reference = tmp_path / "one" / "bin"
    fast([*arguments, reference])
    expected = {name: sum_ for name, sum_ in all_checksums(reference).items() if name != "data-bin.txt"}

    def same(output):
        return {name: sum_ for name, sum_ in all_checksums(output).items() if name != "data-bin.txt"} == expected

    fast([*arguments, tmp_path / "two", "--workers", "2"])
    assert same(tmp_path / "two")
    for part in (1, 0):
        fast([*arguments, tmp_path / "parts", "--part", f"{part}/2"])
    assert same(tmp_path / "parts")
    rng = random.Random(2)
    for _ in range(6):
        process = start_function_in_own_group(fast, [[*arguments, tmp_path / "killed", "--workers", "2"]])
        time.sleep(rng.uniform(0.01, 0.2))
        kill_group(process)
    fast([*arguments, tmp_path / "killed"])
    assert same(tmp_path / "killed")


def test_foreign_folders_and_wrong_inputs_are_refused(prepared, models, tmp_path):
    output = tmp_path / "bin"
    arguments = [prepared, "--output", output, "--tokenizer"]
    fast([*arguments, models["unigram"]])
    with pytest.raises(CorpusError, match="shard0 was binarised from another text or with another --tokenizer"):
        fast([*arguments, models["bpe"]])
    (output / "shard1" / "binarised.json").unlink()
    with pytest.raises(CorpusError, match="shard1 exists but was not made by this command"):
        fast([*arguments, models["unigram"]])
    model = ["--tokenizer", models["unigram"]]
    for wrong, sentence in (
        ([*model, "--output", tmp_path / "a:b", prepared], "separates the data folders"),
        (["--tokenizer", tmp_path / "no.model", "--output", output, prepared], "no such sentencepiece model"),
        (["--tokenizer", prepared / "report.txt", "--output", output, prepared], "is no sentencepiece model"),
        ([*model, "--output", output, tmp_path], "has no manifest.json"),
        ([*model, "--output", output], "Give either"),
        ([*model, "--output", output, prepared, "--valid", prepared / "valid.txt"], "bring"),
        ([*model, "--output", output, "--train", tmp_path / "none.txt"], "none.txt does not exist"),
        ([*model, "--output", output, prepared, "--workers", "0"], "--workers 0"),
    ):
        with pytest.raises(CorpusError, match=sentence):
            fast(wrong)
    (tmp_path / "latin1.txt").write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(CorpusError, match=r"latin1.txt is not UTF-8 at byte 8"):
        fast([*model, "--output", tmp_path / "l", "--train", tmp_path / "latin1.txt"])


def test_damaged_parts_are_encoded_again_and_never_joined(prepared, models, tmp_path, monkeypatch):
    """A power cut may leave a file empty under its final name where an older version did not wait for the disk."""
    monkeypatch.setattr(binarisation, "_SMALLEST_RANGE", 2000)
    arguments = ["--train", prepared / "valid.txt", "--tokenizer", models["unigram"], "--output"]
    fast([*arguments, tmp_path / "reference"])

    def interrupted(*arguments):
        raise CorpusError("interrupted")

    for number, damage in enumerate((lambda ids: b"", lambda ids: ids[:-2], lambda ids: ids + b"\0\0", None)):
        output = tmp_path / str(number)
        with monkeypatch.context() as patch, pytest.raises(CorpusError, match="interrupted"):
            patch.setattr(binarisation.Binarisation, "_join", interrupted)
            fast([*arguments, output])
        parts = sorted(output.rglob("*.ids"))
        assert len(parts) >= 2
        if damage is None:
            parts[0].unlink()
        else:
            parts[0].write_bytes(damage(parts[0].read_bytes()))
        with pytest.raises(CorpusError, match=r"\.ids and .*\.lengths do not fit"):
            join_parts([parts[0].with_suffix("")], tmp_path / "joined", np.dtype(np.uint16))
        fast([*arguments, output])
        assert all_checksums(output / "shard0") == all_checksums(tmp_path / "reference" / "shard0")


@pytest.fixture
def named(monkeypatch):
    """The names that files and folders get, each of which must be on the disk by then."""
    names, synchronised, fsync, replace = [], set(), os.fsync, os.replace

    def spying_fsync(descriptor):
        synchronised.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking_replace(source, target):
        files = [*os.scandir(source)] if os.path.isdir(source) else []
        unsafe = [file.name for file in files if file.inode() not in synchronised]
        assert unsafe == [] and os.stat(source).st_ino in synchronised, (source, unsafe)
        names.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spying_fsync)
    monkeypatch.setattr(os, "replace", checking_replace)
    return names


@pytest.mark.parametrize("flags", [["--fast"], []], ids=["fast", "fairseq-preprocess"])
def test_what_gets_its_name_is_on_the_disk(prepared, models, tmp_path, monkeypatch, named, flags):
    def preprocess(command, **options):
        folder = command[command.index("--destdir") + 1]
        os.makedirs(folder)
        for name, content in (("train.bin", b""), ("train.idx", index_header(np.uint16, 0))):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(binarisation.subprocess, "run", preprocess)
    train = sorted(prepared.glob("train.*.txt"))[0]
    arguments = ["--train", train, "--tokenizer", models["unigram"], "--output", tmp_path / "bin", *flags]
    run_command("binarise", *arguments)
    assert {"shard0", "data-bin.txt", "binarised.json"} <= set(named)
    assert not flags or any(name.endswith(".ids") for name in named) and any(n.endswith(".lengths") for n in named)


def test_second_binarisation_of_a_folder_is_refused(prepared, models, tmp_path):
    ready, release = multiprocessing.Event(), multiprocessing.Event()

    def held():
        with own_folder(tmp_path / "bin", binarisation.LOCK, 0, 1):
            ready.set()
            release.wait(60)

    owner = multiprocessing.get_context("fork").Process(target=held)
    owner.start()
    assert ready.wait(60)
    for part in ([], ["--part", "0/2"]):
        with pytest.raises(CorpusError, match=rf"Another process works in .*bin \(process {owner.pid} on "):
            fast([prepared, "--tokenizer", models["unigram"], "--output", tmp_path / "bin", *part])
    release.set()
    owner.join()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"[" * 10**5, b'{"identity": 3}'])
def test_damaged_record_of_a_shard_is_one_sentence(prepared, models, tmp_path, damage):
    arguments = ["--train", prepared / "valid.txt", "--tokenizer", models["unigram"], "--output", tmp_path / "bin"]
    fast(arguments)
    (tmp_path / "bin" / "shard0" / "binarised.json").write_bytes(damage)
    with pytest.raises(CorpusError, match="shard0/binarised.json is damaged .*; remove it and run"):
        fast(arguments)


def test_failure_of_fairseq_preprocess_is_reported(prepared, models, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback ...\nMemoryError: no room")
    monkeypatch.setattr(binarisation.subprocess, "run", lambda *arguments, **keywords: failed)
    arguments = [prepared, "--tokenizer", models["unigram"], "--output", tmp_path / "l"]
    with pytest.raises(CorpusError, match="fairseq-preprocess failed on .*train.00000.txt: MemoryError: no room"):
        run_command("binarise", *arguments)
    assert not (tmp_path / "l" / "shard0").exists()


def test_damaged_models_end_with_one_sentence(models, tmp_path):
    """All kinds of damage: bytes flipped everywhere, and inside the letters of a piece."""
    model = models["unigram"].read_bytes()
    rng, refused = random.Random(1), 0
    damaged = [model.replace("é".encode(), b"\xc3("), model.replace("語".encode(), b"\xe8\xaa("), model[:1000], b""]
    for _ in range(200):
        place = rng.randrange(len(model))
        damaged.append(model[:place] + bytes([model[place] ^ 1 << rng.randrange(8)]) + model[place + 1 :])
    for number, content in enumerate(damaged):
        (tmp_path / "m.model").write_bytes(content)
        try:
            binarisation.open_tokenizer(tmp_path / "m.model").encode_lines([b"kato"])
        except CorpusError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert number >= 4  # many a flipped bit is but another score
    assert refused > 20


def test_pieces_that_fairseq_cannot_hold_are_refused(tmp_path):
    for symbols, sentence in ((["<mask>"], "'<mask>' collides"), (["\u0085"], "contains white space")):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d"] * 20),
            model_prefix=str(tmp_path / "m"),
            vocab_size=20,
            hard_vocab_limit=False,
            user_defined_symbols=symbols,
            minloglevel=2,
            num_threads=1,
        )
        with pytest.raises(CorpusError, match=sentence):
            binarisation.open_tokenizer(tmp_path / "m.model")


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_dictionary_is_padded_and_free_of_white_space(models, kind):
    dictionary = Dictionary.load(str(models[kind].with_name("dict.txt")))
    assert (len(dictionary) + 1) % 64 == 0
    assert not any(re.search(r"\s", symbol) for symbol in dictionary.symbols)
    assert dictionary.symbols == SentencePieceVocabulary.open(models[kind]).symbols


def test_presets_are_multiples_of_64_and_known_to_sentencepiece(prepared, tmp_path):
    assert set(PRESETS) == {"albert-30k", "bert-32k", "xlm-250k", "bpe-32k"}
    for name, preset in PRESETS.items():
        assert preset.dictionary_size % 64 == 0
        out = tmp_path / name / "spm.model"
        train_tokenizer([prepared], out, 448, preset.options, threads=1)
        processor = sentencepiece.SentencePieceProcessor(model_file=str(out))
        assert len(Dictionary.load(str(out.with_name("dict.txt")))) + 1 == 448
        if name == "albert-30k":
            assert processor.encode("KATO (9)", out_type=str)[-3:] == ["(", "9", ")"]
            assert processor.encode("KATO") == processor.encode("kato")
        if name == "bpe-32k":
            assert processor.unk_id() not in processor.encode("never seen: Ж\u0085\u00a0\t")


def test_sample_is_seeded_and_of_the_size_asked_for(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_training, "_SAMPLE_BLOCK", 512)
    files = tokenizer_training.text_files([prepared])
    everything = [line for file in files for line in file.read_text().split("\n") if line.strip()]
    whole = list(sampled_lines(files, 10**9, 1))
    assert [re.sub(r"\s", " ", line) for line in everything] == whole
    some = list(sampled_lines(files, 8 * 512, 1))
    assert some == list(sampled_lines(files, 8 * 512, 1)) != list(sampled_lines(files, 8 * 512, 2))
    assert set(some) <= set(whole) and 6 * 512 < sum(len(line.encode()) + 1 for line in some) < 10 * 512


def test_a_tokenizer_is_on_the_disk_when_it_gets_its_name(prepared, tmp_path, named):
    train_tokenizer([prepared], tmp_path / "spm.model", 192, KINDS["unigram"], threads=1)
    assert named == ["dict.txt", "spm.model"]  # recipes go by the model


def test_the_dictionary_of_another_model_is_not_overwritten(prepared, models, tmp_path):
    first, dictionary = tmp_path / "first.model", tmp_path / "dict.txt"
    shutil.copy(models["unigram"], first)
    shutil.copy(models["unigram"].with_name("dict.txt"), dictionary)
    before = dictionary.read_bytes()
    with pytest.raises(FileExistsError, match="dict.txt belongs to first.model: give --out another folder"):
        train_tokenizer([prepared], tmp_path / "second.model", 256, KINDS["unigram"], threads=1)
    assert dictionary.read_bytes() == before and not (tmp_path / "second.model").exists()
    (tmp_path / "no.model").write_bytes(b"something else")
    train_tokenizer([prepared], first, 256, KINDS["unigram"], threads=1)  # its own may be replaced
    assert dictionary.read_text(encoding="utf-8") == SentencePieceVocabulary.open(first).dictionary_text()
    assert dictionary.read_bytes() != before


def test_unfinished_corpus_is_no_input_of_the_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no finished corpus"):
        train_tokenizer([tmp_path], tmp_path / "m.model", 64, {})
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such text file"):
        train_tokenizer([tmp_path], tmp_path / "m.model", 64, {})
