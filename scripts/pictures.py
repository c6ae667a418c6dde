"""Draw the pictures in docs/: `make docs`.

The flow's graph and the pod come from the code and the job template; the timeline and the memory from
`docs/benchmarks.json`, where there is one. Each picture is a card of its own in the reader's light or dark mode,
without scripts or fonts, for GitHub shows no others.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import tempfile
from html import escape
from typing import Any

from prefect import Parameter

from flows.docker_sidecar import flow
from flows.settings import PROJECT, load_job_template

DOCS = PROJECT / "docs"
COLOURS = {  # in light and in dark mode
    "card": ("#ffffff", "#0d1117"),
    "line": ("#d1d9e0", "#3d444d"),
    "ink": ("#1f2328", "#f0f6fc"),
    "dim": ("#59636e", "#9198a1"),
    "blue": ("#0969da", "#4493f8"),
    "green": ("#1a7f37", "#3fb950"),
    "amber": ("#9a6700", "#d29922"),
    "red": ("#d1242f", "#f85149"),
    "violet": ("#8250df", "#ab7df8"),
}
LIGHT, DARK = (" ".join(f"--{name}: {pair[mode]};" for name, pair in COLOURS.items()) for mode in (0, 1))
CLASSES = "\n".join(f"text.{c}, .fill-{c} {{ fill: var(--{c}); }} .draw-{c} {{ stroke: var(--{c}); }}" for c in COLOURS)
STYLE = f"""<style>
svg {{ {LIGHT} font: 14px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }}
@media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }}
text {{ fill: var(--ink); }}
{CLASSES}
.title {{ font-weight: 600; font-size: 15px; }}
.small {{ font-size: 12.5px; }}
.mono {{ font: 12px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
.tint {{ fill-opacity: .12; }}
.graph path, .graph ellipse, .graph polygon {{ stroke: var(--dim); }}
.edge polygon {{ fill: var(--dim); }}
.edge text, .graph > text {{ fill: var(--dim); font-size: 12.5px; }}
.node ellipse {{ fill: var(--blue); fill-opacity: .12; stroke: var(--blue); }}
.parameter ellipse {{ fill: var(--amber); stroke: var(--amber); }}
.reference ellipse {{ stroke-width: 2.5; }}
</style>
"""
RUNS = {
    "published": "The recipe as published",
    "cold": "This one: the image is pulled",
    "warm": "This one: the image is there",
}
PHASES = {  # of a flow's process: the event that ends each, its colour, and what it is
    "run_running": ("amber", "pod, daemon and flow start"),
    "image_pulled": ("blue", "pull"),
    "container_finished": ("green", "your container"),
    "run_finished": ("violet", "logs, final state"),
}
STEPS = (
    "The Agent creates the Job from the template, and fills in its first container: image, args, env.",
    "dockerd answers on 127.0.0.1:2375: dind-daemon makes the FIFO, and reads from it.",
    "flow-container has waited for the FIFO: it opens it for writing, and runs the flow.",
    "The flow pulls the image, creates and starts the container, waits on it, and gets its logs.",
    "The flow is gone, by whatever signal: the kernel closes its end of the FIFO, and dind-daemon stops dockerd.",
    "All containers have ended: the Job is complete, and the Agent deletes it.",
)


def text(x: float, y: float, content: str, classes: str = "", anchor: str = "start") -> str:
    """A line of text; ``y`` is its base line."""
    return f'<text x="{x:g}" y="{y:g}" class="{classes}" text-anchor="{anchor}">{escape(content)}</text>\n'


def note(x: float, y: float, content: str, colour: str = "dim") -> str:
    """A small text around ``x``."""
    return text(x, y, content, f"small {colour}", "middle")


def step(x: float, y: float, number: int) -> str:
    """A number in a disc."""
    disc = f'<circle cx="{x:g}" cy="{y:g}" r="10" class="fill-ink"/>\n'
    return disc + text(x, y + 4.5, str(number), "small title card", "middle")


def box(x: float, y: float, width: float, height: float, colour: str, *lines: str, style: str = "tint") -> str:
    """A rectangle around lines of text: the first a title, the others small; a back quote makes it monospace."""
    parts = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="{style} '
    parts += f'fill-{colour} draw-{colour}"/>\n'
    base = y + height / 2 - 9 * len(lines) + 14
    for number, line in enumerate(lines):
        classes = ("small dim" if number else "title") + " mono" * line.startswith("`")
        parts += text(x + width / 2, base + 18 * number, line.lstrip("`"), classes, "middle")
    return parts


def line(colour: str, *points: tuple[float, float], head: bool = True, dash: str = "none") -> str:
    """A line through points, with an arrow's head at its end."""
    path, marker = " L".join(f"{x:g} {y:g}" for x, y in points), f'marker-end="url(#{colour})"' * head
    return f'<path d="M{path}" class="draw-{colour}" fill="none" stroke-dasharray="{dash}" {marker}/>\n'


def svg(width: float, height: float, what: str, *parts: str) -> str:
    """A picture: its parts on a card, with a description for those who do not see it."""
    heads = (
        f'<marker id="{colour}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L10 5L0 10z" class="fill-{colour}"/></marker>\n'
        for colour in COLOURS
        if any(f"url(#{colour})" in part for part in parts)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img">\n<title>{escape(what)}</title>\n{STYLE}{"".join(heads)}'
        f'<rect x="1" y="1" width="{width - 2:g}" height="{height - 2:g}" rx="10" class="fill-card draw-line"/>\n'
        f'<g stroke-width="1.5">\n{"".join(parts)}</g>\n</svg>\n'
    )


def graph() -> str:
    """The flow's graph, as Prefect draws it, with what is a parameter, what decides, and what is mere order."""
    if not shutil.which("dot"):
        sys.exit("pictures: no `dot`, which draws the flow's graph; it is in the package graphviz (apt-get, dnf, brew)")
    with tempfile.TemporaryDirectory() as folder:
        drawn = flow.visualize(filename=f"{folder}/flow", format="svg")
    source = "".join(drawn.body)
    for task in flow.tasks:  # Prefect names nodes by their address in memory, which changes the layout every time
        source = source.replace(str(id(task)), task.name)
    source = re.sub(r"(-> \w+)$", r"\1 [style=dashed]", source, flags=re.M)
    source = re.sub(r"(->.*label=)(\w+)", r'\1"  \2  "', source)  # off the line
    drawn.body = sorted(source.splitlines(keepends=True))
    for task in sorted(flow.tasks, key=lambda task: str(task.name)):
        kind = "parameter" if isinstance(task, Parameter) else "reference" if task in flow.reference_tasks() else ""
        drawn.node(task.name, **{"class": kind})
    legend = "\n\namber: the run's parameters    bold: these decide the run's state    dashed: order alone"
    drawn.graph_attr.update(bgcolor="transparent", pad="0.3", ranksep="0.35", label=legend)
    for attributes in (drawn.graph_attr, drawn.node_attr, drawn.edge_attr):
        attributes.update(fontname="Helvetica")
    found = drawn.pipe("svg", encoding="utf-8")
    width, height = map(float, re.findall(r'(?:width|height)="(\d+)pt"', found)[:2])
    body = found[found.index("<g ") : found.rindex("</svg>")]
    body = re.sub(r'<!--.*?-->\n| font-(family|size)=".*?"|<title>%3</title>\n', "", body)
    return svg(width, height, "The flow's tasks and parameters, and what each hands on", body)


def volumes(pod: dict[str, Any], container: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What a container mounts besides the gate and scratch space, in three lines: kind, source, path."""
    sources = {volume["name"]: next(item for item in volume.items() if item[0] != "name") for volume in pod["volumes"]}
    found = []
    for mount in container["volumeMounts"]:
        kind, source = sources[mount["name"]]
        if mount["name"] not in ("gate", "tmp"):
            named = source.get("name") or source.get("secretName") or source.get("path") or "gone with the pod"
            found.append((kind, named + ", optional" * source.get("optional", False), f"`{mount['mountPath']}"))
    return found


def pod() -> str:
    """The pod of a run: who talks to whom, and who cannot."""
    spec = load_job_template("docker_sidecar")["spec"]["template"]["spec"]
    first, daemon = spec["containers"]
    parts = [
        box(24, 24, 170, 56, "line", "Prefect API"),
        box(340, 24, 190, 56, "line", "Kubernetes Agent"),
        box(656, 24, 174, 56, "line", "Job", "`docker_sidecar.yaml") + step(830, 52, 6),
        line("dim", (340, 52), (196, 52)) + note(268, 44, "asks for runs"),
        line("dim", (530, 52), (654, 52)) + note(604, 44, "creates") + step(560, 40, 1),
        line("dim", (743, 80), (743, 126)) + note(786, 108, "has one pod"),
        line("dim", (109, 168), (109, 82)) + note(152, 108, "states, logs"),
        line("dim", (24, 128), (830, 128), (830, 504), (24, 504), (24, 128), head=False, dash="6 4"),
        text(40, 153, "Pod", "title"),
        box(48, 168, 216, 220, "blue") + text(64, 192, first["name"], "title"),
        text(64, 211, "the flow's image; unprivileged", "small dim"),
        box(58, 228, 196, 130, "blue", "the flow", "`prefect execute flow-run", "pull, create, start, wait, logs"),
        box(580, 168, 226, 220, "amber") + text(596, 192, daemon["name"], "title"),
        text(790, 192, "privileged", "small red", "end") + text(596, 211, daemon["image"], "small dim mono"),
        box(596, 228, 194, 48, "green", "your container", "any image and command"),
        box(596, 308, 194, 50, "amber", "dockerd", "keeps images and layers"),
        line("dim", (693, 308), (693, 278)) + note(717, 297, "runs"),
        box(357, 180, 130, 68, "violet", "the gate", "a FIFO", "`/gate/flow"),
        line("violet", (264, 214), (355, 214)) + note(309, 233, "holds it open") + step(309, 197, 3),
        line("violet", (580, 214), (489, 214)) + note(534, 233, "makes, reads") + step(534, 197, 2),
        step(357, 268, 5) + text(373, 272.5, "ends with the flow", "small dim"),
        box(352, 308, 140, 50, "line", "`127.0.0.1:2375", "the pod's loopback"),
        line("blue", (254, 333), (350, 333)) + note(307, 352, "Docker API") + step(309, 316, 4),
        line("blue", (492, 333), (594, 333)),
        box(868, 305, 108, 56, "line", "Registry", "or its mirror"),
        line("dim", (790, 333), (866, 333)) + note(849, 324, "pulls"),
        box(332, 560, 180, 44, "red", "other pods"),
        line("red", (422, 560), (422, 360), dash="6 4") + '<circle cx="422" cy="504" r="13" class="fill-card"/>\n',
        '<path d="M413 495l18 18m0-18l-18 18" class="draw-red" stroke-width="4"/>\n',
        text(446, 538, "refused: nothing listens on the pod's own address", "small red"),
    ]
    for left, right, start, container in ((48, 264, 48, first), (580, 806, 478, daemon)):
        for number, lines in enumerate(volumes(spec, container)):
            x = start + 170 * number
            middle = min(max(x + 79, left + 20), right - 20)
            parts.append(line("dim", (middle, 388), (middle, 416), head=False, dash="2 3"))
            parts.append(box(x, 416, 158, 70, "line", *lines))
    parts += [step(42, 636 + 26 * n, n + 1) + text(62, 641 + 26 * n, what) for n, what in enumerate(STEPS)]
    return svg(1000, 790, "A run's Job, its pod, and who talks to whom", *parts)


def timeline(runs: list[dict[str, Any]]) -> str:
    """What happened when in each run: to the daemon, the flow, and the Job.

    Args:
        runs: each with its ``name`` in RUNS, its ``outcome`` in words, ``watched`` in seconds, and its events in
            seconds since the creation of its Job, null for what did not happen while it was watched.
    """
    events = (*PHASES, "daemon_ready", "job_complete")
    end: float = 1.12 * max(run[event] for run in runs for event in events if run[event] is not None)
    ticks = range(0, int(end) + 1, next(every for every in (1, 2, 5, 10, 20, 50, 100, 1000) if end / every <= 12))

    def at(seconds: float) -> float:
        return 110 + 850 * seconds / end

    def bar(y: float, start: float, stop: float, colour: str, label: str) -> str:
        x, width = at(start), at(stop) - at(start)
        label = label if width > 6.5 * len(label) else ""
        ground = box(x, y, width, 22, "card", style="")
        return ground + box(x, y, width, 22, colour) + note(x + width / 2, y + 15.5, label, "ink")

    parts, legend, y = [], 110.0, 60
    for colour, name in PHASES.values():
        parts.append(box(legend, 22, 14, 14, colour) + text(legend + 20, 33.5, name, "small dim"))
        legend += 50 + 6.2 * len(name)
    for run in runs:
        ready, done = run["daemon_ready"], run["job_complete"]
        colour, last = ("red", end) if done is None else ("green", done)
        parts.append(text(24, y + 14, RUNS[run["name"]], "title"))
        parts.append(text(960, y + 14, run["outcome"], f"title {colour}", "end"))
        parts += [line("line", (at(seconds), y + 20), (at(seconds), y + 106), head=False) for seconds in ticks]
        parts += [
            text(100, y + 40 + 28 * n, name, "small dim", "end") for n, name in enumerate(("daemon", "flow", "Job"))
        ]
        if ready is not None:
            parts.append(bar(y + 24, 0, ready, "amber", f"{ready:.1f} s") + bar(y + 24, ready, last, "dim", "ready"))
        start = 0.0
        for event, (phase, _) in PHASES.items():
            if run[event] is not None:
                parts.append(bar(y + 52, start, run[event], phase, f"{run[event] - start:.1f} s"))
                start = run[event]
        label = f"not complete after {run['watched']:g} s" if done is None else f"complete after {done:.1f} s"
        parts.append(bar(y + 80, 0, last, colour, label))
        if label not in parts[-1]:
            parts.append(text(at(last) + 8, y + 95.5, label, "small"))
        if done is None:
            parts.append(line("red", (962, y + 91), (986, y + 91), dash="3 3"))
        y += 124
    parts += [note(at(seconds), y + 4, f"{seconds} s") for seconds in ticks]
    return svg(1000, y + 22, "Timelines of a run, in seconds since the creation of its Job", *parts)


def memory(measured: dict[str, list[float | None]]) -> str:
    """How much the flow's process grows with the output of its container, on logarithmic scales.

    Args:
        measured: "output", its sizes, and the growth at each size with the tasks of the "library" and with "ours", all
            in MiB; null where the process did not survive it.
    """
    sizes = [size for size in measured["output"] if size]
    top = math.ceil(math.log10(max(10, *(value or 0 for name in ("library", "ours") for value in measured[name]))))

    def at(size: float, value: float) -> tuple[float, float]:
        return 150 + 450 * math.log(size / sizes[0], sizes[-1] / sizes[0]), 330 - 270 * math.log10(max(value, 1)) / top

    parts = [text(24, 32, "Peak growth of the flow's memory", "title"), note(375, 396, "output of the container")]
    parts += [note(at(size, 1)[0], 372, f"{size:,} MiB") for size in sizes]
    for power in range(top + 1):
        y = at(sizes[0], 10**power)[1]
        parts.append(line("line", (120, y), (640, y), head=False))
        parts.append(text(108, y + 4, f"{10**power:,} MiB", "small dim", "end"))
    most = [max(value or 0 for value in pair) for pair in zip(measured["library"], measured["ours"])]
    for key, colour, name in (("library", "red", "Prefect's tasks"), ("ours", "green", "these tasks")):
        points = [(*at(size, value), value) for size, value in zip(sizes, measured[key]) if value is not None]
        parts.append(line(colour, *((x, y) for x, y, _ in points), head=False))
        for (x, y, value), highest in zip(points, most):
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4.5" class="fill-{colour}"/>\n')
            parts.append(note(x, y + (20 if value < highest else -12), f"{value:,.0f}", colour))
        x, y, _ = points[-1]
        parts.append(text(x + 26, y + 5, name, f"title {colour}"))
        if len(points) < len(sizes):
            parts.append(text(x + 26, y + 23, f"{sizes[len(points)]:,} MiB: killed", f"small {colour}"))
    return svg(760, 416, "Peak growth of the flow's memory against the output of its container", *parts)


def main() -> None:
    """Write the pictures."""
    pictures = {"flow": graph(), "pod": pod()}
    try:
        figures = json.loads((DOCS / "benchmarks.json").read_text(encoding="utf-8"))
        pictures["timeline"] = timeline(figures["runs"])
        pictures["memory"] = memory(figures["memory"])
    except FileNotFoundError:
        print("pictures: there is no docs/benchmarks.json, so timeline.svg and memory.svg are left out")
    for name, picture in pictures.items():
        (DOCS / f"{name}.svg").write_text(picture, encoding="utf-8")
        print(f"pictures: docs/{name}.svg")


if __name__ == "__main__":
    main()
