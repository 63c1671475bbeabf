"""How the report becomes pages: the context of all sections, the template, and pandoc and typst."""
