"""What holds of the source as a whole: which way imports run, what importing starts, and that pages tell the truth."""

import ast
import dataclasses
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from running import REPOSITORY

import jax_sae
from jax_sae.config_tables import config_names

PACKAGE = REPOSITORY / "jax_sae"
PAGES = {path: path.read_text() for path in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"))}
API = PAGES[REPOSITORY / "docs" / "api.md"]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
LAYERS = {
    "errors": 0,
    "card": 0,
    "rows": 1,
    "streams": 0,
    "config": 1,
    "processes": 1,
    "config_tables": 2,
    "precision": 2,
    "language_model": 3,
    "autoencoder": 3,
    "activations": 4,
    "formats": 5,
    "sweep": 5,
    "encode_decode": 6,
    "trained": 7,
    "figures": 6,
    "run": 8,
    "analysis": 9,
    "pages": 10,
    "api": 11,
    "commands": 12,
    "__main__": 13,
}


def imports(path: Path) -> set[str]:
    """The first name below `jax_sae` of every module that a file imports from this package."""
    tree = ast.parse(path.read_text())
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("jax_sae.")}


def files_with(word: str) -> set[str]:
    """Files of the package that hold a word."""
    return {path.relative_to(PACKAGE).as_posix() for path in MODULES if word in path.read_text()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_downwards(path: Path) -> None:
    """A file imports from its own folder and from lower layers; the autoencoder knows no language model."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imports(path) - {own}:
        assert LAYERS[other] < LAYERS[own], f"{path} imports {other}"


def test_orbax_vmap_and_torch_stand_where_they_should() -> None:
    """Orbax in three files; few vmaps; torch in one file, and in what a model card shows; few places that compile."""
    assert files_with("import orbax") == {"run/checkpoints.py", "run/saved_checkpoints.py", "run/slice_handler.py"}
    assert files_with("jax.vmap(") == {"sweep/update.py", "autoencoder/selection.py", "analysis/steering.py"}
    assert files_with("import torch") == {"commands/export_activations.py", "formats/model_card.py"}
    assert files_with("jax.jit") == {
        "activations/blocks.py",
        "analysis/loss_recovered.py",
        "analysis/probes.py",
        "analysis/steering.py",
        "encode_decode.py",
        "language_model/devices.py",
        "language_model/generate.py",
        "language_model/harvest.py",
        "language_model/pretrained.py",
        "pages/lens.py",
        "processes.py",
        "run/held_out.py",
        "run/report.py",
        "sweep/mesh.py",
        "sweep/update.py",
        "trained.py",
    }


def test_importing_starts_no_backend_and_help_needs_no_jax() -> None:
    """With a platform that does not exist, any array made at import time would fail; `import jax_sae` is immediate."""
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in MODULES]
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    environment = {**os.environ, "JAX_PLATFORMS": "none", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    code = "import sys, jax_sae; assert 'numpy' not in sys.modules; "
    code += "import jax_sae.commands.train, jax_sae.config; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_says_its_version_and_what_it_has() -> None:
    """Before any of it is imported."""
    assert jax_sae.__version__ == version("jax_sae")
    assert set(jax_sae.__all__) | {"__version__"} <= set(dir(jax_sae))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jax_sae.nothing


def test_a_page_prints_the_file_tree() -> None:
    """Every file of the package, of configs/ and of scripts/ stands in the tree of docs/house.md."""
    page = (REPOSITORY / "docs" / "house.md").read_text()
    files = [*MODULES, *(REPOSITORY / "configs").iterdir(), *(REPOSITORY / "scripts").glob("*.py")]
    assert [path.name for path in files if f"  {path.name} " not in page] == []


def signature(value: Any) -> str:
    """Of a function, its parameters and defaults without types and self, as docs/api.md gives them; else nothing."""
    if not inspect.isfunction(inspect.unwrap(value)):
        return ""
    parameters = inspect.signature(value).parameters.values()
    shown = [each.replace(annotation=inspect.Parameter.empty) for each in parameters if each.name != "self"]
    return str(inspect.Signature(shown))


def test_a_page_lists_everything_public() -> None:
    """Every name that docs/api.md gives is there, and functions have the parameters that it gives them."""
    listed = dict(re.findall(r"`(jax_sae(?:\.\w+)+)(\([^`]*\))?`", API))
    assert {name.removeprefix("jax_sae.") for name in listed if name.count(".") == 1} == set(jax_sae.__all__)
    assert listed == {name: signature(pkgutil.resolve_name(name)) for name in listed}


@pytest.mark.parametrize("cls", [jax_sae.Run, jax_sae.TrainedAutoencoder, jax_sae.LanguageModel])
def test_a_page_lists_every_public_method_and_attribute(cls: Any) -> None:
    """Under the name of the class, with parameters, in docs/api.md."""
    section = API.split(f"\n## `jax_sae.{cls.__name__}`\n")[1].split("\n## ")[0]
    names = {field.name for field in dataclasses.fields(cls)} | set(vars(cls))
    public = {name: signature(vars(cls).get(name)) for name in names if not name.startswith("_")}
    assert dict(re.findall(r"`\.(\w+)(\([^`]*\))?`", section)) == public


def test_pages_lead_somewhere() -> None:
    """Relative links go to files and headings that are there; the index has every page; examples use what is public."""
    for path, text in PAGES.items():
        prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", prose)
        for file, heading in [*links, *re.findall(r'src(?:set)?="([^"]*)()"', prose)]:
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path.name} links {file}"
            titles = re.findall(r"^#+ (.*)$", PAGES.get(target, ""), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in anchors, f"{path.name} links {file}#{heading}"
        for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax_sae"):
                    for alias in node.names:
                        assert f"`{node.module}.{alias.name}" in API, f"{path.name} imports {alias.name}"
    index = PAGES[REPOSITORY / "docs" / "index.md"]
    others = [path for path in (*PAGES, *REPOSITORY.glob("notebooks/*.ipynb")) if path.name != "index.md"]
    missing = [path.name for path in others if f"]({os.path.relpath(path, REPOSITORY / 'docs')})" not in index]
    assert missing == [], "each page has a line in docs/index.md"


def test_a_wheel_holds_every_package_and_the_configs() -> None:
    """The list in pyproject.toml has each folder with modules or data, and configs/ as `jax_sae.configs`."""
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [*PACKAGE.rglob("*.py"), *(path for path in (PACKAGE / "demo").rglob("*") if path.is_file())]
    folders = {path.parent.relative_to(REPOSITORY).as_posix().replace("/", ".") for path in files}
    assert set(setuptools["packages"]) == folders | {"jax_sae.configs"}
    assert set(config_names().values()) == set((REPOSITORY / "configs").iterdir())
