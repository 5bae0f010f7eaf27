"""Draw text as a terminal would show it, as SVG: `terminal_svg.py TITLE < text > picture.svg`."""

from __future__ import annotations

import html
import re
import sys

COLUMN, ROW, MARGIN, BAR = 8.4, 18, 16, 34
COLOURS = {"ok": "#7ee787", "..": "#e3b341", "XX": "#ff7b72", "!!": "#ff7b72"}
MARK = re.compile(r"(?<= )(ok|\.\.|XX|!!)(?= |$)")


def picture(title: str, lines: list[str]) -> str:
    """Return an SVG of these lines; words of two letters that are marks get their colour."""
    width = max(80, *(len(line) for line in lines)) * COLUMN + 2 * MARGIN
    height = len(lines) * ROW + BAR + MARGIN
    rows = []
    for number, line in enumerate(lines):
        text = MARK.sub(
            lambda mark: f'<tspan fill="{COLOURS[mark[0]]}">{mark[0]}</tspan>', html.escape(line)
        )
        y = BAR + number * ROW + 14
        rows.append(f'<text x="{MARGIN}" y="{y}" xml:space="preserve">{text}</text>')
    dots = "".join(
        f'<circle cx="{MARGIN + 4 + n * 18}" cy="17" r="5.5" fill="{colour}"/>'
        for n, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" aria-label="{html.escape(title)}">'
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>{dots}'
        f'<text x="50%" y="21" text-anchor="middle" fill="#8b949e" font-size="12" '
        f'font-family="sans-serif">{html.escape(title)}</text>'
        '<g fill="#e6edf3" font-size="13.5" '
        'font-family="ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace">'
        + "\n".join(rows)
        + "</g></svg>\n"
    )


if __name__ == "__main__":
    sys.stdout.write(picture(sys.argv[1], sys.stdin.read().rstrip().split("\n")))
