"""Results as text."""


def line(result):
    """A result as a line, followed by the output of a part that failed."""
    first, *rest = (result.get("note") or "").split("\n")
    text = f"{result['kind']:9}{result['part']:24}{result['name']:44}{_value(result)}"
    return "\n".join([f"{text}  {first}".rstrip(), *("    | " + x for x in rest)])


def _value(result):
    if "limit" in result:
        return f"{result['value']:>10.2e} (limit {result['limit']:.2g})"
    if "unit" in result:
        return f"{_number(result['value']):>10} {result['unit']}"
    return ""


def _number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tables(results):
    """All results by kind; failures come last, where they are seen."""
    titles = {
        "info": "The machine",
        "measured": "Speeds",
        "skipped": "Skipped",
        "passed": "Passed",
        "broken": "Errors in transformers and in speeds",
        "failed": "Failed",
    }
    lines = []
    for kind, title in titles.items():
        found = [result for result in results if result["kind"] == kind]
        if found:
            lines += ["", title, *(line(result) for result in found)]
    counts = {kind: sum(r["kind"] == kind for r in results) for kind in titles}
    closing = "{passed} passed, {failed} failed, {skipped} skipped".format(**counts)
    return "\n".join([*lines, "", closing])
