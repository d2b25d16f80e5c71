"""Run commands in a real terminal (tmux) and draw what it shows as a PNG, as in docs/images/. Needs tmux.

    python scripts/terminal_picture.py FILE.png COMMAND [COMMAND ...] [--first N] [--last N]

The commands of the pictures; the previews need the config and the tokenizer of Qwen2.5-0.5B-Instruct, but no weights:

    session.png          'arpo-trl train recipes/tiny_cpu.yaml' --first 1 --last 13
    preview.png          'arpo-trl train mine.yaml --preview 1', on the README's own data
    preview_inside.png   the same with the conversation in one reply and mask_spans=result
"""

import argparse
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from rich.ansi import AnsiDecoder
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

FONT_SIZE, MARGIN = 14, 14
BACKGROUND, FOREGROUND = (13, 17, 23), (220, 220, 220)
NORMAL = [(1, 4, 9), (255, 123, 114), (86, 211, 100), (227, 179, 65), (121, 192, 255), (210, 168, 255), (86, 212, 221)]
BRIGHT = [
    (110, 118, 129),
    (255, 161, 152),
    (86, 211, 100),
    (227, 179, 65),
    (165, 214, 255),
    (226, 197, 255),
    (179, 240, 255),
]
THEME = TerminalTheme(BACKGROUND, FOREGROUND, [*NORMAL, FOREGROUND], [*BRIGHT, (255, 255, 255)])


def record(commands: list[str], width: int, height: int) -> str:
    """Run the commands in tmux and return its screen and scrollback, with ANSI colors."""
    tmux = ["tmux", "-L", "arpo_trl_picture"]
    with tempfile.TemporaryDirectory() as folder:
        script, done = Path(folder) / "run.sh", Path(folder) / "done"
        lines = [f"printf '\\033[2m$\\033[0m \\033[1m%s\\033[0m\\n' {shlex.quote(c)}; {c}" for c in commands]
        script.write_text("\n".join([*lines, f"touch {done}", "sleep 1000"]), encoding="utf-8")
        size = ["-x", str(width), "-y", str(height)]
        subprocess.run([*tmux, "-f", "/dev/null", "new-session", "-d", *size, f"bash {script}"], check=True)
        try:
            while not done.exists():
                time.sleep(0.2)
            time.sleep(0.5)
            capture = [*tmux, "capture-pane", "-e", "-p", "-S", "-"]
            return subprocess.run(capture, check=True, capture_output=True, encoding="utf-8").stdout
        finally:
            subprocess.run([*tmux, "kill-session"], check=False)


def draw(lines: list[Text]) -> Image.Image:
    """Draw lines of a screen."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = {(False, False): "", (True, False): "-Bold", (False, True): "-Oblique", (True, True): "-BoldOblique"}
    faces = {key: ImageFont.truetype(fonts / f"DejaVuSansMono{name}.ttf", FONT_SIZE) for key, name in names.items()}
    cell, line_height = faces[False, False].getlength("M"), round(FONT_SIZE * 1.3)
    console = Console(width=400, color_system="truecolor")
    rows = [list(line.render(console)) for line in lines]
    columns = max(sum(len(segment.text.rstrip("\n")) for segment in row) for row in rows)
    size = (2 * MARGIN + round(columns * cell), 2 * MARGIN + line_height * len(rows))
    image = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(image)
    for number, row in enumerate(rows):
        column = 0
        for segment in row:
            part, style = segment.text.rstrip("\n"), segment.style or Style()
            place = (MARGIN + column * cell, MARGIN + number * line_height)
            pen.text(place, part, fill=color_of(style), font=faces[bool(style.bold), bool(style.italic)])
            column += len(part)
    return image.quantize(32)


def color_of(style: Style) -> tuple[int, int, int]:
    """Return the RGB color of a style; dim text is halfway to the background."""
    color = style.color or Color.default()
    red, green, blue = FOREGROUND if color.is_default else color.get_truecolor(THEME)
    if style.dim:
        red, green, blue = ((c + b) // 2 for c, b in zip((red, green, blue), BACKGROUND, strict=True))
    return red, green, blue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, metavar="FILE.png")
    parser.add_argument("commands", nargs="+", metavar="COMMAND", help="shell commands, run one after another")
    parser.add_argument("--width", type=int, default=100, help="columns of the terminal (100)")
    parser.add_argument("--height", type=int, default=50, help="lines of the terminal (50)")
    parser.add_argument("--first", type=int, metavar="N", help="draw the first N lines (and the last ones of --last)")
    parser.add_argument("--last", type=int, metavar="N", help="draw the last N lines (and the first ones of --first)")
    args = parser.parse_args()
    lines = list(AnsiDecoder().decode(record(args.commands, args.width, args.height).rstrip()))
    if args.first or args.last:
        lines = lines[: args.first or 0] + lines[len(lines) - (args.last or 0) :]
    draw(lines).save(args.picture, optimize=True)
    print(f"{args.picture}: {args.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
