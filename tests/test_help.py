# SPDX-License-Identifier: Apache-2.0
"""docs/commands.md holds the complete --help of every command. `python tests/test_help.py` writes it anew."""

import importlib
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "commands.md"
SCRIPTS = [
    "train",
    "calc_metrics",
    "resample",
    "generate",
    "style_mixing",
    "projector",
    "dataset_tool",
    "legacy",
    "ssn_ext.sweep.__main__",
]
HEAD = """# The commands

What `python <script> --help` prints, in full. What a StyleGAN2-ADA user finds under which name is in
[from-stylegan2-ada.md](from-stylegan2-ada.md).
"""


def title(script):
    """The script as one types it."""
    package = script.removesuffix(".__main__")
    return f"{script}.py" if package == script else f"python -m {package}"


def command(script):
    """The click command of a script."""
    module = importlib.import_module(script)
    if hasattr(module, "build_command"):
        return module.build_command()
    (found,) = [each for each in vars(module).values() if isinstance(each, click.Command)]
    return found


def page():
    """The text of docs/commands.md."""
    parts = [HEAD]
    for script in SCRIPTS:
        cmd = command(script)
        with click.Context(cmd, info_name=title(script), terminal_width=110, max_content_width=110) as ctx:
            lines = [line.rstrip() for line in cmd.get_help(ctx).strip().splitlines()]
        parts.append(f"## {title(script)}\n\n```\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


def test_the_page_is_what_the_scripts_say():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/test_help.py"


def test_every_option_and_every_script_says_what_it_is_for():
    for script in SCRIPTS:
        cmd = command(script)
        assert cmd.help, script
        assert [p.name for p in cmd.params if isinstance(p, click.Option) and not p.help] == []


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
