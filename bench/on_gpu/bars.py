"""What is said of the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.on_gpu.given import given, is_cuda


def bars(results: dict[str, Any]) -> list[tuple[str, bool | None, str]]:
    """(what, whether it is met; None: not measured, figures)."""
    rows: list[tuple[str, bool | None, str]] = []

    def add(what: str, section: str, judge: Callable[[dict[str, Any]], tuple[bool | None, str]]) -> None:
        if section not in results:
            return
        found = results.get(section)
        if not found or "failed" in found or "skipped" in found:
            rows.append((what, None, "" if not found else str(found.get("failed") or found.get("skipped"))[-160:]))
            return
        try:
            rows.append((what, *judge(found)))
        except Exception as error:
            rows.append((what, None, f"cannot be judged: {error!r}"[:160]))

    def same_bits(found: dict[str, Any]) -> tuple[bool | None, str]:
        bad = [n for n, r in found.items() if not r["identical"] and r.get("repeatable_without", True)]
        errors = [n for n, r in found.items() if r.get("error")]
        return (
            not bad and not errors,
            f"{len(found) - len(bad)} of {len(found)} cases identical; differ {bad}; errors {errors}",
        )

    def no_waits(found: dict[str, Any]) -> tuple[bool | None, str]:
        # an alarm inside a replay does not stop the watch: it makes tensors unknown
        bad = {
            n: (r["watch_error"] or r["step_error"] or f"{r['known']} of {r['of']} known: {r['reasons']}")[:90]
            for n, r in found.items()
            if r["watch_error"] or r["step_error"] or r["known"] < r["of"]
        }
        return not bad, f"{len(found) - len(bad)} of {len(found)} without; {bad or ''}"

    def no_wait_calls(found: dict[str, Any]) -> tuple[bool | None, str]:
        calls = {n: r.get("waiting_calls") for n, r in found.items() if r.get("waiting_calls")}
        return not calls, str(calls or "none")

    def lasts(found: dict[str, Any]) -> tuple[bool | None, str]:
        fine = not found["error"] and found["last_ms"] < 1.5 * found["first_ms"] + 0.2
        return fine, (
            f"{found['steps']} steps, failed at {found['failed_at'] or '-'} {found['error'][:60]}; step {found['first_ms']:.2f} -> "
            f"{found['last_ms']:.2f} ms; host +{found['host_mb_grown']} MB"
        )

    def near(found: dict[str, Any]) -> tuple[bool | None, str]:
        worst = {n: r.get("largest") for n, r in found.items()}
        fine = all(v is not None and v < (0.4 if given.quick and "turns" in n else 0.05) for n, v in worst.items())
        return fine, ", ".join(f"{n}: {'-' if v is None else f'{v:.3f}'}" for n, v in worst.items())

    def cheap(found: dict[str, Any]) -> tuple[bool | None, str]:
        kinds = {label: found[label] for label in ("every step", "budget") if label in found}
        errors = [r["error"] for r in kinds.values() if r["error"]]
        held = kinds.get("budget")
        fine = None if given.quick or held is None else held["added_share_mean"] < 0.0125 and not errors
        said = [
            f"{label}: {r['step_ms']:.1f} ms, added {r['added_ms_mean']:.2f} ms = {100 * r['added_share_mean']:.1f}%"
            f" (own clock {100 * (r['own_share'] or 0):.1f}%; {r['observed_steps']} of {r['window']} steps)"
            for label, r in kinds.items()
        ]
        return fine, "; ".join(said + errors)

    def captured(found: dict[str, Any]) -> tuple[bool | None, str]:
        kinds = [r for r in found.values() if isinstance(r, dict)]
        fine = not found.get("exit") and all(
            r.get("identical") and not r.get("foreign_tensors_overwritten") for r in kinds
        )
        said = "; ".join(
            f"{n}: identical {r.get('identical')}, overwritten {r.get('foreign_tensors_overwritten')}, {r.get('healths')}"
            for n, r in found.items()
            if isinstance(r, dict)
        )
        return (
            fine,
            f"{said} {'exit ' + str(found['exit']) if found.get('exit') else ''} {str(found.get('stderr', ''))[-120:]}",
        )

    def compiles(found: dict[str, Any]) -> tuple[bool | None, str]:
        kinds = {n: r for n, r in found.items() if isinstance(r, dict) and n != "alone"}
        alone = found.get("alone", {})
        fine = not found.get("exit") and all(
            r.get("identical")
            and not r.get("watch_error")
            and r.get("waits_in_20_steps", 0) <= alone.get(n, {}).get("waits_in_20_steps", 0)
            for n, r in kinds.items()
        )
        return fine, "; ".join(
            f"{n}: same {r.get('identical')}, waits {r.get('waits_in_20_steps')}, known {r.get('known')} {str(r.get('watch_error', ''))[:50]}"
            for n, r in kinds.items()
        )

    add("same bits with the watch", "identity", same_bits)
    add("no synchronising call in steps", "syncs", no_waits)
    add("no waiting runtime calls added", "launches", no_wait_calls)
    add("thousands of steps", "soak", lasts)
    add("efficiency is that of all elements", "truth", near)
    add("one gather by one launch, the same to the bit", "gather", lambda r: (all(x["same"] for x in r.values()), ""))
    add(
        "all kernels in use, numbers as torch's",
        "kernels",
        lambda r: (
            all(r["in_use"].values()) and r["largest_difference"] < 1e-4,
            f"{[name for name, used in r['in_use'].items() if not used] or 'all'}; {r['numbers']} numbers, largest difference "
            f"{r['largest_difference']:.2g}; attached in {r['attach_seconds']} s",
        ),
    )

    def few(found: dict[str, Any]) -> tuple[bool | None, str]:
        worst = {name: r for name, r in found.items() if "alone" in r}
        fine = all(r["ordinary"]["launches_median"] <= 4 and r["mean_launches"] <= 8 for r in worst.values())
        said = ", ".join(
            f"{n}: {r['ordinary']['launches_median']:.0f}, {r['mean_launches']:.1f}" for n, r in worst.items()
        )
        return (fine if is_cuda() else None), said

    add("4 launches a step, 8 in the mean", "launches", few)
    add("124M GPT: within a budget of 1%", "training_time", cheap)
    add(
        "side stream: same report",
        "streams",
        lambda r: (r["same_report"] and not r["error"], f"largest difference {r['largest']:.2g} {r['error']}"),
    )
    add(
        "other GPU: read after arrival",
        "other_device",
        lambda r: (r["wrong_reads"] == 0, f"{r['wrong_reads']} of {r['of']} wrong"),
    )
    add("captured in a CUDA graph", "graphs", captured)
    add("compiled step", "compiled", compiles)
    return rows


def table(results: dict[str, Any]) -> str:
    lines = []
    environment_ = results.get("environment", {})
    lines.append(
        " ".join(
            f"{k}={environment_[k]}"
            for k in ("gpu", "torch", "python", "triton", "host_us_per_small_operator", "host_us_stack_of_64_views")
            if k in environment_
        )
    )
    for what, is_met, figures in bars(results):
        lines.append(f"{'ok  ' if is_met else 'MISS' if is_met is False else '-   '} {what:38s} {figures}")
    found = results.get("launches") or {}
    if found and "failed" not in found:
        lines.append(
            f"{'launches added' if is_cuda() else 'operators added':26s} {'alone':>7s} {'ordinary':>9s} {'adding':>8s} {'close':>7s} {'mean':>7s} {'dev ms':>8s}"
        )
        for label, r in found.items():
            if "alone" in r:
                lines.append(
                    f"  {label:24s} {r['alone']['launches']:7.0f} {r['ordinary']['launches_median']:9.0f} {r['adding']['launches_median']:8.0f} "
                    f"{r['close']['launches_median']:7.0f} {r['mean_launches']:7.1f} {r['mean_device_ms']:8.3f}  {r['error'][:40]}"
                )
    found = results.get("step_time") or {}
    if found and "failed" not in found:
        lines.append(
            f"{'ms added to AdamW steps':26s} {'alone h/d':>15s} {'ordinary h/d':>15s} {'adding h/d':>15s} {'close h/d':>15s} {'mean h/d':>15s} share d"
        )
        for label, r in found.items():
            if "alone_host_ms" in r:
                cells = [(r["alone_host_ms"], r["alone_device_ms"])]
                cells += [(r[f"{k}_host_ms"], r[f"{k}_device_ms"]) for k in ("ordinary", "adding", "close")]
                cells += [(r["mean_host_ms"], r["mean_device_ms"])]
                share = r["mean_device_ms"] / r["alone_device_ms"] if r["alone_device_ms"] else float("nan")
                lines.append(
                    f"  {label:24s} "
                    + " ".join(f"{h:7.2f}/{d:7.2f}" for h, d in cells)
                    + f" {share:6.2f}  {r['error'][:40]}"
                )
    found = results.get("memory") or {}
    for label, r in found.items():
        if isinstance(r, dict) and "held_mb" in r:
            lines.append(
                f"  {label:24s} holds {r['held_mb']:.2f} MB on the device, at most {r['peak_in_step_mb']:.2f} MB more in a step"
            )
    for label, r in (results.get("gather") or {}).items():
        if isinstance(r, dict) and "same" in r:
            ways = {name: way for name, way in r.items() if isinstance(way, dict)}
            cells = [
                f"{name}: {way['host_us']:.0f} us host, {way['launches']:.0f} launches, {way['device_us']:.0f} us device"
                for name, way in ways.items()
            ]
            lines.append(f"  gather of 4 x {label}: {'same' if r['same'] else 'DIFFERS'}; {'; '.join(cells)}")
    for name, r in results.items():
        if isinstance(r, dict) and "failed" in r:
            lines.append(f"section {name} failed: {r['failed'][-1] if r['failed'] else ''}"[:240])
    return "\n".join(lines)
