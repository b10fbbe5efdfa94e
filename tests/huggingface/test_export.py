"""Checkpoints as folders of transformers: the same function without fairseq and without this package, and back."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    pipeline,
)

from fairseq_implicit.fields.mixers import MIXERS
from fairseq_implicit.huggingface import CONFIGURATIONS
from fairseq_implicit.huggingface.bundle import bundle
from fairseq_implicit.huggingface.export import read_folder, write_folder
from tests.conftest import ROOT
from tests.huggingface.tiny import SIZES, bert_folder

MODERN = dict(attention_rotary_base=50.0, attention_qk_norm=True, attention_window=2, gated_feed_forward=True,
              no_biases=True)  # fmt: skip
CASES = {
    "rk2": ("ode_bert", dict(ode_scheme="rk2")),
    "post-norm": ("ode_bert", dict(ode_field="post-norm", ode_scheme="euler", segment_types=2)),
    "gated": ("ode_bert", dict(ode_coefficients="gated")),
    "pcformer": ("ode_bert", dict(ode_corrector="pcformer", rk_norm=True, ode_coefficients="ema")),
    "theta": ("ode_bert", dict(ode_scheme="theta", ode_theta=0.5)),
    "adaptive": ("ode_bert", dict(ode_scheme="bosh3", ode_tolerance=1e-2)),
    "embedding": ("neural_ode_bert", dict(ode_tolerance=1e-2)),
    "knots": ("neural_ode_bert", dict(ode_depth_weights="linear", ode_tolerance=0.0)),
    "own maps": ("ode_bert", dict(mixer="disentangled", disentangled_own_maps=True, ode_scheme="rk2")),
    "disentangled knots": (
        *("neural_ode_bert", dict(mixer="disentangled", ode_depth_weights="linear", ode_tolerance=0.0)),
    ),
    "narrow embeddings": ("ode_bert", dict(encoder_embedding_dim=8, ode_tied=True)),
    "modern": (
        "ode_bert",
        dict(**MODERN, attention_global_every=2, attention_local_rotary_base=9.0, no_first_norm=True),
    ),
    "modern-deq": ("deq_bert", MODERN),
    "loop": (
        "ode_bert",
        dict(ode_linear_part="diagonal", ode_scheme="etd2", ode_tied=True, ode_steps=3, ode_random_depth=4.0),
    ),
    "etd4": ("neural_ode_bert", dict(ode_linear_part="diagonal", ode_scheme="etd4", ode_tolerance=0.0)),
    "deq": ("deq_bert", dict()),
    "deq-linear": ("deq_bert", dict(deq_linear_part="diagonal")),
    "deq-injected": ("deq_bert", dict(deq_weight_norm=True, deq_qkv_injection=True)),
    **{mixer: ("ode_bert", dict(mixer=mixer)) for mixer in MIXERS if mixer != "attention"},
}
SENTENCES = ["the implicit solver <mask> the state", "the <mask> tableau", "a stable <mask>er in 12 steps."]


@pytest.fixture(scope="module")
def checkpoints(toy_data, toy_model, tmp_path_factory):
    """Folders of checkpoints of all cases, in fresh weights that are larger than those, beside their vocabulary."""
    from fairseq.data import Dictionary
    from fairseq.models import MODEL_REGISTRY

    import fairseq_implicit.models  # noqa: F401
    from fairseq_implicit.evaluation.checkpoints import write
    from fairseq_implicit.evaluation.folders import checkpoint_of
    from fairseq_implicit.huggingface.export import TrainedModel

    root, folders = tmp_path_factory.mktemp("checkpoints"), {}
    dictionary = Dictionary.load(os.path.join(toy_data, "dict.txt"))
    dictionary.add_symbol("<mask>")
    task = types.SimpleNamespace(source_dictionary=dictionary)
    for number, (case, (family, options)) in enumerate(CASES.items()):
        torch.manual_seed(number)
        kind = MODEL_REGISTRY[family]
        config = kind.config_class()(**SIZES, encoder_init_std=0.1, **options)
        model = kind.build_model(config, task)
        if case == "rk2":
            model.register_classification_head("topics", 3, inner_dim=8)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        if case == "deq":
            model.set_num_updates(70)
        folders[case] = root / case
        folders[case].mkdir()
        shutil.copy(os.path.join(toy_data, "dict.txt"), folders[case])
        shutil.copy(toy_model, folders[case] / "sentencepiece.bpe.model")
        names = {name: getattr(config, name) for name in CONFIGURATIONS[family].options_class.__dataclass_fields__}
        stub = TrainedModel(CONFIGURATIONS[family](vocab_size=len(dictionary), **names), model.state_dict())
        state = checkpoint_of(stub, str(folders[case]))
        state["optimizer_history"][-1]["num_updates"] = 70 if case == "deq" else 0
        state["extra_state"]["val_loss"] = 3.25
        write(state, str(folders[case] / "model.pt"))
    return folders


@pytest.fixture(scope="module")
def hubs(checkpoints):
    from fairseq_implicit.models.bert import ImplicitBertModel

    return {case: ImplicitBertModel.from_pretrained(str(folder)) for case, folder in checkpoints.items()}


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """Folders that the command wrote."""
    from fairseq_implicit.commands import main

    root = tmp_path_factory.mktemp("exported")
    for case, folder in checkpoints.items():
        assert main(["export", str(folder), str(root / case)]) == 0
    assert main(["export", str(checkpoints["rk2"]), str(root / "plain"), "--no-bundle"]) == 0
    return root


@pytest.fixture(scope="module")
def inputs(hubs):
    """A padded batch of sentences."""
    return hubs["rk2"].encode(["the implicit solver bounds the state", "the tableau", "a stable encoder"])


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_fairseqs_to_the_last_bit(case, exported, hubs, inputs):
    model = AutoModelForMaskedLM.from_pretrained(exported / case)
    with torch.no_grad():
        expected, _ = hubs[case].model(inputs)
        assert torch.equal(model(inputs, attention_mask=inputs.ne(1)).logits, expected)
        assert torch.equal(model(inputs).logits, expected)


ALONE = """
import sys
for absent in ("fairseq", "fairseq_cli", "fairseq_implicit", "hydra", "omegaconf", "torchdyn", "torchdiffeq",
               "sentencepiece"):
    sys.modules[absent] = None
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers import pipeline
root, cases, saved = sys.argv[1], sys.argv[2].split(","), sys.argv[3]
inputs, found = torch.load(f"{saved}/inputs.pt"), {}
for case in cases:
    model = AutoModelForMaskedLM.from_pretrained(f"{root}/{case}", trust_remote_code=True)
    with torch.no_grad():
        found[case] = model(inputs, attention_mask=inputs.ne(1)).logits
model = AutoModelForMaskedLM.from_pretrained(f"{root}/deq", trust_remote_code=True)
model.save_pretrained(f"{saved}/again")
again = AutoModelForMaskedLM.from_pretrained(f"{saved}/again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(inputs).logits, found["deq"])
assert "DepthCallback" in type(model.trainer_callback()).__name__ and model.num_updates == 70
tokens = AutoModelForTokenClassification.from_pretrained(f"{root}/deq", trust_remote_code=True, num_labels=4)
assert tokens(inputs).logits.shape[-1] == 4
topics = AutoModelForSequenceClassification.from_pretrained(f"{root}/rk2", trust_remote_code=True)
with torch.no_grad():
    found["topics"] = topics(inputs).logits
fill = pipeline("fill-mask", model=f"{root}/rk2", trust_remote_code=True)
found["filled"] = fill("the <mask> tableau", top_k=3)
torch.save(found, f"{saved}/found.pt")
"""


@pytest.fixture(scope="module")
def alone(exported, inputs, tmp_path_factory):
    """What a process finds in the folders that has transformers and nothing of ours."""
    saved = tmp_path_factory.mktemp("alone")
    torch.save(inputs, saved / "inputs.pt")
    code = [sys.executable, "-W", "ignore", "-c", ALONE, str(exported), ",".join(CASES), str(saved)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(saved / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(code, capture_output=True, text=True, cwd=saved, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(saved / "found.pt"), saved / "again"


@pytest.mark.parametrize("case", CASES)
def test_a_bundled_folder_needs_neither_fairseq_nor_this_package(case, alone, hubs, inputs):
    found, _ = alone
    with torch.no_grad():
        assert torch.equal(found[case], hubs[case].model(inputs)[0])


def test_a_bundled_model_that_is_saved_anew_carries_its_code(alone):
    _, folder = alone
    assert {path.name for path in folder.glob("*.py")} == set(bundle(CONFIGURATIONS["deq_bert"]))
    assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForMaskedLM"].endswith("ForMaskedLM")


def test_a_bundle_holds_what_its_family_imports_and_no_more():
    modules = {family: set(bundle(config)) for family, config in CONFIGURATIONS.items()}
    assert all({"huggingface_callback.py", "layout.py"} <= files for files in modules.values())
    assert all(f"families_{family}.py" in files for family, files in modules.items())
    common, everything = set.intersection(*modules.values()), set().union(*modules.values())
    assert all(len(files - common) < 0.7 * len(everything - common) for files in modules.values())
    assert "depth_equilibrium.py" in modules["deq_bert"] and "depth_equilibrium.py" not in modules["ode_bert"]
    assert "depth_stack.py" in modules["ode_bert"] and "depth_stack.py" not in modules["neural_ode_bert"]
    for config in CONFIGURATIONS.values():
        assert not any("from fairseq_implicit" in text for text in bundle(config).values())


def test_the_folder_without_code_has_none(exported):
    assert not list((exported / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((exported / "plain" / "config.json").read_text())


def test_it_opens_with_this_package_where_there_is_no_fairseq(exported, hubs, inputs, tmp_path):
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys
for absent in ("fairseq", "fairseq_cli", "hydra", "omegaconf"):
    sys.modules[absent] = None
import torch
import fairseq_implicit.huggingface
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(f"{sys.argv[2]}/inputs.pt")).logits, f"{sys.argv[2]}/logits.pt")
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(exported / "plain"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), hubs["rk2"].model(inputs)[0])


def test_a_classification_head_goes_along(exported, hubs, inputs, alone):
    model = AutoModelForSequenceClassification.from_pretrained(exported / "rk2")
    with torch.no_grad():
        expected = hubs["rk2"].predict("topics", inputs, return_logits=True)
        assert torch.equal(model(inputs).logits, expected) and torch.equal(alone[0]["topics"], expected)
    assert type(model).__name__ == model.config.architectures[0] and model.config.num_labels == 3


@pytest.mark.parametrize("case", ["rk2", "deq"])
def test_masks_are_filled_as_the_hub_fills_them(case, exported, hubs, alone):
    fill = pipeline(
        "fill-mask", model=AutoModelForMaskedLM.from_pretrained(exported / case), tokenizer=str(exported / case)
    )
    hub = hubs[case]
    for sentence in SENTENCES:
        for ours, theirs in zip(hub.fill_mask(sentence, topk=5), fill(sentence, top_k=5), strict=True):
            assert hub.vocabulary.surface(hub.dictionary[theirs["token"]]) == ours.token
            assert theirs["score"] == pytest.approx(ours.probability, rel=1e-5)
    if case == "rk2":
        filled = [one["token"] for one in alone[0]["filled"]]
        assert filled == [one["token"] for one in fill("the <mask> tableau", top_k=3)]


def test_the_tied_matrix_is_there_once_and_the_count_of_updates_too(exported):
    weights = load_file(exported / "deq" / "model.safetensors")
    assert "model.encoder.lm_head.weight" not in weights and "model.encoder.embed_tokens.weight" in weights
    assert int(weights["model.encoder.depth.updates.earlier"]) == 70


def test_the_model_card_tells_scheme_cost_and_training(exported):
    card = (exported / "rk2" / "README.md").read_text()
    head = card.split("---")[1]
    assert "library_name: transformers" in head and "pipeline_tag: text-classification" in head
    for words in (
        "| ode_scheme | rk2 |",
        "| encoder_layers | 2 |",
        "forward pass | 4 ",
        "| Updates | 0 |",
        "trust_remote",
    ):
        assert words in card
    assert "trust_remote" not in (exported / "plain" / "README.md").read_text()
    assert "fill-mask" in (exported / "deq" / "README.md").read_text()


@pytest.mark.parametrize("case", ["rk2", "post-norm", "pcformer", "knots", "deq-injected", "deq"])
def test_there_and_back_the_weights_are_the_same(case, exported, hubs, inputs, checkpoints, tmp_path, command):
    from fairseq_implicit.models.bert import ImplicitBertModel

    status, output, errors = command("import", exported / case, tmp_path / "back")
    assert status == 0, errors
    back = ImplicitBertModel.from_pretrained(str(tmp_path / "back"))
    first, second = (hub.model.state_dict() for hub in (hubs[case], back))
    assert first.keys() == second.keys()
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    # The updates of the first life are those of an earlier one now.
    assert moved == ({"encoder.depth.updates.earlier"} if case == "deq" else set())
    depths = [hub.model.encoder.depth for hub in (hubs[case], back)]
    assert depths[0].updates_seen == depths[1].updates_seen == (70 if case == "deq" else 0)
    for name in ("dict.txt", "sentencepiece.bpe.model"):
        assert (tmp_path / "back" / name).read_bytes() == (checkpoints[case] / name).read_bytes()
    assert back.fill_mask(SENTENCES[0]) == hubs[case].fill_mask(SENTENCES[0])
    with torch.no_grad():
        assert torch.equal(back.model(inputs)[0], hubs[case].model(inputs)[0])


def test_what_transformers_saved_comes_back_too(exported, hubs, inputs, tmp_path, command):
    from fairseq_implicit.models.bert import ImplicitBertModel

    AutoModelForMaskedLM.from_pretrained(exported / "gated").save_pretrained(tmp_path / "saved")
    status, _, errors = command("import", tmp_path / "saved", tmp_path / "back")
    assert status == 1 and "tokenizer" in errors
    AutoTokenizer.from_pretrained(exported / "gated").save_pretrained(tmp_path / "saved")
    status, _, errors = command("import", tmp_path / "saved", tmp_path / "back")
    assert status == 0, errors
    back = ImplicitBertModel.from_pretrained(str(tmp_path / "back"))  # with tokenizer.json in sentencepiece's place
    with torch.no_grad():
        assert torch.equal(back.model(inputs)[0], hubs["gated"].model(inputs)[0])
    filled = [one.token for one in hubs["gated"].fill_mask(SENTENCES[0])]
    assert [one.token for one in back.fill_mask(SENTENCES[0])] == filled
    status, _, errors = command("export", tmp_path / "back", tmp_path / "forth")
    assert status == 0, errors
    fill = pipeline("fill-mask", model=str(tmp_path / "forth"), trust_remote_code=True)
    ids = [one["token"] for one in fill(SENTENCES[0], top_k=5)]
    assert [back.vocabulary.surface(back.dictionary[index]) for index in ids] == filled


def test_pushing_to_the_hub_sends_the_model(exported, monkeypatch):
    from transformers.utils import hub

    class Recorder:
        """Stands for the service, which no test asks."""

        sent = []

        def create_repo(self, name, **kwargs):
            return types.SimpleNamespace(repo_id=name)

        def create_commit(self, repo_id, operations, **kwargs):
            self.sent += [operation.path_in_repo for operation in operations]

    monkeypatch.setattr(hub, "hf_api", Recorder)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: types.SimpleNamespace(save=print))
    AutoModelForMaskedLM.from_pretrained(exported / "deq").push_to_hub("someone/deq")
    assert {"config.json", "model.safetensors"} <= set(Recorder.sent)


@pytest.mark.parametrize("case, kind", [("gated", AutoModel), ("rk2", AutoModelForSequenceClassification)])
def test_a_model_without_a_masked_lm_head_gets_an_untrained_one(case, kind, exported, hubs, inputs, tmp_path, command):
    """As a classifier has been trained by Trainer, say."""
    from fairseq_implicit.models.bert import ImplicitBertModel

    kind.from_pretrained(exported / case).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(exported / case).save_pretrained(tmp_path / "saved")
    status, output, errors = command("import", tmp_path / "saved", tmp_path / "back")
    assert status == 0, errors
    assert "no head of masked tokens" in output and "untrained" in output
    back, hub = ImplicitBertModel.from_pretrained(str(tmp_path / "back")), hubs[case]
    with torch.no_grad():
        assert torch.equal(back.extract_features(inputs), hub.extract_features(inputs))
        if case == "rk2":
            assert torch.equal(back.predict("topics", inputs), hub.predict("topics", inputs))
    # And out again without what nobody trained, unless it has no other head.
    status, _, errors = command("export", tmp_path / "back", tmp_path / "forth")
    assert status == 0, errors
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "forth"))
    assert {name if case == "rk2" else f"model.{name}" for name in before} == set(after)


def test_other_heads_are_no_fairseq_models(exported, tmp_path, command):
    AutoModelForTokenClassification.from_pretrained(exported / "gated").save_pretrained(tmp_path / "saved")
    status, _, errors = command("import", tmp_path / "saved", tmp_path / "back")
    assert status == 1 and "saved: score" in errors and not (tmp_path / "back").exists()


def test_a_damaged_dictionary_is_said(checkpoints, tmp_path, command):
    folder = tmp_path / "folder"
    shutil.copytree(checkpoints["gated"], folder)
    (folder / "dict.txt").write_bytes(b"\x00\xffnonsense\n" * 9)
    status, _, errors = command("export", folder, tmp_path / "out")
    assert status == 1 and "dict.txt is no dictionary or damaged" in errors


def test_the_heads_that_stay_behind_are_named(checkpoints, tmp_path, command):
    from fairseq_implicit.evaluation.checkpoints import stored, write

    folder = tmp_path / "two"
    shutil.copytree(checkpoints["rk2"], folder)
    state = stored(str(folder / "model.pt"))
    heads = {name: weight for name, weight in state["model"].items() if name.startswith("classification_heads.topics")}
    state["model"].update({name.replace("topics", "moods"): weight.clone() for name, weight in heads.items()})
    write(state, str(folder / "model.pt"))
    status, _, errors = command("export", folder, tmp_path / "out")
    assert status == 1 and "choose it with --head" in errors
    status, output, _ = command("export", folder, tmp_path / "out", "--head", "moods")
    assert status == 0 and "left out: the classification heads topics" in output


@pytest.mark.parametrize("way", ["export", "import", "convert", "convert --to"])
def test_what_fails_half_way_leaves_nothing(way, checkpoints, exported, tmp_path, command, monkeypatch):
    """As a full disk or Ctrl-C ends it."""
    from fairseq_implicit.commands import transformers_folder
    from fairseq_implicit.huggingface import export

    module = export if way == "export" else transformers_folder
    imported = importlib.import_module("fairseq_implicit.commands.import")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    source = {"export": checkpoints["gated"], "import": exported / "gated"}.get(way)
    arguments = [way, source, tmp_path / "out"]
    if source is None:
        bert_folder(tmp_path / "bert")
        arguments = ["convert", tmp_path / "bert", tmp_path / "out"]
        if way == "convert --to":
            assert command(*arguments)[0] == 0
            arguments = ["convert", tmp_path / "out" / "model.pt", tmp_path / "back", "--to", "bert"]
    before = sorted(path.name for path in tmp_path.iterdir())
    for failure, status, words in ((full, 1, "No space left"), (interrupted, 130, "interrupted")):
        monkeypatch.setattr(module, "write_weights", failure)
        monkeypatch.setattr(transformers_folder.checkpoints, "write", failure)
        monkeypatch.setattr(imported, "write", failure)
        found, _, errors = command(*arguments)
        assert found == status and words in errors, errors
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "name, contents, words",
    [
        ("model.safetensors", lambda old: old[:200], "cannot be read"),
        ("model.safetensors", lambda old: b"", "cannot be read"),
        ("model.safetensors", None, "there is no model.safetensors"),
        ("config.json", lambda old: old[:40], "config.json is damaged"),
        ("config.json", lambda old: b"[]", "config.json is damaged"),
        ("config.json", lambda old: old.replace(b'"ode_bert"', b'"gpt2"'), "of the type 'gpt2'"),
        ("config.json", lambda old: old.replace(b'"vocab_size": ', b'"vocab_size": 1'), "embed_tokens.weight"),
        ("config.json", lambda old: old.replace(b'"gated"', b'"no"'), "ode_coefficients"),
        ("tokenizer.json", lambda old: old[:100], "tokenizer.json"),
        ("dict.txt", lambda old: old[: len(old) // 2], "dict.txt"),
        ("dict.txt", lambda old: b"\xff\x00" + old, "dict.txt is damaged"),
        ("dict.txt", lambda old: b"x" + old, "in tokenizer.json, and 4 in dict.txt"),
        ("sentencepiece.bpe.model", lambda old: old[: len(old) // 2], "sentencepiece.bpe.model: this is no"),
    ],
)
def test_damaged_folders_end_in_a_sentence(name, contents, words, exported, tmp_path, command):
    folder = tmp_path / "folder"
    shutil.copytree(exported / "gated", folder)
    if contents is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(contents((folder / name).read_bytes()))
    status, _, errors = command("import", folder, tmp_path / "back")
    assert status == 1 and words in errors and len(errors.strip().splitlines()) == 1, errors
    assert not (tmp_path / "back").exists()


def test_weights_of_another_configuration_are_not_written(exported, tmp_path):
    model = read_folder(exported / "gated")
    model.config.encoder_layers = 3
    with pytest.raises(ValueError, match=r"combinations\.2.*shape None"):
        write_folder(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["export", "{checkpoints}/nowhere", "{out}"], 1, ["no checkpoint", "nowhere"]),
        (["export", "{checkpoints}/rk2", "{checkpoints}/deq"], 2, ["exists"]),
        (["export", "{checkpoints}/rk2", "{out}", "--head", "other"], 1, ["no classification head 'other'", "topics"]),
        (["import", "{checkpoints}/rk2", "{out}"], 1, ["no config.json"]),
        (["import", "{exported}/rk2", "{checkpoints}/deq"], 2, ["exists"]),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(arguments, status, words, checkpoints, exported, tmp_path, command):
    places = dict(checkpoints=checkpoints["rk2"].parent, exported=exported, out=tmp_path / "out")
    found, _, errors = command(*(part.format(**places) for part in arguments))
    assert found == status and all(word in errors for word in words), errors
    assert not (tmp_path / "out").exists() and not Path(f"{tmp_path}/out.part").exists()


def test_the_snippet_of_the_front_page_runs_as_it_stands(exported, tmp_path, monkeypatch):
    """With an exported model and a BERT in the folders that it names."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## From and to transformers")[1]
    (snippet,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    (tmp_path / "my-bert").symlink_to(exported / "gated")
    tokenizer = AutoTokenizer.from_pretrained(exported / "rk2")
    tokenizer.save_pretrained(tmp_path / "bert")
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    BertModel(BertConfig(**shape, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet, "README", "exec"), names)
    assert type(names["encoder"]) is BertModel and names["model"].config.num_labels == 2
