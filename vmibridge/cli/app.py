"""The commands by name. Each is a function of its own module, imported when it is asked for.

A summary is the first line of its function's docstring; it stands here so that `vmibridge --help`
imports none of them. A test holds the two against each other.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from cyclopts import App

from vmibridge import __version__
from vmibridge.cli.environment import Environment
from vmibridge.cli.help import HelpFormatter

_GROUPS = {
    "guest": "What guests are made of.",
    "handlers": "Look at handlers.",
    "new": "Begin something of your own.",
    "qemu": "What QEMU needs to be a backend.",
    "recordings": "Recordings kept in NATS (JetStream).",
}
COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "agent": (
            "agent:agent",
            "Run a guest whose handlers are in a `vmibridge serve`, here or on another machine.",
        ),
        "completion": (
            "completion:completion",
            "Print a script that completes commands and options in a shell.",
        ),
        "demo": (
            "demo:demo",
            "Run a guest that calls the ready-made handlers and checks every answer.",
        ),
        "diff": (
            "diff:diff",
            "Compare two recordings, request by request, without handlers.",
        ),
        "edit": (
            "edit:edit",
            "Cut, merge, split, rename, redact or shift recordings.",
        ),
        "export": (
            "export:export",
            "Write the traps of a recording in the format of another tool.",
        ),
        "guest include-path": (
            "guest:include_path",
            "Print the folder of the headers: bridge.inc for nasm, vmibridge.h for C.",
        ),
        "guest tools": (
            "guest_tools:build_tools",
            "Compile vmib, the program by which a guest asks its host.",
        ),
        "guest-header": (
            "guest_header:guest_header",
            "Make the header by which a guest calls handlers: one function a method.",
        ),
        "handlers list": (
            "handlers:list_handlers",
            "Show each handler's contract and methods, without making any.",
        ),
        "health": (
            "health:health",
            "Tell whether a process serves, or a socket listens: the health check of a container.",
        ),
        "import": (
            "import_lines:import_lines",
            "Make a recording of JSON lines: those of an export, or your own.",
        ),
        "inspect": (
            "inspect:inspect",
            "List the traps of a recording, in the order of their replies.",
        ),
        "new handler": (
            "new_handler:new_handler",
            "Make a folder with a handler of your own, its test, and a guest in C that asks it.",
        ),
        "qemu attach": (
            "qemu_device:attach",
            "Plug the device into a QEMU that runs, answer its guest, and unplug it at the end.",
        ),
        "qemu build-plugin": (
            "qemu_plugin:build_qemu_plugin",
            "Compile the TCG plugin for QEMU 11.1 and later; needs a C compiler alone.",
        ),
        "qemu device-args": (
            "qemu_device:device_args",
            "Print what QEMU 11.1 needs to have the device: arguments for a shell, or XML.",
        ),
        "qemu fetch": (
            "qemu_fetch:fetch_qemu",
            "Bring QEMU 11.1 to a Debian that has an older one, for this user alone.",
        ),
        "qemu initramfs": (
            "qemu_initramfs:make_initramfs",
            "Pack programs into an initramfs, which runs them in order and powers off.",
        ),
        "qemu run": (
            "qemu_run:run_qemu",
            "Start QEMU with what traps need, answer them until it ends, and take it down.",
        ),
        "qemu stop": (
            "qemu_stop:stop",
            "Stop a QEMU by its monitor: its guest powers off, is saved, or is cut off.",
        ),
        "recordings get": ("recordings:get_recording", "Get a recording back."),
        "recordings list": (
            "recordings:list_recordings",
            "List the recordings that are kept: bytes, name.",
        ),
        "recordings put": ("recordings:put_recording", "Keep a recording in NATS."),
        "recover": (
            "recover:recover",
            "Make a clean recording of a damaged one, with all of it that can be read.",
        ),
        "replay": (
            "replay:replay",
            "Ask handlers again what a recording was asked, and compare.",
        ),
        "report": (
            "report:report",
            "Make one HTML page of a recording, which needs no network.",
        ),
        "run": ("run:run", "Run a guest and answer its traps until it ends."),
        "serve": (
            "serve:serve",
            "Answer the traps of VMs whose agents connect; each VM has handlers of its own.",
        ),
    }
)
"""From the name of a command to its function and its summary."""


def app_for(tokens: Iterable[str], environment: Environment | None = None) -> App:
    """The whole command line, for these arguments."""
    given = set(tokens)
    app = App(
        name="vmibridge",
        help="Answer what a virtual machine asks by one instruction with async Python handlers.",
        version=__version__,
        help_formatter=HelpFormatter(),
        help_format="plaintext",
        config=environment or Environment(),
    )
    groups = {name: App(name=name, help=text) for name, text in _GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for name, (function, summary) in COMMANDS.items():
        group_name, _, word = name.rpartition(" ")
        parent = groups[group_name] if group_name else app
        # A summary given here stands for the whole docstring, so the command asked for gets none.
        parent.command(
            f"vmibridge.cli.{function}", name=word, help=None if word in given else summary
        )
    return app
