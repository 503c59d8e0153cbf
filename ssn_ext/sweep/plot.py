# SPDX-License-Identifier: Apache-2.0
"""The Pareto plot of a sweep: distance against distortion, with the floors under the distortion (docs/limit.md)."""

import math
import statistics

from ssn_ext.sweep import plan

MISSING = "the plot needs matplotlib: python -m pip install matplotlib, then run the same command again"
SIZE, DPI = (8.0, 5.6), 150  # 1200 pixels wide
INK, SOFT, FAINT = "#222222", "#767676", "#b4b4b4"
BOX = dict(facecolor="white", alpha=0.8, edgecolor="none", pad=1)  # behind text
STYLE = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica", "sans-serif"],
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sweep",  # equal plots are equal files
    "axes.edgecolor": SOFT,
    "text.color": INK,
    "axes.labelcolor": INK,
}
# Where a label may stand: distances from its marker in points, and directions, the best first.
DISTANCES = [9, 13, 18, 25, 34, 45, 60, 80, 105, 135]
ANGLES = [0, 45, 90, 315, 270, 135, 180, 225, 22, 67, 337, 292, 112, 157, 202, 247]


def available():
    """Whether matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def save(rows, quality, paths):
    """Draws the plot of the rows (ssn_ext.sweep.table.Row) into files whose names end in .png or .svg."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(STYLE):
        figure = draw(rows, quality)
        for path in paths:
            metadata = {"Date": None} if path.endswith(".svg") else {"Software": None}
            figure.savefig(path, dpi=DPI, metadata=metadata)
        FigureCanvasAgg(figure)


def draw(rows, quality):
    """The Figure; its labels carry the gid 'label'. ValueError where no row has both numbers.

    One marker a training: x its ldbr_dist, y the result `quality`, the colour the share of the covariance kept. A
    faint line goes from it to the floor of its own covariance: as short as its efficiency is high.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    singles = [row for row in rows if not isinstance(row.seed, str)]
    shown = [row for row in singles if quality in row.values and "ldbr_dist" in row.values]
    if not shown:
        raise ValueError(f"nothing to draw: no run has both {quality} and ldbr_dist yet")
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _set_up(axes, singles, shown, quality)
        obstacles = _floors(axes, shown, quality) + _baselines(axes, singles, quality)
        obstacles += _runs(figure, axes, shown, quality)
        _legend(figure, shown)
        figure.canvas.draw()  # from here on everything has its place
        figure.set_layout_engine("none")
        names = list(dict.fromkeys(row.name for row in shown))
        groups = [[row for row in shown if row.name == name] for name in names]
        places = [
            tuple(statistics.fmean(row.values[key].mean for row in group) for key in ("ldbr_dist", quality))
            for group in groups
        ]
        texts = [
            f"{name} ({len(group)}x)" if len(group) > 1 else name
            for name, group in zip(names, groups, strict=True)
        ]
        _label(figure, axes, texts, places, obstacles)
    return figure


def _set_up(axes, singles, shown, quality):
    """Axes, limits and grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def plain(value, _position):
        return f"{value:.9f}".rstrip("0").rstrip(".")

    x = [row.values["ldbr_dist"].mean for row in shown]
    x += [
        row.values[key].mean for row in shown for key in ("ldbr_floor", "ldbr_floor_own") if key in row.values
    ]
    low, high = math.log10(min(x)), math.log10(max(x))
    margin = 0.12 * max(high - low, 0.5)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - margin), 10 ** (high + 1.4 * margin))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 1.6 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(plain))

    y = [row.values[quality].mean for row in singles if quality in row.values]
    low, high = min(y), max(y)
    if low > 0 and high > 2.5 * low:  # far apart: those near the best would lie on one another
        margin = 0.12 * math.log(high / low)
        axes.set_yscale("log")
        axes.set_ylim(low * math.exp(-margin), high * math.exp(margin))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
    else:
        spread = max(high - low, 0.02 * abs(high), 1e-12)
        axes.set_ylim(low - 0.14 * spread, high + 0.16 * spread)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=SOFT, labelcolor=INK)
    axes.set_xlabel("change outside the re-drawn block, ldbr_dist (lower is better)")
    axes.set_ylabel(f"distance, {quality} (lower is better)")


def _floors(axes, shown, quality):
    """Vertical lines at the floors of the data, and the runs' own floors. Returns what labels should not cover."""
    obstacles = []
    floors = sorted({float(f"{r.values['ldbr_floor'].mean:.3g}") for r in shown if "ldbr_floor" in r.values})
    for floor in floors:
        axes.axvspan(axes.get_xlim()[0], floor, color="#d55e00", alpha=0.05, linewidth=0)
        obstacles.append(axes.axvline(floor, color="#d55e00", linewidth=1.4))
        text = axes.annotate(
            f"floor of the data, {floor:g}",
            (floor, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -4),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=9.5,
            color="#a04700",
            bbox=dict(BOX),
        )
        obstacles.append(text)
    for row in shown:
        if "ldbr_floor_own" in row.values:
            x, own, y = (row.values[key].mean for key in ("ldbr_dist", "ldbr_floor_own", quality))
            axes.plot([own, x], [y, y], color=FAINT, linewidth=1, zorder=1.5)
            obstacles += axes.plot(
                [own], [y], "|", color=SOFT, markersize=8, markeredgewidth=1.2, zorder=1.6, clip_on=False
            )
    return obstacles


def _baselines(axes, singles, quality):
    """A horizontal line at the distance of each continued baseline: it has no distortion."""
    obstacles = []
    lines = [row for row in singles if row.name == plan.BASELINE and quality in row.values]
    for row in lines:
        y = row.values[quality].mean
        obstacles.append(axes.axhline(y, color="#0072b2", linewidth=1.2, linestyle=(0, (5, 3)), zorder=1.4))
    if lines:
        seeds = f", {len(lines)} trainings" if len(lines) > 1 else ""
        text = axes.annotate(
            f"{plan.BASELINE}: StyleGAN2 trained on{seeds}",
            (0, min(row.values[quality].mean for row in lines)),
            xycoords=("axes fraction", "data"),
            xytext=(5, -4),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=9.5,
            color="#005a8d",
            bbox=dict(BOX),
        )
        obstacles.append(text)
    return obstacles


def _runs(figure, axes, shown, quality):
    """Markers with error bars, coloured by the share kept; lambdas of one training seed are joined. Returns them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    kept = [row.values["ldbr_floor_kept"].mean for row in shown if "ldbr_floor_kept" in row.values]
    shades = ScalarMappable(Normalize(0, 1), "viridis")
    artists = []
    for seed in dict.fromkeys(row.seed for row in shown):
        chain = [row for row in shown if row.seed == seed and row.name.startswith("lambda")]
        chain.sort(key=lambda row: row.lambda_d)
        points = [(row.values["ldbr_dist"].mean, row.values[quality].mean) for row in chain]
        if points:
            artists += axes.plot(*zip(*points, strict=True), color=SOFT, linewidth=1, zorder=1.8, gid="chain")
    for row in shown:
        x, y = row.values["ldbr_dist"], row.values[quality]
        value = row.values.get("ldbr_floor_kept")
        bars = axes.errorbar(
            x.mean,
            y.mean,
            xerr=x.error,
            yerr=y.error,
            fmt="o" if row.name.startswith("lambda") else "D",
            markersize=10 if len(shown) < 9 else 8,
            markerfacecolor="white" if value is None else shades.to_rgba(value.mean),
            markeredgecolor=INK,
            markeredgewidth=1,
            ecolor=INK,
            elinewidth=1.2,
            capsize=3,
            zorder=3,
        )
        artists += [bars.lines[0], *bars.lines[2]]
    if kept:
        bar = figure.colorbar(shades, ax=axes, pad=0.02, fraction=0.05, aspect=28)
        bar.set_label("share of the data's covariance kept")
        bar.outline.set_edgecolor(SOFT)
    return artists


def _legend(figure, shown):
    """What the marks mean, below the plot."""
    from matplotlib.lines import Line2D

    marker = dict(linestyle="none", markerfacecolor="white", markeredgecolor=INK, markersize=8)
    handles = [
        Line2D([], [], marker="o", label="SSN, by lambda", **marker),
        Line2D([], [], marker="D", label="other methods", **marker),
        Line2D(
            [], [], color=FAINT, marker="|", markeredgecolor=SOFT, markersize=8, label="down to its own floor"
        ),
    ]
    used = [
        any(row.name.startswith("lambda") for row in shown),
        any(not row.name.startswith("lambda") for row in shown),
        any("ldbr_floor_own" in row.values for row in shown),
    ]
    handles = [handle for handle, there in zip(handles, used, strict=True) if there]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)


def _label(figure, axes, texts, places, obstacles):
    """Writes each text beside its place where it covers least of the obstacles, the others' texts included."""
    renderer = figure.canvas.get_renderer()
    taken = []
    for obstacle in obstacles:
        taken += _boxes(axes, obstacle, renderer)
    frame = axes.get_window_extent(renderer)
    order = sorted(range(len(texts)), key=lambda i: places[i])
    for i in order:
        best = None
        for distance in DISTANCES:
            for angle in ANGLES:
                dx, dy = (round(distance * f(math.radians(angle)), 2) for f in (math.cos, math.sin))
                text = _annotate(axes, texts[i], places[i], dx, dy)
                box = text.get_window_extent(renderer).padded(2)
                text.remove()
                covered = sum(_overlap(box, other) for other in taken) + 10 * _outside(box, frame)
                if best is None or covered + 2 * distance < best[0]:
                    best = covered + 2 * distance, dx, dy, distance, box
        _cost, dx, dy, distance, box = best
        _annotate(axes, texts[i], places[i], dx, dy)
        if distance > 13:
            _annotate(
                axes, "", places[i], dx, dy, arrowprops=dict(arrowstyle="-", color=SOFT, lw=0.8, shrinkB=3)
            )
        taken.append(box)


def _annotate(axes, text, place, dx, dy, **line):
    """A label so many points beside a place; or, below all labels, the line there."""
    return axes.annotate(
        text,
        place,
        xytext=(dx, dy),
        textcoords="offset points",
        ha="left" if dx > 2 else "right" if dx < -2 else "center",
        va="bottom" if dy > 2 else "top" if dy < -2 else "center",
        bbox=dict(BOX) if text else None,
        gid="label" if text else None,
        zorder=4 if text else 2.5,
        **line,
    )


def _boxes(axes, artist, renderer):
    """The boxes on the picture that an artist covers: of a slanting line, many small ones along it."""
    from matplotlib.transforms import Bbox

    if artist.get_gid() != "chain":
        return [artist.get_window_extent(renderer)]
    points = axes.transData.transform(artist.get_xydata())
    steps = [(a + (b - a) * i / 40) for a, b in zip(points, points[1:], strict=False) for i in range(41)]
    return [Bbox.from_bounds(x - 1, y - 1, 2, 2) for x, y in steps]


def _overlap(a, b):
    """Area in pixels that two boxes share; a line counts as 2 pixels wide."""
    width = min(a.x1, max(b.x1, b.x0 + 2)) - max(a.x0, b.x0)
    height = min(a.y1, max(b.y1, b.y0 + 2)) - max(a.y0, b.y0)
    return max(width, 0) * max(height, 0)


def _outside(box, frame):
    """Area in pixels of a box that lies outside the frame."""
    return box.width * box.height - _overlap(box, frame)
