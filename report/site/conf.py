"""Sphinx's configuration of the course site; `make site` builds it into ``build/site/``.

The pages are the committed notebooks (``notebooks/`` is a link to the real ones, and nothing is executed), an API reference
from the docstrings of whatever modules there are, and the committed report. Nothing is loaded from a network.
"""

project = "Gradients without backpropagation"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "report.site.pages",
    "report.site.descriptions",
]
exclude_patterns = ["notebooks/**/.ipynb_checkpoints", "notebooks/results"]
language = "en"

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # the committed notebooks hold no widgets; the default is a script from a network
myst_enable_extensions = ["dollarmath", "amsmath"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = project
html_copy_source = True  # for the button that downloads a notebook
html_show_copyright = False
html_theme_options = {"use_download_button": True, "use_fullscreen_button": False, "show_toc_level": 2}
