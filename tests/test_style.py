"""Check docs/development/style.md: words and forms that prose and names avoid.

As a script, list the findings of files or directories, or print the table of counts:

    python tests/test_style.py tinkerfs/api docs/caching.md
    python tests/test_style.py --counts
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_SENTENCE_WORDS = 30
MAX_TEST_NAME = 60

#: Words of prose: docstrings, comments, messages in strings, pages.
WORDS = {
    "who": r"\b(who|whoever|whose|whom|somebody|nobody|everybody)\b",
    "told": r"\b(told|tells?|telling)\b",
    "be had": r"\bbe had\b",
    "Take note": r"\btakes? note\b",
    "is no": r"(?<!\bthere )\b(is|are|be) (no|none)\b(?! (longer|more|less|fewer|later|sooner)\b)",
    # Not "as many as", "so many that" and "twice as many".
    "so many": (
        r"(?<!times )(?<!half )(?<!twice )\b(so|as) (many|much)\b"
        r"(?!( [\w-]+){0,3} (as|that)\b)"
    ),
    "folder": r"\bfolders?\b",
    "answer": r"\b(un)?answer(s|ed|ing|able)?\b",
    "in vain": r"\b(in vain|anew|at hand|let go|lets go|letting go)\b",
}

#: The same in names, of which the words are joined by underscores or by capitals.
NAME_WORDS = {
    "who": WORDS["who"],
    "told": r"\b(untold|told|tells|telling)\b",
    "folder": WORDS["folder"],
    "answer": WORDS["answer"],
    "in vain": WORDS["in vain"],
}

#: Directory -> pattern -> maximum number of findings, 0 if absent. The numbers may only fall.
ALLOWED: dict[str, dict[str, int]] = {}

_CODE = re.compile(r"``.+?``|`[^`]+`", re.DOTALL)
_QUOTED = re.compile(r"\"[^\"]{1,120}\"|“[^”]{1,120}”", re.DOTALL)
_LINK_TARGET = re.compile(r"\]\([^)]*\)|<https?:[^>]*>|https?://\S+")
_ITEM = re.compile(r"([-*+]|\d+\.|#+|>) |\|")
_ARGUMENT = re.compile(r"\*{0,2}\w+( \([^)]*\))?: ")
_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Example|Note)s?:$")
_SENTENCE_END = re.compile(r"(?<=[.!?])[)\"'*]*\s+(?=[^a-z\s])")


def paragraphs(text, line):
    """Yield (line, text) of each paragraph, list item, argument and heading of prose."""
    current, start, is_fenced = [], line, False
    for number, raw in enumerate(text.splitlines(), line):
        stripped = raw.strip()
        if stripped.startswith("```"):
            is_fenced = not is_fenced
            stripped = ""
        is_code = is_fenced or (
            not current and raw.startswith("    ") and not _ITEM.match(stripped)
        )
        if not stripped or is_code or _ITEM.match(stripped) or _ARGUMENT.match(stripped):
            if current:
                yield start, " ".join(current)
            current = []
        if stripped and not is_code:
            if not current:
                start = number
            current.append(stripped)
            if stripped.startswith("#") or _SECTION.match(stripped):
                yield start, stripped
                current = []
    if current:
        yield start, " ".join(current)


def prose_findings(text, line, *, is_message=False):
    """Yield (line, pattern, text) for prose that begins at `line`."""
    for start, paragraph in [(line, text)] if is_message else paragraphs(text, line):
        plain = _LINK_TARGET.sub("]", _CODE.sub("CODE", paragraph))
        bare = plain if is_message else _QUOTED.sub("QUOTED", plain)
        for pattern, regex in WORDS.items():
            for match in re.finditer(regex, bare, re.IGNORECASE):
                near = bare[max(match.start() - 40, 0) : match.end() + 40]
                yield start, pattern, " ".join(near.split())
        if is_message:
            continue
        for cell in plain.split("|") if plain.startswith("|") else [plain]:
            for sentence in _SENTENCE_END.split(cell):
                words = [word for word in sentence.split() if re.search(r"\w", word)]
                if len(words) > MAX_SENTENCE_WORDS:
                    yield start, "long sentence", f"{len(words)} words: {' '.join(words[:9])} ..."


def comments_of(source):
    """Yield (line, text) of each comment; comments on consecutive lines are one."""
    current, start, last = [], 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text = re.sub(r"^#[:!]? ?", "", token.string)
        if re.match(r"(noqa|type:|pragma|mypy|fmt:|ruff)", text.strip()):
            continue
        is_alone = not token.line[: token.start[1]].strip()
        if current and is_alone and token.start[0] == last + 1:
            current.append(text)
        else:
            if current:
                yield start, "\n".join(current)
            current, start = [text], token.start[0]
        last = token.start[0]
    if current:
        yield start, "\n".join(current)


def _docstring_nodes(tree):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            yield node.body[0].value


def _is_message(text):
    """Return whether a string reads as a message: several words, not data and not a program."""
    if re.search(r"^\s*[\[{<]|^(import|from) |\n\s*(import|def|class|from) |\\b", text):
        return False
    return bool(re.search(r"[a-z]{2,},? [a-z]{2,}", text))


def _bound_names(tree):
    """Yield (line, name) of each name that a module defines, once each."""
    seen = set()
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        if name is not None and name not in seen:
            seen.add(name)
            yield node.lineno, name


def _is_impure_predicate(node):
    if not isinstance(node, ast.FunctionDef) or not re.match(r"(is|has|can)_", node.name):
        return False
    if any(isinstance(each, ast.Attribute) for each in node.decorator_list):  # a setter
        return False
    return any(
        isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
        for each in ast.walk(node)
    )


def python_findings(source):
    """Yield (line, pattern, text) for a module."""
    tree = ast.parse(source)
    docstrings = list(_docstring_nodes(tree))
    for node in docstrings:
        yield from prose_findings(_cleaned(node.value), node.lineno)
    for line, text in comments_of(source):
        yield from prose_findings(text, line)
    documented = {id(node) for node in docstrings}
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_string and id(node) not in documented and _is_message(node.value):
            yield from prose_findings(node.value, node.lineno, is_message=True)
        if isinstance(node, ast.FunctionDef):
            if node.name.startswith("test_") and len(node.name) > MAX_TEST_NAME:
                yield node.lineno, "long test name", f"{len(node.name)}: {node.name}"
            if _is_impure_predicate(node):
                yield node.lineno, "impure predicate", node.name
    for line, name in _bound_names(tree):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name.replace("_", " "))
        for pattern, regex in NAME_WORDS.items():
            if re.search(regex, words, re.IGNORECASE):
                yield line, pattern, name


def _cleaned(docstring):
    """Return a docstring without its indentation, line for line."""
    first, *rest = docstring.splitlines() or [""]
    margins = [len(line) - len(line.lstrip()) for line in rest if line.strip()]
    margin = min(margins, default=0)
    return "\n".join([first, *(line[margin:] for line in rest)])


def findings(path):
    """Return the findings (line, pattern, text) of a file, by line."""
    source = path.read_text()
    if path.suffix == ".md":
        return sorted(prose_findings(source, 1))
    return sorted(python_findings(source))


def files_of(path):
    """Return the checked files at or below a path."""
    if path.is_file():
        return [path]
    found = [*path.rglob("*.py"), *path.rglob("*.md")]
    return sorted(
        each
        for each in found
        if each != Path(__file__).resolve()
        and not any(part.startswith(".") for part in each.relative_to(ROOT).parts)
    )


def directory_of(path):
    """Return the directory that a file is counted under, such as "tinkerfs/api"."""
    parent = path.relative_to(ROOT).parent.as_posix()
    return "docs" if parent == "." or parent.startswith("docs") else parent


def all_files():
    """Return every file that is checked."""
    below = [ROOT / name for name in ("tinkerfs", "tests", "scripts", "docs")]
    return [ROOT / "README.md", *(each for path in below for each in files_of(path))]


def counts():
    """Return directory -> pattern -> number of findings."""
    found = {}
    for path in all_files():
        counter = found.setdefault(directory_of(path), Counter())
        counter.update(pattern for _, pattern, _ in findings(path))
    return found


@pytest.fixture(scope="module")
def counted():
    return counts()


@pytest.mark.parametrize("directory", sorted({directory_of(path) for path in all_files()}))
def test_style_directory_has_no_new_findings(directory, counted):
    allowed = ALLOWED.get(directory, {})
    found = {name: n for name, n in counted[directory].items() if n > allowed.get(name, 0)}
    assert found == {}, f"python tests/test_style.py {directory}; allowed: {allowed}"


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ('"""Return who waits."""', "who"),
        ("# Nobody reads it.", "who"),
        ("x = 'the server told us'", "told"),
        ("def told_bytes(): pass", "told"),
        ("# It cannot be had.", "be had"),
        ('"""Take note of it."""', "Take note"),
        ("# That is no checkpoint.", "is no"),
        ("# So many are kept.", "so many"),
        ("class FolderCache: pass", "folder"),
        ("x = f'no answer after {y} s'", "answer"),
        ("# It waits in vain.", "in vain"),
        (f"# {'word ' * 31}.", "long sentence"),
        (f"def test_{'a' * 60}(): pass", "long test name"),
        ("def is_free(self): self.taken = True", "impure predicate"),
    ],
)
def test_style_finds_pattern(source, pattern):
    assert [found for _, found, _ in python_findings(source)] == [pattern]


@pytest.mark.parametrize(
    "source",
    [
        "# It is no longer cached, there is no cache, and `folder` is a key.",
        "# At most as many requests as permits.",
        "x = file.tell()",
        "x = {'folder': 1, 'answer': 2}",
        "program = 'import os\\nwho = os.getuid()'",
        "def is_free(self): return self.taken",
        f"# {'Word ' * 29}.\n# {'Word ' * 29}.",
    ],
)
def test_style_passes_plain_source(source):
    assert list(python_findings(source)) == []


def main(arguments):
    """Print the findings of the named files and directories, or the counts of all."""
    if arguments == ["--counts"]:
        for directory, counter in sorted(counts().items()):
            if counter:
                print(f"    {directory!r}: {dict(sorted(counter.items()))},".replace("'", '"'))
        return
    total = Counter()
    for argument in arguments:
        for path in files_of(Path(argument).resolve()):
            for line, pattern, text in findings(path):
                total[pattern] += 1
                print(f"{path.relative_to(ROOT)}:{line}: {pattern}: {text}")
    print(", ".join(f"{name} {n}" for name, n in sorted(total.items())) or "nothing found")


if __name__ == "__main__":
    main(sys.argv[1:])
