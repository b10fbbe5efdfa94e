"""The task: data folders, shards, dictionaries, and one sentence for whatever is wrong with them."""

import os
import shutil

import pytest
import torch
from fairseq.data import Dictionary

from fairseq_implicit.data.dictionary import VocabularyDictionary
from fairseq_implicit.data.objectives import OBJECTIVES
from fairseq_implicit.tasks.implicit_masked_lm import ImplicitMaskedLMConfig, ImplicitMaskedLMTask


def setup(data, **options):
    options = {"seed": 1, "tokens_per_sample": 32, **options}
    return ImplicitMaskedLMTask.setup_task(ImplicitMaskedLMConfig(data=str(data), **options))


@pytest.fixture
def folder(toy_data, tmp_path):
    """A copy of the toy data to damage."""
    shutil.copytree(toy_data, tmp_path / "bin")
    return tmp_path / "bin"


def test_mask_is_the_last_symbol(toy_data):
    task = setup(toy_data)
    assert task.mask_idx == len(task.source_dictionary) - 1
    assert len(task.source_dictionary) % 64 == 0


@pytest.mark.parametrize("mode", ["none", "complete", "complete_doc", "eos"])
def test_splits(toy_data, mode):
    task = setup(toy_data, sample_break_mode=mode)
    train, valid = task.load_dataset("train"), task.load_dataset("valid", epoch=1)
    assert not train.fixed and valid.fixed
    assert task.dataset("train") is train
    assert train.sizes.max() <= 32 == task.max_positions()
    assert train[0]["source"].shape == train[0]["target"].shape


def test_masks_of_the_validation(toy_data):
    """Their share may differ from training's; they are the same whatever the seed, and training's are not."""

    def targets(split, **options):
        blocks = setup(toy_data, **options).load_dataset(split)
        return torch.cat([blocks[index]["target"] for index in range(len(blocks))])

    def share(found):
        return found.ne(1).double().mean().item()

    assert share(targets("train", mask_prob=0.4, valid_mask_prob=0.1)) == pytest.approx(0.4, abs=0.04)
    assert share(targets("valid", mask_prob=0.4, valid_mask_prob=0.1)) == pytest.approx(0.1, abs=0.04)
    assert share(targets("valid", mask_prob=0.4)) == pytest.approx(0.4, abs=0.04)
    assert torch.equal(targets("valid", seed=1), targets("valid", seed=2))
    assert not torch.equal(targets("train", seed=1), targets("train", seed=2))


@pytest.mark.parametrize("flag", [dict(mask_whole_words=True), dict(objective="masked-words")])
def test_whole_words_need_beginnings_of_words(toy_data, folder, flag):
    for name, options in (("masked-tokens", {}), ("masked-words", flag)):
        assert type(setup(toy_data, **options).objective) is OBJECTIVES[name]
    (folder / "dict.txt").write_text("piece 1\n")
    (folder / "sentencepiece.bpe.model").unlink()
    said = "--mask-whole-words" if "mask_whole_words" in flag else "--objective masked-words"
    with pytest.raises(ValueError, match=f"^{said}: no symbol of dict.txt begins a word"):
        setup(folder, **flag)


def test_whole_words_of_a_text_without_word_spaces_are_announced(toy_data, folder, caplog):
    setup(toy_data, mask_whole_words=True).load_dataset("train")
    assert "--mask-whole-words" not in caplog.text
    rows = (folder / "dict.txt").read_text().splitlines()
    first = next(row for row in rows if row.startswith("\u2581"))
    rows = [row if row == first else row.replace("\u2581", "_") for row in rows]
    (folder / "dict.txt").write_text("\n".join(rows) + "\n")
    (folder / "sentencepiece.bpe.model").unlink()
    train = setup(folder, mask_whole_words=True).load_dataset("train")
    assert train.objective.pieces_per_word(train.blocks.drawn()) > 4
    assert f"--mask-whole-words: in {folder}/train.bin what stands" in caplog.text
    assert "pieces on average, so the text has no word spaces; spans of 1 to 4 pieces" in caplog.text


def test_shards_take_turns_and_validation_comes_from_the_first(toy_data, folder):
    other = folder.with_name("second")
    os.mkdir(other)
    for suffix in ("bin", "idx"):
        shutil.copy(folder / f"valid.{suffix}", other / f"train.{suffix}")
    task = setup(f"{toy_data}{os.pathsep}{other}")
    assert task.has_sharded_data("train")
    sizes = [len(task.load_dataset("train", epoch=epoch)) for epoch in (1, 2, 3)]
    valid = len(task.load_dataset("valid", epoch=1))
    assert sizes == [sizes[0], valid, sizes[0]] and sizes[0] != valid


def test_batches_cover_every_block_once_and_change_by_epoch(toy_data):
    task = setup(toy_data, sample_break_mode="complete")
    blocks = task.load_dataset("train")
    composed = []
    for epoch in (1, 2):
        iterator = task.get_batch_iterator(blocks, max_tokens=200, max_positions=32, epoch=epoch)
        batches = iterator.frozen_batches
        assert sorted(int(i) for batch in batches for i in batch) == list(range(len(blocks)))
        composed.append({tuple(map(int, batch)) for batch in batches})
    assert composed[0] != composed[1]


def test_never_drops_a_block(toy_data):
    task = setup(toy_data)
    blocks = task.load_dataset("train")
    with pytest.raises(ValueError, match="longer than the 16 tokens .* lower --tokens-per-sample 32"):
        task.get_batch_iterator(blocks, max_tokens=16, max_positions=16, ignore_invalid_inputs=True)


def test_dataset_for_inference(toy_data):
    task = setup(toy_data)
    sequences = [torch.tensor([9, 8, 7, 2]), torch.tensor([5, 2])]
    data = task.build_dataset_for_inference(sequences, [4, 2])
    batch = next(task.get_batch_iterator(data, max_sentences=2).next_epoch_itr(shuffle=False))
    assert batch["net_input"]["src_tokens"].tolist() == [[0, 5, 2, 1, 1], [0, 9, 8, 7, 2]]
    with pytest.raises(ValueError, match="40 tokens"):
        task.build_dataset_for_inference([torch.zeros(39, dtype=torch.int64)], [39])


def test_checkpoint_knows_its_dictionary(toy_data, folder):
    state = setup(toy_data).get_checkpoint_dict()["ImplicitMaskedLMTask"]
    setup(folder).set_checkpoint_dict(state)
    os.remove(folder / "sentencepiece.bpe.model")
    lines = (folder / "dict.txt").read_text(encoding="utf-8").splitlines()
    (folder / "dict.txt").write_text("\n".join([lines[1], lines[0]] + lines[2:]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="trained with another dictionary"):
        setup(folder).set_checkpoint_dict(state)


def test_dictionaries(toy_model, toy_data, tmp_path):
    assert isinstance(ImplicitMaskedLMTask.load_dictionary(toy_model), VocabularyDictionary)
    assert type(ImplicitMaskedLMTask.load_dictionary(f"{toy_data}/dict.txt")) is Dictionary
    with pytest.raises(FileNotFoundError, match="--srcdict"):
        ImplicitMaskedLMTask.load_dictionary(str(tmp_path / "dict.txt"))
    with pytest.raises(ValueError, match="needs --srcdict"):
        ImplicitMaskedLMTask.build_dictionary(["train.txt"])


def test_refuses_missing_folders_and_files(toy_data, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="data folder .*absent does not exist"):
        setup(tmp_path / "absent")
    with pytest.raises(ValueError, match="names an empty folder"):
        setup(f"{toy_data}{os.pathsep}")
    os.remove(folder / "valid.idx")
    os.remove(folder / "valid.bin")
    with pytest.raises(FileNotFoundError, match="no valid.idx: pass --validpref to fairseq-preprocess, or train with"):
        setup(folder).load_dataset("valid")
    os.remove(folder / "dict.txt")
    with pytest.raises(FileNotFoundError, match="has no dict.txt"):
        setup(folder)


@pytest.mark.parametrize("when", ["inside the split", "before it"])
def test_says_that_preprocessing_was_interrupted(folder, when):
    begun, ended = "Namespace(validpref='valid.txt')\n", f"Wrote preprocessed data to {folder}\n"
    os.remove(folder / "valid.idx")
    if when == "before it":
        os.remove(folder / "valid.bin")
        (folder / "preprocess.log").write_text(begun + ended + begun + "[None] Dictionary: 180 types\n")
    with pytest.raises(FileNotFoundError, match="no valid.idx: fairseq-preprocess ended before it had written it"):
        setup(folder).load_dataset("valid")


def test_refuses_a_model_or_shard_of_another_dictionary(toy_data, folder):
    (folder / "dict.txt").write_text("other 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="does not match the dict.txt beside it"):
        setup(folder)
    with pytest.raises(ValueError, match="binarise all shards with one --srcdict"):
        setup(f"{toy_data}{os.pathsep}{folder}")


def test_refuses_a_split_without_tokens(toy_model, toy_data, folder, fairseq_preprocess, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    flags = ["--task", "implicit_masked_lm", "--only-source", "--srcdict", toy_model]
    with pytest.raises(ValueError, match="empty.txt is empty"):
        fairseq_preprocess(*flags, "--trainpref", empty, "--destdir", tmp_path / "out")
    (folder / "train.bin").write_bytes(b"")
    index = (folder / "train.idx").read_bytes()
    (folder / "train.idx").write_bytes(index[:18] + bytes(8))  # the header, and no lines
    with pytest.raises(ValueError, match="holds no tokens"):
        setup(folder).load_dataset("train")


def test_refuses_blank_lines_only(toy_model, fairseq_preprocess, tmp_path):
    blank = tmp_path / "blank.txt"
    blank.write_text("\n\n\n", encoding="utf-8")
    fairseq_preprocess(
        *("--task", "implicit_masked_lm", "--only-source", "--srcdict", toy_model),
        *("--trainpref", blank, "--destdir", tmp_path / "out"),
    )
    with pytest.raises(ValueError, match="holds blank lines only"):
        setup(tmp_path / "out", sample_break_mode="complete_doc").load_dataset("train")


@pytest.mark.parametrize("workers", [1, 2])
def test_refuses_invalid_utf8(toy_model, fairseq_preprocess, tmp_path, workers):
    text = tmp_path / "latin1.txt"
    text.write_bytes(b"the state\n" * 3 + b"caf\xe9 state\n" + b"the state\n" * 3)
    with pytest.raises(ValueError, match=r"latin1.txt is not valid UTF-8 \(byte 33, line 4\)"):
        fairseq_preprocess(
            *("--task", "implicit_masked_lm", "--only-source", "--srcdict", toy_model, "--workers", workers),
            *("--trainpref", text, "--destdir", tmp_path / "out"),
        )


def test_control_characters_and_blank_lines_survive_preprocessing(toy_model, fairseq_preprocess, tmp_path):
    text = tmp_path / "odd.txt"
    text.write_bytes("the\x00state\x85follows\n\nthe\u2028order\n".encode())
    out = tmp_path / "out"
    fairseq_preprocess(
        *("--task", "implicit_masked_lm", "--only-source", "--srcdict", toy_model),
        *("--trainpref", text, "--validpref", text, "--destdir", out),
    )
    blocks = setup(out, sample_break_mode="complete_doc").load_dataset("train")
    assert len(blocks) == 2


@pytest.mark.parametrize(
    "options, flag",
    [
        (dict(tokens_per_sample=1), "--tokens-per-sample"),
        (dict(mask_prob=2.0), "--mask-prob"),
        (dict(valid_mask_prob=0.0), "--valid-mask-prob"),
        (
            dict(objective="masked-verbs"),
            "--objective masked-verbs is unknown: choose one of masked-tokens, ",
        ),
        (dict(objective="masked-spans", mask_whole_words=True), "--mask-whole-words is --objective masked-words, not"),
    ],
)
def test_refuses_impossible_flags(toy_data, options, flag):
    with pytest.raises(ValueError, match=flag):
        setup(toy_data, **options)
