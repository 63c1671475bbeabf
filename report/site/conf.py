"""Sphinx's configuration of the course site; `make site` builds it into ``build/site/``.

The pages are the committed notebooks, a reference from the docstrings of all modules, and the committed
report. ``notebooks/`` is a link to the real ones; nothing is executed. The pages load nothing from a network.
"""

project = "Gradients without backpropagation"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "report.site.pages",
    "report.site.descriptions",
    "report.site.outputs",
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
html_theme_options = {
    "navbar_persistent": [],  # the search is in the sidebar
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system has it
html_static_path = ["style", "../page/sliders.js"]
html_css_files = ["course.css"]
html_js_files = ["course.js", "sliders.js"]
