"""The documentation site: `make docs` builds it without a network, and any warning fails."""

import importlib
import os
import shutil
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import pnorm_decay

project = "pnorm-decay"
author = "The pnorm-decay authors"
release = pnorm_decay.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]

PUBLIC = [  # every name in their __all__ is in the reference
    "pnorm_decay",
    "pnorm_decay.baselines",
    "pnorm_decay.data",
    "pnorm_decay.decay",
    "pnorm_decay.deploy",
    "pnorm_decay.models",
    "pnorm_decay.optim",
    "pnorm_decay.records",
    "pnorm_decay.sparsity",
    "pnorm_decay.training",
]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"  # what browsers draw themselves; MathJax would come from the network
html_show_copyright = False
pygments_style = "friendly"
highlight_language = "none"  # of the equations in docstrings

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = True
nb_execution_mode = os.environ.get("NOTEBOOKS", "cache")  # off: what the files hold
nb_execution_timeout = 600
nb_merge_streams = True
nb_execution_raise_on_error = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # it would come from the network

default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_use_rtype = False


def math(node: nodes.math | nodes.math_block, **options: Any) -> str:
    """A formula as MathML, in which the bars of |w| do not stand apart."""
    formula = tex2mathml(node.astext(), **options)
    return formula.replace('<mo stretchy="false">|', '<mo lspace="0" rspace="0" stretchy="false">|')


def inline_math(writer: Any, node: nodes.math) -> None:
    """Writes a formula within a line."""
    writer.body.append(math(node))
    raise nodes.SkipNode


def display_math(writer: Any, node: nodes.math_block) -> None:
    """Writes a formula on a line of its own."""
    writer.body.append(f'<div class="math">{math(node, as_block=True)}</div>')
    raise nodes.SkipNode


def check_reference(app: Sphinx, env: Any) -> None:
    """Warns of every public name that the reference lacks."""
    documented = {name for name, *_ in env.get_domain("py").get_objects()}
    modules = [importlib.import_module(name) for name in PUBLIC]
    for module in modules:
        for name in module.__all__:
            thing = getattr(module, name)
            holders = [m.__name__ for m in modules if getattr(m, name, None) is thing]
            if documented.isdisjoint(f"{holder}.{name}" for holder in holders):
                message = "%s.%s is not in the reference"
                logging.getLogger(__name__).warning(message, module.__name__, name)


def copy_notebooks(app: Sphinx, config: Any) -> None:
    """Brings the notebooks into this folder, without which Sphinx does not find them."""
    shutil.rmtree(app.srcdir / "notebooks", ignore_errors=True)
    shutil.copytree(app.srcdir.parent / "notebooks", app.srcdir / "notebooks")


def adapt_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turns links that are right in the repository into links to the copies."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def setup(app: Sphinx) -> None:
    """Registers what stands above with Sphinx."""
    app.connect("config-inited", copy_notebooks)
    app.connect("source-read", adapt_links)
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("env-check-consistency", check_reference)
