"""Help without boxes and colours: names, and beside each what it means, wrapped to the width."""

import textwrap
from typing import TYPE_CHECKING, Any

from vmibridge.cli.environment import variable_of

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

_MAX_NAME = 28
"""Characters of a name that may have its description beside it."""
_MAX_LINE = 100


class HelpFormatter:
    """What cyclopts asks of a formatter."""

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
        """Show the options of one group, or the commands."""
        entries = [(_name(entry), _text(entry)) for entry in panel.entries]
        if not entries:
            return
        width = min(options.max_width, _MAX_LINE)
        beside = 4 + max((len(name) for name, _ in entries if len(name) <= _MAX_NAME), default=0)
        lines = [f"{panel.title}:"] if panel.title else []
        if about := _plain(panel.description):
            lines += _wrapped(about, width)
        for name, text in entries:
            wrapped = _wrapped(text, max(width - beside, 20)) or [""]
            if len(name) > beside - 4:
                lines.append(f"  {name}")
            else:
                lines.append(f"  {name.ljust(beside - 2)}{wrapped.pop(0)}")
            lines += [f"{'':{beside}}{line}" for line in wrapped]
        _print(console, lines)

    def render_usage(self, console: "Console", options: "ConsoleOptions", usage: Any) -> None:
        """Show the line of usage."""
        if text := _plain(usage):
            _print(console, _wrapped(f"Usage: {text}", min(options.max_width, _MAX_LINE)))

    def render_description(
        self, console: "Console", options: "ConsoleOptions", description: Any
    ) -> None:
        """Show what the command does: a docstring, by paragraphs."""
        for paragraph in _plain(description).split("\n\n"):
            if paragraph.strip():
                _print(console, _wrapped(paragraph, min(options.max_width, _MAX_LINE)))


def _name(entry: "HelpEntry") -> str:
    return ", ".join(entry.display_labels_with_metavar)


def _text(entry: "HelpEntry") -> str:
    parts = [_plain(entry.description)]
    if entry.choices:
        parts.append(f"[choices: {', '.join(entry.choices)}]")
    named = [variable for name in entry.names if (variable := variable_of(name))]
    if variables := dict.fromkeys([*(entry.env_var or ()), *named[:1]]):
        parts.append(f"[env var: {', '.join(variables)}]")
    if entry.default is not None:
        parts.append(f"[default: {entry.default}]")
    if entry.required:
        parts.append("[required]")
    return " ".join(part for part in parts if part)


def _plain(entry: Any) -> str:
    """The text of what may be one of rich or cyclopts."""
    entry = getattr(entry, "primary_renderable", entry)
    return "" if entry is None else str(getattr(entry, "plain", entry)).strip()


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _print(console: "Console", lines: list[str]) -> None:
    """With an empty line behind them."""
    console.file.write("".join(f"{line.rstrip()}\n" for line in (*lines, "")))
