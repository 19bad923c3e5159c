"""The documentation, run: its examples, its code, its links."""

import ast
import importlib
import re
import sys

import pytest
from documents import ROOT, blocks, prose, run
from needs import needs

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = ("make", "pip", "apt-get", "git")


documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


# --- examples ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, document):
    """Where the commands of a document run: who has installed a wheel has no checkout."""
    needs("nasm")
    if document.name == "benchmarks.md":
        (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    return tmp_path


@documents
def test_examples_do_what_the_document_says(document, folder, environment):
    for block in blocks(document):
        place = f"{document.name}:{block.line}"
        if block.note.startswith("file: "):
            file = folder / block.note.removeprefix("file: ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.language == "console":
            for command, printed in commands(block.text):
                run_command(place, command, printed, folder, environment)
        elif block.note == "run":
            done = run([sys.executable, "-W", "error", "-c", block.text], folder, environment)
            assert done.returncode == 0, f"{place}: {done.stdout}"
        else:
            assert not block.note, f"{place}: what is {block.note!r}?"


def test_the_handlers_of_the_guide_can_be_loaded_together():
    """Each of them answers requests of its own."""
    found = {}
    for block in blocks(ROOT / "docs" / "guide.md"):
        if block.note.startswith("file: ") and block.language == "python":
            for number in re.findall(r"^    REQUEST = (\w+)$", block.text, re.MULTILINE):
                found.setdefault(number, set()).add(block.note)
    assert len(found) >= 4
    assert [files for files in found.values() if len(files) > 1] == []


def commands(text):
    """Each command of a console block, with the lines that it prints."""
    assert text.startswith("$ "), "a console block begins with a command"
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *printed = part.splitlines()
        yield command, printed


def run_command(place, command, printed, folder, environment):
    if command.split()[0] in NOT_RUN:
        return
    status = re.search(r"# exits with (\d+)$", command)
    done = run(["bash", "-c", command], folder, environment)
    told = f"{place}: {command}\n{done.stdout}"
    assert done.returncode == (int(status[1]) if status else 0), told
    pattern = "".join(line_pattern(line) for line in printed)
    seen = "".join(f"{without_durations(line)}\n" for line in done.stdout.splitlines())
    assert re.fullmatch(pattern, seen), told


def line_pattern(line):
    if line == "...":
        return r"(?:.*\n)*?"
    return re.escape(without_durations(line)).replace(r"\.\.\.", ".*") + r"\n"


def without_durations(line):
    """One line of output with single blanks, and with N for what differs from run to run."""
    words = line.split()
    if len(words) > 10 and re.fullmatch(r"(cpuid|vmcall|vmmcall)\d\d", words[2]):
        words[10] = "N"  # behind the four values of the answer
    line = re.sub(r'"duration_us":[0-9.]+', '"duration_us":N', " ".join(words))
    return re.sub(r" in [0-9.]+s$", " in N s", line)


@documents
def test_python_compiles_and_imports_what_is_there(document):
    for block in blocks(document):
        if block.language != "python":
            continue
        place = f"{document.name}:{block.line}"
        tree = ast.parse(block.text, place)
        compile(tree, place, "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vmibridge":
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{place}: {node.module} has no {missing}"


# --- links ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert ROOT in file.resolve().parents, f"{page.name}: {target} is not of this project"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def anchors(document):
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
