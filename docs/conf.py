"""The site, made by Sphinx: README first, then the notebooks as committed, then the docs. `make site` builds it."""

from pathlib import Path

from pygments.lexers.special import TextLexer

ROOT = Path(__file__).parents[1]

project = "Llama 3.1 70B on two 24 GB GPUs"
html_title = project
extensions = ["myst_nb", "sphinx_copybutton"]

root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "notebooks/[0-9]*_*.ipynb", "docs/**.md"]
# The notes for teachers stand in the workshop's solutions edition. No other folder has pages: Sphinx need not look.
exclude_patterns = ["docs/teachers_notes.md"]
exclude_patterns += [p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in ("docs", "notebooks")]
CONTENTS = """
```{toctree}
:hidden:
:glob:
:caption: Lessons

notebooks/*
```
```{toctree}
:hidden:
:glob:
:caption: Beside the lessons

docs/**
CONTRIBUTING*
```
"""

nb_execution_mode = "off"  # what is shown is what is committed
myst_heading_anchors = 4  # places as code hosts name them, for links like README.md#where-it-runs

html_theme = "furo"
templates_path = []
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_use_index = False
html_show_search_summary = False  # would fetch pages, which a browser forbids to pages read from disk
copybutton_selector = "div.highlight:not(.cell_output *) pre"  # a button that copies: code, not outputs

# `make links` asks every address outside; whether a page has the place named behind its # is not asked.
linkcheck_anchors = False


def setup(app):
    """Give the README its contents at the side, and let Mermaid's text, which code hosts draw, stand as text."""
    app.add_lexer("mermaid", TextLexer)

    def contents(app, name, source):
        if name == root_doc:
            source[0] += CONTENTS

    app.connect("source-read", contents)
