"""What setup.py asks for is what the code imports, and the README names every extra."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Import names that differ from those of the distribution.
DISTRIBUTIONS = {"hydra": "hydra-core", "sklearn": "scikit-learn", "yaml": "PyYAML"}
#: fairseq is installed first and alone; the other two declare requirements that would replace torch, and serve
#: comparisons only (README, "Installation").
BESIDE = {"fairseq", "fairseq_cli", "torchdyn", "torchdeq"}
#: The extras that the files of a folder may need.
EXTRAS = {
    "fairseq_implicit": ["adaptive", "hub", "huggingface", "parquet", "plots", "quality", "tensorboard"],
    "scripts": ["adaptive", "huggingface"],
    "examples/study": ["study"],
    "examples/glue": ["huggingface", "study"],
}


@pytest.fixture(scope="module")
def described():
    """The keywords of setup()."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("setuptools.setup", lambda **keywords: found.update(keywords))
        runpy.run_path("setup.py")
    return found


def names(requirements):
    return {re.split(r"[\[<>=!~; ]", requirement)[0] for requirement in requirements}


def imported(folder):
    """{module: file} of everything that the files of a folder import, but for the standard library and each other."""
    own = {"fairseq_implicit", "scripts"} | {path.stem for path in (ROOT / folder).rglob("*.py")}
    own |= {path.name for path in (ROOT / folder).iterdir() if path.is_dir()}
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            found.update({module.split(".")[0]: path.name for module in modules})
    return {module: file for module, file in found.items() if module not in own | set(sys.stdlib_module_names)}


@pytest.mark.parametrize("folder", EXTRAS)
def test_every_import_is_required_or_in_an_extra(described, folder):
    allowed = names(described["install_requires"])
    for extra in EXTRAS[folder]:
        allowed |= names(described["extras_require"][extra])
    needed = {DISTRIBUTIONS.get(module, module): file for module, file in imported(folder).items()}
    assert {module: file for module, file in needed.items() if module not in allowed | BESIDE} == {}


def test_every_requirement_of_the_package_is_pinned_for_the_checkout(described):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = names(line for line in lines if "==" in line and line[0] != "#")
    asked = names(described["install_requires"]).union(
        *(names(found) for extra, found in described["extras_require"].items() if extra != "quality")
    )
    # PyYAML comes with omegaconf, which pins nothing narrower
    assert asked - pinned == {"PyYAML"}


def test_the_set_up_installs_every_section_of_the_pins():
    sections = re.findall(r"^# --- (\w+):", (ROOT / "requirements.txt").read_text(), re.M)
    script = (ROOT / "scripts/environment.sh").read_text()
    assert len(sections) == 5
    for section in sections:
        assert re.search(rf"^ *watched .* pip_install .*\${section}\b", script, re.M), section


def test_the_annotations_are_packaged(described):
    assert all((ROOT / folder / name).is_file() for folder, [name] in described["package_data"].items())
    assert described["package_data"] == {"fairseq_implicit": ["py.typed"]}


def test_the_readme_names_every_extra(described):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Installation")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(described["extras_require"])
