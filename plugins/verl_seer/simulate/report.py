"""A result of `kimi-stack seer simulate` as one HTML page, without scripts or outside files."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from verl_seer.simulate.paper import ABLATION, FIGURES
from verl_seer.simulate.presets import BASELINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .8em; border-bottom: 1px solid #ddd }
th { text-align: left } td { text-align: right } td:first-child { text-align: left; font-weight: 600 }
img { max-width: 100% } .note { color: #666 } code { background: #f4f4f4; padding: 0 .3em }
"""


def require_matplotlib() -> None:
    """RuntimeError, with what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RuntimeError("the report needs matplotlib: pip install 'kimi-stack[bench]'") from None


def page(body: dict[str, Any]) -> str:
    """HTML of a checked result document (`study.check_document`)."""
    require_matplotlib()
    policies: dict[str, dict] = body["policies"]
    reference = BASELINE if BASELINE in policies else next(iter(policies))
    samples, cluster = body["samples"], body["cluster"]
    parts = [
        f"<h1>{html.escape(body['title'])}</h1>",
        f"<p>{samples['requests']:,} requests in {samples['groups']:,} groups, {samples['mean_tokens']:,.0f} tokens on "
        f"average, {samples['quantiles'][-1]:,} at most; {cluster['instances']} instances of "
        f"{cluster['kv_capacity']:,} KV tokens.</p>",
        '<p class="note">Simulated. The step times are a fitted model, not measurements on this machine; a gain '
        "is the difference that the schedule makes in that model.</p>",
        _settings(body["settings"]),
        "<h2>Policies</h2>",
        _table(policies, reference, body["settings"].get("paper")),
        f'<p class="note">Tail: time in which the last tenth of the requests finishes. Gains are against '
        f"<code>{html.escape(reference)}</code>. Recomputed: tokens whose KV was computed again after a preemption. "
        "Moved: chunks that went on elsewhere than the one before.</p>",
        "<h2>Finished requests over time</h2>",
        _image(_finish_curves(policies), "share of requests finished over time"),
        "<h2>Instances over time</h2>",
        "<p>One row an instance; the colour is the number of running requests.</p>",
        _image(_gantt(policies), "running requests of every instance over time"),
        "<h2>KV memory in use</h2>",
        _image(_kv(policies), "mean share of KV memory in use over time"),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(body["title"])}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _settings(settings: dict[str, Any]) -> str:
    words = ", ".join(f"{html.escape(k)} <code>{html.escape(str(v))}</code>" for k, v in settings.items())
    return f'<p class="note">{words}</p>'


def _table(policies: dict[str, dict], reference: str, paper: str | None) -> str:
    base = policies[reference]
    figures = FIGURES.get(paper) if paper else None
    printed = dict(zip(ABLATION, figures.ablation)) if figures else {}
    header = ["policy", "rollout s", "tokens/s", "gain"]
    header += ["paper's gain"] if figures else []
    header += ["tail s", "tail change"]
    header += ["paper's tail change"] if figures else []
    header += ["preemptions", "recomputed", "moved", "idle", "KV use", "tokens/step"]
    rows = []
    for name, p in policies.items():
        row = [
            html.escape(name),
            f"{p['makespan']:,.0f}",
            f"{p['throughput']:,.0f}",
            f"{p['throughput'] / base['throughput']:.2f}",
        ]
        if figures:
            row.append(f"{printed[name]:.2f}" if name in printed else "")
        change = p["tail"] / base["tail"] - 1 if base["tail"] else 0.0
        row += [f"{p['tail']:,.0f}", f"{change:+.0%}"]
        if figures:
            row.append(f"{figures.seer[1] / figures.baseline[1] - 1:+.0%}" if name == "seer" else "")
        accepted = p["accepted_length"]
        row += [
            f"{p['preemptions']:,}",
            f"{p['recomputed_tokens']:,}",
            f"{p['moved_chunks']:,}",
            f"{p['idle_share']:.0%}",
            f"{p['kv_use']:.0%}",
            f"{accepted:.2f}" if accepted else "",
        ]
        rows.append(row)
    head = "".join(f"<th>{h}</th>" for h in header)
    cells = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{cells}</table>"


def _figure(rows: int, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0]


def _image(figure: Figure, alt: str) -> str:
    # A raster: the heat maps have tens of thousands of cells.
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=90)
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _finish_curves(policies: dict[str, dict]) -> Figure:
    figure, (axes,) = _figure(1, 4)
    for name, p in policies.items():
        axes.plot(p["finish_quantiles"], np.linspace(0, 1, len(p["finish_quantiles"])), label=name)
    axes.set(xlabel="seconds", ylabel="share finished", ylim=(0, 1), xlim=(0, None))
    axes.axhline(0.9, color="0.7", linewidth=0.8)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _gantt(policies: dict[str, dict]) -> Figure:
    figure, axes = _figure(len(policies), 0.6 + 1.3 * len(policies))
    most = max(1, max(max(max(row) for row in p["running"]) for p in policies.values()))
    image = None
    for ax, (name, p) in zip(axes, policies.items()):
        extent = (0, p["makespan"], len(p["running"]) - 0.5, -0.5)
        image = ax.imshow(
            p["running"],
            aspect="auto",
            interpolation="nearest",
            extent=extent,
            vmin=0,
            vmax=most,
            cmap="magma",
        )
        ax.set_ylabel("instance", fontsize=8)
        ax.set_title(f"{name}: {p['makespan']:,.0f} s", fontsize=9, loc="left")
    axes[-1].set(xlabel="seconds", xlim=(0, max(p["makespan"] for p in policies.values())))
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="running requests", shrink=0.5)
    return figure


def _kv(policies: dict[str, dict]) -> Figure:
    figure, (axes,) = _figure(1, 3.2)
    for name, p in policies.items():
        kv = np.array(p["kv"])
        columns = kv.shape[1]
        axes.plot((np.arange(columns) + 0.5) * p["makespan"] / columns, kv.mean(axis=0), label=name)
    axes.set(xlabel="seconds", ylabel="mean KV use", ylim=(0, 1), xlim=(0, None))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure
