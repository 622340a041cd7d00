"""Pictures for the documentation: of a page in chromium, light or dark, and of a terminal through tmux.

python scripts/screenshots.py page OUTPUT_DIR/report.html docs/report-light.png docs/report-dark.png
tmux capture-pane -e -p -t NAME | python scripts/screenshots.py terminal docs/terminal.svg
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def browser() -> str | None:
    """The chromium of this machine; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page(
    file: Path, picture: Path, *, dark: bool, width: int = 1180, height: int = 1560, colours: int | None = 96
) -> None:
    """Opens an HTML file in chromium, as a system in light or dark colours shows it, and keeps a picture.

    colours: most of them in the picture, which then is a quarter of the size and near the page's; None keeps all.
    """
    program = browser()
    if program is None:
        raise SystemExit("no chromium here")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [program, *QUIET, f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
             f"--window-size={width},{height}", f"--screenshot={picture}", file.resolve().as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
    if colours is not None:
        with Image.open(picture) as image:
            image.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(picture, optimize=True)


def terminal(captured: str, title: str = "python -m jaxft.train") -> str:
    """What a terminal shows, with its escapes, as SVG that asks for nothing of the network."""
    text = Text.from_ansi(captured.rstrip("\n"))
    console = Console(record=True, width=max(map(len, text.plain.splitlines())), file=io.StringIO())
    console.print(text)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("page", "terminal"))
    parser.add_argument("files", nargs="+", type=Path, help="the page, and its light and dark picture; or the SVG")
    parser.add_argument("--height", type=int, default=1560, help="pixels of a page")
    options = parser.parse_args()
    if options.what == "terminal":
        options.files[0].write_text(terminal(sys.stdin.read()), encoding="utf-8")
        return 0
    for picture, dark in zip(options.files[1:], (False, True), strict=True):
        page(options.files[0], picture, dark=dark, height=options.height)
    return 0


if __name__ == "__main__":
    sys.exit(main())
