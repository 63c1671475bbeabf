"""The files of fwdlib that a notebook's code can reach, found by reading imports without running anything.

It follows imports inside functions too, because they may run. Where the text does not tell what is used, it takes more
files rather than fewer: a needless new run costs minutes, and a stale result costs trust.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from fwdlib.runs.parameters import without_magics

NAME = "fwdlib"


class Package:
    """The source files of fwdlib, each read once.

    Args:
        folder: that holds its ``__init__.py``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._uses: dict[Path, set[Path]] = {}
        self._public = _public_names(_tree(folder / "__init__.py"))

    def all_files(self) -> set[Path]:
        """Return every file that a result can depend on."""
        return {path for pattern in ("*.py", "*.mplstyle") for path in self.folder.rglob(pattern)}

    def files_of(self, code: str) -> set[Path]:
        """Return the files that ``code`` can reach; all of them if it is no Python.

        Args:
            code: of a notebook, the cells one after the other. Lines of IPython (``%pip``, ``!ls``) are skipped.
        """
        try:
            tree = ast.parse(without_magics(code))
        except SyntaxError:
            return self.all_files()
        found: set[Path] = set()
        waiting = self._used_by(tree, self.folder)
        while waiting:
            path = waiting.pop()
            found.add(path)
            if path not in self._uses:
                self._uses[path] = self._used_by(_tree(path), path.parent) if path.suffix == ".py" else set()
            waiting |= self._uses[path] - found
        return found

    def _used_by(self, tree: ast.Module, folder: Path) -> set[Path]:
        """Return the files that a module in ``folder`` uses directly."""
        nodes = list(_run_time_nodes(tree))
        used = {path for node in nodes for name in _imported(node) for path in self._files_named(name)}
        for text in _texts(nodes):  # "fwdlib.bench.memory", for `python -m`; "fwdlib.mplstyle"
            used |= self._files_named(text) if text.startswith(f"{NAME}.") else set()
            used |= {folder / text} if text.endswith(".mplstyle") and (folder / text).is_file() else set()
        names, is_whole = _attributes(nodes)
        used |= {path for name in (self._public if is_whole else names) for path in self._files_named(f"{NAME}.{name}")}
        return used

    def _files_named(self, name: str) -> set[Path]:
        """Return the files that a dotted name of the project imports, those of the packages around it included."""
        package, *parts = name.split(".")
        if package != NAME:
            return set()
        if parts == ["*"]:
            return {path for public in self._public for path in self._files_named(f"{NAME}.{public}")}
        if parts and (module := self._public.get(parts[0], parts[0])) != parts[0]:
            return self._files_named(f"{NAME}.{module}")
        found, place = {self.folder / "__init__.py"}, self.folder
        for part in parts:
            if (place / f"{part}.py").is_file():
                return found | {place / f"{part}.py"}
            place /= part
            if not (place / "__init__.py").is_file():  # the name of something in a module
                break
            found.add(place / "__init__.py")
        return found


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _public_names(tree: ast.Module) -> dict[str, str]:
    """Return the module of each name that the package offers lazily, from the dictionaries in its ``__init__.py``.

    A dictionary is of the form ``{"name": "module"}`` or ``{"module": ("name", ...)}``.
    """
    public: dict[str, str] = {}
    for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
        for key, value in zip(table.keys, table.values, strict=True):
            match key, value:
                case ast.Constant(str(name)), ast.Constant(str(module)):
                    public[name] = module.removeprefix(f"{NAME}.").strip(".")
                case ast.Constant(str(module)), ast.Tuple(names) | ast.List(names) | ast.Set(names):
                    texts = [each.value for each in names if isinstance(each, ast.Constant)]
                    public |= dict.fromkeys(texts, module.removeprefix(f"{NAME}.").strip("."))
    return public


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk through a tree, except for the blocks under ``if TYPE_CHECKING``, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield other
                yield from _run_time_nodes(other)
            continue
        yield node
        yield from _run_time_nodes(node)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def _texts(nodes: list[ast.AST]) -> set[str]:
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _attributes(nodes: list[ast.AST]) -> tuple[set[str], bool]:
    """Return the names that code takes from the package itself, and whether it hands the package on as a whole."""
    aliases = {
        alias.asname or NAME
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if (alias.name == NAME) or (alias.name.startswith(f"{NAME}.") and not alias.asname)
    }
    chains = [_chain(node) for node in nodes if isinstance(node, ast.Attribute)]
    found = {".".join(chain[1:]) for chain in chains if chain and chain[0] in aliases}
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    whole = [node for node in nodes if isinstance(node, ast.Name) and node.id in aliases and id(node) not in inner]
    return found, bool(whole)


def _chain(node: ast.AST) -> list[str]:
    """Return the parts of ``a.b.c``; nothing if it starts with something other than a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (start := _chain(node.value)):
        return [*start, node.attr]
    return []
