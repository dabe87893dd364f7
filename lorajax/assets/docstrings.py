"""The docstrings of installed packages: collected by importing them, cleaned, and rid of repetitions."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

STANDARD_LIBRARY = "python"

# Modules that are tests, that do something when imported (antigravity opens a browser), or whose text is not
# under their package's own licence (https://docs.python.org/3/license.html, and vendored packages).
_SKIPPED = re.compile(
    r"(^|\.)(tests?|testing|conftest|\w+_tests?|examples?|externals|extern|_\w+|setup"
    r"|antigravity|this|idlelib|lib2to3|turtledemo|tkinter|turtle|ensurepip|pydoc_data"
    r"|asynchat|asyncore|trace|uu|xmlrpc|http\.cookies|posix|posixpath|nt|ntpath|genericpath)(\.|$)"
)
_OTHER_HOMES = {"os": {"posix", "posixpath", "genericpath"}}
# Lines that scipy makes when it is imported, with random numbers and in the order of a set.
_UNSTABLE = re.compile(r"# may vary|Use of argument\(s\) ``\{")
_FIELDS = re.compile(r"[A-Z]\w*\(\w+: ")  # a dataclass under another name
_SHORTEST = 40  # characters


@dataclass(frozen=True)
class Docstring:
    """What one object of a package says about itself.

    Attributes:
        name: the full name, such as numpy.linalg.norm; builtins have no prefix.
        kind: module, class, function, method, attribute or topic.
        signature: the arguments in parentheses, without types; empty where there is none.
        text: the cleaned docstring.
    """

    name: str
    kind: str
    signature: str
    text: str

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def heading(self) -> str:
        """The signature as a line of its own; empty where the text begins with one."""
        if not self.signature or self.text.startswith(f"{self.short_name}("):
            return ""
        return self.short_name + self.signature


class _Found(NamedTuple):
    """An object with a docstring; is_inherited: it belongs to another class than the name says."""

    name: str
    kind: str
    value: Any
    text: str
    is_inherited: bool


def collect(package: str) -> list[Docstring]:
    """Every public docstring of a package once, under its shortest name, in the names' order.

    A method is named after the class that defines it, unless that class has a longer name.

    Args:
        package: an installed package, or "python" for the standard library.

    Raises:
        ImportError: the package is not installed.
    """
    roots = [package]
    if package == STANDARD_LIBRARY:
        roots = ["builtins", "os.path", *sorted(sys.stdlib_module_names)]
    else:
        importlib.import_module(package)
    everything = [found for root in roots for found in _walk(root)]
    everything.sort(key=lambda found: (found.name.count("."), found.is_inherited, found.name))
    unique: dict[str, _Found] = {}
    for found in everything:
        unique.setdefault(" ".join(found.text.split()), found)
    docstrings = [
        Docstring(found.name, found.kind, _signature(found.value), found.text) for found in unique.values()
    ]
    if package == STANDARD_LIBRARY:
        docstrings += _topics()
    return sorted(docstrings, key=lambda docstring: docstring.name)


@functools.cache
def clean(text: str) -> str:
    """A docstring without indentation, trailing blanks, tabs, surplus empty lines, and unstable lines."""
    lines = [line.rstrip() for line in inspect.cleandoc(text).splitlines() if not _UNSTABLE.search(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def is_useful(name: str, text: str) -> bool:
    """False for what is too short, made by a machine (dataclasses, named tuples), or in another alphabet."""
    short = name.rpartition(".")[2]
    is_generated = "\n" not in text and (
        text.startswith((f"{short}(", "Alias for field number")) or _FIELDS.match(text) is not None
    )
    ascii_share = sum(character.isascii() for character in text) / max(len(text), 1)
    return len(text) >= _SHORTEST and not is_generated and ascii_share > 0.97


def deduplicate(docstrings: Iterable[Docstring], *, largest_share: float = 0.7) -> list[Docstring]:
    """Leave out docstrings that mostly repeat lines of earlier ones.

    Args:
        docstrings: in order of preference.
        largest_share: of the characters in long lines that may have been seen before.
    """
    seen: set[str] = set()
    kept = []
    for docstring in docstrings:
        lines = _long_lines(docstring.text)
        repeated = sum(len(line) for line in lines if line in seen)
        if not lines or repeated <= largest_share * sum(map(len, lines)):
            kept.append(docstring)
            seen.update(lines)
    return kept


def without_shared(docstrings: Iterable[Docstring], held_out: Sequence[Docstring]) -> list[Docstring]:
    """Leave out docstrings that have a paragraph of at least 100 characters in common with held-out ones."""

    def paragraphs(docstring: Docstring) -> set[str]:
        parts = (" ".join(part.split()) for part in docstring.text.split("\n\n"))
        return {part for part in parts if len(part) >= 100}

    secret = set().union(*map(paragraphs, held_out))
    return [docstring for docstring in docstrings if not paragraphs(docstring) & secret]


def _long_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]


def _topics() -> Iterator[Docstring]:
    """The language reference, as `help("topics")` shows it."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Docstring(name, "topic", "", clean(text))


def _walk(root: str) -> Iterator[_Found]:
    package = root.partition(".")[0]
    for module_name, module in _modules(root):
        yield from _described(module_name, "module", module)
        for name, value in _members(module):
            if not _is_home(package, value):
                continue
            if inspect.isclass(value):
                yield from _class(f"{module_name}.{name}", value, package)
            elif callable(value):
                yield from _described(f"{module_name}.{name}", "function", value)


def _modules(name: str) -> Iterator[tuple[str, ModuleType]]:
    """A module, under the name asked for, and all below it that can be imported, in the names' order."""
    if _SKIPPED.search(name):
        return
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except (Exception, SystemExit):  # other systems' modules, optional dependencies, scripts
        return
    yield name, module
    for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda info: info.name):
        yield from _modules(f"{name}.{info.name}")


def _members(owner: Any) -> Iterator[tuple[str, Any]]:
    for name in sorted(dir(owner)):
        if name.startswith("_"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                value = inspect.getattr_static(owner, name)
                if not isinstance(value, property):
                    value = getattr(owner, name)
            except Exception:  # deprecated names raise what they like
                continue
        yield name, value


def _is_home(package: str, value: Any) -> bool:
    """Whether a module's member belongs to the package and was not imported from elsewhere."""
    home = getattr(value, "__module__", None)
    if not isinstance(home, str):
        return True
    top = home.partition(".")[0]
    return top.removeprefix("_") == package or top in _OTHER_HOMES.get(package, ())


def _class(name: str, value: type, package: str, depth: int = 0) -> Iterator[_Found]:
    yield from _described(name, "class", value)
    for member, attribute in _members(value):
        home = next((base for base in value.__mro__ if member in vars(base)), None)
        if home is None or not _is_home(package, home):
            continue  # inherited from another package
        if inspect.isclass(attribute):
            if depth == 0:  # an accessor, such as pandas.Series.str
                yield from _class(f"{name}.{member}", attribute, package, depth + 1)
        elif callable(attribute) or inspect.isdatadescriptor(attribute):
            kind = "method" if callable(attribute) else "attribute"
            yield from _described(f"{name}.{member}", kind, attribute, is_inherited=home is not value)


def _described(name: str, kind: str, value: Any, is_inherited: bool = False) -> Iterator[_Found]:
    text = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    if not isinstance(text, str):
        return
    name, text = name.removeprefix("builtins."), clean(text)
    if is_useful(name, text):
        yield _Found(name, kind, value, text, is_inherited)


def _signature(value: Any) -> str:
    """The arguments of a callable without types; empty where they are unknown, long, or show an address."""
    if not callable(value):
        return ""
    try:
        signature = inspect.signature(value)
    except Exception:  # a default value that is not there on this system, among others
        return ""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    if parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    try:
        text = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    except Exception:  # a default value whose repr fails
        return ""
    return text if len(text) <= 200 and "0x" not in text and "\n" not in text else ""
