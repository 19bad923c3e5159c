"""`vmibridge completion`: a script that completes commands, options and their values."""

import sys
from typing import Annotated, Literal

from cyclopts import Parameter


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="The shell to make it for.")],
    /,
) -> int:
    """Print a script that completes commands and options in a shell.

    Example: source <(vmibridge completion bash)
    """
    from vmibridge.cli.app import app_for

    sys.stdout.write(app_for(()).generate_completion(shell=shell))
    return 0
