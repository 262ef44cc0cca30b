"""The benchmark's picture: requests a second against connections, drawn for light and dark backgrounds."""

from collections.abc import Callable

CONNECTIONS = (1, 4, 16, 64, 256)
SERIES = (
    ("REST ceiling, {} connections", "ceiling: no database", "#8a8f98", "#9aa0aa"),
    ("REST one wallet, {} connections", "this service", "#1a7f37", "#3fb950"),
    ("REST single, {} connections", "one call per request", "#cf222e", "#f85149"),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 70, 170, 40, 50


def draw(rate: Callable[[str], float]) -> str:
    """Return an SVG of the rates, which `rate` gives by the name of a line."""
    rates = [[rate(name.format(connections)) for connections in CONNECTIONS] for name, *_ in SERIES]
    step = 2000
    top = (int(max(map(max, rates))) // step + 1) * step

    def x(index: int) -> float:
        return LEFT + index * (WIDTH - LEFT - RIGHT) / (len(CONNECTIONS) - 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM) / top

    light = "".join(f".s{n}{{stroke:{series[2]};fill:{series[2]}}}" for n, series in enumerate(SERIES))
    dark = "".join(f".s{n}{{stroke:{series[3]};fill:{series[3]}}}" for n, series in enumerate(SERIES))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        'font-size="13" role="img" aria-label="Requests a second on one wallet against connections">',
        f"<style>text{{fill:#1f2328}}.grid{{stroke:#d1d9e0}}{light}polyline{{fill:none!important;stroke-width:2.5}}"
        "text[class]{stroke:none}@media (prefers-color-scheme:dark){text{fill:#e6edf3}.grid{stroke:#3d444d}"
        f"{dark}}}</style>",
        f'<text x="{LEFT}" y="20" font-weight="600">Durable operations on one wallet, requests a second</text>',
    ]
    for value in range(0, top + 1, step):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:,}</text>')
    for index, connections in enumerate(CONNECTIONS):
        parts.append(f'<text x="{x(index):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{connections}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">connections</text>')
    for number, ((_, label, *_), values) in enumerate(zip(SERIES, rates, strict=True)):
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(values))
        parts.append(f'<polyline class="s{number}" points="{points}"/>')
        parts.append(f'<text class="s{number}" x="{WIDTH - RIGHT + 8}" y="{y(values[-1]) + 4:.1f}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])
