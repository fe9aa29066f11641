"""Benchmark the report: how long it takes to write and to open in headless Chromium, and what it weighs.

    python scripts/bench/bench_report.py --images my_photographs
    python scripts/bench/bench_report.py --images my_photographs --examples 2000

Makes a folder of two runs with this many predictions about the photographs, each under many names, and writes its
report. The last line is one JSON object: examples, megabytes, write_seconds, open_seconds (from the request until the
first examples are drawn; the median), and ratio_vs_small: open_seconds over those of a report of 100 examples, which
is measured in the same run. Needs chromium, chromedriver and selenium (.[browser]).
"""

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vlmclassifier import cli
from vlmclassifier.prompts import PromptSetting
from vlmclassifier.records import UserError
from vlmclassifier.reporting.write import write_report
from vlmclassifier.runs.record import new_record

NAMES = [f"class {number}" for number in range(100)]
SMALL = 100  # examples of the baseline
LONGEST = 60  # seconds to wait for a page


@dataclass
class Args:
    images: Path
    """Folder with photographs (.jpg, also in folders below it)."""
    examples: int = 10_000
    """Predictions of each run."""
    repeats: int = 5
    """Times that each page is opened."""


def main(args: Args) -> None:
    """Write both reports, open them in turn, print."""
    cli.check_positive(examples=args.examples, repeats=args.repeats)
    photos = sorted(args.images.rglob("*.jpg"))
    if not photos:
        raise UserError(f"{args.images} has no .jpg files: give another --images.")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        raise UserError("chromium and chromedriver are not installed.")
    with tempfile.TemporaryDirectory() as folder:
        written, seconds = [], []
        for count in (SMALL, args.examples):
            root = make_outputs(Path(folder) / str(count), photos, count)
            start = time.perf_counter()
            written.append(write_report(root, root / "report", "Benchmark", root / "photos", count))
            seconds.append(time.perf_counter() - start)
        small, large = opened([one.page for one in written], args.repeats, programs)
    print(json.dumps({
        "examples": args.examples, "megabytes": round(written[1].megabytes, 1), "write_seconds": round(seconds[1], 1),
        "open_seconds": round(large, 3), "ratio_vs_small": round(large / small, 2),
    }))  # fmt: skip


def make_outputs(root: Path, photos: list[Path], count: int) -> Path:
    """Two finished runs whose rows name copies of the photographs."""
    (root / "photos").mkdir(parents=True)
    for number in range(count):
        shutil.copy(photos[number % len(photos)], root / "photos" / f"{number}.jpg")
    for kind, output in (("vlm", "This is a photograph of class {}, as it seems."), ("clip", "class {}")):
        folder = root / "main_results" / kind
        folder.mkdir(parents=True)
        config = PromptSetting(tuple(NAMES)).config | {
            "script": f"classify_{kind}", "kind": kind, "model": "mini-llava", "benchmark": "mine", "split": "test",
            "manifest": "0", "classes": NAMES, "tags": [], "limit": None,
        }  # fmt: skip
        record = new_record(config) | {"finished": "2026-01-01T00:00:00+00:00", "rows": count, "target": count}
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
        with open(folder / "predictions.jsonl", "w", encoding="utf-8") as stream:
            for number in range(count):
                place = number % len(NAMES)
                row = {
                    "example_id": f"{number}.jpg", "label": NAMES[place], "class_index": place, "prompt": "?",
                    "choices": None, "output": output.format(place), "ranking": [place] if kind == "clip" else None,
                }  # fmt: skip
                stream.write(json.dumps(row) + "\n")
    return root


def opened(pages: list[Path], repeats: int, programs: list[str | None]) -> list[float]:
    """The median seconds until each page shows its first examples; the pages take turns."""
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    times: list[list[float]] = [[] for _ in pages]
    try:
        for _ in range(repeats):
            for of_page, page in zip(times, pages, strict=True):
                start = time.perf_counter()
                browser.get(f"file://{page.resolve()}")
                while not browser.find_elements(By.CLASS_NAME, "example"):
                    if time.perf_counter() - start > LONGEST:
                        raise UserError(f"{page} shows no example after {LONGEST} seconds.")
                of_page.append(time.perf_counter() - start)
    finally:
        browser.quit()
    return [statistics.median(of_page) for of_page in times]


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
