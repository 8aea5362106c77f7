"""T-MASS as an installed package: `from tmass.model import TMASS`, `python -m tmass.train`, and the commands.

The modules are the files of the repository, unchanged; an installed package keeps them in tmass/flat. There
they import each other by bare names (`from model import TMASS`). A program that installs T-MASS may have its
own model.py, so inside this package the bare names mean tmass.model, tmass.data, ...: every import of one of
our modules gets the prefix "tmass." when its file is compiled. Nothing is added to sys.path.
"""

import ast
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType

_HERE = Path(__file__).resolve().parent
_FLAT = _HERE / "flat" if (_HERE / "flat").is_dir() else _HERE.parent  # installed; or a checkout
_OURS = {path.stem for path in _FLAT.glob("*.py")} | {"engine"}
__path__ = [str(_FLAT)]


class _Prefix(ast.NodeTransformer):
    """Puts "tmass." before the names of our modules, in every form of import that they use."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        """`from model import TMASS` becomes `from tmass.model import TMASS`."""
        if not node.level and node.module.split(".")[0] in _OURS:
            node.module = f"tmass.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        """`import data` becomes `import tmass.data as data`."""
        for alias in node.names:
            if alias.name in _OURS:
                alias.name, alias.asname = f"tmass.{alias.name}", alias.asname or alias.name
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        """`importlib.import_module(name)` of our modules is called on our modules only."""
        self.generic_visit(node)
        if ast.unparse(node.func) == "importlib.import_module":
            node.args[0] = ast.BinOp(ast.Constant("tmass."), ast.Add(), node.args[0])
        return node


class _Loader(SourceFileLoader):
    """Compiles a file with the prefix. The cached bytecode beside it is that of the bare names: not used."""

    def get_code(self, fullname: str) -> CodeType:
        """The code of a module, newly compiled."""
        tree = _Prefix().visit(ast.parse(self.get_data(self.path), self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class _Finder:
    """Finds the modules below tmass in `__path__`, and lets _Loader load them."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        """The spec of one of our modules; None for every other name."""
        if not name.startswith("tmass."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder)
