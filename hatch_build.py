"""The long description of the package: README.md as an index of packages can show it.

README links to files beside it. An index has no files beside it, so a link to `docs/guide.md` would
lead nowhere there: such a link becomes the name of the file, which the source distribution has.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(?:#[^)\s]*)?\)")
_WHERE = "\nThe files that this page names are in the source distribution.\n"


class LongDescription(MetadataHookInterface):
    """Sets the field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the fields of `[project]`, to add to them."""
        readme = (Path(self.root) / "README.md").read_text("utf-8")
        text = _RELATIVE_LINK.sub(_named, readme) + _WHERE
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def _named(link: re.Match[str]) -> str:
    words, file = link.groups()
    return f"`{file}`" if words == file else f"{words} (`{file}`)"
