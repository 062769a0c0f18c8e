"""The documentation's site: `pip install -e '.[docs]' && sphinx-build -W --keep-going -c docs . build/site`.

Sphinx reads the repository from its root, so that the links from page to page are the ones that hold in the repository:
docs/, README.md, the changelog and the notebooks are pages of one site. `site_pages.py` makes what they do not say.
"""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

import jax_sae

sys.path.insert(0, str(Path(__file__).parent))
import site_pages

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "jax_sae"
version = release = jax_sae.__version__
root_doc = "docs/index"
include_patterns = ["docs/*.md", "*.md", "notebooks/*.ipynb"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

nb_execution_mode = "off"  # notebooks are shown as they were run
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4  # as a repository's pages have them
suppress_warnings = ["myst.header"]

autodoc_typehints = "none"  # they stand in the signatures of the source; docstrings say shapes
autodoc_preserve_defaults = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = "jax_sae"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_math_renderer = "drawn"
html_theme_options = {"navigation_with_keys": True}


def page_read(app: Sphinx, page: str, source: list[str]) -> None:
    """Put in what is made of the index, of the settings and of the docstrings."""
    source[0] = site_pages.with_markdown_pictures(source[0])
    if page == "docs/index":
        source[0] = site_pages.with_navigation(source[0])
    if page == "docs/api":
        source[0] = site_pages.with_links_to_docstrings(source[0])
    if page == "docs/settings":
        source[0] = source[0].replace("<!-- settings -->", site_pages.settings_tables())
    if page == "docs/reference":
        source[0] = source[0].replace("<!-- docstrings -->", site_pages.docstrings((HERE / "api.md").read_text()))


def read_anew(app: Sphinx, *changes: Any) -> list[str]:
    """Pages that may change though their files do not."""
    return ["docs/index", "docs/api", "docs/reference", "docs/settings"]


def pictures_have_two_looks(app: Sphinx, tree: nodes.document) -> None:
    """Beside each picture that has a dark variant, that one, of which a page shows what fits it."""
    folder = ROOT / Path(app.env.docname).parent
    for image in list(tree.findall(nodes.image)):
        dark = site_pages.dark_variant(folder / image["uri"]) if "://" not in image["uri"] else None
        if dark:
            other = image.deepcopy()
            other["uri"] = str(Path(image["uri"]).with_name(dark.name))
            image["classes"].append("only-light")
            other["classes"].append("only-dark")
            image.parent.insert(image.parent.index(image) + 1, other)


def docstring_read(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Docstrings here are plain text, in which a bar is the bar of |x|."""
    lines[:] = site_pages.plain_rst(lines)


def inline_math(translator: Any, node: nodes.math) -> None:
    """A formula in a line, as a drawing."""
    translator.body.append(site_pages.drawn_formula(node.astext()))
    raise nodes.SkipNode


def display_math(translator: Any, node: nodes.math_block) -> None:
    """A formula of its own."""
    formula = " ".join(node.astext().split())
    translator.body.append(f'<div class="formula">{site_pages.drawn_formula(formula)}</div>')
    raise nodes.SkipNode


def front_door(app: Sphinx, error: Exception | None) -> None:
    """The site begins at its index, which is a page of docs/."""
    if error is None and app.builder.name == "html":
        to = "docs/index.html"
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={to}"><a href="{to}">{project}</a>\n'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx of what stands above."""
    app.connect("env-get-outdated", read_anew)
    app.connect("source-read", page_read)
    app.connect("doctree-read", pictures_have_two_looks, priority=400)  # before Sphinx gathers the files of pictures
    app.connect("autodoc-process-docstring", docstring_read, priority=400)  # before Napoleon makes fields of sections
    app.connect("build-finished", front_door)
    app.add_html_math_renderer("drawn", (inline_math, None), (display_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
