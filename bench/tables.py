"""Documents as short tables, for a terminal."""

from .document import Json


def latency_table(found: Json) -> str:
    """A line a result: latency, steps, rate, share of the floor; then the doubts."""
    width = max([len(row["name"]) for row in found["results"]], default=0)
    columns = ["p50 ms", "p95 ms", "step ms", "images/s", "floor"]
    head = " ".join([f"{'':{width}} ", *(f"{name:>9}" for name in columns), f"{'n':>4}"])
    lines = [head]
    for row in found["results"]:
        latency, step, rate = row["latency"], row["step"], row["throughput"]
        share = row["roofline"] and row["roofline"]["share"]
        if latency is None:
            lines.append(f"{row['name']:{width}}  {row['reason'] or 'not measured'}")
        else:
            cells = [
                f"{1e3 * latency['p50']:9.3f}",
                f"{1e3 * latency['p95']:9.3f}",
                f"{1e3 * step['p50']:9.3f}" if step else f"{'–':>9}",
                f"{rate['value']:9.2f}" if rate else f"{'–':>9}",
                f"{share:9.0%}" if share else f"{'–':>9}",
                f"{latency['count']:4}",
            ]
            lines.append(f"{row['name']:{width}}  {' '.join(cells)}")
    for row in found["results"]:
        if row["cold"]:
            seconds = row["cold"]["process_start_to_picture"]["p50"]
            lines.append(f"{row['name']}: {seconds:.2f} s from process start to picture")
    return "\n".join([*lines, *comparison_lines(found), *warning_lines(found)])


def comparison_lines(found: Json) -> list[str]:
    """A line a comparison: above 1, ours is faster."""
    return [
        f"{c['what']}: {c['other']} takes {c['ratio']:.2f} × as long as {c['base']} "
        f"({c['interval'][0]:.2f} to {c['interval'][1]:.2f})"
        for c in found["comparisons"]
    ]


def warning_lines(found: Json) -> list[str]:
    """A line a doubt."""
    return [
        f"warning: {w['result']}: {w['text']}" if w["result"] else f"warning: {w['text']}"
        for w in found["warnings"]
    ]
