"""Messages, help, docs, comments and names are idiomatic English: each phrase below has a better one next to it.

A phrase is a regular expression. An entry of ALLOWED is a technical use of a phrase in one file, with its reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PHRASES = {
    "mend": (r"\bmend(s|ed|ing)?\b", "fix"),
    "go on": (r"\b(go|goes|going|gone|went) on\b", "resume, continue"),
    "is told": (r"\b(is|are|be|been|was|were|and|not|to|or) told\b", "is reported, is printed, warns"),
    "is said": (r"\b(is|are|be|was|were|and) said\b|\bsays? so\b|\bsaid once\b", "is reported, logs, warns"),
    "a line says": (r"\blines? (says?|tells?)\b|\bline that says\b", "is printed, logs"),
    "is there": (r"\b(is|are|was|were|be) (not )?there\b", "exists, is missing"),
    "has not": (
        r"\b(has|have) not\b(?! (yet )?(been|seen|run|read|begun|written|sent|shown|given|known|set|met|made|\w+ed)\b)",
        "lacks, does not have",
    ),
    "way out": (r"\bways? out\b", "a fix, what to do instead"),
    "refuse": (r"\brefus(e|es|ed|ing|al|als)\b", "not supported, raises an error, rejects"),
    "laid end to end": (r"\bend to end\b", "padding-free, concatenated"),
    "mixture": (r"\bmixtures?\b(?! of experts|-of-depth)", "mixture of experts (MoE)"),
    "thought": (r"\bthoughts?\b", "reasoning"),
    "carries loss": (r"\b(carry|carries|carried|carrying) (no )?loss\b|\bfrom the loss\b", "trained, masked"),
    "lose their end": (
        r"\b(lose|loses|lost|losing) (its|their|the|an?) (end|ends|(final )?answers?)\b|\blost answers?\b",
        "truncated, truncated before the final answer",
    ),
    "whole": (r"(?<!the )\bwhole\b(?! (word|number)s?\b)", "complete, in full (the whole run is fine)"),
    "set aside": (r"\b(set|sets|setting|put|puts|move|moves|moved) aside\b", "renamed"),
    "damaged": (r"\bdamag(e|es|ed|ing)\b", "incomplete"),
    "of its own": (r"\bof (its|their|his|our|your|my) own\b", "own"),
    "beside": (r"\bbeside\b", "next to, besides, in addition to"),
    "anew": (r"\banew\b", "again"),
    "lest": (r"\blest\b", "to avoid"),
    "for want of": (r"\bfor want of\b", "because there is no"),
    "goes with": (r"\b(go|goes) with\b", "is compatible with"),
    "stands in": (r"\b(stand|stands) in\b", "is in"),
    "comes from": (r"\b(come|comes) from\b", "is set by, is from"),
    "metaphors": (r"\b(rooms?|journeys?|roads?|(?<!math\.)floors?|doors?)\b", "packages, data flow, guarantees"),
}
QUESTIONS = re.compile(r"(What|Whether|How|Why|Where|When|Which|If)\b")
NAMES = {"found", "given", "one", "said", "told", "wanted"}

TOY_TEXT = "sentences of the toy data, which this script generates"
ALLOWED = {
    ("go on", "scripts/make_toy_dataset.py"): TOY_TEXT,
    ("is there", "scripts/make_toy_dataset.py"): TOY_TEXT,
    ("of its own", "scripts/make_toy_dataset.py"): TOY_TEXT,
    ("metaphors", "scripts/make_toy_dataset.py"): TOY_TEXT,
    ("refuse", "arpo_trl/data/messages.py"): "`refusal` is a field of OpenAI's messages",
    ("refuse", "arpo_trl/data/templates/names.toml"): "system messages of model families",
}
ALLOWED_NAMES = {("found", "arpo_trl/data/serving_causes.py"): "a field: found, next to cause and fix"}
GENERATED = {"arpo_trl/recipe/keys_of_trl.py"}  # transformers' and TRL's own help


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def texts() -> Iterator[tuple[str, str]]:
    """Yield the path and the text of each file that people read; of a test file, its name and those of its tests."""
    patterns = "*.md *.toml Dockerfile docs/**/*.md recipes/*.md recipes/*.yaml scripts/*.py scripts/*.sh"
    patterns += " accelerate_configs/*.yaml .github/**/*.yml arpo_trl/**/*.py arpo_trl/**/*.md arpo_trl/**/*.toml"
    for pattern in [*patterns.split(), "arpo_trl/**/*.yaml"]:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if name not in GENERATED:
                yield name, read_text(path)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        names = re.findall(r"^ *(?:async )?(?:def|class) (\w+)", read_text(path), re.MULTILINE)
        words = "\n".join(name.replace("_", " ") for name in [path.stem, *names])
        yield path.relative_to(ROOT).as_posix(), words


def in_group(name: str, group: str) -> bool:
    """Whether a file belongs to a group: a folder, or "." for the files of the root."""
    return "/" not in name if group == "." else name.startswith(f"{group}/")


PACKAGES = [
    f"arpo_trl/{path.name}" for path in sorted((ROOT / "arpo_trl").iterdir()) if (path / "__init__.py").exists()
]
GROUPS = [".", ".github", "accelerate_configs", "docs", "recipes", "scripts", "tests", "arpo_trl", *PACKAGES]


def group_of(name: str) -> str:
    """Return the innermost group of a file."""
    return max((group for group in GROUPS if in_group(name, group)), key=len)


@pytest.mark.parametrize("group", GROUPS)
def test_no_phrase_of_the_table_is_left(group: str) -> None:
    wrong = []
    for name, text in texts():
        if group_of(name) != group:
            continue
        for phrase, (pattern, better) in PHRASES.items():
            if (phrase, name) in ALLOWED:
                continue
            for match in re.finditer(pattern, text, re.IGNORECASE if phrase != "whole" else 0):
                line = text.count("\n", 0, match.start()) + 1
                wrong.append(f"{name}:{line}: {match[0]!r}: {better}: {text.splitlines()[line - 1].strip()}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_allowed_use_exists() -> None:
    files = dict(texts())
    unused = [
        (phrase, name)
        for phrase, name in ALLOWED
        if name not in files or not re.search(PHRASES[phrase][0], files[name], re.IGNORECASE)
    ]
    assert not unused


def test_docstrings_open_with_a_verb_and_names_are_nouns() -> None:
    wrong = []
    for path in sorted((ROOT / "arpo_trl").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(read_text(path))):
            if isinstance(node, ast.FunctionDef) and QUESTIONS.match(ast.get_docstring(node) or ""):
                wrong.append(f"{name}:{node.lineno}: {node.name}: {(ast.get_docstring(node) or '').splitlines()[0]}")
            stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id
            argument = isinstance(node, ast.arg) and node.arg
            if (stored or argument) in NAMES and (stored or argument, name) not in ALLOWED_NAMES:
                wrong.append(f"{name}:{node.lineno}: the name {stored or argument!r}")
    assert not wrong, "\n" + "\n".join(wrong)
